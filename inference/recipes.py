"""The recipe that a command is given: a file, or edits written out."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from core.cli import machine
from inference.session import InferenceConfig, Session
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
        first = session.needs_features()
        if SHORT_RECIPE.match(self.steer.strip()):
            recipe = Recipe(parse_edits(self.steer), first.sae.weights_hash)
        else:
            recipe = Recipe.read(Path(self.steer))
        try:
            check_all(session.steerings(), recipe)
        except ValueError as error:
            raise ValueError(f"--steer {self.steer}: {error}") from None
        known = {features.sae.weights_hash: features for features in session.features}
        for edit in recipe.edits:
            features = known[recipe.sae_of(edit)]
            label = features.label(edit.latent) or "no label"
            how = edit.mode if edit.mode == "ablate" else f"{edit.mode} {edit.strength:+g} times its maximum"
            where = f"from position {edit.positions}" if isinstance(edit.positions, int) else f"positions: {edit.positions}"
            site = f" of {features.site}" if len(known) > 1 else ""
            log.info("steering latent %d%s (%s): %s, %s", edit.latent, site, label, how, where)
        return recipe


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
        raise ValueError(f"--steer: expected {form}; found {part!r}") from None
    where = int(positions) if positions.isdecimal() and len(positions) < 9 else positions
    return Edit(latent=index, strength=amount, mode=mode, positions=where)  # type: ignore[arg-type]
