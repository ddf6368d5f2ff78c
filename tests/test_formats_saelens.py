"""SAELens' folders of every version: what each key means is known, or the folder is refused by its name."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sae.convert import dense_codes, read
from sae.model import SAE

D, N, K = 12, 40, 4
Keys = dict[str, Any]

# As SAELens wrote them before version 6, topk being an activation function of the standard architecture.
EARLY: Keys = {
    "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "activation_fn_str": "relu",
    "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 128, "model_name": "llama-tiny",
    "hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "hook_head_index": None, "prepend_bos": True,
    "dataset_path": "texts", "dataset_trust_remote_code": True, "normalize_activations": "none", "activation_fn_kwargs": {},
    "sae_lens_training_version": "4.3.5", "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
}  # fmt: skip
EARLY_TOPK = EARLY | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
MODERN: Keys = {
    "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "model_name": "llama-tiny",
        "hook_name": "blocks.3.hook_resid_post", "hook_head_index": None, "prepend_bos": True,
    },
}  # fmt: skip
MODERN_TOPK = MODERN | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False}


def tensors(kind: str = "standard") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "batchtopk":
        made["topk_threshold"] = torch.tensor(1.5, dtype=torch.float64)
    return made


def folder_of(path: Path, cfg: Keys, weights: dict[str, Tensor] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    safetensors.torch.save_file(tensors() if weights is None else weights, path / "sae_weights.safetensors")
    return path


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


def l0(sae: SAE, x: Tensor) -> float:
    return float((dense_codes(sae, x) > 0).sum(1).float().mean())


def codes(weights: dict[str, Tensor], x: Tensor, k: int = 0) -> Tensor:
    """The latents of a standard or topk SAE."""
    h = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    return (h if not k else torch.zeros_like(h).scatter(1, h.topk(k).indices, 1.0) * h).relu()


TOPKS: dict[str, Keys] = {
    "standard with an activation function": EARLY_TOPK,
    "renamed as version 6 does": {n.removesuffix("_str"): v for n, v in EARLY_TOPK.items()},
    "topk with k in the kwargs": EARLY_TOPK | {"architecture": "topk"},
    "topk by name alone": EARLY | {"architecture": "topk", "activation_fn_kwargs": {"k": K}},
    "topk with k beside it": {n: v for n, v in EARLY.items() if n != "activation_fn_kwargs"} | {"architecture": "topk", "k": K},
    "no architecture": {n: v for n, v in EARLY_TOPK.items() if n != "architecture"},
    "the first hook names": {n.replace("hook_name", "hook_point"): v for n, v in EARLY_TOPK.items()} | {"l1_coefficient": 5},
    "version 6": MODERN_TOPK,
    "version 6 for training": MODERN_TOPK | {"aux_loss_coefficient": 1.0, "decoder_init_norm": 0.1},
    "a byte order mark": MODERN_TOPK,
}  # fmt: skip


@pytest.mark.parametrize("name", TOPKS)
def test_a_topk_of_any_version_is_a_topk(name: str, x: Tensor, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", TOPKS[name])
    if name == "a byte order mark":
        (folder / "cfg.json").write_bytes(b"\xef\xbb\xbf" + (folder / "cfg.json").read_bytes())
    sae = read(folder)
    assert (sae.cfg.architecture, sae.cfg.k) == ("topk", K)
    assert 3 < l0(sae, x) <= K
    torch.testing.assert_close(dense_codes(sae, x), codes(tensors(), x, K), rtol=1e-5, atol=1e-5)
    assert sae.cfg.provenance["site"] == "layers.3.resid_post"


@pytest.mark.parametrize("cfg", [EARLY, MODERN, EARLY | {"activation_fn_kwargs": None, "normalize_activations": False}])
def test_a_relu_of_any_version_is_a_relu(cfg: Keys, x: Tensor, tmp_path: Path) -> None:
    sae = read(folder_of(tmp_path / "theirs", cfg))
    assert sae.cfg.architecture == "relu"
    torch.testing.assert_close(dense_codes(sae, x), codes(tensors(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg", [EARLY, MODERN, MODERN | {"apply_b_dec_to_input": False}])
def test_a_gated_sae_of_any_version_is_one(cfg: Keys, x: Tensor, tmp_path: Path) -> None:
    """Before version 6 and since, `b_enc` is missing: each path has a bias of its own."""
    weights, generator = tensors(), torch.Generator().manual_seed(2)
    del weights["b_enc"]
    weights |= {name: 0.5 * torch.randn(N, generator=generator) for name in ("b_gate", "r_mag", "b_mag")}
    sae = read(folder_of(tmp_path / "theirs", cfg | {"architecture": "gated"}, weights))
    u = (x - weights["b_dec"] * cfg["apply_b_dec_to_input"]) @ weights["W_enc"]
    f = (u + weights["b_gate"] > 0) * (u * weights["r_mag"].exp() + weights["b_mag"]).relu()
    assert sae.cfg.architecture == "gated"
    torch.testing.assert_close(dense_codes(sae, x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), f @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_a_batchtopk_has_one_threshold_for_all(x: Tensor, tmp_path: Path) -> None:
    """What a training leaves is compared with the threshold after the multiplication by the norms of the decoder's rows."""
    weights = tensors("batchtopk")
    for kind in ("batchtopk", "matryoshka_batchtopk"):
        cfg = MODERN_TOPK | {"architecture": kind, "k": 4.0, "topk_threshold_lr": 0.01, "rescale_acts_by_decoder_norm": True}
        sae = read(folder_of(tmp_path / kind, cfg, weights))
        h = codes(weights, x) * weights["W_dec"].norm(dim=1)
        assert (sae.cfg.architecture, sae.cfg.k) == ("batchtopk", 4)
        torch.testing.assert_close(dense_codes(sae, x), h * (h > 1.5), rtol=1e-5, atol=1e-4)


