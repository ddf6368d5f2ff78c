"""What inference reads, made in a second and without the stages: an SAE of a model, its top sentences and its explanations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from core.artifact import building
from core.runtime import Runtime, Solo
from interpretability.records import (
    EXPLANATIONS_FILE,
    HISTOGRAM_BINS,
    HISTOGRAM_FIRST_EXPONENT,
    LATENT_SCHEMA,
    LATENTS_FILE,
    TOP_FILE,
    TOP_SCHEMA,
    Explanation,
    compressed,
    explanation_lines,
    parquet_bytes,
)
from llama3 import load_model, load_tokenizer
from sae import SAE, SAEConfig

SENTENCES = (
    "the storm tore the roof from the barn",
    "rain fell on the harbour all night",
    "she read the letter twice and wept",
    "the king was buried in the old church",
    "add the onions and stir the soup",
    "the train reached the bridge at noon",
    "he counted the stars over the sea",
    "the vote was close and the town was restless",
)
LABELS = ("storms at sea", "grief and letters", "kitchens", "railway bridges", "kings of old", "the night sky", "town votes")


class Features(NamedTuple):
    """Paths of what `inference` reads."""

    model: Path
    sae: Path
    top: Path
    explanations: Path

    @property
    def flags(self) -> list[str]:
        return flags_of(self)


def flags_of(*runs: Features) -> list[str]:
    """The command line for the SAEs of `runs`, which share a model."""
    named = {name: [str(getattr(run, name)) for run in runs] for name in ("sae", "top", "explanations")}
    return ["--model", str(runs[0].model), *(part for name, paths in named.items() for part in (f"--{name}", *paths))]


@dataclass(frozen=True)
class Config:
    """Stands in for the flags of the stages that would write these folders."""

    aggregations: tuple[str, ...] = ("max",)


def alone() -> Runtime:
    return Runtime(0, 1, torch.device("cpu"), Solo())


def tiny_sae(model_path: Path, site: str, n_latents: int = 48, k: int = 6, seed: int = 0, norm: str = "dataset") -> SAE:
    """A random SAE fitted to the size of a model's activations at `site`, with the provenance that training would write."""
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    x = torch.cat([model.capture(torch.tensor([tokenizer.encode(s)]), sites=[site])[site][0, 1:] for s in SENTENCES])
    scale = float(x.shape[1] ** 0.5 / x.norm(dim=1).mean()) if norm == "dataset" else 1.0
    provenance = {
        "model_hash": model.weights_hash, "tokenizer_hash": tokenizer.hash, "site": site, "dtype": "fp32", "bos": "none"
    }  # fmt: skip
    sae = SAE(
        SAEConfig(d_model=model.width(site), n_latents=n_latents, k=k, norm=norm, scale=scale, provenance=provenance)
    ).requires_grad_(False)
    sae.initialise_(generator=torch.Generator().manual_seed(seed))
    sae.b_pre.copy_(sae.normalise(x).z.mean(0))
    return sae


def write_features(folder: Path, model_path: Path, sae: SAE, sentences: Sequence[str] = SENTENCES) -> Features:
    """Write the SAE, its top sentences on `sentences` and explanations into `folder`."""
    sae.save(folder / "sae")
    provenance = sae.cfg.provenance | {"sae_hash": sae.weights_hash, "n_latents": sae.cfg.n_latents}
    top, latents, n_tokens = _top_rows(model_path, sae, sentences)
    with building(folder / "top", "top_sentences", Config(), alone(), provenance=provenance) as builder:
        builder.publish(TOP_FILE, parquet_bytes(TOP_SCHEMA, [pa.Table.from_pylist(top, TOP_SCHEMA)]))
        builder.publish(LATENTS_FILE, parquet_bytes(LATENT_SCHEMA, [pa.Table.from_pylist(latents, LATENT_SCHEMA)]))
        builder.finish([TOP_FILE, LATENTS_FILE], {"tokens": n_tokens, "sentences": len(sentences)})
    explained = [
        Explanation(row["latent"], f"{LABELS[i % len(LABELS)]}", f"about {LABELS[i % len(LABELS)]}", "token_statistics", "",
                    "valid", score=0.95 - i / 100)
        for i, row in enumerate(row for row in latents if row["max"] > 0)
    ]  # fmt: skip
    with building(folder / "explanations", "explanations", SimpleConfig(), alone(), provenance=provenance) as builder:
        builder.publish(EXPLANATIONS_FILE, compressed(explanation_lines(explained)))
        builder.finish([EXPLANATIONS_FILE], {"explanations": len(explained)})
    return Features(model_path, folder / "sae", folder / "top", folder / "explanations")


@dataclass(frozen=True)
class SimpleConfig:
    """No flags."""


def _top_rows(model_path: Path, sae: SAE, sentences: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Rows of both Parquet files by brute force: the dense activations of every sentence."""
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    site = sae.cfg.provenance["site"]
    dense = []
    for sentence in sentences:
        ids = tokenizer.encode(sentence)
        found = sae.encode(model.capture(torch.tensor([ids]), sites=[site])[site][0])
        values = torch.zeros(len(ids), sae.cfg.n_latents).scatter_add(1, found.indices, found.values)
        values[0] = 0  # the attention sink
        dense.append(SimpleNamespace(text=sentence, tokens=tokenizer.pieces(ids), values=values))
    everything = torch.cat([d.values for d in dense])
    top, latents = [], []
    for latent in range(sae.cfg.n_latents):
        column = everything[:, latent]
        fires = column[column > 0]
        bins = (fires.log2().floor() - HISTOGRAM_FIRST_EXPONENT).clamp(0, HISTOGRAM_BINS - 1).long()
        best = sorted(range(len(dense)), key=lambda i: (-float(dense[i].values[:, latent].max()), i))
        shown = [i for i in best if float(dense[i].values[:, latent].max()) > 0]
        for rank, i in enumerate(shown[:20]):
            values = dense[i].values[:, latent]
            top.append({
                "latent": latent, "aggregation": "max", "rank": rank, "value": float(values.max()), "sentence_id": i,
                "document": f"document {i}", "label": None, "text": dense[i].text, "tokens": dense[i].tokens,
                "activations": values.tolist(),
            })  # fmt: skip
        latents.append({
            "latent": latent, "firing_count": len(fires), "sentence_count": len(shown), "max": float(column.max()),
            "mean": float(fires.mean()) if len(fires) else 0.0, "density": len(fires) / len(column),
            "histogram": torch.bincount(bins, minlength=HISTOGRAM_BINS).tolist(),
            "promoted": [" rain", " storm"], "suppressed": [" dry"],
        })  # fmt: skip
    return top, latents, len(everything)
