"""What candidates are measured with: rows of the model at many sites, what an SAE explains of them, and what the model loses.

Shapes: B texts of a batch, T tokens of the longest, N rows, d their width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.norms import row_norms
from llama3 import Message, Tokenizer, Transformer, encode_dialog
from llama3.sites import LAYER_SITES, MODEL_SITES
from sae.accumulator import Accumulator
from sae.adopting.candidates import Rows
from sae.evaluating.bootstrap import whole
from sae.evaluating.figures import measures
from sae.model import SAE

MAX_NORM_RATIO = 10.0
"""Rows above so many times the median norm are left out: attention sinks, as in sae.preprocess."""
BLOCK_ROWS = 256  # rows given to an SAE at a time


class Batch(NamedTuple):
    """Texts padded on the right: tokens (B, T) int64, and which of them count (B, T): neither padding nor BOS."""

    tokens: Tensor
    counts: Tensor


class Fit(NamedTuple):
    """How well an SAE explains rows."""

    fvu: float
    l0: float


@dataclass(frozen=True)
class Reader:
    """The model, and the texts that it reads."""

    model: Transformer
    tokenizer: Tokenizer
    texts: Sequence[str]
    max_length: int
    """Tokens after which a text is cut, BOS not counted."""
    batch_tokens: int

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site, layer by layer; in each the residual stream after it first."""
        places = sorted(LAYER_SITES, key=lambda place: place != "resid_post")
        sites = [f"layers.{i}.{place}" for i in range(self.model.params.n_layers) for place in places]
        return {site: self.model.width(site) for site in (*sites, *MODEL_SITES)}

    def encoded(self, text: str) -> list[list[int]]:
        """The texts as token ids without BOS, by length; none is empty. `text` is plain or chat."""
        found = []
        for each in self.texts:
            ids = self.tokenizer.encode(each)[: self.max_length]
            if text == "chat" and ids:
                ids = encode_dialog(self.tokenizer, [Message("user", self.tokenizer.decode(ids))])
                ids = ids[1:] if ids[0] == self.tokenizer.bos_id else ids
            if ids:
                found.append(ids)
        return sorted(found, key=len)

    def batches(self, bos: str, text: str) -> Iterator[Batch]:
        """The texts in batches of at most `batch_tokens` slots, or of one text."""
        lead = [self.tokenizer.bos_id] if bos == "feed" else []
        encoded = [lead + ids for ids in self.encoded(text)]
        start = 0
        while start < len(encoded):
            stop = start + 1
            while stop < len(encoded) and (stop + 1 - start) * len(encoded[stop]) <= self.batch_tokens:
                stop += 1
            parts = [torch.tensor(ids) for ids in encoded[start:stop]]
            tokens = pad_sequence(parts, batch_first=True)
            counts = torch.arange(tokens.shape[1]) < torch.tensor([len(part) for part in parts])[:, None]
            counts[:, : len(lead)] = False
            yield Batch(tokens.to(self.model.device), counts.to(self.model.device))
            start = stop

    @torch.inference_mode()
    def rows(self, sites: Sequence[str], bos: str, text: str, n: int, seed: int) -> dict[str, Rows]:
        """At most `n` rows of each site, the same tokens at all of them, drawn at random."""
        batches = list(self.batches(bos, text))
        sizes = [int(batch.counts.sum()) for batch in batches]
        chosen = torch.zeros(sum(sizes), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:n]] = True
        found: dict[str, list[Tensor]] = {site: [] for site in sites}
        firsts = []
        for batch, mine in zip(batches, torch.split(chosen, sizes), strict=True):
            firsts.append((batch.counts.cumsum(1) == 1)[batch.counts].cpu()[mine])
            for site, x in self.model.capture(batch.tokens, sites).items():
                found[site].append(x[batch.counts][mine.to(x.device)].float().cpu())
        return {site: _usable(torch.cat(parts), torch.cat(firsts)) for site, parts in found.items()}

    @torch.inference_mode()
    def ce(self, batches: Sequence[Batch], hooks: dict[str, Callable[[Tensor], Tensor]]) -> float:
        """Mean cross-entropy, nats per token, of the tokens that count, with these hooks."""
        total, n = 0.0, 0
        for batch in batches:
            with self.model.hooks(hooks):
                logits = self.model(batch.tokens)[:, :-1]
            targets = batch.counts[:, 1:]
            total += float(F.cross_entropy(logits[targets].float(), batch.tokens[:, 1:][targets], reduction="sum").double())
            n += int(targets.sum())
        return total / n if n else float("nan")


def _usable(x: Tensor, first: Tensor) -> Rows:
    norms = row_norms(x)
    median = float(norms.median())
    max_norm = MAX_NORM_RATIO * median
    kept = norms <= max_norm
    usual = norms[kept]
    return Rows(x[kept], first[kept], float(usual.mean()), float(usual.square().mean()), median, max_norm)


@torch.inference_mode()
def fit(sae: SAE, x: Tensor) -> Fit:
    """What `sae` explains of rows `x` [N, d]."""
    cfg = sae.cfg
    sums = Accumulator.none(cfg.d_model, cfg.n_latents, cfg.k if sae.selects_top_k else cfg.n_latents)
    for block in torch.split(x, BLOCK_ROWS):
        rows = block.to(sae.W_enc.device)
        latents = sae.encode(rows)
        sums.add_reconstruction(rows, sae.decode(latents, sae.normalise(rows)), latents)
    found = measures(whole(sums.sums))
    return Fit(float(found["fvu"]), float(found["l0"]))


class Losses:
    """What the model loses on the same batches with an SAE at a site; what no SAE changes is computed once."""

    def __init__(self, reader: Reader, batches: Sequence[Batch]) -> None:
        self._reader, self._batches = reader, batches
        self._clean: float | None = None
        self._zero: dict[str, float] = {}

    def recovered(self, sae: SAE, site: str, max_norm: float) -> float:
        """`(ce_zero - ce_sae) / (ce_zero - ce_clean)`; rows above `max_norm`, which belongs to the site, stay as they are."""
        if self._clean is None:
            self._clean = self._reader.ce(self._batches, {})
        if site not in self._zero:
            self._zero[site] = self._spliced(torch.zeros_like, site, max_norm)
        clean, zero = self._clean, self._zero[site]
        return (zero - self._spliced(sae, site, max_norm)) / (zero - clean) if zero != clean else float("nan")

    def _spliced(self, stand_in: Callable[[Tensor], Tensor], site: str, max_norm: float) -> float:
        of_passes = iter(self._batches)

        def hook(x: Tensor) -> Tensor:
            kept = next(of_passes).counts & (row_norms(x) <= max_norm)
            x = x.clone()
            x[kept] = stand_in(x[kept].float()).to(x.dtype)
            return x

        return self._reader.ce(self._batches, {site: hook})
