"""Other libraries' formats: their formulas written out, applied to the files written, give our latents and reconstructions."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from core.artifact import verify
from sae.architectures import names
from sae.convert import ConvertConfig, compare, dense_codes, read, run
from sae.formats import FORMATS
from sae.formats.sites import hook_name, site_of_hook
from sae.model import SAE, SAEConfig, load
from tests.sae_folders import ALONE, SITE, make_activations, own_tensors

SCALE = 0.37
Computed = tuple[Tensor, Tensor]


def make_sae(architecture: str, norm: str = "dataset") -> SAE:
    """d 12, 40 latents, every parameter away from its initial value, rows of W_dec units."""
    generator = torch.Generator().manual_seed(0)
    prefixes = (20, 40) if architecture == "matryoshka" else ()
    shape: dict[str, Any] = {"d_model": 12, "n_latents": 40, "k": 5, "norm": norm, "scale": SCALE if norm == "dataset" else 1.0}
    provenance = {"site": SITE, "model": "tiny", "bos": "feed", "max_length": 128}
    sae = SAE(SAEConfig(**shape, architecture=architecture, prefixes=prefixes, provenance=provenance))
    sae.initialise_("tied", generator)
    with torch.no_grad():
        for tensor in (getattr(sae, name) for name in ("b_enc", "b_pre", "W_enc") if hasattr(sae, name)):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        for tensor in own_tensors(sae):
            tensor += 0.4 if architecture == "batchtopk" else torch.rand(40, generator=generator)
        if architecture == "gated":
            sae.b_gate.sub_(1.2)
    return sae.requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(30, 12, generator=torch.Generator().manual_seed(1)) + 1


def topk(h: Tensor, k: int) -> Tensor:
    return torch.zeros_like(h).scatter(1, h.topk(k).indices, 1.0) * h.relu()


def as_saelens(folder: Path, x: Tensor) -> Computed:
    """process_sae_in, encode and decode of sae_lens 6."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), safetensors.torch.load_file(folder / "sae_weights.safetensors")
    mean, std = 0.0, 1.0
    if cfg["normalize_activations"] == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)  # type: ignore[assignment]
        x = (x - mean) / (std + 1e-5)
    if cfg["architecture"] == "gated":
        u = (x - t["b_dec"] * cfg["apply_b_dec_to_input"]) @ t["W_enc"]
        f = (u + t["b_gate"] > 0) * (u * t["r_mag"].exp() + t["b_mag"]).relu()
        return f, (f @ t["W_dec"] + t["b_dec"]) * std + mean
    h = (x - t["b_dec"] * cfg["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
    if cfg["architecture"] == "topk":
        assert not cfg["rescale_acts_by_decoder_norm"]
        f = topk(h, cfg["k"])
    else:
        f = h.relu() * (h > t["threshold"]) if cfg["architecture"] == "jumprelu" else h.relu()
    return f, (f @ t["W_dec"] + t["b_dec"]) * std + mean


def as_sparsify(folder: Path, x: Tensor) -> Computed:
    """SparseCoder.encode and decode."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), safetensors.torch.load_file(folder / "sae.safetensors")
    f = topk(((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu(), cfg["k"])
    return f, f @ t["W_dec"] + t["b_dec"]


def as_dictionary_learning(folder: Path, x: Tensor) -> Computed:
    """AutoEncoderTopK, BatchTopKSAE, AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder and GatedAutoEncoder."""
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    t = torch.load(folder / "ae.pt", weights_only=True)
    if kind == "JumpReluAutoEncoder":
        h = x @ t["W_enc"] + t["b_enc"]
        f = (h * (h > t["threshold"])).relu()
        return f, f @ t["W_dec"] + t["b_dec"]
    if kind == "GatedAutoEncoder":
        u = (x - t["decoder_bias"]) @ t["encoder.weight"].T
        f = (u + t["gate_bias"] > 0) * (t["r_mag"].exp() * u + t["mag_bias"]).relu()
        return f, f @ t["decoder.weight"].T + t["decoder_bias"]
    if kind == "AutoEncoderNew":
        f = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        return f, f @ t["decoder.weight"].T + t["decoder.bias"]
    bias = t["bias" if kind == "AutoEncoder" else "b_dec"]
    f = ((x - bias) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    if kind == "AutoEncoderTopK":
        f = topk(f, int(t["k"]))
    if kind == "BatchTopKSAE":
        f = f * (f > t["threshold"])
    return f, f @ t["decoder.weight"].T + bias


FORMULAS = {"saelens": as_saelens, "sparsify": as_sparsify, "dictionary_learning": as_dictionary_learning}
EXPRESSIBLE = [(to, a) for to in FORMATS for a in names() if to != "sparsify" or a in ("topk", "matryoshka")]


def convert(source: Path, to: Any, out: Path, **flags: Any) -> Path:
    run(ConvertConfig(sae=source, to=to, out=out, **flags), ALONE)
    return out


@pytest.mark.parametrize(("to", "architecture"), EXPRESSIBLE)
def test_export_computes_the_same_and_comes_back(to: str, architecture: str, x: Tensor, tmp_path: Path) -> None:
    sae = make_sae(architecture)
    sae.save(tmp_path / "ours")
    theirs = convert(tmp_path / "ours", to, tmp_path / "theirs")
    verify(theirs)
    f, x_hat = FORMULAS[to](theirs, x)
    codes = dense_codes(sae, x)
    assert 0 < int((codes > 0).sum()) < codes.numel() / 2 + 40
    torch.testing.assert_close(f * SCALE, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=1e-4)
    back = load(convert(theirs, "sae", tmp_path / "back"))
    torch.testing.assert_close(dense_codes(back, x) * SCALE, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back.W_dec.norm(dim=1), torch.ones(40))
    assert verify(tmp_path / "back").provenance["sae_hash"] == back.weights_hash
    assert convert(theirs, "sae", tmp_path / "back") == tmp_path / "back"  # done already: nothing happens
    assert back.cfg.provenance["site"] == SITE
    assert back.cfg.norm == "none"


@pytest.mark.parametrize(("to", "architecture"), EXPRESSIBLE)
def test_rows_of_another_norm_are_kept(to: str, architecture: str, x: Tensor, tmp_path: Path) -> None:
    """Imported SAEs have decoder rows of any norm; the latents that go out are those that come back."""
    sae = make_sae(architecture)
    with torch.no_grad():
        sae.W_dec *= torch.rand(40, 1, generator=torch.Generator().manual_seed(5)) + 0.5
    sae.save(tmp_path / "ours")
    theirs = convert(tmp_path / "ours", to, tmp_path / "theirs")
    f, x_hat = FORMULAS[to](theirs, x)
    torch.testing.assert_close(f * SCALE, dense_codes(sae, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_codes(read(theirs), x) * SCALE, dense_codes(sae, x), rtol=1e-4, atol=1e-5)


def test_a_layer_norm_goes_to_saelens_alone(x: Tensor, tmp_path: Path) -> None:
    sae = make_sae("topk", norm="layer")
    sae.save(tmp_path / "ours")
    theirs = convert(tmp_path / "ours", "saelens", tmp_path / "theirs")
    f, x_hat = as_saelens(theirs, x)
    torch.testing.assert_close(f, dense_codes(sae, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=1e-4)
    back = read(theirs)
    assert (back.cfg.norm, back.cfg.norm_eps) == ("layer", 1e-5)
    for to in ("sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=r"mean and std, .* export with --to saelens"):
            convert(tmp_path / "ours", to, tmp_path / to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("architecture", ["batchtopk", "relu", "jumprelu", "gated"])
def test_sparsify_holds_top_k_alone(architecture: str, tmp_path: Path) -> None:
    make_sae(architecture).save(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"sparsify holds only topk; this SAE is {architecture};"):
        convert(tmp_path / "ours", "sparsify", tmp_path / "out")


def test_batchtopk_with_several_thresholds_is_refused(tmp_path: Path) -> None:
    sae = make_sae("batchtopk")
    own_tensors(sae)[0][3] += 1
    sae.save(tmp_path / "ours")
    with pytest.raises(ValueError, match="one threshold for all latents"):
        convert(tmp_path / "ours", "dictionary_learning", tmp_path / "out")


def test_an_import_carries_what_later_stages_ask_for(tmp_path: Path) -> None:
    make_sae("topk").save(tmp_path / "ours")
    theirs = convert(tmp_path / "ours", "sparsify", tmp_path / "theirs")
    acts = make_activations(tmp_path / "acts", torch.ones(3, 12), [3])
    sae = load(convert(theirs, "sae", tmp_path / "back", activations=acts))
    assert {name: sae.cfg.provenance[name] for name in ("model_hash", "tokenizer_hash", "site", "bos")} == {
        "model_hash": "m", "tokenizer_hash": "t", "site": SITE, "bos": "none",
    }  # fmt: skip
    narrow = make_activations(tmp_path / "narrow", torch.ones(3, 11), [3])
    with pytest.raises(ValueError, match="width 11, but the SAE's is 12"):
        convert(theirs, "sae", tmp_path / "again", activations=narrow)


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def foreign(tmp_path: Path, to: str, architecture: str = "topk") -> Path:
    """A folder as another library would leave it: without a manifest of ours, and without our provenance."""
    for name, content in FORMATS[to].write(make_sae(architecture)).items():
        (tmp_path / name).write_bytes(content)
    name = "config.json" if to == "dictionary_learning" else "cfg.json"
    edit(tmp_path, name, lambda values: (values.get("metadata") or values).pop("llama3_sae"))
    return tmp_path


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_of_another_library_is_read(to: str, x: Tensor, tmp_path: Path) -> None:
    sae = read(foreign(tmp_path, to))
    torch.testing.assert_close(sae(x), make_sae("topk")(x), rtol=1e-4, atol=1e-4)
    assert sae.cfg.provenance.get("site") == (None if to == "sparsify" else SITE)


def test_saelens_conventions_are_undone(x: Tensor, tmp_path: Path) -> None:
    """An encoder that does not subtract b_dec; pre-activations multiplied, and latents divided, by the norms of the decoder."""
    folder, sae = foreign(tmp_path, "saelens"), make_sae("topk")
    t = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    norms = torch.rand(40) + 0.5
    t["b_enc"] = (t["b_enc"] - t["b_dec"] @ t["W_enc"]) / norms
    t["W_enc"], t["W_dec"] = t["W_enc"] / norms, t["W_dec"] * norms[:, None]
    safetensors.torch.save_file(t, folder / "sae_weights.safetensors")
    edit(folder, "cfg.json", lambda c: c.update(apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=True))
    found = read(folder)
    torch.testing.assert_close(dense_codes(found, x) * SCALE, dense_codes(sae, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_a_gated_sae_of_another_library_keeps_its_paths(to: str, x: Tensor, tmp_path: Path) -> None:
    """As it leaves their training: decoder rows of any norm, and a gate whose rows differ in length from the magnitudes'."""
    folder, generator = foreign(tmp_path, to, "gated"), torch.Generator().manual_seed(3)
    if to == "saelens":
        t = safetensors.torch.load_file(folder / "sae_weights.safetensors")
        t["W_dec"] *= 0.5 + torch.rand(40, 1, generator=generator)
        safetensors.torch.save_file(t, folder / "sae_weights.safetensors")
    else:
        t = torch.load(folder / "ae.pt", weights_only=True)
        t["decoder.weight"] *= 0.5 + torch.rand(40, generator=generator)
        torch.save(t, folder / "ae.pt")
    f, x_hat = FORMULAS[to](folder, x)
    sae = read(folder)
    assert sae.cfg.architecture == "gated"
    torch.testing.assert_close(sae.r_mag, t["r_mag"])
    assert 0 < int((f > 0).sum()) < f.numel() / 2
    torch.testing.assert_close(dense_codes(sae, x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "change", "message"),
    [
        ("saelens", {"architecture": "temporal"}, "architecture is 'temporal'"),
        ("saelens", {"architecture": "gated"}, r"k \(5\) is not known"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "keeps its factor elsewhere"),
        ("saelens", {"architecture": "jumprelu"}, r"k \(5\) is not known"),
        ("sparsify", {"transcode": True}, "transcode is True"),
        ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax'"),
        ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "dict_class is 'CrossCoder'"),
        ("dictionary_learning", {"trainer": {"dict_class": "GatedAutoEncoder"}}, r"missing: .*'r_mag'"),
    ],
)
def test_what_cannot_be_computed_is_refused(to: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path, to)
    edit(folder, "config.json" if to == "dictionary_learning" else "cfg.json", lambda c: c.update(change))
    with pytest.raises(ValueError, match=message):
        read(folder)


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_damaged_and_dangerous_files_are_refused(tmp_path: Path) -> None:
    folder = foreign(tmp_path, "dictionary_learning")
    good = torch.load(folder / "ae.pt", weights_only=True)
    for content, message in (
        ({"step": 3, "ae": good}, "backup from the middle"),
        (good | {"b_dec": good["b_dec"] * float("nan")}, "b_dec holds NaN"),
        (good | {"b_dec": good["b_dec"][1:]}, r"b_dec has shape \[11\]"),
        (good | {"W_skip": good["b_dec"]}, r"not known: \['W_skip'\]"),
        ({"encoder.weight": Bomb(tmp_path / "touched")}, "not a state dict of tensors"),
    ):
        torch.save(content, folder / "ae.pt")
        with pytest.raises(ValueError, match=message):
            read(folder)
    assert not (tmp_path / "touched").exists()
    whole = io.BytesIO()
    torch.save(good, whole)
    (folder / "ae.pt").write_bytes(whole.getvalue()[:-100])
    with pytest.raises(ValueError, match="not a state dict of tensors"):
        read(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json"):
        read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no SAE of a known layout"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder or file"):
        read(tmp_path / "nowhere")


def test_a_conversion_that_went_wrong_is_noticed() -> None:
    sae, other = make_sae("topk"), make_sae("topk")
    assert "0.0e+00" in compare(sae, other)
    other.b_enc[2] += 3
    with pytest.raises(ValueError, match="does not compute the same"):
        compare(sae, other)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
        ("Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("someone/Llama-3.2-3B", "someone/Llama-3.2-3B"),
        ("Llama-3.2-3B-poems", "Llama-3.2-3B-poems"),
        ("tiny", "tiny"),
        (None, None),
    ],
)
def test_an_export_names_the_model_as_the_hub_does(model: str | None, name: str | None) -> None:
    sae = make_sae("topk")
    sae.cfg = replace(sae.cfg, provenance={"site": SITE, "model": model})
    assert json.loads(FORMATS["saelens"].write(sae)["cfg.json"])["metadata"]["model_name"] == name
    assert json.loads(FORMATS["dictionary_learning"].write(sae)["config.json"])["trainer"]["lm_name"] == name


