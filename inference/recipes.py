"""The recipe that a user gives: a file, or edits written out."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from core.cli import machine
from inference.session import Feature, InferenceConfig, Session
from inference.steering import Edit, Recipe, check_all

log = logging.getLogger("inference")

SHORT_RECIPE = re.compile(r"\d+:")
"""How edits that are written out begin; anything else is the name of a file."""


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(InferenceConfig):
    """Flags of commands that steer."""

    steer: str | None = machine(None)
    """A recipe: a JSON file as the app saves it, or edits of the first SAE as LATENT:STRENGTH[:MODE[:POSITIONS]] with commas
    between them, such as 561:1.5,20:ablate. Strengths are multiples of the latent's maximum, modes add, clamp, ablate and
    replace, positions all, prompt, generated or a number to start from. None: no steering."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steer is not None and not self.steer.strip():
            raise ValueError("--steer: expected a recipe's file, or edits such as 561:1.5; found nothing")

    def recipe(self, session: Session) -> Recipe:
        """The recipe of --steer, checked against the SAEs, and logged; an empty one without the flag."""
        if self.steer is None:
            return Recipe()
        try:
            recipe = recipe_of(session, self.steer)
        except ValueError as error:
            raise ValueError(f"--steer {self.steer}: {str(error).removeprefix(f'{self.steer}: ')}") from None
        for line in described(session, recipe):
            log.info("steering %s", line)
        return recipe


def recipe_of(session: Session, given: str | Path | Mapping[int | Feature, float | str] | Recipe) -> Recipe:
    """The recipe that a user gives, checked against the loaded SAEs.

    A string holds edits of the first SAE, `561:1.5,20:ablate`, or names the file of a recipe. A mapping has what follows the
    colon for each latent: `{561: 1.5, 20: "ablate", 7: "2:clamp:generated"}`; a number is a latent of the first SAE, a
    `Feature` one of the SAE at its site. ValueError where it is none of these or does not fit the SAEs.
    """
    first = session.needs_features()
    if isinstance(given, Recipe):
        recipe = given
    elif isinstance(given, Mapping):
        edits = []
        for key, change in given.items():
            site, latent = key if isinstance(key, Feature) else ("", key)
            edits.append(replace(_parse_edit(f"{latent}:{change}"), sae_hash=session.at(site).sae.weights_hash))
        recipe = Recipe.from_edits(edits)
    elif SHORT_RECIPE.match(str(given).strip()):
        recipe = Recipe(parse_edits(str(given)), first.sae.weights_hash)
    else:
        recipe = Recipe.read(Path(given))
    check_all(session.steerings(), recipe)
    return recipe


def described(session: Session, recipe: Recipe) -> Iterator[str]:
    """Each edit in a line, with the label of its latent; the site where several SAEs are loaded."""
    known = {features.sae.weights_hash: features for features in session.features}
    for edit in recipe.edits:
        features = known[recipe.sae_of(edit)]
        label = features.label(edit.latent) or "no label"
        how = edit.mode if edit.mode == "ablate" else f"{edit.mode} {edit.strength:+g} times its maximum"
        where = f"from position {edit.positions}" if isinstance(edit.positions, int) else f"positions: {edit.positions}"
        site = f" of {features.site}" if len(known) > 1 else ""
        yield f"latent {edit.latent}{site} ({label}): {how}, {where}"


def parse_edits(text: str) -> tuple[Edit, ...]:
    """Edits from `561:1.5,20:ablate,7:2:clamp:generated`; ValueError for anything else."""
    return tuple(_parse_edit(part.strip()) for part in text.split(",") if part.strip())


def _parse_edit(part: str) -> Edit:
    latent, *rest = part.split(":")
    if rest[:1] == ["ablate"]:  # which uses no strength
        rest = ["1", *rest]
    try:
        strength, mode, positions = [*rest, *("", "add", "all")[len(rest) :]]
        amount, index = float(strength), int(latent[:10])
    except ValueError:
        form = "LATENT:STRENGTH[:MODE[:POSITIONS]], such as 561:1.5:clamp"
        raise ValueError(f"expected {form}; found {part!r}") from None
    where = int(positions) if positions.isdecimal() and len(positions) < 9 else positions
    return Edit(latent=index, strength=amount, mode=mode, positions=where)  # type: ignore[arg-type]
