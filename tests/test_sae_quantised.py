"""SAEs stored as int8 with a scale per row: what is kept, what it costs, and what is refused."""

import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch

from core.artifact import building, open_artifact
from core.cli import StageConfig, parse
from sae.convert import ConvertConfig, fvu, run
from sae.model import SAE, SAEConfig, load
from sae.quantised import SCALES, dequantised, quantised
from tests.interp_folders import Folders, make_folders, random_texts, solo


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("int8"), random_texts(200), n_latents=64, k=8)


def test_rows_equal_a_plain_loop_and_keep_their_norm() -> None:
    rows = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    rows[7] = 0
    stored = quantised({"W": rows, "b": torch.ones(3, dtype=torch.float64)})
    assert stored["W"].dtype == torch.int8
    assert stored["W" + SCALES].dtype == stored["b"].dtype == torch.float32
    back = dequantised(stored)
    assert list(back) == ["W", "b"]
    for row, integers, found in zip(rows, stored["W"], back["W"], strict=True):
        largest = max(abs(v) for v in row.tolist()) or 1.0
        assert integers.tolist() == [round(v * (torch.tensor(127.0) / largest).item()) for v in row.tolist()]
        assert float(found.norm()) == pytest.approx(float(row.norm()), rel=1e-6)
        assert float((found - row).abs().max()) <= largest / 127
    assert torch.equal(back["W"][7], torch.zeros(33))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_a_folder_is_a_quarter_and_reads_like_any_other(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=64, n_latents=512, k=8, architecture=architecture))
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name not in ("W_enc", "W_dec"):
                tensor.fill_(0.01)
    sae.save(tmp_path / "whole")
    sae.save(tmp_path / "int8", dtype="int8")
    sae.save(tmp_path / "int8", dtype="int8")  # the same again is left alone
    sizes = [(tmp_path / name / "sae.safetensors").stat().st_size for name in ("whole", "int8")]
    assert sizes[1] < 0.3 * sizes[0]
    found = load(tmp_path / "int8")
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(512), atol=1e-6)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        errors = (found(x) - sae(x)).norm(dim=1) / sae(x).norm(dim=1)
    # Of nearly equal latents another may be among the k: a few rows differ by more, and how many depends on the weights.
    assert float(errors.median()) < 0.01
    manifest = open_artifact(tmp_path / "int8", "sae").manifest
    assert found.weights_hash == manifest.provenance["sae_hash"] != sae.weights_hash
    found.save(tmp_path / "back")
    assert torch.equal(load(tmp_path / "back").W_enc, found.W_enc)


def test_a_folder_whose_scales_do_not_fit_is_refused(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_model=8, n_latents=16, k=2))
    sae.save(tmp_path / "int8", dtype="int8")
    stored = safetensors.torch.load_file(tmp_path / "int8" / "sae.safetensors")
    without = {name: tensor for name, tensor in stored.items() if name != "W_enc_scales"}
    short = stored | {"W_dec_scales": torch.ones(3)}
    stray = {name: tensor for name, tensor in stored.items() if name != "W_dec"}
    broken = stored | {"W_enc_scales": torch.full((16,), float("inf"))}
    cases = [(without, "W_enc_scales"), (short, "W_dec_scales"), (stray, "W_dec_scales"), (broken, "W_enc")]
    for number, (tensors, named) in enumerate(cases):
        folder = tmp_path / str(number)
        with building(folder, "sae", StageConfig(), solo()) as builder:
            builder.publish("sae.safetensors", safetensors.torch.save(tensors))
            builder.publish("cfg.json", (tmp_path / "int8" / "cfg.json").read_bytes())
            builder.finish(["sae.safetensors", "cfg.json"], {})
        with pytest.raises(ValueError, match=named):
            load(folder)


def test_the_command_measures_what_int8_costs(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from capture.store import open_activations

    flags = ["--sae", str(folders.sae), "--to", "sae", "--dtype", "int8", "--measure", str(folders.activations)]
    with caplog.at_level(logging.INFO):
        run(parse(ConvertConfig, "", [*flags, "--out", str(tmp_path / "small")]), solo())
    before, after = (fvu(load(path), open_activations(folders.activations)) for path in (folders.sae, tmp_path / "small"))
    assert before != after
    assert f"FVU {before:.5f} as it was, {after:.5f} as it is written" in caplog.text
    assert after < before * 1.05
    small = load(tmp_path / "small")
    assert small.cfg == load(folders.sae).cfg


def test_other_formats_are_not_quantised(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dtype int8"):
        parse(ConvertConfig, "", ["--sae", "s", "--to", "saelens", "--dtype", "int8", "--out", str(tmp_path)])
