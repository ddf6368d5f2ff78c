"""What the model is asked to continue and to answer: templates over the topics of our passages, and the random order of both.

A prompt is a beginning, which the model continues as plain text, or a question, which it answers as a chat.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

BEGINNINGS = (
    "The first thing most people learn about {topic} is that",
    "Everyone in our street had an opinion about {topic}.",
    "An introduction to {topic}\n\n",
    "Chapter 3: {Topic}\n\nBefore we go any further, we need to",
    "Dear Miriam,\n\nYou asked me in your last letter about {topic}.",
    "Notes from the lecture on {topic}, Tuesday morning:",
    "A report published this week on {topic} found that",
    '"I never understood {topic}," said the old woman,',
    "When I was nine, my uncle took me aside to talk about {topic}.",
    "In the nineteenth century, {topic}",
    "Common questions about {topic}\n\nQ:",
    "There are two ways to think about {topic}.",
    "Researchers who study {topic} have long known that",
    "Minutes of the meeting. Item 4: {topic}.",
    "How {topic} changed our town:",
    "It was raining on the day that I first took an interest in {topic}.",
    "The word that comes to mind when I think of {topic} is",
    "Three things to check before you begin with {topic}:",
    "What nobody tells you about {topic} is how much",
    "The museum's new exhibition on {topic} opens with",
    "From the diary of a beginner in {topic}. Monday:",
    "LONDON - A dispute over {topic} ended on Friday when",
    "My grandmother's advice on {topic} was short:",
    "Unlike its neighbours, the country has a long tradition of {topic}.",
    "If you want to explain {topic} to a child, start with",
    "On the radio that evening they were talking about {topic}, and",
    "The trouble with {topic} began in the spring, when",
    "Abstract. This paper examines {topic} in",
    "He had written four books about {topic}, and in none of them",
    "Looking for help with {topic}! I have been trying since last week to",
    "Good evening, and thank you for coming. I want to speak tonight about {topic}.",
    "The oldest written record of {topic} comes from",
    "Our guide stopped, pointed, and began to explain {topic}.",
    "Five years ago the committee decided to invest in {topic}.",
    "Dr Okafor, who has worked in {topic} for twenty years, says",
    "A brief history of {topic}:",
    "It is easy to get {topic} wrong.",
    "The two sisters disagreed about almost everything, but above all about {topic}.",
    "In the village school the children were asked to write about {topic}. One of them wrote:",
    "The cost of {topic} has risen since",
)
QUESTIONS = (
    "Explain {topic} in simple terms.",
    "Write a short story in which {topic} plays a part.",
    "What are the most common misunderstandings about {topic}?",
    "Give me some practical advice about {topic}.",
    "Write a news report about {topic}.",
    "How has {topic} changed over the last hundred years?",
    "Write a letter to a friend about {topic}.",
    "What words should I know if I want to talk about {topic}?",
    "Write a dialogue between two people who disagree about {topic}.",
    "What would an expert in {topic} do on an ordinary working day?",
    "Describe a place that has to do with {topic}.",
    "Why does {topic} matter?",
    "Write a diary entry by somebody whose life has to do with {topic}.",
    "Tell me something surprising about {topic}.",
    "Compare how two countries deal with {topic}.",
    "Write the opening of a textbook chapter about {topic}.",
    "What went wrong in a famous case that has to do with {topic}?",
    "Write a speech about {topic} for a school assembly.",
    "Give step-by-step instructions for a task connected with {topic}.",
    "Write a review of a book about {topic}.",
    "What can go wrong with {topic}, and what can be done about it?",
    "Summarise the main facts about {topic} in one paragraph.",
    "What did people believe about {topic} in the past?",
    "Write an interview with somebody who knows {topic} well.",
    "Which tools or materials does one need for {topic}?",
    "Write a poem about {topic}.",
    "What questions about {topic} are still open?",
    "How would you teach {topic} to adults?",
    "Write an email complaining about something to do with {topic}.",
    "What are the arguments for and against {topic}?",
)

Kind = Literal["continued", "answered"]
TEMPLATES: dict[Kind, tuple[str, ...]] = {"continued": BEGINNINGS, "answered": QUESTIONS}


class Prompt(NamedTuple):
    """What the model is given."""

    kind: Kind
    label: str
    """The topic."""
    text: str


def prompts(topics: Sequence[str], seed: int) -> list[Prompt]:
    """Every template with every topic, in a random order in which continuations and answers take turns."""
    every = []
    for kind, templates in TEMPLATES.items():
        some = [Prompt(kind, topic, filled(template, topic)) for template in templates for topic in topics]
        random.Random(f"{seed} {kind}").shuffle(some)
        every.append(some)
    return [prompt for pair in zip(*every, strict=False) for prompt in pair]  # to the end of the shorter list


def filled(template: str, topic: str) -> str:
    return template.replace("{topic}", topic).replace("{Topic}", topic[0].upper() + topic[1:])
