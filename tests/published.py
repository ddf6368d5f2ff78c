"""Small SAEs in the layouts of published ones, written key by key, each with the formula of the library that wrote it.

d 12, 40 latents. The formulas take raw rows and give latents and reconstructions, as the slow twin of a reader.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

D, N, K = 12, 40, 4
IN, OUT = 7.0, 9.0  # average norms of rows read and written
A, O = D**0.5 / IN, D**0.5 / OUT  # noqa: E741
Computed = tuple[Tensor, Tensor]


def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"threshold": torch.rand(N, generator=generator) + 0.5}


T = drawn()
LINEAR = {"encoder.weight": T["W_enc"], "encoder.bias": T["b_enc"], "decoder.weight": T["W_dec"].T.contiguous()}
PARAMETERS = {"W_enc": T["W_enc"].T.contiguous()} | {name: T[name] for name in ("b_enc", "W_dec", "b_dec")}
GATE = {"gate_bias": T["threshold"] - 2, "r_mag": T["b_enc"] / 2}
UNIT = T["W_dec"] / T["W_dec"].norm(dim=1, keepdim=True)


class Published(NamedTuple):
    """`files` to write below `folder`, `given` to the reader; what is to come out."""

    folder: str
    files: dict[str, Any]
    computed: Callable[[Tensor], Computed]
    provenance: dict[str, Any]
    architecture: str
    k: int = 1
    given: str = ""

    def write(self, root: Path) -> Path:
        folder = root / self.folder
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json"):
                path.write_text(json.dumps(content))
            elif name.endswith(".safetensors"):
                safetensors.torch.save_file(content, path)
            elif name.endswith(".npz"):
                np.savez(path, **{key: tensor.numpy() for key, tensor in content.items()})
            else:
                torch.save(content, path)
        return folder / self.given


def kept(h: Tensor, k: int) -> Tensor:
    return torch.zeros_like(h).scatter(1, h.topk(k).indices, 1.0) * h.relu()


def linear(x: Tensor, b_dec: Tensor | float = T["b_dec"]) -> Tensor:
    return (x - b_dec) @ T["W_enc"].T + T["b_enc"]


def relu(x: Tensor) -> Computed:
    f = linear(x).relu()
    return f, f @ T["W_dec"] + T["b_dec"]


def relu_of_unit_rows(x: Tensor) -> Computed:
    """AutoEncoder.from_pretrained normalises the decoder: the same function, larger latents."""
    f, x_hat = relu(x)
    return f * T["W_dec"].norm(dim=1), x_hat


def relu_of_plain_input(x: Tensor) -> Computed:
    f = linear(x, 0.0).relu()
    return f, f @ T["W_dec"] + T["b_dec"]


def gated(x: Tensor) -> Computed:
    u = (x - T["b_dec"]) @ T["W_enc"].T
    f = (u + GATE["gate_bias"] > 0) * (GATE["r_mag"].exp() * u + T["b_enc"]).relu()
    return f, f @ T["W_dec"] + T["b_dec"]


def topk(x: Tensor) -> Computed:
    f = kept(linear(x), K)
    return f, f @ T["W_dec"] + T["b_dec"]


def batchtopk(x: Tensor) -> Computed:
    h = linear(x)
    f = h * (h > 0.9)
    return f, f @ T["W_dec"] + T["b_dec"]


def jumprelu_of_plain_input(x: Tensor) -> Computed:
    h = linear(x, 0.0)
    f = h * (h > T["threshold"])
    return f, f @ T["W_dec"] + T["b_dec"]


def layer_topk(k: int, eps: float) -> Callable[[Tensor], Computed]:
    def computed(x: Tensor) -> Computed:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        f = kept(linear((x - mean) / (std + eps)), k)
        return f, (f @ T["W_dec"] + T["b_dec"]) * (std + eps) + mean

    return computed


def llama_scope(x: Tensor) -> Computed:
    """Rows of unit norm; the threshold as it stands, on raw rows."""
    W_dec = T["W_dec"] * A / O
    h = (x @ T["W_enc"].T + T["b_enc"] / A) * W_dec.norm(dim=1)
    f = h * (h > 0.7)
    return f, f @ UNIT + T["b_dec"] / O


def llama_scope_r1(x: Tensor) -> Computed:
    """All in normalised units, and back."""
    h = A * x @ T["W_enc"].T + T["b_enc"]
    f = h * (h > T["threshold"])
    return f / A, (f @ T["W_dec"] + T["b_dec"]) / A


SPARSIFY = {"d_in": D, "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K}
SPARSIFY_NEW = SPARSIFY | {"activation": "topk", "multi_topk": True, "skip_connection": False, "transcode": False}
SPARSIFY_WEIGHTS = {name: LINEAR[name] for name in ("encoder.weight", "encoder.bias")} | {
    name: T[name] for name in ("W_dec", "b_dec")
}
TRAINER = {"activation_dim": D, "dict_size": N, "lm_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 15, "lr": 1e-4}
NUMBERS = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.9)}
SCOPE = {
    "d_model": D, "d_sae": N, "expansion_factor": 8, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
    "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True,
    "jump_relu_threshold": 0.7, "dataset_average_activation_norm": {"in": IN, "out": OUT}, "top_k": 5, "l1_coefficient": 0.0,
    "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
}  # fmt: skip
SCOPE_R1 = {name: value for name, value in SCOPE.items() if name not in ("jump_relu_threshold", "d_sae")} | {
    "sparsity_include_decoder_norm": False, "d_sae": N, "dataset_average_activation_norm": None,
}  # fmt: skip
HOOK_NORM = "dataset_average_activation_norm.blocks.15.hook_resid_post"
AUTO = LINEAR | {"decoder.bias": T["b_dec"]}
LLAMA8B = {"model": "meta-llama/Llama-3.1-8B", "site": "layers.15.resid_post"}


def sparsify(folder: str, cfg: dict[str, Any], provenance: dict[str, Any]) -> Published:
    return Published(folder, {"cfg.json": cfg, "sae.safetensors": SPARSIFY_WEIGHTS}, topk, provenance, "topk", K)


def dictionary(
    kind: str, weights: dict[str, Tensor], computed: Callable[[Tensor], Computed], architecture: str, k: int = 1, **trainer: Any
) -> Published:
    facts = TRAINER | {"dict_class": kind} | ({"k": k} if k > 1 else {}) | trainer
    files = {"ae.pt": weights, "config.json": {"trainer": facts, "buffer": {"ctx_len": 128}}}
    known = {"model": TRAINER["lm_name"], "site": "layers.15.resid_post"}
    return Published("resid_post_layer_15/trainer_1", files, computed, known, architecture, k)


def single(name: str, weights: dict[str, Any], computed: Callable[[Tensor], Computed], *rest: Any) -> Published:
    return Published("x", {name: weights}, computed, *rest, given=name)


PUBLISHED: dict[str, Published] = {
    "sparsify, layer_N": sparsify(
        "layer_7", SPARSIFY | {"signed": False},
        {"site": "layers.7.resid_post", "site_candidates": ["layers.7.resid_post", "layers.7.resid_pre"]},
    ),
    "sparsify, layers.N": sparsify("layers.23", SPARSIFY_NEW, {"site": "layers.23.resid_post"}),
    "sparsify, layers.N.mlp": sparsify("layers.23.mlp", SPARSIFY_NEW, {"site": "layers.23.ffn_out"}),
    "sparsify, seeds": sparsify("layers.2.self_attn/seed1", SPARSIFY_NEW, {"site": "layers.2.attn_out"}),
    "sparsify, embed_tokens": sparsify("embed_tokens", SPARSIFY_NEW, {"site": "embed"}),
    "AutoEncoder": dictionary("AutoEncoder", LINEAR | {"bias": T["b_dec"]}, relu_of_unit_rows, "relu"),
    "AutoEncoderNew": dictionary("AutoEncoderNew", AUTO, relu_of_plain_input, "relu"),
    "AutoEncoderTopK": dictionary("AutoEncoderTopK", LINEAR | {"b_dec": T["b_dec"]} | NUMBERS, topk, "topk", K),
    "AutoEncoderTopK, early": dictionary("AutoEncoderTopK", LINEAR | {"b_dec": T["b_dec"]}, topk, "topk", K),
    "BatchTopKSAE": dictionary("BatchTopKSAE", LINEAR | {"b_dec": T["b_dec"]} | NUMBERS, batchtopk, "batchtopk", K),
    "MatryoshkaBatchTopKSAE": dictionary(
        "MatryoshkaBatchTopKSAE", PARAMETERS | NUMBERS | {"group_sizes": torch.tensor([10, 30])}, batchtopk, "batchtopk", K
    ),
    "JumpReluAutoEncoder": dictionary(
        "JumpReluAutoEncoder", PARAMETERS | {"threshold": T["threshold"]}, jumprelu_of_plain_input, "jumprelu"
    ),
    "GatedAutoEncoder": dictionary(
        "GatedAutoEncoder",
        GATE | {n: LINEAR[n] for n in LINEAR if n != "encoder.bias"} | {"mag_bias": T["b_enc"], "decoder_bias": T["b_dec"]},
        gated, "gated",
    ),
    "Llama Scope": Published(
        "Llama3_1-8B-Base-L15R-8x",
        {"hyperparams.json": SCOPE, "checkpoints/final.safetensors": AUTO},
        llama_scope, LLAMA8B | {"threshold_factor": 1 / A}, "jumprelu", 5,
    ),
    "Llama Scope R1": Published(
        "800M-Slimpajama-0-OpenR1-Math-220k/L15R",
        {
            "config.json": SCOPE_R1,
            "sae_weights.safetensors": AUTO | {"log_jumprelu_threshold": T["threshold"].log(), HOOK_NORM: torch.tensor(IN)},
        },
        llama_scope_r1, LLAMA8B, "jumprelu", 5,
    ),
    "Goodfire": single(
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        {name.replace(".", "_linear."): tensor for name, tensor in AUTO.items()},
        relu_of_plain_input, {"model": "meta-llama/Llama-3.1-8B-Instruct", "site": "layers.19.resid_post"}, "relu",
    ),
    "qresearch": single(
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", AUTO, relu_of_plain_input,
        {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "site": "layers.19.resid_post"}, "relu",
    ),
    "OpenAI, TopK": single(
        "autoencoder.pt",
        {
            "pre_bias": T["b_dec"], "encoder.weight": T["W_enc"], "latent_bias": T["b_enc"],
            "decoder.weight": LINEAR["decoder.weight"], "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
            "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
        },
        layer_topk(K, 1e-5), {}, "topk", K,
    ),
    "OpenAI, ReLU": single(
        "autoencoder.pt",
        {
            "pre_bias": T["b_dec"], "encoder.weight": T["W_enc"], "latent_bias": T["b_enc"],
            "decoder.weight": LINEAR["decoder.weight"], "activation": "ReLU", "activation_state_dict": {},
        },
        relu, {}, "relu",
    ),
    "Gemma Scope": Published(
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_6",
        {"params.npz": PARAMETERS | {"threshold": T["threshold"]}},
        jumprelu_of_plain_input, {"site": "layers.20.resid_post"}, "jumprelu", 6,
    ),
}  # fmt: skip
