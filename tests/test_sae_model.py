"""The SAE's equations, kernels, losses and folder, each against something slow and obvious."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import sae as sae_package
from core.artifact import open_artifact, verify
from sae.loss import LossConfig, aux_weight, default_k_aux
from sae.model import SAE, Latents, SAEConfig, best_encoder_norm, load
from sae.sparse import decode, encode_at, sampled_product, sums_by_latent, transpose, transposed_product
from sae.topk import group_size, top_k


def make_sae(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: object) -> SAE:
    """A small SAE with every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    shape: dict[str, object] = {"d_model": 12, "n_latents": 40, "k": 5, "norm": "none"}
    sae = SAE(SAEConfig(**(shape | overrides))).to(dtype)  # type: ignore[arg-type]
    sae.initialise_("tied", generator)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_pre, sae.W_enc):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return sae


def rows(n: int, d: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_latents(h: Tensor, indices: Tensor) -> Tensor:
    """ReLU of `h` at `indices`, zero elsewhere: the [N, n] matrix that the library never builds."""
    return torch.zeros_like(h).scatter(1, indices, 1.0) * h.relu()


# top-k ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(4096, 32), (4096, 1), (1000, 4), (1023, 3), (64, 64), (100, 60), (5, 2), (65_536, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_equals_torch(n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.topk.SMALL", 0)  # else torch.topk would be tested against itself
    h = rows(7, n, seed=n + k, dtype=torch.float32).to(dtype)
    values, indices = top_k(h, k)
    expected = h.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(h.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    following = h.topk(min(k + 1, n)).values
    untied = (following.diff(dim=1) != 0).all(1)
    assert torch.equal(indices[untied], expected.indices[untied])


def test_top_k_takes_both_levels_and_repeats_itself_on_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.topk.SMALL", 0)
    assert 4096 // group_size(4096, 32) >= 64  # so that there are groups of groups
    tied = torch.randint(0, 3, (9, 4096), generator=torch.Generator().manual_seed(0)).bfloat16()
    values, indices = top_k(tied, 32)
    assert torch.equal(values, tied.topk(32).values)
    assert torch.equal(indices, top_k(tied.clone(), 32)[1])
    constant = torch.full((3, 4096), float("-inf"))
    assert all(len(set(row)) == 32 for row in top_k(constant, 32)[1].tolist())


# sparse products -----------------------------------------------------------------------------------------------------


def test_sparse_products_equal_dense_ones() -> None:
    n, N, d = 30, 11, 6
    h, g, weight = rows(N, n, 1), rows(N, d, 2), rows(n, d, 3)
    values, indices = h.topk(4)
    dense = torch.zeros_like(h).scatter(1, indices, values)
    by_latent = transpose(indices, n)
    torch.testing.assert_close(transposed_product(values, by_latent, g), dense.T @ g)
    torch.testing.assert_close(sums_by_latent(values, by_latent), dense.sum(0))
    torch.testing.assert_close(sampled_product(g, weight, indices), (g @ weight.T).gather(1, indices))
    torch.testing.assert_close(decode(values, indices, weight), dense @ weight)


def test_sparse_gradients_equal_those_of_the_dense_twin() -> None:
    sae, z = make_sae(), rows(9, 12).requires_grad_()
    with torch.no_grad():
        h = sae.pre_activations(z)
        indices = h.topk(5).indices
    sparse_values = encode_at((sae.b_pre, sae.W_enc, sae.b_enc), z, indices, h).relu()
    sparse = decode(sparse_values, indices, sae.W_dec) + sae.b_pre
    weight = rows(9, 12, 5)
    parameters = [z, *sae.parameters()]
    ours = torch.autograd.grad((sparse * weight).sum(), parameters)

    dense_h = (z - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    dense = dense_latents(dense_h, indices) @ sae.W_dec + sae.b_pre
    theirs = torch.autograd.grad((dense * weight).sum(), parameters)
    torch.testing.assert_close(sparse, dense)
    for mine, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_against_finite_differences() -> None:
    sae, z = make_sae(), rows(3, 12)
    indices = sae.pre_activations(z).topk(5).indices

    def f(z: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        h = (z - b_pre) @ W_enc.T + b_enc
        return decode(encode_at((b_pre, W_enc, b_enc), z, indices, h.detach()), indices, W_dec)

    inputs = [t.detach().requires_grad_() for t in (z, sae.b_pre, sae.W_enc, sae.b_enc, sae.W_dec)]
    assert torch.autograd.gradcheck(f, inputs)


def test_no_rows_give_zero_gradients() -> None:
    sae = make_sae()
    loss_config = LossConfig(k=5, k_aux=4, aux_coefficient=1.0)
    sae.losses(torch.empty(0, 12, dtype=torch.float64), loss_config, torch.tensor([3, 7]), 2).objective.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in sae.parameters())


# loss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dead", [0, 1, 3, 17])
def test_losses_equal_the_written_out_reference(n_dead: int) -> None:
    """Reconstruction and AuxK from their definitions, with autograd through dense matrices."""
    sae, z, k_aux = make_sae(), rows(20, 12), 4
    dead = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:n_dead].sort().values
    part = sae.losses(z, LossConfig(k=5, k_aux=k_aux, aux_coefficient=1 / 32), dead, n_dead)
    part.objective.backward()
    ours = {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}
    sae.zero_grad()

    h = (z - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    z_hat = dense_latents(h, h.topk(5).indices) @ sae.W_dec + sae.b_pre
    error = z - z_hat
    reference = error.square().sum()
    main = reference.item()
    if n_dead:
        masked = torch.full_like(h, float("-inf")).index_copy(1, dead, h[:, dead])
        e_hat = dense_latents(h, masked.topk(min(k_aux, n_dead)).indices) @ sae.W_dec  # without b_pre
        aux = (error.detach() - e_hat).square().sum()
        reference = reference + min(1, n_dead / k_aux) / 32 * aux
        torch.testing.assert_close(part.aux, aux)
    else:
        assert part.aux == 0
    reference.backward()
    assert part.main.item() == pytest.approx(main)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-11, atol=1e-11)


def test_losses_count_firing_latents() -> None:
    sae, z = make_sae(), rows(20, 12)
    part, latents = sae.losses(z, LossConfig(k=5)), sae.encode(z)
    assert part.l0 == (latents.values > 0).sum()
    assert torch.equal(part.fired, torch.bincount(latents.indices[latents.values > 0], minlength=40))


def test_auxiliary_loss_reaches_dead_latents_alone_and_fades_in() -> None:
    sae, z = make_sae(), rows(20, 12)
    dead = torch.tensor([2, 9])
    (gradient,) = torch.autograd.grad(sae.losses(z, LossConfig(5, 8, 1.0), dead, 2).aux, [sae.W_dec])
    assert gradient.any(1).nonzero()[:, 0].tolist() == [2, 9]
    assert [aux_weight(n, 8, 1 / 32) for n in (0, 2, 8, 30)] == [0, 1 / 128, 1 / 32, 1 / 32]
    assert [default_k_aux(d) for d in (2, 256, 512, 3072, 4096)] == [1, 128, 256, 2048, 2048]


# decoder rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tied", "orthogonal"])
def test_initial_rows_have_unit_norm_per_latent(how: str) -> None:
    sae = make_sae(n_latents=30)
    sae.initialise_(how, torch.Generator().manual_seed(3))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert torch.equal(sae.W_dec, sae.W_enc)
    if how == "orthogonal":
        torch.testing.assert_close(sae.W_dec[:12] @ sae.W_dec[:12].T, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)


def test_encoder_starts_at_the_norm_that_reconstructs_best() -> None:
    """With it, no other factor reconstructs random rows much better."""
    d, n, k = 128, 2048, 16
    sae, z = make_sae(d_model=d, n_latents=n, k=k), rows(500, d)
    norm = best_encoder_norm(n, k, d)
    sae.initialise_("tied", torch.Generator().manual_seed(3), encoder_norm=norm)
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_pre.zero_()
        torch.testing.assert_close(sae.W_enc, sae.W_dec * norm)
        z_hat = sae(z)
    best_factor = float((z * z_hat).sum() / z_hat.square().sum())
    assert best_factor == pytest.approx(1, abs=0.06)
    assert norm < 0.6
    assert best_encoder_norm(8, 8, 8) == 0.5


def test_parallel_gradient_is_removed_row_by_row() -> None:
    sae = make_sae()
    sae.W_dec.grad = rows(40, 12, 8)
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-14
    removed = before - sae.W_dec.grad
    torch.testing.assert_close(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)


# the public names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "scale"), [("none", 1.0), ("dataset", 0.25), ("layer", 1.0)])
def test_normalisation_round_trip(norm: str, scale: float) -> None:
    sae, x = make_sae(norm=norm, scale=scale), 3 * rows(8, 12) + 5
    z, mean, factor = sae.normalise(x)
    assert mean.shape == factor.shape == (8, 1)
    torch.testing.assert_close(z / factor + mean, x)
    if norm == "layer":
        torch.testing.assert_close(z, (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6))
    else:
        torch.testing.assert_close(z, x * scale)


@pytest.mark.parametrize(("norm", "scale"), [("none", 1.0), ("dataset", 0.25), ("layer", 1.0)])
def test_a_hook_gets_back_the_type_that_it_gave(norm: str, scale: float) -> None:
    """A model in bfloat16 splices what comes back into its own sums."""
    sae = make_sae(dtype=torch.float32, norm=norm, scale=scale)
    x = rows(5, 12, dtype=torch.bfloat16)
    assert sae(x).dtype == torch.bfloat16
    torch.testing.assert_close(sae(x), sae(x.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "scale"), [("none", 1.0), ("dataset", 0.25), ("layer", 1.0)])
def test_forward_equals_the_equations(norm: str, scale: float) -> None:
    sae, x = make_sae(norm=norm, scale=scale), 3 * rows(8, 12) + 5
    z = sae.normalise(x).z
    h = (z - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    latents = dense_latents(h, h.topk(5).indices)
    z_hat = latents @ sae.W_dec + sae.b_pre
    x_hat = z_hat * (x.std(1, keepdim=True) + 1e-6) + x.mean(1, keepdim=True) if norm == "layer" else z_hat / scale
    torch.testing.assert_close(sae(x), x_hat)
    found = sae.encode(x)
    torch.testing.assert_close(torch.zeros_like(h).scatter_add(1, found.indices, found.values), latents)


@pytest.mark.parametrize("norm", ["dataset", "layer"])
def test_directions_are_what_one_unit_of_a_latent_adds(norm: str) -> None:
    sae, x = make_sae(norm=norm, scale=0.25 if norm == "dataset" else 1.0), rows(6, 12)
    normalised, latents = sae.normalise(x), sae.encode(x)
    raised = Latents(latents.values.clone(), latents.indices)
    raised.values[:, 0] += 1
    change = sae.decode(raised, normalised) - sae.decode(latents, normalised)
    directions = sae.directions(latents.indices[:, 0], normalised)
    expected = directions if norm == "dataset" else directions[torch.arange(6), torch.arange(6)]
    torch.testing.assert_close(change, expected)
    if norm == "layer":
        with pytest.raises(ValueError, match=r"norm=sae\.normalise"):
            sae.decode(latents)
        with pytest.raises(ValueError, match=r"norm=sae\.normalise"):
            sae.directions(latents.indices[:, 0])


def test_encode_takes_any_leading_shape_and_pads() -> None:
    sae, x = make_sae(), rows(24, 12)
    with torch.no_grad():
        sae.b_enc -= 1  # so that fewer than k fire
    flat, cube = sae.encode(x), sae.encode(x.view(2, 3, 4, 12))
    assert cube.values.shape == cube.indices.shape == (2, 3, 4, 5)
    assert cube.indices.dtype == torch.long
    assert torch.equal(cube.values.view(24, 5), flat.values)
    silent = flat.values == 0
    assert silent.any()
    assert not flat.indices[silent].any()
    assert sae(x.view(2, 3, 4, 12)).shape == (2, 3, 4, 12)
    assert sae.encode(x[:0]).values.shape == (0, 5)


def test_encode_without_gradients_equals_encode_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = make_sae(), rows(24, 12)
    whole = sae.encode(x)
    monkeypatch.setattr("sae.model.CPU_ELEMENTS", 7 * 40)
    with torch.no_grad():
        blocks = sae.encode(x)
    torch.testing.assert_close(blocks.values, whole.values)
    assert torch.equal(blocks.indices, whole.indices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_encode_refuses_what_cannot_be_ranked(bad: float) -> None:
    x = rows(4, 12)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_sae().encode(x)
    with pytest.raises(ValueError, match="width 12, found 11"):
        make_sae().encode(x[:, 1:])


def test_encode_says_that_a_finite_value_is_too_large() -> None:
    x = rows(4, 12)
    x[2, 3] = -3e38
    with pytest.raises(ValueError, match=r"3e\+38") as caught:
        make_sae().encode(x)
    assert "NaN" not in str(caught.value)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1.0, 1e30])
def test_decoder_rows_of_any_size_get_unit_norm(size: float) -> None:
    sae = make_sae()
    plain = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec.mul_(size)
        sae.W_dec[3] = 0
    sae.normalise_decoder_()
    plain[3] = 0
    torch.testing.assert_close(sae.W_dec.detach(), plain, rtol=1e-3, atol=1e-3 if size < 1e-38 else 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 41}, "k must be between 1 and the number of latents, 40; found 41"), ({"norm": "batch"}, "norm 'batch'"),
     ({"architecture": "gate"}, "'gate'"), ({"scale": 0.0}, "scale must lie between"),
      ({"scale": float("inf")}, "found inf"), ({"scale": 1e-38}, "1e-38"), ({"norm_eps": 0.0}, "norm_eps must")],
)  # fmt: skip
def test_config_refuses_what_makes_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sae(**change)


