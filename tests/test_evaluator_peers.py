"""Our figures beside those of SAELens' and dictionary_learning's own evaluators, on the same tokens: docs/metrics.md.

With `pytest -m peers`, where benchmarks/requirements.txt is installed. They expect TransformerLens' model and their own SAEs:
stand-ins have the interface that they use, and our model and SAE behind it.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama3 import Transformer, load_model, load_tokenizer
from sae.evaluate import evaluate_batch
from sae.evaluating.contenders import of_sae
from sae.evaluating.figures import figures_of
from sae.evaluating.subject import Batch, Subject
from sae.model import SAE, Latents, SAEConfig
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SITE, TOLERANCE = "layers.1.resid_post", 1e-3


class TheirSAE:
    """Our SAE with dense latents, under the names that both libraries use."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.device = sae, "cpu"
        self.cfg = SimpleNamespace(d_sae=sae.cfg.n_latents, metadata=SimpleNamespace(hook_name=SITE, hook_head_index=None))
        self.dict_size, self.activation_dim = sae.cfg.n_latents, sae.cfg.d_model

    def encode(self, x: Tensor) -> Tensor:
        values, indices = self.sae.encode(x)
        return torch.zeros(*x.shape[:-1], self.dict_size).scatter_add_(-1, indices, values)

    def decode(self, latents: Tensor) -> Tensor:
        return self.sae.decode(Latents(*latents.topk(self.sae.cfg.k)))

    def __call__(self, x: Tensor, output_features: bool = False) -> tuple[Tensor, Tensor]:
        latents = self.encode(x)
        return self.decode(latents), latents


class TheirModel:
    """Our model with the calls of a HookedTransformer."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        return None, self.model.capture(tokens, [SITE])

    def __call__(self, tokens: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens)
        return logits, F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any, **_: Any) -> tuple[Tensor, Tensor]:
        with self.model.hooks({site: lambda x, hook=hook: hook(x, hook=None) for site, hook in fwd_hooks}):
            return self(tokens)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our figures, and what they were taken from: model, SAE and tokens of equal length."""
    folder = tiny_llama(tmp_path_factory.mktemp("model") / "m", seed=5)
    model, tokens = load_model(folder), torch.randint(5, 200, (20, 16), generator=torch.Generator().manual_seed(0))
    sae = SAE(SAEConfig(d_model=32, n_latents=64, k=4, norm="none", provenance={"site": SITE})).requires_grad_(False)
    sae.b_pre.add_(0.1)
    subject = Subject(sae, model, load_tokenizer(folder), batch_tokens=320)
    contender = of_sae("sae", sae)
    sums = contender.sums(1)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(20, dtype=torch.long))
    with torch.inference_mode():
        evaluate_batch(subject, batch, [contender], torch.zeros(32), {"sae": sums})
    return {"ours": figures_of(sums, 0, 0), "model": model, "sae": TheirSAE(sae), "tokens": tokens}


def test_saelens_agrees(found: dict[str, Any]) -> None:
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    store: Any = SimpleNamespace(get_batch_tokens=lambda _: found["tokens"])
    common: Any = {"activation_scaler": ActivationScaler(), "n_batches": 1, "eval_batch_size_prompts": 20}
    with torch.no_grad():
        theirs, _ = get_sparsity_and_variance_metrics(
            found["sae"], TheirModel(found["model"]), store, **common, compute_l2_norms=True, compute_sparsity_metrics=True,  # type: ignore[arg-type]
            compute_variance_metrics=True, compute_featurewise_density_statistics=True, model_kwargs={},
        )  # fmt: skip
        losses = get_downstream_reconstruction_metrics(
            found["sae"], TheirModel(found["model"]), store, **common, compute_kl=True, compute_ce_loss=True  # type: ignore[arg-type]
        )  # fmt: skip
    for name, ours in {
        "explained_variance": "explained_variance",
        "explained_variance_legacy": "explained_variance_legacy",
        "l0": "l0",
        "l1": "l1",
        "mse": "mse",
        "cossim": "cosine",
        "l2_ratio": "l2_ratio",
        "l2_norm_in": "norm",
        "l2_norm_out": "norm_hat",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
        "ce_loss_without_sae": "ce_clean",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_score": "ce_recovered",
    }.items():
        assert found["ours"][ours].value == pytest.approx((theirs | losses)[name], rel=TOLERANCE), name
    # Theirs counts the last position too, at which nothing is predicted: with 16 positions it cannot agree to the digit.
    assert found["ours"]["kl"].value == pytest.approx(losses["kl_div_with_sae"], rel=0.1)


def test_dictionary_learning_agrees_but_for_a_constant_error(found: dict[str, Any]) -> None:
    from dictionary_learning.evaluation import evaluate

    x = found["model"].capture(found["tokens"], [SITE])[SITE].flatten(0, 1)
    with torch.no_grad():
        theirs = evaluate(found["sae"], iter([x]))
        error = x - found["sae"](x)[0]
    for name, ours in {
        "l0": "l0", "cossim": "cosine", "l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias",
    }.items():  # fmt: skip
        assert found["ours"][ours].value == pytest.approx(theirs[name], rel=TOLERANCE), name
    spread = (x - x.mean(0)).square().sum(1).mean()
    constant = float(error.mean(0).square().sum() / spread)
    assert constant > TOLERANCE
    assert theirs["frac_variance_explained"] - found["ours"]["explained_variance"].value == pytest.approx(
        constant, abs=TOLERANCE
    )
