"""Small folders of every kind that interpretability reads, made through core.artifact in the layout that the stages write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from capture.store import open_activations, open_corpus
from core.artifact import building, open_artifact
from core.cli import StageConfig
from core.runtime import Runtime, Solo
from llama3 import load_model, load_tokenizer
from sae.model import SAE, SAEConfig
from tests.tiny import tiny_llama

SITE = "layers.1.resid_post"
WORDS = (
    "soldier",
    "river",
    "bread",
    "the",
    "of",
    "and",
    "war",
    "winter",
    "naïve",
    "日本",
    "42",
    "1980",
    "runs",
    "🙂",
    "at",
    "in",
)


class Folders(NamedTuple):
    """The inputs of `interpretability.top_sentences`."""

    model: Path
    corpus: Path
    activations: Path
    sae: Path

    def flags(self) -> list[str]:
        names = zip(("model", "corpus", "activations", "sae"), self, strict=True)
        return [part for name, path in names for part in (f"--{name}", str(path))]


def solo() -> Runtime:
    return Runtime(0, 1, torch.device("cpu"), Solo())


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def random_texts(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest + 1))) + "." for _ in range(n)]


def make_corpus(path: Path, texts: Sequence[str], labels: Sequence[str | None] | None = None, per_document: int = 7) -> Path:
    """A corpus folder in two files; a document every `per_document` sentences."""
    n = len(texts)
    document_ids = np.arange(n) // per_document
    half = (n + 1) // 2
    with building(path, "corpus", StageConfig(), solo()) as builder:
        columns = {
            "sentence_id": pa.array(np.arange(n)),
            "document_id": pa.array(document_ids),
            "text": pa.array(texts, pa.string()),
            "label": pa.array(labels or [None] * n, pa.string()),
        }
        table = pa.table(columns)
        names = [f"sentences-{i:05d}.parquet" for i in range(2)]
        for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
            builder.publish(name, parquet(part), rows=len(part))
        documents = pa.table(
            {
                "document_id": pa.array(np.unique(document_ids)),
                "name": [f"book.{i}" for i in np.unique(document_ids)],
                "source": ["test"] * len(np.unique(document_ids)),
            }
        )
        builder.publish("documents.parquet", parquet(documents), rows=len(documents))
        builder.finish([*names, "documents.parquet"], {"sentences": n, "documents": len(documents)})
    return path


@dataclass(frozen=True, kw_only=True)
class ChunkConfig(StageConfig):
    chunk_sentences: int


def make_activations(path: Path, corpus: Path, model: Path, rows: torch.Tensor | None, chunk_sentences: int) -> Path:
    """An activations folder for SITE. `rows` [n_tokens, d_model] are stored as they are; None: what the model computes."""
    texts, tokenizer, llama = open_corpus(corpus), load_tokenizer(model), load_model(model)
    n = texts.n_sentences
    token_ids = [tokenizer.encode(text) for text in texts.texts(range(n))]
    if rows is None:
        with torch.inference_mode():
            rows = torch.cat([llama.capture(torch.tensor([ids]), [SITE])[SITE][0] for ids in token_ids])
    lengths = torch.tensor([len(ids) for ids in token_ids])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    provenance = {
        "model_hash": llama.weights_hash,
        "tokenizer_hash": tokenizer.hash,
        "sites": [SITE],
        "d_model": rows.shape[1],
        "dtype": "fp32",
        "bos": "none",
        "max_length": 128,
        "corpus_hash": texts.manifest_hash,
        "model": model.name,
    }
    config = ChunkConfig(chunk_sentences=chunk_sentences)
    with building(path, "activations", config, solo(), [open_artifact(corpus, "corpus")], provenance) as builder:
        names = []
        for index, first in enumerate(range(0, n, chunk_sentences)):
            last = min(n, first + chunk_sentences)
            names.append(f"{SITE}/chunk-{index:06d}.safetensors")
            tensors = {
                "activations": rows[ends[first] : ends[last]].clone(),
                "token_ids": torch.tensor([i for ids in token_ids[first:last] for i in ids], dtype=torch.int32),
                "sentence_ids": torch.arange(first, last),
                "document_ids": torch.tensor(texts.document_ids(range(first, last))),
                "offsets": ends[first : last + 1] - ends[first],
            }
            builder.publish(names[-1], safetensors.torch.save(tensors), rows=int(ends[last] - ends[first]))
        builder.finish(names, {"sentences": n, "tokens": int(ends[-1])})
    return path


def make_sae(path: Path, activations: Path, n_latents: int, k: int, **provenance: object) -> Path:
    """An SAE whose encoder is exact in float32 on rows of small integers; its last two latents can never fire."""
    found = open_activations(activations, SITE).provenance | provenance
    cfg = SAEConfig(d_model=found["d_model"], n_latents=n_latents, k=k, norm="none", provenance=found)
    sae = SAE(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.initialise_(generator=generator)
        sae.W_enc.copy_((torch.randn(sae.W_enc.shape, generator=generator) * 4).round() / 8)
        sae.W_enc[-2:], sae.b_enc[-2:] = 0, -1
    sae.save(path)
    return path


def make_folders(
    root: Path, texts: Sequence[str], integers: bool = True, n_latents: int = 64, k: int = 6, chunk_sentences: int = 16
) -> Folders:
    """A tiny model, a corpus of `texts`, its activations (small integers with many repeats, or the model's), and an SAE."""
    model = tiny_llama(root / "model")
    corpus = make_corpus(root / "corpus", texts, [f"topic {i % 3}" if i % 2 else None for i in range(len(texts))])
    rows = None
    if integers:
        tokenizer = load_tokenizer(model)
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        generator = torch.Generator().manual_seed(2)
        prototypes = torch.randint(-2, 3, (400, 32), generator=generator).float()
        rows = prototypes[torch.randint(0, 400, (n_tokens,), generator=generator)]
    activations = make_activations(root / "activations", corpus, model, rows, chunk_sentences)
    return Folders(model, corpus, activations, make_sae(root / "sae", activations, n_latents, k))