# on disk -------------------------------------------------------------------------------------------------------------


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    sae = make_sae(dtype=torch.float32, norm="dataset", scale=0.5, provenance={"site": "layers.1.resid_post"})
    sae.save(tmp_path / "sae")
    loaded = sae_package.load(tmp_path / "sae")
    assert loaded.cfg == sae.cfg
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, getattr(loaded, name))
    assert loaded.weights_hash == sae.weights_hash
    x = rows(5, 12, dtype=torch.float32)
    assert torch.equal(loaded(x), sae(x))
    manifest = verify(tmp_path / "sae")
    assert manifest.kind == "sae"
    assert manifest.provenance["site"] == "layers.1.resid_post"
    assert manifest.provenance["sae_hash"] == sae.weights_hash
    with safe_open(tmp_path / "sae" / "sae.safetensors", "pt") as file:
        assert set(file.keys()) == {"W_enc", "W_dec", "b_enc", "b_pre"}
        assert file.get_slice("W_dec").get_shape() == file.get_slice("W_enc").get_shape() == [40, 12]


def test_the_site_is_that_of_the_provenance() -> None:
    cfg = SAEConfig(d_model=4, n_latents=8, k=2, provenance={"site": "layers.1.ffn_hidden"})
    assert SAE(cfg).site == "layers.1.ffn_hidden"
    for provenance in ({}, {"site": None}):
        with pytest.raises(ValueError, match=r"site.* sae\.adopt.* --activations to sae\.convert"):
            _ = SAE(replace(cfg, provenance=provenance)).site


