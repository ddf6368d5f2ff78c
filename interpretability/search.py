"""Find features: by prompts for and against, by words of their explanations, by the direction that they write in, or together.

    python -m interpretability.search --sae run/sae --model M --top top/ --positive "a storm at sea" --negative "a calm sea"
    python -m interpretability.search --sae run/sae --explanations explanations/ --text "storm sea"
    python -m interpretability.search --sae run/sae --latent 896
    python -m interpretability.search --sae run/sae --top top/ --latents 3 17
    python -m interpretability.search --sae run/sae --steerability steerability/ --rank steerability

With --explanations the features in the table carry their titles. The table goes to stdout, everything else to stderr.

Shapes: n latents, d model width, T tokens of a prompt, K active latents per token, M latents asked for.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core.cli import StageConfig, run_stage
from core.norms import unit_rows
from core.runtime import Runtime
from core.shipped import absence, shipped_for
from core.table import text_table
from core.terminal import say
from interpretability.causal.records import Steerability, read_steerability
from interpretability.evidence.coactivation import Together, together
from interpretability.opening import check_sae, open_explanations_of, open_top_of
from interpretability.records import Explanation, title_of, trust
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.model import SAE, load

BLOCK_ELEMENTS = 1 << 24
"""Most cosines, and most numbers of decoder rows in float32, that are held at once: 64 MiB each."""
RANK_TOP = 20
"""Latents of a prompt that rank counting counts."""

FIELDS = ("title", "explanation", "details")
"""Where words are looked for, the most telling place first."""

Method = Literal["mean", "rank"]

log = logging.getLogger("interpretability.search")


class Ranked(NamedTuple):
    """A feature found by prompts."""

    latent: int
    score: float
    """`positive - negative`."""
    positive: float
    """mean: mean share of its maximum over the prompts for it, 0 to 1; rank: prompts for it that it is among the top of."""
    negative: float
    """The same over the prompts against it; 0 without any."""
    token: str
    """Where it is largest in the prompts for it, in its share; in those against it where it fires on none for it."""


class Match(NamedTuple):
    """A feature found by words."""

    latent: int
    field: str
    """The title where all words are in the title; else the explanation where both hold them all; else details."""
    score: float
    """How far its explanation can be trusted (`trust`)."""


class Neighbour(NamedTuple):
    """A feature whose decoder row points in a similar direction."""

    latent: int
    cosine: float


class Steerable(NamedTuple):
    """A feature found by its steerability alone."""

    latent: int


Hit = Ranked | Match | Neighbour | Steerable | Together


def search_text(explanations: Mapping[int, Explanation], query: str, limit: int) -> list[Match]:
    """At most `limit` features for which each word of `query` begins a word of title, explanation or details, in any case.

    Those that need the title alone come first, then those that need the explanation too, then the details; among equals the
    most trusted, then the lowest latent. An empty query finds every explained feature; one without a letter or digit none.
    Failed explanations are never found.
    """
    wanted = _words(query)
    if query.strip() and not wanted:
        return []
    found = []
    for latent, explanation in explanations.items():
        if explanation.state == "valid":
            field = _field_needed(explanation, wanted)
            if field is not None:
                found.append((field, -trust(explanation), latent))
    return [Match(latent, FIELDS[field], -distrust) for field, distrust, latent in sorted(found)[:limit]]


def _field_needed(explanation: Explanation, wanted: Collection[str]) -> int | None:
    """Index in FIELDS of the last field that must be read to find all words; None where even all fields lack one."""
    missing = set(wanted)
    for field, texts in enumerate(([explanation.title], [explanation.explanation], _texts(explanation.details))):
        words = {word for text in texts for word in _words(text)}
        missing = {word for word in missing if not any(known.startswith(word) for known in words)}
        if not missing:
            return field
    return None


def _words(text: str) -> list[str]:
    """Runs of letters and digits, compatible characters (full width, ligatures) made equal, without case."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _texts(value: Any) -> Iterator[str]:
    """All text in the values of a JSON tree; keys are the backend's words, not the feature's."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))
    elif isinstance(value, str):
        yield value


def search_prompts(
    sae: SAE,
    model: Transformer,
    tokenizer: Tokenizer,
    site: str,
    max_values: Tensor,
    positive: Sequence[str],
    negative: Sequence[str] = (),
    method: Method = "mean",
) -> list[Ranked]:
    """Features that fire on the prompts of `positive` and not on those of `negative`, best first, ties by latent.

    The share of a latent in a prompt is the largest of its values over the prompt's tokens, divided by `max_values` [n], its
    largest value on the corpus, and cut off at 1. The largest and not the mean: a word that names a concept counts the same in
    a long prompt as in a short one.

    mean: the mean share over `positive` minus that over `negative`. rank: each prompt ranks its latents by share, and a latent
    counts in how many prompts of `positive` it is among the first RANK_TOP, minus the same for `negative`; so one prompt on
    which it is very strong weighs no more than another. Equal counts are ordered by the mean.

    Each prompt is read as the model met texts in training (`Tokenizer.encode_prompt`), and position 0 is left out: whatever
    stands there becomes the attention sink, a row of huge norm that says nothing of the text. Where that is BOS no word of the
    prompt is lost to it; without BOS its first token is. Latents that never fired on the
    corpus (maximum 0) have no range and never rank; of the others, those that count in at least one prompt are returned.

    ValueError without a prompt for, and for a prompt that is empty or too long for the model's context.
    """
    if not positive:
        raise ValueError("no prompt to search for; give at least one, --positive TEXT")
    if len(max_values) != sae.cfg.n_latents:
        raise ValueError(f"expected a maximum for each of {sae.cfg.n_latents} latents, found {len(max_values)}")
    maxima = max_values.detach().float().cpu()
    totals, peaks = [], []
    for prompts in (positive, negative):
        mean, count = torch.zeros(2, len(maxima), dtype=torch.float64)
        peak, token_id = torch.zeros(len(maxima)), torch.zeros(len(maxima), dtype=torch.int64)
        for prompt in prompts:
            share, at = _shares(sae, model, site, maxima, _prompt_ids(model, tokenizer, prompt))
            mean += share.double() / len(prompts)
            first = share.sort(descending=True, stable=True).indices[:RANK_TOP]
            count[first[share[first] > 0]] += 1
            peak, token_id = torch.maximum(peak, share), torch.where(share > peak, at, token_id)
        totals.append((mean, count))
        peaks.append((peak, token_id))
    (mean_for, count_for), (mean_against, count_against) = totals
    (peak_for, token_for), (_, token_against) = peaks
    token_ids = torch.where(peak_for > 0, token_for, token_against)
    means = mean_for - mean_against
    plus, minus = (count_for, count_against) if method == "rank" else (mean_for, mean_against)
    scores = plus - minus
    found = torch.nonzero((plus > 0) | (minus > 0))[:, 0].tolist()
    found.sort(key=lambda latent: (-float(scores[latent]), -float(means[latent]), latent))
    tokens = [tokenizer.decode([i]) for i in token_ids[found].tolist()]
    numbers = zip(scores[found].tolist(), plus[found].tolist(), minus[found].tolist(), strict=True)
    return [Ranked(latent, *row, token) for latent, row, token in zip(found, numbers, tokens, strict=True)]


def _prompt_ids(model: Transformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode_prompt(prompt)
    if not prompt.strip():
        raise ValueError("a prompt is empty; write the text that the feature should, or should not, fire on")
    if len(ids) < 2:
        raise ValueError(f"the prompt {prompt!r} is one token, and this model's first is never read; write a few words")
    if len(ids) > model.params.max_seq_len:
        raise ValueError(
            f"a prompt has {len(ids):,} tokens, but the context holds {model.params.max_seq_len:,}; shorten it: {prompt:.40}"
        )
    return ids


@torch.no_grad()
def _shares(sae: SAE, model: Transformer, site: str, maxima: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[n] largest value of each latent over the tokens after the first, in units of its maximum, 0 to 1; 0 where dead.

    And [n] the id of the first token with that value; of no meaning where the value is 0.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    latents = sae.encode(model.capture(tokens, sites=[site])[site][0, 1:].float())  # T tokens, K each
    values, indices = latents.values.float().cpu().flatten(), latents.indices.cpu().flatten()  # (T * K)
    places = torch.arange(1, len(ids)).repeat_interleave(latents.values.shape[1])
    each = torch.where(maxima[indices] > 0, values / maxima[indices], 0).clamp(max=1)
    share = torch.zeros(len(maxima)).scatter_reduce(0, indices, each, "amax")
    largest = each == share[indices]
    place = torch.full((len(maxima),), len(ids) - 1).scatter_reduce(0, indices[largest], places[largest], "amin")
    return share, torch.tensor(ids)[place]


def neighbours(W_dec: Tensor, latent: int, n: int) -> list[Neighbour]:
    """The `n` latents whose rows of `W_dec` [n_latents, d] have the largest cosine with that of `latent`, itself left out.

    Largest first, equal ones by latent. ValueError where there is no such latent.
    """
    if not 0 <= latent < len(W_dec):
        raise ValueError(f"latent {latent}: expected one of 0 to {len(W_dec) - 1}")
    indices, cosines = nearest(W_dec, torch.tensor([latent]), n)
    return [Neighbour(*pair) for pair in zip(indices[0].tolist(), cosines[0].tolist(), strict=True)]


@torch.no_grad()
def nearest(W_dec: Tensor, latents: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Neighbours of several `latents` (M,) at once: indices (M, n) int64 and cosines (M, n) float32, each row in that order.

    `n` is cut off at n_latents - 1. Beyond `W_dec` and the result, memory is about 5 * BLOCK_ELEMENTS float32, whatever M and
    n_latents are, so that all 65,536 latents of an SAE can be asked for. A row of zeros has cosine 0 with every other.
    """
    n_latents, d = W_dec.shape
    n = max(0, min(n, n_latents - 1))
    if n == 0 or len(latents) == 0:
        return latents.new_empty(len(latents), n), torch.empty(len(latents), n)
    found: list[tuple[Tensor, Tensor]] = []
    for block in torch.split(latents.to(W_dec.device), max(1, BLOCK_ELEMENTS // max(n_latents, d))):
        asked = unit_rows(W_dec[block].float())
        cosines = torch.cat(
            [asked @ unit_rows(rows.float()).T for rows in torch.split(W_dec, max(1, BLOCK_ELEMENTS // d))], dim=1
        )
        cosines[torch.arange(len(block), device=block.device), block] = -torch.inf
        indices = _first_largest(cosines, n)
        values, order = cosines.gather(1, indices).sort(dim=1, descending=True, stable=True)
        found.append((indices.gather(1, order), values))
    return torch.cat([indices for indices, _ in found]), torch.cat([values for _, values in found])


def _first_largest(x: Tensor, n: int) -> Tensor:
    """Ascending indices (M, n) of the `n` largest of each row of `x`; of equals the first, which `topk` does not promise."""
    least = x.topk(n, dim=1).values[:, -1:]
    above, level = x > least, x == least
    wanted = n - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= wanted))
    return torch.nonzero(chosen)[:, 1].view(len(x), n)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(StageConfig):
    """Flags of `python -m interpretability.search`: one of --positive, --text, --latent, --latents says what to look for, or
    none with --rank steerability, which then ranks all features."""

    sae: Path | None = None
    """Folder of the SAE (`run/sae`). None: the one that ships with --model demo and smollm2, with its --top and
    --explanations."""
    model: str = ""
    """The model that it was trained on: a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo.
    Needed with --positive."""
    top: Path | None = None
    """Its top sentences, where the maxima of its latents are read. Needed with --positive and --latents."""
    explanations: Path | None = None
    """Explanations of its latents. Needed with --text; elsewhere None leaves features without titles."""
    positive: tuple[str, ...] = ()
    """Prompts that the features should fire on."""
    negative: tuple[str, ...] = ()
    """Prompts that they should not fire on."""
    method: Method = "mean"
    """How prompts are weighed up: mean of range-normalised activations, or rank (in how many prompts' top 20)."""
    text: str = ""
    """Words to look for in the explanations."""
    latent: int | None = None
    """Latent whose neighbours by decoder cosine to show."""
    latents: tuple[int, ...] = ()
    """Latents that fire in the same sentences: of those that --top stores, the ones in which all do, the weakest of them
    strongest first."""
    steerability: Path | None = None
    """Folder of interpretability.steerability, whose figures are shown beside each feature. Needed with --rank steerability."""
    rank: Literal["match", "steerability"] = "match"
    """Order of what is shown: the best match first, or of the --n best matches the one of the largest output score first."""
    n: int = 20
    """Features shown, at most."""
    json: bool = False
    """Print one JSON object a line instead of a table."""

    def __post_init__(self) -> None:
        if self.sae is None:
            self._take_what_ships()
        asked = [bool(self.positive), bool(self.text.strip()), self.latent is not None, bool(self.latents)]
        if asked.count(True) != 1 and (any(asked) or self.rank == "match"):
            raise ValueError("give one of --positive PROMPTS, --text WORDS, --latent NUMBER and --latents NUMBERS")
        if self.rank == "steerability" and (self.steerability is None or self.latents):
            raise ValueError(
                "--rank steerability: --latents finds sentences, not features"
                if self.latents
                else "--steerability is missing: --rank reads the figures there"
            )
        if self.negative and not self.positive:
            raise ValueError("--negative: only takes away from --positive; give --positive too")
        if self.positive and not self.model:
            raise ValueError("--model is missing: the prompts are read by the model that the SAE was trained on")
        if self.positive and self.top is None:
            raise ValueError(
                "--top is missing: activations are measured in units of each latent's maximum, which is read there"
            )
        if self.latents and self.top is None:
            raise ValueError("--top is missing: the sentences in which --latents fire are read there")
        if self.text and self.explanations is None:
            raise ValueError("--explanations is missing: --text searches in them")
        if self.n < 1:
            raise ValueError(f"--n must be at least 1; found {self.n}")

    def _take_what_ships(self) -> None:
        found = shipped_for(self.model)
        if found is None:
            raise ValueError(absence(self.model) or "--sae is missing; or give --model demo or smollm2, whose SAE ships")
        given = {"sae": found.sae, "top": self.top or found.top, "explanations": self.explanations or found.explanations}
        for name, path in given.items():
            object.__setattr__(self, name, path)


def run(config: SearchConfig, runtime: Runtime) -> None:
    """Print the features that `config` asks for, on rank 0."""
    if not runtime.is_main:
        return
    assert config.sae is not None
    sae = load(config.sae, runtime.device)
    explanations = {} if config.explanations is None else open_explanations_of(sae, config.explanations)
    top = None if config.top is None else open_top_of(sae, config.top)
    figures = None if config.steerability is None else read_steerability(config.steerability, sae.weights_hash)
    hits: Sequence[Hit]
    if config.positive:
        assert top is not None
        model, tokenizer = load_model(config.model, device=runtime.device), load_tokenizer(config.model)
        site = check_sae(sae, config.sae, model.eval(), tokenizer)
        maxima = torch.tensor(top.max_values)
        hits = search_prompts(sae, model, tokenizer, site, maxima, config.positive, config.negative, config.method)
    elif config.latents:
        assert top is not None
        hits = together(top, config.latents)
    elif config.latent is not None:
        hits = neighbours(sae.W_dec, config.latent, config.n)
    elif config.text:
        hits = search_text(explanations, config.text, config.n)
    else:
        assert figures is not None
        hits = [Steerable(latent) for latent in figures.order()]
    best = hits[: config.n]
    if config.rank == "steerability":
        assert figures is not None
        place = {latent: i for i, latent in enumerate(figures.order())}
        best = sorted(best, key=lambda hit: place[hit.latent] if not isinstance(hit, Together) else 0)
    shown = [_row(hit, explanations, figures) for hit in best]
    for line in map(json.dumps, shown) if config.json else text_table(shown):
        say(line)
    what = "sentences" if config.latents else "features"
    log.info("%d %s found in %s with %d latents, %d shown", len(hits), what, config.sae, sae.cfg.n_latents, len(shown))


def _row(hit: Hit, explanations: Mapping[int, Explanation], figures: Steerability | None) -> dict[str, Any]:
    if isinstance(hit, Together):
        return hit._asdict()
    steers = {} if figures is None else figures.of(hit.latent)
    return hit._asdict() | steers | {"title": title_of(explanations.get(hit.latent))}


if __name__ == "__main__":
    run_stage(SearchConfig, run, __doc__)
