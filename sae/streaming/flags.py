"""The flags of training while the model runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.cli import machine


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """What decides which rows the model gives."""

    model: str = ""
    """Instead of --batches: train while this model runs over --corpus. A folder, a .gguf file, a Hub
    id, ollama:NAME, smollm2 or demo."""
    corpus: Path | None = None
    """With --model: a corpus folder, from capture.sentences."""
    site: str = ""
    """With --model: the site whose rows are learned. Empty: resid_post at 5/6 of the depth."""
    storage: Literal["bf16", "fp32"] = "bf16"
    """With --model: type of the rows in the buffer, as --storage of capture.activations."""
    bos: Literal["auto", "feed", "none"] = "auto"
    """With --model: feed the BOS token before each sentence, whose row is not learned. auto: as the
    model was trained."""
    max_length: int = 192
    """With --model: tokens after which a sentence is cut."""
    chunk_sentences: int = 2048
    """With --model: sentences of a chunk, which goes through the model as a whole. Chunks come in a
    random order."""
    batch_tokens: int = 8192
    """With --model: slots of one forward pass, padding included."""
    max_padding: float = 0.05
    """With --model: a batch of sentences ends early rather than hold a greater share of padding."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """With --model: on NaN or Inf, stop, or give the sentence no rows."""
    statistics_sentences: int = 16_384
    """With --model: sentences, in whole chunks, that mean, norm, variance and the number of rows are
    taken from before training; their held-out documents are the validation rows. The error of
    E||x|| and of b_pre falls with the square root of their number."""
    validation_fraction: float = 0.05
    """With --model: share of documents held out, chosen by hash of document id and --rows-seed; 0:
    none."""
    max_norm_ratio: float = 10.0
    """With --model: rows with a norm above this many times the median norm of the first chunk are
    left out (attention sinks); 0: keep all."""

    def __post_init__(self) -> None:
        positive = ("max_length", "chunk_sentences", "batch_tokens", "statistics_sentences")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: expected at least 1")
        for name in ("validation_fraction", "max_padding"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: expected a share in [0, 1)")
        if not self.max_norm_ratio >= 0:
            found = self.max_norm_ratio
            raise ValueError(f"--max-norm-ratio {found}: expected 0 (keep all) or more")


@dataclass(frozen=True, kw_only=True)
class StreamFlags(ModelRows):
    """And how many of them wait."""

    buffer_rows: int = 2**20
    """With --model: rows that wait, out of which each batch is drawn at random. All ranks that share
    out rows hold one buffer together."""
    buffer_on: Literal["device", "host"] = machine("device")
    """With --model: where the buffer lies: on the GPU, or in pinned memory of the host."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_rows < 1:
            raise ValueError(f"--buffer-rows {self.buffer_rows}: expected at least 1")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
