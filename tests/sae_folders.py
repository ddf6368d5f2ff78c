"""Activations and batches folders made up for tests, in the format of the stages that usually write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from core.artifact import building
from core.cli import StageConfig
from core.runtime import Runtime, Solo
from sae.model import SAE
from sae.preprocess import PreprocessConfig
from sae.preprocess import run as preprocess

SHARED = {"W_enc", "W_dec", "b_enc", "b_pre"}
ALONE = Runtime(0, 1, torch.device("cpu"), Solo())
SITE = "layers.1.resid_post"


@dataclass(frozen=True, kw_only=True)
class MadeUpConfig(StageConfig):
    chunk_sentences: int = 8


def make_activations(
    folder: Path,
    rows: Tensor,
    lengths: Sequence[int],
    document_ids: Sequence[int] | None = None,
    chunk_sentences: int = 8,
    token_ids: Tensor | None = None,
) -> Path:
    """An activations folder: sentence i has `lengths[i]` of the `rows` [N, d] and is of `document_ids[i]`, else of i // 2.

    Tokens are numbered through the whole folder where `token_ids` [N] are not given, so that no two sentences are the same.
    """
    assert sum(lengths) == len(rows)
    documents = torch.tensor(document_ids if document_ids is not None else [i // 2 for i in range(len(lengths))])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.arange(len(rows)) if token_ids is None else token_ids
    provenance = {
        "model_hash": "m", "tokenizer_hash": "t", "sites": [SITE], "d_model": rows.shape[1], "bos": "none", "max_length": 128,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[rows.dtype], "corpus_hash": "c", "model": "tiny",
    }  # fmt: skip
    with building(
        folder, "activations", MadeUpConfig(chunk_sentences=chunk_sentences), ALONE, provenance=provenance
    ) as builder:
        names = []
        for index, first in enumerate(range(0, len(lengths), chunk_sentences)):
            last = min(first + chunk_sentences, len(lengths))
            own = rows[starts[first] : starts[last]]
            tensors = {
                "activations": own.contiguous(),
                "token_ids": tokens[starts[first] : starts[last]].int(),
                "sentence_ids": torch.arange(first, last),
                "document_ids": documents[first:last].clone(),
                "offsets": starts[first : last + 1] - starts[first],
            }
            names.append(f"{SITE}/chunk-{index:06d}.safetensors")
            builder.publish(names[-1], safetensors.torch.save(tensors), rows=len(own))
        builder.finish(names, {"sentences": len(lengths), "tokens": len(rows)})
    return folder


def make_batches(folder: Path, rows: Tensor, batch_rows: int = 64, validation_fraction: float = 0.1) -> Path:
    """A batches folder of `rows` [N, d], ten to a sentence, three sentences to a document."""
    lengths = [10] * (len(rows) // 10) + ([len(rows) % 10] if len(rows) % 10 else [])
    documents = [i // 3 for i in range(len(lengths))]
    activations = make_activations(folder / "activations", rows, lengths, documents)
    preprocess(
        PreprocessConfig(
            activations=activations,
            out=folder / "batches",
            batch_rows=batch_rows,
            validation_fraction=validation_fraction,
            max_norm_ratio=0,
        ),
        ALONE,
    )
    return folder / "batches"


def own_tensors(sae: SAE) -> list[Tensor]:
    """Those that not every architecture has, in order of name."""
    return [tensor for name, tensor in sorted(sae.state_dict().items()) if name not in SHARED]


def sparse_rows(n_rows: int, d: int, n_directions: int, active: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [n_rows, d], each the sum of `active` of `n_directions` random unit directions times 1 to 2; and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_directions, d, generator=generator), dim=1)
    which = torch.rand(n_rows, n_directions, generator=generator).topk(active).indices
    weights = torch.zeros(n_rows, n_directions).scatter(1, which, 1 + torch.rand(n_rows, active, generator=generator))
    return weights @ directions, directions
