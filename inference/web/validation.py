"""What a client of the app may send: every value is checked here, as a client need not be the page. Errors are one line."""

from typing import Any, NamedTuple

from core.text import lines
from inference.session import Feature, Features, Session
from inference.steering import Edit, Recipe, check_all
from llama3.generate import Sampling

MAX_PROMPTS = 8
MAX_PROMPT_CHARACTERS = 8_000
"""All prompts of a request together, counted before anything reads them."""
MAX_QUERY_CHARACTERS = 300
MAX_NEW_TOKENS = 512
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 80
STRENGTHS = (-10.0, 30.0)
"""Range of the strength in the app, in multiples of a latent's maximum."""
STRENGTH_STEP = 0.25


class Knobs(NamedTuple):
    """Sampling as a client sends it; any field may hold anything until `checked` has seen it."""

    max_new_tokens: Any = 60
    temperature: Any = 0.8
    top_p: Any = 0.95
    top_k: Any = 0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.1
    seed: Any = 0
    stop: Any = ""
    """Strings that end a text, one a line; \\n in a line is a line break, \\t a tab."""

    def checked(self) -> Sampling:
        """ValueError names the knob that is out of range."""
        return Sampling(
            max_new_tokens=whole("new tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS),
            temperature=number("temperature", self.temperature, 0, 5),
            top_p=number("top-p", self.top_p, 0.01, 1),
            top_k=whole("top-k", self.top_k, 0, 1000),
            min_p=number("min-p", self.min_p, 0, 1),
            repetition_penalty=number("repetition penalty", self.repetition_penalty, 0.5, 5),
            seed=whole("seed", self.seed, 0, 2**31),
            stop=stop_strings(self.stop),
        )


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a number within the limits; ValueError for anything else, NaN included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}; found {value!r:.40}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as a whole number within the limits; a float that is whole will do, as JSON knows no difference."""
    value = number(name, value, low, high)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number; found {value!r}")
    return int(value)


def unescaped(stop: str) -> str:
    """A stop string as typed on one line: \\n and \\t in it stand for a line break and a tab."""
    return stop.replace("\\n", "\n").replace("\\t", "\t")


def stop_strings(text: Any) -> tuple[str, ...]:
    """One a line, empty lines left out; \\n and \\t within a line stand for a line break and a tab."""
    if not isinstance(text, str):
        raise ValueError(f"stop strings must be text, one a line; found {type(text).__name__}")
    if len(text) > MAX_STOPS * (MAX_STOP_CHARACTERS + 1):
        raise ValueError(f"stop strings may hold {MAX_STOPS} lines of {MAX_STOP_CHARACTERS} characters; found {len(text):,}")
    stops = tuple(unescaped(line) for line in lines(text) if line.strip())
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters, one a line")
    return stops


def checked_latent(features: Features, value: Any) -> int:
    """A latent of this SAE, from a number or from text such as "896" or "#896"."""
    if isinstance(value, str) and value.strip().lstrip("#").isdecimal() and len(value) < 20:
        value = int(value.strip().lstrip("#"))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    last = features.n_latents - 1
    if type(value) is not int:
        raise ValueError(f"a latent is a whole number from 0 to {last}; found {value!r:.40}")
    if not 0 <= value <= last:
        raise ValueError(f"latent {value!r:.40} is out of range; the SAE at {features.site} has latents 0 to {last}")
    return value


def checked_feature(session: Session, latent: Any, site: Any = "") -> Feature:
    """A feature of a loaded SAE; an empty site is that of the first one."""
    features = session.at(site)
    return Feature(features.site, checked_latent(features, latent))


def checked_edit(features: Features, latent: Any, strength: Any, mode: Any, positions: Any) -> Edit:
    """One edit as the page describes it; `positions` may be text such as "12" or "from 12"."""
    index = checked_latent(features, latent)
    amount = number(f"latent {index}: strength", strength, *STRENGTHS)
    if isinstance(positions, str) and (word := positions.strip().removeprefix("from").strip()).isdecimal() and len(word) < 10:
        positions = int(word)
    return Edit(latent=index, strength=amount, mode=mode, positions=positions, sae_hash=features.sae.weights_hash)


def checked_recipe(session: Session, recipe: Recipe) -> Recipe:
    """A recipe that the loaded SAEs can follow, within the app's limits."""
    if recipe.edits:
        check_all(session.steerings(), recipe)
    for edit in recipe.edits:
        number(f"latent {edit.latent}: strength", edit.strength, *STRENGTHS)
    return recipe


def split_prompts(text: Any) -> list[str]:
    """One prompt a line, empty lines left out."""
    if not isinstance(text, str):
        raise ValueError(f"prompts must be text; found {type(text).__name__}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"prompts may hold {MAX_PROMPT_CHARACTERS:,} characters together; found {len(text):,}")
    prompts = [line.strip() for line in lines(text) if line.strip()]
    if not prompts:
        raise ValueError("the prompt is empty; write the beginning of a text, one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts at once, one a line; found {len(prompts)}")
    return prompts
