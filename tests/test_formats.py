"""Readers of published SAEs: each layout gives its own library's latents and reconstructions, or is refused by name."""

import io
import json
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.artifact import verify
from sae.convert import ConvertConfig, dense_codes, read, run
from sae.model import load
from tests.published import AUTO, HOOK_NORM, LINEAR, NUMBERS, PUBLISHED, D, K, N, T, layer_topk, single
from tests.sae_folders import ALONE


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_computes_what_its_library_does(name: str, x: Tensor, tmp_path: Path) -> None:
    made = PUBLISHED[name]
    path = made.write(tmp_path)
    sae = read(path)
    f, x_hat = made.computed(x)
    assert 1 < float((f > 0).sum(1).float().mean()) < N
    torch.testing.assert_close(dense_codes(sae, x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-4)
    assert (sae.cfg.architecture, sae.cfg.k) == (made.architecture, made.k)
    assert {key: value for key, value in sae.cfg.provenance.items() if key != "layout"} == made.provenance
    if path.is_file():  # the folder of a single file stands for it
        assert read(path.parent).weights_hash == sae.weights_hash


def test_the_reference_run_normalises_each_row(tmp_path: Path) -> None:
    """k is 64 in its source, not in its file."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (80, 12),
        "encoder.bias": (80,),
        "decoder.weight": (12, 80),
        "b_pre": (12,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = 3 * torch.randn(9, 12, generator=generator) + 1
    path = single("model_checkpoint_epoch-10.pth", weights, layer_topk(64, 1e-6), {}, "topk").write(tmp_path)
    sae = read(path)
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    h = ((x - mean) / (std + 1e-6) - weights["b_pre"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    f = torch.zeros_like(h).scatter(1, h.topk(64).indices, 1.0) * h.relu()
    torch.testing.assert_close(dense_codes(sae, x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), (f @ weights["decoder.weight"].T + weights["b_pre"]) * std + mean, rtol=1e-5, atol=1e-4)
    assert sae.cfg.provenance["site"] == "layers.23.attn_norm"


def test_a_foreign_folder_becomes_one_of_ours(x: Tensor, tmp_path: Path) -> None:
    path = PUBLISHED["Llama Scope"].write(tmp_path)
    run(ConvertConfig(sae=path, to="sae", out=tmp_path / "ours"), ALONE)
    ours = load(tmp_path / "ours")
    torch.testing.assert_close(ours(x), read(path)(x))
    assert verify(tmp_path / "ours").provenance["site"] == "layers.15.resid_post"


def test_a_file_of_a_folder_stands_for_the_folder(tmp_path: Path) -> None:
    for name, file in (
        ("Llama Scope", "checkpoints/final.safetensors"),
        ("BatchTopKSAE", "ae.pt"),
        ("Gemma Scope", "params.npz"),
    ):
        folder = PUBLISHED[name].write(tmp_path / name)
        assert read(folder / file).weights_hash == read(folder).weights_hash


def test_a_folder_of_several_hookpoints_is_refused_with_the_list(tmp_path: Path) -> None:
    for name in ("sparsify, layers.N", "sparsify, layers.N.mlp", "sparsify, seeds"):
        PUBLISHED[name].write(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model": "meta-llama/Llama-3.1-8B"}')
    torch.save({}, tmp_path / "run" / "state.pt")
    with pytest.raises(ValueError, match=r"3 SAE\(s\) .*: layers\.2\.self_attn/seed1, layers\.23, layers\.23\.mlp$"):
        read(tmp_path / "run")
    assert read(tmp_path / "run" / "layers.23").cfg.provenance["model"] == "meta-llama/Llama-3.1-8B"
    for name in ("a.pt", "b.pth"):
        torch.save(AUTO, tmp_path / name)
    (tmp_path / "files").mkdir()
    for name in ("a.pt", "b.pth"):
        (tmp_path / name).rename(tmp_path / "files" / name)
    with pytest.raises(ValueError, match=r"give one of them: a\.pt, b\.pth"):
        read(tmp_path / "files")


def changed(name: str, file: str, **changes: Any) -> dict[str, Any]:
    """The files of a layout with some keys of one of them changed; MISSING takes a key away."""
    files = dict(PUBLISHED[name].files)
    keys = files[file] | changes
    files[file] = {key: value for key, value in keys.items() if value is not MISSING}
    return files


MISSING: Any = object()
TRAINER = PUBLISHED["AutoEncoderTopK"].files["config.json"]["trainer"]
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sparsify, layers.N", "cfg.json", {"k": MISSING}, "k is missing"),
    ("sparsify, layers.N", "cfg.json", {"signed": True}, "signed is True"),
    ("sparsify, layers.N", "cfg.json", {"activation": "groupmax"}, "activation is 'groupmax'"),
    ("sparsify, layers.N", "cfg.json", {"transcode": True}, "transcode is True"),
    ("sparsify, layers.N", "cfg.json", {"a_new_key": 1}, "a_new_key"),
    ("sparsify, layers.N", "cfg.json", {"d_in": 13}, "cfg.json says d_in 13"),
    ("sparsify, layers.N", "sae.safetensors", {"b_dec": T["b_dec"] * float("nan")}, r"layers\.23: b_dec holds NaN"),
    ("sparsify, layers.N", "sae.safetensors", {"b_dec": T["b_enc"].clone()}, r"layers\.23: b_dec has shape \[40\]"),
    ("sparsify, layers.N", "sae.safetensors", {"W_skip": torch.ones(D, D)}, "W_skip"),
    ("sparsify, layers.N", "sae.safetensors", {"W_dec": T["W_dec"][0].clone()}, r"W_dec has shape \[12\]"),
    ("sparsify, layers.N", "sae.safetensors", {"encoder.bias": torch.tensor(1.0)}, r"b_enc has shape \[\]"),
    ("BatchTopKSAE", "ae.pt", {"threshold": torch.ones(3)}, r"threshold has shape \[3\]"),
    ("BatchTopKSAE", "ae.pt", {"k": torch.ones(3)}, r"k is \[1.0, 1.0, 1.0\]"),
    ("JumpReluAutoEncoder", "ae.pt", {"b_dec": torch.ones(3)}, r"b_dec has shape \[3\]"),
    ("Llama Scope", "hyperparams.json", {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "in is 0.0"),
    ("Llama Scope R1", "sae_weights.safetensors", {HOOK_NORM: torch.ones(3)}, r"resid_post is \[1.0"),
    ("AutoEncoderTopK", "config.json", {"trainer": MISSING}, "dict_class is missing"),
    ("AutoEncoderTopK", "config.json", {"trainer": TRAINER | {"dict_class": "GatedAutoEncoder"}}, r"missing: .*'gate_bias'"),
    ("GatedAutoEncoder", "ae.pt", {"r_mag": torch.ones(3)}, r"r_mag has shape \[3\]"),
    ("GatedAutoEncoder", "ae.pt", {"encoder.weight": torch.ones(N, 3)}, r"W_gate has shape \[40, 3\]"),
    ("GatedAutoEncoder", "ae.pt", {"gate_bias": T["b_enc"] * float("nan")}, "b_gate holds NaN"),
    ("GatedAutoEncoder", "ae.pt", {"r_mag": T["b_enc"] + 90}, "holds NaN or infinite"),
    ("AutoEncoderTopK", "config.json", {"trainer": TRAINER | {"dict_class": "CrossCoder"}}, "CrossCoder"),
    ("AutoEncoderTopK", "config.json", {"trainer": TRAINER | {"k": None}}, "k is None"),
    ("AutoEncoderTopK", "config.json", {"trainer": TRAINER | {"k": K + 1}}, "k is 4, but config.json says 5"),
    ("BatchTopKSAE", "ae.pt", {"threshold": MISSING}, "threshold"),
    ("Llama Scope", "hyperparams.json", {"act_fn": "topk"}, "act_fn is 'topk'"),
    ("Llama Scope", "hyperparams.json", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
    ("Llama Scope", "hyperparams.json", {"use_glu_encoder": True}, "use_glu_encoder is True"),
    ("Llama Scope", "hyperparams.json", {"jump_relu_threshold": MISSING}, "jump_relu_threshold is missing"),
    ("Llama Scope", "hyperparams.json", {"dataset_average_activation_norm": {"in": 3.0}}, "out is missing"),
    ("Llama Scope", "hyperparams.json", {"hook_point_out": "blocks.15.hook_mlp_out"}, "a transcoder"),
    ("Llama Scope", "hyperparams.json", {"d_sae": 99}, "99 latents of 12 dimensions"),
    ("Llama Scope R1", "config.json", {"act_fn": "relu"}, "act_fn is 'relu'"),
    ("Llama Scope R1", "sae_weights.safetensors", {"log_jumprelu_threshold": MISSING}, "log_jumprelu_threshold"),
    ("Goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth", {"gate": T["b_enc"]}, r"not known: \['gate'\]"),
    ("OpenAI, TopK", "autoencoder.pt", {"activation": "Identity"}, "activation is 'Identity'"),
    ("OpenAI, TopK", "autoencoder.pt", {"activation_state_dict": {"postact_fn": "ReLU"}}, "k is missing"),
    (
        "OpenAI, TopK",
        "autoencoder.pt",
        {"activation_state_dict": {"k": K, "postact_fn": "Identity"}},
        "postact_fn is 'Identity'",
    ),
    ("Gemma Scope", "params.npz", {"threshold": MISSING}, r"missing: \['threshold'\]"),
    ("Gemma Scope", "params.npz", {"scaling_factor": torch.full((D,), 2.0)}, "scaling_factor"),
    ("Gemma Scope", "params.npz", {"threshold": torch.ones(N, dtype=torch.int64)}, "threshold holds int64"),
]


@pytest.mark.parametrize(("name", "file", "changes", "message"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(
    name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = PUBLISHED[name]._replace(files=changed(name, file, **changes)).write(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_layouts_that_no_class_here_can_hold_say_why(tmp_path: Path) -> None:
    for files, message in (
        (["conf.yaml", "latest_ckpt.safetensors"], "temporal SAE"),
        (["W_enc_0.safetensors", "W_dec_0.safetensors"], "cross-layer transcoder"),
        (["layer_0.safetensors", "layer_1.safetensors"], "transcoders of circuit-tracer"),
        (["README.md"], r"no SAE of a known layout\. It holds README\.md; expected saelens"),
        ([], "It holds nothing"),
    ):
        folder = tmp_path / message[:5]
        folder.mkdir()
        for name in files:
            (folder / name).touch()
        with pytest.raises(ValueError, match=message):
            read(folder)
        if len(files) == 2:
            with pytest.raises(ValueError, match=message):
                read(folder / files[1])
    with pytest.raises(ValueError, match="no such folder or file"):
        read(tmp_path / "nowhere")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(ValueError, match=r"x\.onnx: not an SAE of a known layout"):
        read(tmp_path / "x.onnx")
    for content, message in (
        (LINEAR | {"b_dec": T["b_dec"]} | NUMBERS, "config.json beside"),
        ({"a": T["b_dec"]}, "It holds a;"),
    ):
        torch.save(content, tmp_path / "alone.pt")
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "alone.pt")


def test_a_threshold_that_was_never_set_is_said(x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = changed("BatchTopKSAE", "ae.pt", threshold=torch.tensor(-1.0))
    sae = read(PUBLISHED["BatchTopKSAE"]._replace(files=files).write(tmp_path))
    assert "was never set" in caplog.text
    h = (x - T["b_dec"]) @ T["W_enc"].T + T["b_enc"]
    torch.testing.assert_close(dense_codes(sae, x), h.relu(), rtol=1e-5, atol=1e-5)


def test_a_latent_without_a_direction_stays_silent(x: Tensor, tmp_path: Path) -> None:
    """Where rows get unit norm, one of zeros would divide by zero."""
    empty = LINEAR["decoder.weight"].clone()
    empty[:, 7] = 0
    files = changed("AutoEncoder", "ae.pt", **{"decoder.weight": empty})
    sae = read(PUBLISHED["AutoEncoder"]._replace(files=files).write(tmp_path))
    f, _ = PUBLISHED["AutoEncoder"].computed(x)
    f[:, 7] = 0
    torch.testing.assert_close(dense_codes(sae, x), f, rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(sae(x)).all())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    """Cut, overwritten and empty: one line with the file's name each time."""
    made = PUBLISHED[name]
    path = made.write(tmp_path)
    for file in made.files:
        whole = (path.parent / file if made.given else path / file).read_bytes()
        for content in (whole[: len(whole) // 2], b"\xff" * len(whole), b"", b"[" * 100_000, b"[]"):
            place = path.parent / file if made.given else path / file
            place.write_bytes(content)
            with pytest.raises(ValueError, match=Path(file).name) as raised:
                read(path)
            assert "\n" not in str(raised.value)
            place.write_bytes(whole)
    read(path)


class Bomb:
    """Unpickled, it would call something."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def bombs(mark: Path) -> list[Any]:
    """Objects that would each leave `mark` behind."""
    touch = Bomb(Path.touch, mark)
    weights: dict[str, Any] = dict(AUTO)
    return [
        touch,
        {"encoder.weight": touch},
        weights | {"decoder.bias": Bomb(os.system, f"touch {mark}")},
        weights | {"decoder.bias": Bomb(exec, f"open({str(mark)!r}, 'w')")},
        weights | {"decoder.bias": Bomb(eval, f"open({str(mark)!r}, 'w')")},
        weights | {"decoder.bias": Bomb(subprocess.Popen, ["touch", str(mark)])},
        weights | {"decoder.bias": Bomb(open, str(mark), "w")},
        weights | {"nested": [{"deep": (touch,)}]},
        weights | {"activation_state_dict": {"k": Bomb(os.mkdir, str(mark))}},
        weights | {"decoder.bias": Bomb(torch.save, torch.ones(2), str(mark))},
    ]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("index", range(10))
def test_a_pickle_never_runs(index: int, tmp_path: Path) -> None:
    """As torch writes it and as a bare pickle, in every file that may be one."""
    mark = tmp_path / "exploded"
    bomb = bombs(mark)[index]
    archive = io.BytesIO()
    torch.save(bomb, archive)
    folder = PUBLISHED["AutoEncoderTopK"].write(tmp_path / "dictionary")
    for content in (archive.getvalue(), pickle.dumps(bomb)):
        for path in (folder / "ae.pt", tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", tmp_path / "sae.pt"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=path.name):
                read(path)
    (tmp_path / "params.npz").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"params\.npz"):
        read(tmp_path / "params.npz")
    assert not mark.exists()


# the libraries themselves, from files instead of the Hub -------------------------------------------------------------


def by_saelens(loader: str, patch: pytest.MonkeyPatch, root: Path, repository: str, folder: str) -> tuple[Any, dict[str, Any]]:
    """The SAE that a loader of sae_lens makes of files below `root`, and its configuration."""
    module = import_module("sae_lens.loading.pretrained_sae_loaders")

    def local(_: str, filename: str, subfolder: str = "", **rest: Any) -> str:
        return str(root / subfolder / filename)

    def named(repo_id: str, filename: str, subfolder: str = "", **rest: Any) -> str:
        return local(repo_id, filename, subfolder)

    patch.setattr(module, "hf_hub_download", named)
    cfg, state, _ = getattr(module, loader)(
        repository, folder, "cpu", cfg_overrides={"dtype": "float32", "d_in": D, "d_sae": N}
    )
    sae = import_module("sae_lens").SAE.from_dict(module.handle_config_defaulting(cfg))
    sae.load_state_dict(state)
    return sae, cfg


@torch.no_grad()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama Scope", "Llama Scope R1", "Goodfire", "qresearch", "Gemma Scope"])
def test_saelens_loads_the_same(name: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It folds the factor of rows into W_enc, so that its latents are that many times larger, and does not scale what comes out
    by another norm than what goes in.
    """
    made = PUBLISHED[name]
    if name == "Llama Scope":
        same = {"in": 7.0, "out": 7.0}
        files = changed(name, "hyperparams.json", dataset_average_activation_norm=same, sparsity_include_decoder_norm=False)
        made = made._replace(files=files)
    root, folder = tmp_path, made.folder
    path = made.write(tmp_path)
    repository = {"Goodfire": "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Gemma Scope": "google/gemma-scope-2b-pt-res"}.get(
        name, ""
    )
    if made.given:
        root, folder = path.parent, made.given
    if name == "Gemma Scope":
        root, folder = tmp_path / "gemma-scope-2b-pt-res", made.folder.partition("/")[2]
    loaders = {
        "Llama Scope": "llama_scope_sae_huggingface_loader",
        "Llama Scope R1": "llama_scope_r1_distill_sae_huggingface_loader",
        "Goodfire": "get_goodfire_huggingface_loader",
        "qresearch": "deepseek_r1_sae_huggingface_loader",
        "Gemma Scope": "gemma_2_sae_huggingface_loader",
    }
    theirs, cfg = by_saelens(loaders[name], monkeypatch, root, repository, folder)
    scale = 1.0
    if cfg.get("normalize_activations") == "expected_average_only_in":
        scale = D**0.5 / 7
        theirs.fold_activation_norm_scaling_factor(scale)
    ours = read(path)
    torch.testing.assert_close(dense_codes(ours, x), theirs.encode(x) / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)


# dictionary-learning 0.1.0 no longer loads the early files, without `k` and `threshold`
PACKAGED = re.compile(r"sparsify|AutoEncoder(?!TopK, early)|TopKSAE")


@torch.no_grad()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(filter(PACKAGED.search, PUBLISHED)))
def test_the_library_loads_the_same(name: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    path = PUBLISHED[name].write(tmp_path)
    ours = read(path)
    if "sparsify" in name:
        coder = import_module("sparsify").SparseCoder.load_from_disk(path)
        out = coder.encode(x)
        f, x_hat = torch.zeros(len(x), N).scatter(1, out.top_indices, out.top_acts), coder.decode(out.top_acts, out.top_indices)
    else:
        facts = json.loads((path / "config.json").read_text())
        assert facts["trainer"]["dict_class"] in name
        dictionary, _ = import_module("dictionary_learning.utils").load_dictionary(str(path), "cpu")
        f, x_hat = dictionary.encode(x), dictionary(x)
    torch.testing.assert_close(dense_codes(ours, x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), x_hat, rtol=1e-5, atol=1e-4)
