"""The path of the demo as command lines: which stages, on which text, with which flags."""

import json
from dataclasses import dataclass
from pathlib import Path

from core.shipped import Shipped
from demo.chain import Stage
from demo.corpus import all_passages, documents, write_documents


@dataclass(frozen=True)
class Scale:
    """The sizes of one version of the demo."""

    units: int
    """Sentences or passages cut from the text, at most; 0: all."""
    passage: int
    """Length of a passage in tokens; 0: single sentences."""
    packages: tuple[str, ...]
    """Packages whose documentation joins the embedded corpus."""
    n_latents: int
    k: int
    epochs: int
    evaluated: int
    """Sentences."""
    tried: int
    """Features among which the showcase chooses."""


FULL = Scale(0, 0, ("python", "numpy", "networkx", "sympy", "torch"), 4096, 32, epochs=2, evaluated=1000, tried=40)
QUICK = Scale(9000, 0, ("python",), 1024, 16, epochs=2, evaluated=400, tried=40)
REAL = Scale(300, 128, (), 4096, 32, epochs=1, evaluated=20, tried=6)
"""With a real model, whose SAE ships and is trained further, on passages as long as those it was trained on; its latents and k
hold in place of those here."""

FROM_SCRATCH = ("--lr", "1e-3", "--lr-end", "1e-4", "--warmup-steps", "50")
FURTHER = ("--lr", "1e-4", "--lr-end", "1e-5", "--warmup-steps", "10", "--batch-size", "512")


@dataclass(frozen=True)
class Plan:
    """What to run, with everything decided."""

    model: str
    scale: Scale
    out: Path
    source: str
    """Of the user's text; empty: the embedded corpus."""
    site: str
    threads: int
    base: Shipped | None
    """The SAE to train further; None: a fresh one is trained."""

    def stages(self) -> list[Stage]:
        """In order, each reading what those before it wrote."""
        return [*self._to_batches(), *self._sae(), *self._features()]

    def _to_batches(self) -> list[Stage]:
        out, most, passage = self.out, self.scale.units, self.scale.passage
        unit = ("--unit", "passage", "--tokens", str(passage), "--tokenizer", self.model) if passage else ()
        cut = ("--deduplicate", *unit, *(("--max-sentences", str(most)) if most else ()))
        source = ("--source", self.source or str(self.documents), *cut)
        corpus = ("--corpus", str(out / "corpus"))
        acts = ("--activations", str(out / "activations"))
        site = ("--sites", self._site) if self._site else ()
        chunk = ("--chunk-sentences", "128") if passage else ()
        return [
            Stage(
                "Cut the text into passages" if passage else "Cut the text into sentences",
                "capture.sentences",
                source,
                out / "corpus",
            ),
            Stage(
                "Run the model, keep the residual stream",
                "capture.activations",
                (*self._model, *corpus, *site, *chunk, *self._threads),
                out / "activations",
            ),
            Stage("Shuffle the activations, measure mean and norm", "sae.preprocess", (*acts, *self._threads), out / "batches"),
        ]

    def _sae(self) -> list[Stage]:
        out, scale = self.out, self.scale
        title = "Train the SAE that ships further" if self.base else "Train a sparse autoencoder"
        epochs = ("--epochs", str(scale.epochs), "--dead-after-tokens", "200000", "--wandb", "off", *self._threads)
        evaluated = ("--sentences", str(scale.evaluated), *self._threads)
        return [
            Stage(title, "sae.train", ("--batches", str(out / "batches"), *self._shape, *epochs), out / "run"),
            Stage(
                "Evaluate it inside the model",
                "sae.evaluate",
                (*self._sae_flag, *self._model, "--corpus", str(out / "corpus"), *evaluated),
                out / "evaluation",
            ),
        ]

    def _features(self) -> list[Stage]:
        out = self.out
        corpus, top = ("--corpus", str(out / "corpus")), ("--top", str(out / "top"))
        read = (*self._sae_flag, "--activations", str(out / "activations"), *corpus, *self._model)
        shown = (
            "--explanations",
            str(out / "explanations"),
            "--run",
            str(out / "run"),
            "--evaluation",
            str(out / "evaluation"),
        )
        return [
            Stage(
                "Find the sentences that fire each latent most",
                "interpretability.top_sentences",
                (*read, "--n", "20", *self._threads),
                out / "top",
            ),
            Stage("Explain each latent", "interpretability.explain run", (*top, *corpus), out / "explanations"),
            Stage("Write the report", "interpretability.report", (*top, *shown), out / "report"),
        ]

    @property
    def documents(self) -> Path:
        return self.out / "documents.jsonl"

    def write_documents(self) -> int:
        """The embedded corpus as the source of the first stage; returns the number of documents, 0 where they are there."""
        if self.documents.exists():
            return 0
        return write_documents(self.documents, all_passages() if self.base else documents(self.scale.packages), bool(self.base))

    @property
    def _model(self) -> tuple[str, ...]:
        return ("--model", self.model)

    @property
    def _threads(self) -> tuple[str, ...]:
        return ("--threads", str(self.threads)) if self.threads else ()

    @property
    def _sae_flag(self) -> tuple[str, ...]:
        return ("--sae", str(self.out / "run" / "sae"))

    @property
    def _base_config(self) -> dict[str, object]:
        assert self.base
        return dict(json.loads((self.base.sae / "cfg.json").read_text(encoding="utf-8")))

    @property
    def _site(self) -> str:
        if self.site or not self.base:
            return self.site
        provenance = self._base_config["provenance"]
        assert isinstance(provenance, dict)
        return str(provenance["site"])

    @property
    def _shape(self) -> tuple[str, ...]:
        if not self.base:
            return ("--n-latents", str(self.scale.n_latents), "--k", str(self.scale.k), *FROM_SCRATCH)
        cfg = self._base_config
        names = ("architecture", "n_latents", "k", "norm")
        same = [part for name in names for part in (f"--{name.replace('_', '-')}", str(cfg[name]))]
        return ("--init-from", str(self.base.sae), *same, *FURTHER)