def test_sites_and_hooks() -> None:
    assert hook_name("layers.3.resid_post") == "blocks.3.hook_resid_post"
    assert hook_name("layers.0.ffn_out") == "blocks.0.hook_mlp_out"
    assert hook_name("layers.3.attn_norm") is None
    assert hook_name("final_norm") is None
    assert site_of_hook("blocks.11.hook_resid_pre") == "layers.11.resid_pre"
    assert site_of_hook("blocks.11.attn.hook_q") is None
    for site, hook in (("layers.3.ffn_hidden", "blocks.3.mlp.hook_post"), ("layers.3.attn_heads", "blocks.3.attn.hook_z")):
        assert (hook_name(site), site_of_hook(hook)) == (hook, site)


# the libraries themselves: `pytest -m peers`, where benchmarks/requirements.txt is installed ---------------------------


def by_saelens(folder: Path, x: Tensor) -> Computed:
    sae = import_module("sae_lens").SAE.load_from_disk(folder)
    return sae.encode(x), sae(x)


def by_sparsify(folder: Path, x: Tensor) -> Computed:
    coder = import_module("sparsify").SparseCoder.load_from_disk(folder)
    out = coder.encode(x)
    return torch.zeros(len(x), 40).scatter(1, out.top_indices, out.top_acts), coder.decode(out.top_acts, out.top_indices)


def by_dictionary_learning(folder: Path, x: Tensor) -> Computed:
    dictionary, _ = import_module("dictionary_learning.utils").load_dictionary(str(folder), "cpu")
    return dictionary.encode(x), dictionary(x)


LIBRARIES = {"saelens": by_saelens, "sparsify": by_sparsify, "dictionary_learning": by_dictionary_learning}


@torch.no_grad()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("to", "architecture"), EXPRESSIBLE)
def test_the_library_itself_computes_the_same(to: str, architecture: str, x: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    cases = [("dataset", 1.0), ("dataset", 0.6)] + [("layer", 1.0)] * (to == "saelens")
    for norm, length in cases:
        sae = make_sae(architecture, norm)
        sae.W_dec *= length
        folder = tmp_path / f"{norm} {length}"
        folder.mkdir()
        for name, content in FORMATS[to].write(sae).items():
            (folder / name).write_bytes(content)
        f, x_hat = LIBRARIES[to](folder, x)
        torch.testing.assert_close(f * sae.cfg.scale, dense_codes(sae, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=1e-4)