def test_save_in_half_precision_keeps_its_own_identity(tmp_path: Path) -> None:
    sae = make_sae(dtype=torch.float32)
    sae.save(tmp_path / "half", dtype=torch.float16)
    loaded = load(tmp_path / "half")
    assert loaded.W_enc.dtype == torch.float32
    assert torch.equal(loaded.W_enc, sae.W_enc.half().float())
    assert loaded.weights_hash == open_artifact(tmp_path / "half").manifest.provenance["sae_hash"] != sae.weights_hash


def test_save_twice_is_harmless_and_another_sae_is_refused(tmp_path: Path) -> None:
    sae, other = make_sae(dtype=torch.float32), make_sae(seed=1, dtype=torch.float32)
    sae.save(tmp_path / "sae")
    sae.save(tmp_path / "sae")
    with pytest.raises(ValueError, match="sae_hash"):
        other.save(tmp_path / "sae")
    assert load(tmp_path / "sae").weights_hash == sae.weights_hash


def test_load_refuses_damage(tmp_path: Path) -> None:
    sae = make_sae(dtype=torch.float32)
    sae.save(tmp_path / "sae")
    file = tmp_path / "sae" / "sae.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"sae\.safetensors: damaged"):
        load(tmp_path / "sae")
    with torch.no_grad():
        sae.W_enc[1, 1] = float("nan")
    sae.save(tmp_path / "nan")
    with pytest.raises(ValueError, match="W_enc holds NaN"):
        load(tmp_path / "nan")
