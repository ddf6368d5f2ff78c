"""An evaluation in the shape of SAEBench's "core" results (github.com/adamkarvonen/SAEBench), for tools that read those.

Its names stand for our figures; what it does differently is in docs/metrics.md. Where it counts batches, we count tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch

from core.version import VERSION
from sae.accumulator import Accumulator
from sae.config import SAEConfig
from sae.evaluating.figures import Figure
from sae.evaluating.weights import WeightFigures

RESULTS = {
    "model_behavior_preservation": {"kl_div_with_ablation": "kl_zero", "kl_div_with_sae": "kl"},
    "model_performance_preservation": {
        "ce_loss_score": "ce_recovered",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance",
        "explained_variance_legacy": "explained_variance_legacy",
        "mse": "mse",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_norm_in": "norm",
        "l2_norm_out": "norm_hat",
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
    },
    "sparsity": {"l0": "l0", "l1": "l1"},
    "misc_metrics": {
        "freq_over_1_percent": "over_1_percent",
        "freq_over_10_percent": "over_10_percent",
        "normalized_freq_over_1_percent": "firing_over_1_percent",
        "normalized_freq_over_10_percent": "firing_over_10_percent",
        "average_max_encoder_cosine_sim": "max_encoder_cosine",
        "average_max_decoder_cosine_sim": "max_decoder_cosine",
    },
}
"""Their categories, their names, and ours."""


def core_results(
    found: Mapping[str, Figure], accumulated: Accumulator, weights: WeightFigures, cfg: SAEConfig, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole file as JSON values. The time is 0: what is written depends on the inputs alone."""
    values = {name: figure.record()["value"] for name, figure in found.items()}
    metrics = {category: {theirs: values.get(ours) for theirs, ours in names.items()} for category, names in RESULTS.items()}
    zero, sae = values.get("kl_zero"), values.get("kl")
    metrics["model_behavior_preservation"]["kl_div_score"] = (zero - sae) / zero if zero and sae is not None else None
    metrics["misc_metrics"]["frac_alive"] = 1 - (values["dead_fraction"] or 0.0)
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": conditions["predicted_tokens"],
        "total_tokens_eval_sparsity_variance": conditions["tokens"],
    }
    return {
        "eval_type_id": "core",
        "eval_config": {**conditions, "llm_dtype": conditions["model_dtype"], "model_name": conditions["model"]},
        "eval_id": conditions["sae_hash"],
        "datetime_epoch_millis": 0,
        "eval_result_metrics": metrics,
        "eval_result_details": _details(accumulated, weights),
        "eval_result_unstructured": {},
        "sae_bench_commit_hash": "",
        "sae_lens_id": conditions["site"],
        "sae_lens_release_id": "llama3-sae",
        "sae_lens_version": f"llama3-sae {VERSION}",
        "sae_cfg_dict": {"architecture": cfg.architecture, "d_in": cfg.d_model, "d_sae": cfg.n_latents, "k": cfg.k},
    }


def _details(accumulated: Accumulator, weights: WeightFigures) -> list[dict[str, Any]]:
    """One record for each latent."""
    fired, sentences = accumulated.firing_counts.double(), accumulated.total("fired_sentences")
    columns = {
        "feature_density": fired / max(1, accumulated.tokens),
        "consistent_activation_heuristic": torch.where(sentences > 0, fired / sentences.clamp(min=1), 0),
        "encoder_bias": weights.encoder_bias,
        "encoder_norm": weights.encoder_norm,
        "encoder_decoder_cosine_sim": weights.encoder_decoder_cosine,
        "max_encoder_cosine_sim": weights.max_encoder_cosine.nan_to_num(),
        "max_decoder_cosine_sim": weights.max_decoder_cosine.nan_to_num(),
    }
    rounded = {name: [round(value, 6) for value in column.tolist()] for name, column in columns.items()}
    return [{"index": i} | {name: column[i] for name, column in rounded.items()} for i in range(len(fired))]