def test_the_factor_of_a_checkpoint_is_read_from_beside_it(x: Tensor, tmp_path: Path) -> None:
    cfg = EARLY_TOPK | {"normalize_activations": "expected_average_only_in"}
    folder = folder_of(tmp_path / "theirs", cfg)
    with pytest.raises(ValueError, match=r"expected_average_only_in.*activation_scaler\.json"):
        read(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    torch.testing.assert_close(dense_codes(read(folder), x), codes(tensors(), x / 4, K), rtol=1e-5, atol=1e-5)


def test_heads_side_by_side_are_rows_of_all_heads(x: Tensor, tmp_path: Path) -> None:
    hook = {"hook_name": "blocks.3.attn.hook_z"}
    for cfg in (EARLY_TOPK | hook, MODERN_TOPK | {"reshape_activations": "hook_z", "metadata": MODERN["metadata"] | hook}):
        sae = read(folder_of(tmp_path / "theirs", cfg))
        assert sae.cfg.provenance["site"] == "layers.3.attn_heads"
    with pytest.raises(ValueError, match="reshape_activations is 'hook_z'"):
        read(folder_of(tmp_path / "theirs", MODERN_TOPK | {"reshape_activations": "hook_z"}))


REFUSED: list[tuple[Keys, str]] = [
    (EARLY | {"activation_fn_str": "tanh-relu"}, "activation_fn_str is 'tanh-relu'"),
    (EARLY_TOPK | {"activation_fn_kwargs": {}}, "k is missing"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": None}}, "k is None"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": 4.5}}, "k is 4.5"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": True}}, "k is True"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": 0}}, "found 0"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": K, "signed": True}}, "signed is True"),
    (EARLY_TOPK | {"activation_fn_kwargs": {"k": K, "postact_fn": "abs"}}, "postact_fn"),
    (EARLY_TOPK | {"activation_fn": "relu"}, "activation_fn and activation_fn_str differ"),
    (EARLY_TOPK | {"architecture": "jumprelu"}, "'jumprelu' with the activation function 'topk'"),
    (EARLY | {"architecture": "topk"}, "k is missing"),
    (EARLY_TOPK | {"architecture": "gated"}, "'gated' with the activation function 'topk'"),
    (EARLY | {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True"),
    (EARLY | {"hook_head_index": 2}, "hook_head_index is 2"),
    (EARLY | {"hook_point_head_index": 2}, "hook_point_head_index is 2"),
    (EARLY | {"normalize_activations": "constant_norm_rescale"}, "normalize_activations is 'constant_norm_rescale'"),
    (EARLY | {"normalize_activations": True}, "expected_average_only_in"),
    (EARLY | {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
    (EARLY | {"hook_name_out": "blocks.3.hook_mlp_out"}, "hook_name_out is 'blocks.3.hook_mlp_out'"),
    (EARLY | {"sae_lens_version": "dev"}, "sae_lens_version is 'dev'"),
    (EARLY | {"d_sae": 64}, r"d_in, d_sae \[12, 64\]"),
    (MODERN | {"architecture": "topk"}, "k is missing"),
    (MODERN | {"architecture": "batchtopk"}, "k is missing"),
    (MODERN | {"architecture": "gated"}, r"missing: \['b_gate', 'b_mag', 'r_mag'\]"),
    (MODERN_TOPK | {"architecture": "abstopk"}, "architecture is 'abstopk'"),
    (MODERN | {"architecture": "matching_pursuit"}, "architecture is 'matching_pursuit'"),
    (MODERN | {"architecture": "transcoder", "d_out": D}, "architecture is 'transcoder'"),
    (MODERN | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "activation_fn_kwargs"),
    (MODERN | {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is True"),
    (MODERN | {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    (MODERN | {"metadata": MODERN["metadata"] | {"hook_head_index": 0}}, "hook_head_index is 0"),
    (MODERN | {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True"),
    (MODERN | {"a_new_key": 3}, r"a_new_key \(3\) is not known"),
    ({name: value for name, value in MODERN.items() if name != "architecture"}, "architecture is missing"),
]


@pytest.mark.parametrize(("cfg", "message"), REFUSED)
def test_a_key_that_is_not_met_is_named(cfg: Keys, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(folder_of(tmp_path / "theirs", cfg))
    assert "\n" not in str(raised.value)


def test_tensors_that_nothing_says_how_to_use_are_named(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: \['threshold'\]"):
        read(folder_of(tmp_path / "theirs", MODERN | {"architecture": "jumprelu"}))
    for factor, message in ((torch.ones(N), ""), (torch.full((N,), 2.0), r"not known: \['scaling_factor'\]")):
        folder = folder_of(tmp_path / "theirs", EARLY, tensors() | {"scaling_factor": factor})
        if not message:
            torch.testing.assert_close(dense_codes(read(folder), x), codes(tensors(), x), rtol=1e-5, atol=1e-5)
            continue
        with pytest.raises(ValueError, match=message):
            read(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: not a safetensors file, or damaged"):
        read(folder)


@torch.no_grad()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOPKS)
def test_saelens_itself_computes_the_same(name: str, x: Tensor, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", TOPKS[name])
    sae, theirs = read(folder), import_module("sae_lens").SAE.load_from_disk(folder)
    torch.testing.assert_close(dense_codes(sae, x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), theirs(x), rtol=1e-5, atol=1e-5)
