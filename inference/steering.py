"""Steering: recipes of edits to SAE latents, applied to the activations of one request through hooks.

A recipe says what to change; `Steering` turns recipes into the `hooks_for` that `llama3.generate` asks for at every forward
pass. Nothing is stored on the model or the SAE, so concurrent requests cannot meet.

Shapes: B batch, T tokens of this pass, D model width, N = B * T, E distinct edits of the batch, K latents stored per token.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from core.product import linear
from core.text import parse_json, read_text
from llama3.generate import HooksFor
from llama3.sites import Hook
from sae.model import SAE, Latents

Mode = Literal["add", "clamp", "ablate", "replace"]
MODES: tuple[str, ...] = get_args(Mode)
PLACES = ("all", "prompt", "generated")
FORMAT = "steering-recipe/1"
FORMAT_OF_SEVERAL = "steering-recipe/2"
"""Where edits may name SAEs of their own; all else is as in FORMAT, which is written where one SAE is enough."""
MAX_EDITS = 32
MAX_STRENGTH = 1000.0
MAX_POSITION = 10**7
MAX_RECIPE_CHARACTERS = 64_000
FIRST_STEERED = 1
"""Position 0 is never edited. It is the attention sink, with or without BOS: a row of huge norm that no SAE was trained on,
where latents read tens of times their maximum; a clamp there would subtract that."""
NEVER = 2**62
"""A position beyond every context."""
ROWS = 256
"""Tokens of which all latents are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change to one latent."""

    latent: int
    """Index of the latent in its SAE."""
    strength: float = 1.0
    """In multiples of the latent's observed maximum; negative pushes away. `ablate` does not use it."""
    mode: Mode = "add"
    """`add`: the decoder direction times strength * maximum is added. `clamp`: the latent takes the value strength * maximum;
    all else, what the SAE does not explain included, stays. `ablate`: the latent's own contribution is taken out. `replace`:
    the activation becomes the SAE's reconstruction, with strength * maximum added to the latent before TopK (the reference
    run's `h_bias`)."""
    positions: str | int = "all"
    """`all`, `prompt`, `generated` (the tokens produced, not the one that predicts the first of them), or p: from position p
    on, counted with BOS from 0. Position 0 is left alone in every case."""
    sae_hash: str = ""
    """`SAE.weights_hash` of the SAE whose latent it is; empty: that of the recipe."""

    def __post_init__(self) -> None:
        if type(self.latent) is not int or self.latent < 0:
            raise ValueError(f"latent must be a whole number from 0; found {self.latent!r}")
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float):
            raise ValueError(f"latent {self.latent}: strength must be a number; found {self.strength!r}")
        if not abs(self.strength) <= MAX_STRENGTH:  # NaN compares False, so it ends here too
            raise ValueError(
                f"latent {self.latent}: strength must be within ±{MAX_STRENGTH:.0f}, in multiples of the maximum; "
                f"found {self.strength!r:.40}"
            )
        if self.mode not in MODES:
            raise ValueError(f"latent {self.latent}: unknown mode {self.mode!r}; expected {', '.join(MODES)}")
        if not (self.positions in PLACES or (type(self.positions) is int and 0 <= self.positions < MAX_POSITION)):
            raise ValueError(
                f"latent {self.latent}: positions must be {', '.join(PLACES)} or a position from 0; found {self.positions!r}"
            )
        if not isinstance(self.sae_hash, str):
            raise ValueError(f"latent {self.latent}: sae_hash must be text; found {self.sae_hash!r:.40}")

    @property
    def changes_nothing(self) -> bool:
        return self.mode == "add" and self.strength == 0

    def span(self, prompt_length: int) -> tuple[int, int]:
        """First position edited in a row whose prompt has `prompt_length` tokens, and one past the last."""
        if isinstance(self.positions, int):
            return max(FIRST_STEERED, self.positions), NEVER
        first = max(FIRST_STEERED, prompt_length) if self.positions == "generated" else FIRST_STEERED
        return first, prompt_length if self.positions == "prompt" else NEVER


