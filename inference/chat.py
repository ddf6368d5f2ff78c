"""Talk with a model in the terminal, steered or not.

    python -m inference.chat [--system "You are a gardener."] [--steer recipe.json] [--watch 896,1204 --alarm 0.5]
    printf 'Hello.\\nWhat grows in winter?\\n' | python -m inference.chat --json

One message a line; /reset forgets the conversation, /quit or Ctrl-D ends it. Answers go to stdout, everything else to stderr.
"""

import json
import logging
import sys
from dataclasses import dataclass, replace

from core.cli import machine, run_stage
from core.runtime import Runtime
from inference.complete import SamplingConfig, reader_may_leave, watched_lines, watched_record
from inference.dialogue import prepare, style_of
from inference.session import Session, open_session
from inference.steering import Recipe
from inference.workbench import new_row
from llama3.chat_format import Message
from llama3.generate import generate

log = logging.getLogger("inference.chat")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Flags of `inference.chat`."""

    system: str = ""
    """System prompt; empty sends none."""
    style: str = "auto"
    """llama3 (the instruct models' format), plain (a transcript), or auto: plain for the embedded model, else llama3."""
    prompt: str = machine("> ")
    """What is shown before each message where standard input is a terminal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        style_of(self.style, self.model)


def run(config: ChatConfig, runtime: Runtime) -> None:
    """Read messages until the end of input and answer each."""
    config.sampling()
    session = open_session(config, runtime.device)
    recipe = config.recipe(session)
    config.watcher(session)  # refuses a latent that does not exist before the first message
    opening = [Message("system", config.system)] if config.system else []
    messages = list(opening)
    with reader_may_leave():
        while (line := _ask(config)) not in (None, "/quit"):
            if line == "/reset":
                messages = list(opening)
                log.info("the conversation starts anew")
            elif line:
                asked = [*messages, Message("user", line)]
                try:
                    messages = [*asked, Message("assistant", _answer(config, session, recipe, asked))]
                except ValueError as error:  # a message that is too long; who sits at the keyboard keeps the conversation
                    if not sys.stdin.isatty():
                        raise
                    log.error("%s", error)


def _ask(config: ChatConfig) -> str | None:
    """The next line of standard input, or None at its end."""
    if sys.stdin.isatty():
        print(config.prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(config: ChatConfig, session: Session, recipe: Recipe, messages: list[Message]) -> str:
    """Stream the answer to the last message; returns its text."""
    turn = prepare(session, messages, style_of(config.style, config.model), config.max_new_tokens)
    if turn.dropped:
        log.info("the context is full: the oldest %d message(s) are left out", turn.dropped)
    row = new_row(session, messages[-1].content, turn.ids)
    sampling = replace(config.sampling(), stop=(*config.stop, *turn.stop))
    watch = config.watcher(session)
    hooks = config.hooks(session, recipe, [row], watch)
    for piece in generate(session.model, session.tokenizer, [row.ids], sampling, hooks):
        row = row.grown(piece)
        if not config.json:
            print(piece.text, end="", flush=True)
    text = row.text.strip()
    if config.json:
        record = {"message": row.prompt, "answer": text, "finished": row.finished, "steered": bool(recipe.edits)}
        record |= watched_record(session, row, 0, watch, row.prompt_length) if watch else {}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return text
    print(flush=True)
    for line in watched_lines(session, row, 0, watch, row.prompt_length) if watch else ():
        print(line, flush=True)
    return text


if __name__ == "__main__":
    run_stage(ChatConfig, run, __doc__ or "")
