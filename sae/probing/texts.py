"""What the model and the SAE make of each of many texts.

Shapes: N texts, d width of the site, n latents.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from capture.store import Corpus
from core.cli import Progress
from core.runtime import Runtime
from sae.evaluating.subject import Subject, batches

CHUNK_SENTENCES = 128  # read at a time


class Texts(NamedTuple):
    """What the model makes of each text, float32: means over its tokens, and peaks."""

    x: Tensor
    """Mean of x, [N, d]."""
    latents: Tensor
    """Mean of each latent, [N, n]."""
    peaks: Tensor
    """Largest value of each latent, [N, n]."""


@torch.inference_mode()
def read(subject: Subject, corpus: Corpus, ids: Tensor, runtime: Runtime) -> Texts:
    """Each sentence through the model and the SAE; zeros for one that holds no token to count."""
    cfg, n = subject.sae.cfg, len(ids)
    found = Texts(torch.zeros(n, cfg.d_model), torch.zeros(n, cfg.n_latents), torch.zeros(n, cfg.n_latents))
    with Progress("reading", n, "sentences", runtime) as bar:
        for first in range(0, n, CHUNK_SENTENCES):
            chunk = ids[first : first + CHUNK_SENTENCES]
            for batch in batches(subject, corpus.texts(chunk), range(first, first + len(chunk))):
                x = subject.model.capture(batch.tokens, [subject.sae.site])[subject.sae.site]
                kept = subject.kept(x, batch.real)
                for place, rows in zip(batch.groups.tolist(), _rows(x, kept), strict=True):
                    if len(rows):
                        values, indices = subject.sae.encode(rows)
                        dense = torch.zeros(len(rows), cfg.n_latents).scatter_add_(1, indices.cpu(), values.float().cpu())
                        found.x[place], found.latents[place] = rows.mean(0).cpu(), dense.mean(0)
                        found.peaks[place] = dense.amax(0)
                bar.update(len(batch.tokens))
    return found


def _rows(x: Tensor, kept: Tensor) -> Iterator[Tensor]:
    """The rows that count of each sentence, float32."""
    for of_sentence, where in zip(x, kept, strict=True):
        yield of_sentence[where].float()
