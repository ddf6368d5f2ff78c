"""Everything that inference needs, loaded once and checked to belong together: model, tokenizer, SAE, top sentences, labels.

A session is read by all requests and changed by none.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import llama3
from core.cli import StageConfig, machine
from inference.steering import Steering
from interpretability.records import Explanation, TopSentences
from interpretability.search import check_sae, open_explanations_of, open_top_of
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer
from sae.model import SAE
from sae.model import load as load_sae

log = logging.getLogger("inference")

EMBEDDED = Path(llama3.__file__).parent.parent / "demo"
"""The folder that ships beside the packages: `model/`, `sae/`, `top/`, `explanations/`."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(StageConfig):
    """Flags that say which model to run and which features to use with it."""

    model: str = "demo"
    """Folder in Meta's or Hugging Face's layout, a Hub id, or demo: the embedded model."""
    sae: Path | None = machine(None)
    """Folder of an SAE (run/sae). None: the embedded one with --model demo, no steering with other models."""
    top: Path | None = machine(None)
    """Top sentences of that SAE, where the maxima of its latents are read. None: the embedded ones with --model demo."""
    explanations: Path | None = machine(None)
    """Explanations of its latents. None: the embedded ones with --model demo, else latents go by number."""

    def __post_init__(self) -> None:
        if self.top is not None and self.sae is None and self.model != "demo":
            raise ValueError("--top: its SAE is missing; give --sae too")
        if self.explanations is not None and self.top is None and self.model != "demo":
            raise ValueError("--explanations: the top sentences they explain are missing; give --top too")


@dataclass(frozen=True)
class Features:
    """An SAE with what is known of its latents."""

    sae: SAE
    site: str
    top: TopSentences
    explanations: Mapping[int, Explanation]
    best_strengths: Mapping[int, float] = field(default_factory=dict)
    """Strengths at which latents were measured to steer best, in multiples of their maximum; the strongest effect first."""

    @cached_property
    def steering(self) -> Steering:
        return Steering(self.sae, self.site, self.max_values)

    @cached_property
    def max_values(self) -> Tensor:
        """[n_latents] largest value of each latent on the corpus, 0 where it never fired."""
        return torch.tensor(self.top.max_values, dtype=torch.float32, device=self.sae.W_dec.device)

    @property
    def n_latents(self) -> int:
        return int(self.sae.W_dec.shape[0])

    def label(self, latent: int) -> str:
        """The title of its explanation, or an empty string."""
        explanation = self.explanations.get(latent)
        return explanation.title.strip() if explanation is not None and explanation.state == "valid" else ""


@dataclass(frozen=True)
class Session:
    """A model with its tokenizer and, where there are any, features to read and steer."""

    model: Transformer
    tokenizer: Tokenizer
    name: str
    """How the model is called in pages and logs."""
    features: Features | None = None

    @property
    def context(self) -> int:
        """Longest sequence in tokens, prompt and answer together."""
        return self.model.params.max_seq_len

    def needs_features(self) -> Features:
        """The features; ValueError where none were loaded."""
        if self.features is None:
            raise ValueError("no SAE is loaded; steering and watching need --sae and --top")
        return self.features

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> "Reading":
        """What the unsteered model's activations at the SAE's site say on `ids` (T token ids)."""
        features = self.needs_features()
        tokens = torch.tensor([list(ids)], device=self.model.device)
        x = self.model.capture(tokens, sites=[features.site])[features.site][0]  # (T, D)
        latents = features.sae.encode(x.float())
        return Reading(latents.values.cpu(), latents.indices.cpu())


@dataclass(frozen=True)
class Reading:
    """Latents that fire on one text: `values`, `indices` [T, K], padded with value 0."""

    values: Tensor
    indices: Tensor

    def of(self, latent: int) -> list[float]:
        """The value of one latent at each of the T tokens."""
        return [float(v) for v in (self.values * (self.indices == latent)).sum(1)]


def open_session(config: InferenceConfig, device: torch.device) -> Session:
    """Load what `config` names; ValueError where a part is missing or does not belong to the others, with both values."""
    tokenizer = llama3.load_tokenizer(config.model)  # first: it takes a moment, and says so where it does not fit the model
    model = llama3.load_model(config.model, device=device)
    model.eval()
    name = "embedded model" if config.model == "demo" else Path(config.model).name or config.model
    return Session(model, tokenizer, name, open_features(config, model, tokenizer, device))


def open_features(config: InferenceConfig, model: Transformer, tokenizer: Tokenizer, device: torch.device) -> Features | None:
    """The SAE, top sentences and explanations of `config`, or None where it names none."""
    paths = {name: getattr(config, name) for name in ("sae", "top", "explanations")}
    if config.sae is None and config.model == "demo":
        paths = {name: path or EMBEDDED / name for name, path in paths.items()}
        if not paths["sae"].is_dir():
            log.info("no features: %s holds no SAE; `python -m demo` makes one, or give --sae", EMBEDDED)
            return None
    if paths["sae"] is None:
        return None
    if paths["top"] is None:
        raise ValueError(f"--top is missing: the maxima of the latents of {paths['sae']}, the unit of steering, are read there")
    return _checked(paths, model, tokenizer, device)


def _checked(paths: Mapping[str, Path | None], model: Transformer, tokenizer: Tokenizer, device: torch.device) -> Features:
    assert paths["sae"] is not None
    assert paths["top"] is not None
    autoencoder = load_sae(paths["sae"], device)
    site = check_sae(autoencoder, paths["sae"], model, tokenizer)
    top = open_top_of(autoencoder, paths["top"])
    explanations = open_explanations_of(autoencoder, paths["explanations"]) if paths["explanations"] is not None else {}
    log.info("%s: %d latents at %s, %d with a label", paths["sae"], len(top.max_values), site, len(explanations))
    return Features(autoencoder, site, top, explanations)
