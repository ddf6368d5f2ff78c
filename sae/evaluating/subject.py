"""The model under an evaluation, the sentences that it reads, and how they are batched.

Shapes: B sentences of a batch, T tokens of its longest, D width of the site.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capture.store import Corpus
from core.artifact import check_provenance
from core.norms import row_norms
from llama3 import Tokenizer, Transformer, load_model, load_tokenizer
from sae.model import SAE, load
from sae.split import held_out


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the SAE, its model, and how sentences are read."""

    sae: SAE
    model: Transformer
    tokenizer: Tokenizer
    batch_tokens: int

    @property
    def bos(self) -> list[int]:
        """The tokens put before each sentence, at which nothing is counted or replaced."""
        return [self.tokenizer.bos_id] if self.sae.cfg.provenance.get("bos") == "feed" else []

    @property
    def max_norm(self) -> float:
        """Tokens of larger norm are no rows of the training either; they stay as they are."""
        return self.sae.cfg.provenance.get("max_norm") or math.inf

    def kept(self, x: Tensor, real: Tensor) -> Tensor:
        """Tokens of `x` (B, T, D) that count, bool (B, T): real, no BOS, of normal norm. `real` (B, T) is False at padding."""
        kept = real & (row_norms(x) <= self.max_norm)
        kept[:, : len(self.bos)] = False
        return kept


def open_subject(path: Path, name: str, device: torch.device, batch_tokens: int, other_weights: bool = False) -> Subject:
    """SAE, model and tokenizer; ValueError naming both values where they do not belong together."""
    sae = load(path, device)
    tokenizer = load_tokenizer(name)
    wanted = sae.cfg.provenance | {"d_model": sae.cfg.d_model}
    check_provenance(f"--model {name}", wanted, {"tokenizer_hash": tokenizer.hash}, ["tokenizer_hash"])
    model = load_model(name, device)
    if not other_weights:
        check_provenance(f"--model {name}", wanted, {"model_hash": model.weights_hash}, ["model_hash"])
    check_provenance(f"--model {name}", wanted, {"d_model": model.width(sae.site)}, ["d_model"])
    return Subject(sae, model, tokenizer, batch_tokens)


class Sample(NamedTuple):
    """Sentence ids: those evaluated, those that the mean and PCA come from, and how the first were chosen."""

    evaluated: Tensor
    fitted: Tensor
    split: str


def choose_sentences(corpus: Corpus, trained_on: Sequence[dict[str, Any]], sentences: int, seed: int) -> Sample:
    """`sentences` (0: all) that no SAE was trained on, where there are any, and as many others to fit the mean and PCA on.

    Drawn at random, in order of id. `trained_on` is the provenance of each SAE.
    """
    documents = torch.cat([torch.tensor(corpus.table(i)["document_id"].to_numpy()) for i in range(len(corpus.files))])
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    here = [provenance for provenance in trained_on if provenance.get("corpus_hash") == corpus.manifest_hash]
    unseen = torch.ones(len(documents), dtype=torch.bool)
    for provenance in here:
        unseen &= held_out(documents, provenance.get("validation_fraction") or 0.0, provenance.get("split_seed") or 0)
    unseen = unseen[order]
    if here and unseen.any() and not unseen.all():
        evaluated, fitted, split = order[unseen], order[~unseen], "validation documents"
    else:
        split = "all documents of the training corpus" if here else "all documents of another corpus"
        half = len(order) // 2
        evaluated, fitted = (order[:half], order[half:]) if half else (order, order)
    n = min(sentences or len(evaluated), len(evaluated))
    return Sample(evaluated[:n].sort().values, fitted[:n].sort().values, split)


class Batch(NamedTuple):
    """Sentences padded on the right: tokens (B, T) int64, which of them are real (B, T), the group of each sentence (B,)."""

    tokens: Tensor
    real: Tensor
    groups: Tensor


def batches(subject: Subject, texts: Sequence[str], groups: Sequence[int]) -> Iterator[Batch]:
    """The sentences as the SAE's activations were captured: cut to the same length, BOS in front or not, none that is empty."""
    max_length = subject.sae.cfg.provenance.get("max_length")
    encoded = [(subject.tokenizer.encode(text)[:max_length], group) for text, group in zip(texts, groups, strict=True)]
    encoded = sorted(((subject.bos + ids, group) for ids, group in encoded if ids), key=lambda pair: len(pair[0]))
    start = 0
    while start < len(encoded):
        stop = start + 1
        while stop < len(encoded) and (stop + 1 - start) * len(encoded[stop][0]) <= subject.batch_tokens:
            stop += 1
        lengths = torch.tensor([len(ids) for ids, _ in encoded[start:stop]])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros(real.shape, dtype=torch.long)
        tokens[real] = torch.tensor([token for ids, _ in encoded[start:stop] for token in ids])
        of_batch = torch.tensor([group for _, group in encoded[start:stop]])
        yield Batch(*(part.to(subject.model.device) for part in (tokens, real, of_batch)))
        start = stop