@dataclass(frozen=True)
class Recipe:
    """Edits that apply together, with the identity of the SAE whose latents they name; single edits may name another one."""

    edits: tuple[Edit, ...] = ()
    sae_hash: str = ""
    """`SAE.weights_hash`. Empty only where no edit needs it."""

    def __post_init__(self) -> None:
        if len(self.edits) > MAX_EDITS:
            raise ValueError(f"a recipe holds at most {MAX_EDITS} edits; found {len(self.edits)}")
        if not all(self.sae_of(edit) for edit in self.edits):
            raise ValueError("a recipe with edits must name its SAE; sae_hash is empty")
        for i, edit in enumerate(self.edits):
            for other in self.edits[:i]:
                same = edit.latent == other.latent and self.sae_of(edit) == self.sae_of(other)
                if same and {edit.positions, other.positions} != {"prompt", "generated"}:
                    raise ValueError(
                        f"latent {edit.latent} is edited twice at the same positions; keep one of the two edits, or let "
                        "one act on the prompt and the other on what is generated"
                    )

    @classmethod
    def from_edits(cls, edits: Sequence[Edit]) -> "Recipe":
        """A recipe of edits that each name their SAE: it names that of the first, and only edits of other SAEs their own."""
        first = edits[0].sae_hash if edits else ""
        return cls(tuple(replace(edit, sae_hash="") if edit.sae_hash == first else edit for edit in edits), first)

    @property
    def active(self) -> tuple[Edit, ...]:
        """The edits that change anything."""
        return tuple(edit for edit in self.edits if not edit.changes_nothing)

    def sae_of(self, edit: Edit) -> str:
        """Identity of the SAE whose latent `edit` changes."""
        return edit.sae_hash or self.sae_hash

    def of(self, sae_hash: str) -> "Recipe":
        """The part that edits latents of one SAE."""
        edits = [replace(edit, sae_hash="") for edit in self.edits if self.sae_of(edit) == sae_hash]
        return Recipe(tuple(edits), sae_hash)

    def to_json(self) -> str:
        """The recipe as text that `from_json` reads, stable and fit for sharing."""
        edits = [
            {item.name: value for item in fields(Edit) if (value := getattr(edit, item.name)) != "" or item.name != "sae_hash"}
            for edit in self.edits
        ]
        form = FORMAT_OF_SEVERAL if any(edit.sae_hash for edit in self.edits) else FORMAT
        return json.dumps({"format": form, "sae_hash": self.sae_hash, "edits": edits}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Parse a recipe; ValueError names what is unknown, missing or out of range."""
        if len(text) > MAX_RECIPE_CHARACTERS:
            raise ValueError(f"a recipe has at most {MAX_RECIPE_CHARACTERS:,} characters; found {len(text):,}")
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"the recipe is not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") not in (FORMAT, FORMAT_OF_SEVERAL):
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"not a steering recipe: expected an object with format {FORMAT!r} or {FORMAT_OF_SEVERAL!r}, found "
                f"{found!r:.80}"
            )
        if not isinstance(data.get("edits"), list) or not isinstance(data.get("sae_hash"), str):
            raise ValueError("the recipe needs edits (a list) and sae_hash (a string)")
        if unknown := sorted(set(data) - {"format", "sae_hash", "edits"}):
            raise ValueError(f"the recipe has an unknown key {unknown[0]!r}; expected format, sae_hash and edits")
        return cls(tuple(_edit_from_json(item, data["format"]) for item in data["edits"]), data["sae_hash"])

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe from a file."""
        try:
            return cls.from_json(read_text(path, "the recipe"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _edit_from_json(item: Any, form: str) -> Edit:
    known = [field.name for field in fields(Edit) if field.name != "sae_hash" or form == FORMAT_OF_SEVERAL]
    if not isinstance(item, dict) or "latent" not in item:
        raise ValueError(f"each edit must be an object with at least a latent; found {item!r:.80}")
    if unknown := sorted(set(item) - set(known)):
        raise ValueError(f"an edit has an unknown key {unknown[0]!r}; expected {', '.join(known)}")
    return Edit(**item)


class Reader:
    """Reads chosen latents of an SAE, at few tokens for the price of few operations; made once per request."""

    @torch.no_grad()
    def __init__(self, sae: SAE, latents: Tensor) -> None:
        """`latents` (E), on the SAE's device."""
        self._sae, self._latents = sae, latents
        self._rows, bias = sae.encoder_rows(latents)  # (E, D), (E)
        self._bias = bias - self._rows @ sae.b_pre  # (E)
        self._floor = None if sae.floor is None else sae.floor[latents]  # (E)

    @torch.no_grad()
    def values(self, flat: Tensor) -> Tensor:
        """Values (N, E) of the latents in the encoding of `flat` (N, D).

        A latent fires only where its own pre-activation is positive. That is looked at first, and all latents are computed only
        if it is anywhere, and only where which of them fire depends on all.
        """
        if len(flat) > ROWS:
            return torch.cat([self.values(block) for block in torch.split(flat, ROWS)])
        z = self._sae.normalised_rows(flat)
        own = linear(z, self._rows, self._bias)
        if self._floor is not None:
            return own.where(own > self._floor, 0)
        if not own.numel() or own.max().item() <= 0:
            return torch.zeros_like(own)
        values, indices = self._sae.select(self._sae.pre_activations(z))  # (N, K)
        return values[:, :, None].where(indices[:, :, None] == self._latents, 0).sum(1)

    @torch.no_grad()
    def pre_activations(self, flat: Tensor) -> Tensor:
        """Pre-activations (N, E) of the latents: where one fires its value, and never less than it."""
        return linear(self._sae.normalised_rows(flat), self._rows, self._bias)


class Plan(NamedTuple):
    """The distinct edits of a batch as tensors, made once per request so that a decode step costs a few small operations."""

    latents: Tensor
    """[E] the latent of each edit."""
    push: Tensor | None
    """[E] units of each latent added to x: strength * maximum; 0 for `ablate`, and for `replace`, which adds elsewhere. None
    where all edits replace."""
    taken: Tensor | None
    """[E] 1 where the latent's present value is taken out (`clamp`, `ablate`), else 0; None where no edit does so."""
    present: Reader
    """Reads those present values."""
    bias: Tensor | None
    """[E] what `replace` adds to each latent's pre-activation, 0 for other modes; None where no edit replaces."""
    replacing: Tensor
    """[E] whether the mode is `replace`."""
    first: Tensor
    """[B, 1, E] first position edited; beyond every position in rows that do not have the edit."""
    end: Tensor | None
    """[B, 1, E] one past the last position; None where no edit ends."""
    directions: Tensor | None
    """[E, D] what one unit of each latent adds to x; None where that depends on the token (SAEs with norm "layer")."""


@dataclass(frozen=True)
class Steering:
    """Applies recipes to one SAE's latents at the site it was trained on. Safe to share between threads."""

    sae: SAE
    site: str
    max_values: Tensor
    """[n_latents] largest value of each latent on the corpus; 0 where it never fired."""

    def check(self, recipe: Recipe) -> None:
        """ValueError where the recipe is for another SAE, or names a latent that is out of range or never fired."""
        for edit in recipe.edits:
            if recipe.sae_of(edit) != self.sae.weights_hash:
                raise ValueError(
                    f"the recipe belongs to the SAE {recipe.sae_of(edit)!r}, but {self.sae.weights_hash!r} is loaded; latents "
                    "of different SAEs have nothing in common"
                )
            if edit.latent >= len(self.max_values):
                raise ValueError(f"latent {edit.latent} is out of range; this SAE has latents 0 to {len(self.max_values) - 1}")
            if edit.mode != "ablate" and edit.strength and not self.max_values[edit.latent] > 0:
                raise ValueError(f"latent {edit.latent} never fired on the corpus, so its maximum is unknown; choose another")

    def hooks_for(self, recipes: Sequence[Recipe], prompt_lengths: Sequence[int]) -> HooksFor | None:
        """For a batch whose row b follows `recipes[b]` and has a prompt of `prompt_lengths[b]` tokens (BOS included): what
        `generate` calls with the positions of each pass. None where no edit changes anything: the plain path, bit for bit.

        Raises ValueError as `check` does.
        """
        assert len(recipes) == len(prompt_lengths)
        for recipe in set(recipes):
            self.check(recipe)
        if not any(recipe.active for recipe in recipes):
            return None
        plan = self._plan(recipes, prompt_lengths)

        def hooks(positions: Tensor) -> Mapping[str, Hook]:
            at = positions[:, :, None]  # (B, T, 1), -1 at padding
            masks = at >= plan.first  # (B, T, E)
            if plan.end is not None:
                masks &= at < plan.end
            return {self.site: partial(self._edited, plan=plan, masks=masks)}

        return hooks

    @torch.no_grad()
    def _plan(self, recipes: Sequence[Recipe], prompt_lengths: Sequence[int]) -> Plan:
        device = self.sae.W_dec.device
        edits = list(dict.fromkeys(edit for recipe in recipes for edit in recipe.active))
        never = (NEVER, NEVER)
        spans = [
            [edit.span(length) if edit in recipe.active else never for edit in edits]
            for recipe, length in zip(recipes, prompt_lengths, strict=True)
        ]
        bounds = torch.tensor(spans, device=device)  # (B, E, 2)
        latents = torch.tensor([edit.latent for edit in edits], device=device)
        strengths = [0.0 if edit.mode == "ablate" else edit.strength for edit in edits]
        value = torch.tensor(strengths, device=device) * self.max_values.to(device)[latents]
        taking = [edit.mode in ("clamp", "ablate") for edit in edits]
        replacing = torch.tensor([edit.mode == "replace" for edit in edits], device=device)
        return Plan(
            latents=latents,
            push=None if replacing.all() else value.masked_fill(replacing, 0),
            taken=torch.tensor(taking, device=device).float() if any(taking) else None,
            present=Reader(self.sae, latents),
            bias=value * replacing if replacing.any() else None,
            replacing=replacing,
            first=bounds[:, None, :, 0].contiguous(),
            end=bounds[:, None, :, 1] if any(end != NEVER for row in spans for _, end in row) else None,
            directions=None if self.sae.cfg.norm == "layer" else self.sae.directions(latents).float(),
        )

    @torch.no_grad()
    def _edited(self, x: Tensor, plan: Plan, masks: Tensor) -> Tensor:
        """`x` (B, T, D) with every edit applied, all computed from the same `x`; tokens outside `masks` (B, T, E) keep their
        bits."""
        flat, masks = x.flatten(0, 1).float(), masks.flatten(0, 1)  # (N, D), (N, E)
        base = flat
        if plan.bias is not None:
            here = masks if masks.shape[1] == 1 else (masks & plan.replacing).any(1, keepdim=True)
            base = torch.where(here, reconstruct_with_bias(self.sae, flat, plan.latents, plan.bias * masks), flat)
        if plan.push is not None:
            amounts = plan.push  # (E), or (N, E): units of each latent to add to each token
            if plan.taken is not None:
                amounts = torch.addcmul(amounts, plan.present.values(flat), plan.taken, value=-1)
            amounts = amounts * masks
            if plan.directions is not None:
                base = torch.addmm(base, amounts, plan.directions)
            else:
                base = base + torch.einsum("ne,ned->nd", amounts, self.sae.directions(plan.latents, self.sae.normalise(flat)))
        return base.to(x.dtype).view_as(x)


def check_all(steerings: Sequence[Steering], recipe: Recipe) -> None:
    """ValueError where an edit's SAE is none of those of `steerings`, or as `Steering.check` raises."""
    if len(steerings) == 1:
        steerings[0].check(recipe)
        return
    known = {steering.sae.weights_hash: steering for steering in steerings}
    for edit in recipe.edits:
        if recipe.sae_of(edit) not in known:
            loaded = ", ".join(f"{name!r} ({steering.site})" for name, steering in known.items())
            raise ValueError(
                f"latent {edit.latent} belongs to the SAE {recipe.sae_of(edit)!r}, but the ones loaded are {loaded}; give its "
                "folder to --sae too"
            )
    for name, steering in known.items():
        steering.check(recipe.of(name))


def hooks_for_all(steerings: Sequence[Steering], recipes: Sequence[Recipe], prompt_lengths: Sequence[int]) -> HooksFor | None:
    """As `Steering.hooks_for`, for recipes over several SAEs, each at a site of its own."""
    for recipe in set(recipes):
        check_all(steerings, recipe)
    parts = [[recipe.of(steering.sae.weights_hash) for recipe in recipes] for steering in steerings]
    return chain(*(one.hooks_for(part, prompt_lengths) for one, part in zip(steerings, parts, strict=True)))


def reconstruct_with_bias(sae: SAE, flat: Tensor, latents: Tensor, bias: Tensor) -> Tensor:
    """The SAE's reconstruction (N, D) of `flat` (N, D) with `bias` (N, E) added to the pre-activations of `latents` (E)."""
    h = sae.pre_activations(sae.normalised_rows(flat)).index_add_(1, latents, bias)
    return sae.decode(Latents(*sae.select(h)), sae.normalise(flat) if sae.cfg.norm == "layer" else None)


def chain(*sources: HooksFor | None) -> HooksFor | None:
    """Several `hooks_for` as one: at a site that more than one edits or reads, they apply in the order given."""
    active = [source for source in sources if source is not None]
    if len(active) < 2:
        return active[0] if active else None

    def hooks(positions: Tensor) -> Mapping[str, Hook]:
        merged: dict[str, list[Hook]] = {}
        for source in active:
            for site, hook in source(positions).items():
                merged.setdefault(site, []).append(hook)
        return {site: partial(_apply_all, fns=fns) for site, fns in merged.items()}

    return hooks


def _apply_all(x: Tensor, fns: Iterable[Hook]) -> Tensor:
    for fn in fns:
        replaced = fn(x)
        x = x if replaced is None else replaced
    return x
