"""Triton kernels, in Triton's interpreter where there is no GPU, against PyTorch's operations."""

import copy
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import fast, update
from sae.batches import Batches
from sae.gradients import RowGradients
from sae.hyperparameters import Hyperparameters
from sae.loss import LossConfig, Losses
from sae.model import SAE
from sae.trainer import Trainer
from sae.update import update_
from tests.conftest import ROOT
from tests.sae_folders import ALONE, make_batches
from tests.test_sae_step import NO_AUX, adam, assert_same_state, make_sae, rows, separate_update_, some_dead

pytest.importorskip("triton", reason="Triton exists for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("sae.kernels")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_indices(n_rows: int, k: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(n_rows)]).to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(64, 5), (300, 5), (1030, 8), (2048, 32), (700, 300), (50, 50), (33, 1)])
def test_top_k(kernels: ModuleType, n: int, k: int, dtype: torch.dtype) -> None:
    """One level and two, with and without a last group that is not full; bfloat16 makes many equal values."""
    h = randn(6, n, dtype=dtype)
    h[1] = -h[1].abs()
    h[2] = 0.5  # all tie
    h[3, ::2] = 0.0
    h[3, 1::2] = -0.0
    h[4, : n // 2] = float("-inf")
    values, indices = kernels.top_k(h, k)
    assert torch.equal(values, torch.topk(h, k).values)
    assert torch.equal(h.gather(1, indices), values)
    assert all(len(row.unique()) == k for row in indices)
    assert torch.equal(indices[2], torch.arange(k, device=DEVICE))  # of equal ones the first


def test_top_k_gives_way_where_it_cannot_hold_the_candidates(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_CANDIDATES", 128)
    h = randn(3, 500)
    assert torch.equal(kernels.top_k(h, 6)[0], h.topk(6).values)
    assert kernels.top_k(h[:0], 6)[0].shape == (0, 6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n_rows", "k", "d"), [(5, 7, 12), (3, 4, 64), (0, 3, 12), (4, 1, 600)])
def test_sparse_products(kernels: ModuleType, n_rows: int, k: int, d: int, dtype: torch.dtype) -> None:
    weight, values, g = randn(40, d, dtype=dtype), randn(n_rows, k, seed=1), randn(n_rows, d, seed=2)
    indices = some_indices(n_rows, k, 40) if n_rows else torch.empty(0, k, dtype=torch.long, device=DEVICE)
    chosen = weight.double()[indices]  # (N, K, d)
    bag, products = kernels.bag(values, indices, weight), kernels.sampled_product(g, weight, indices)
    torch.testing.assert_close(bag, torch.einsum("nk,nkd->nd", values.double(), chosen).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products, torch.einsum("nd,nkd->nk", g.double(), chosen).float(), rtol=1e-5, atol=2e-5)


def test_sparse_products_in_float64(kernels: ModuleType) -> None:
    weight, values, indices = randn(40, 12, dtype=torch.float64), randn(5, 7, dtype=torch.float64), some_indices(5, 7, 40)
    expected = F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
    torch.testing.assert_close(kernels.bag(values, indices, weight), expected, rtol=1e-12, atol=1e-12)


# whole steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the step use the kernels on any device; top-k in float64, which they do not rank, stays PyTorch's."""
    by_kernel = kernels.top_k
    monkeypatch.setattr(fast, "kernels_for", lambda tensor: kernels)
    monkeypatch.setattr(kernels, "top_k", lambda h, k: torch.topk(h, k) if h.dtype == torch.float64 else by_kernel(h, k))


def one_step(sae: SAE, z: Tensor, dead: Tensor, products: torch.dtype | None = None) -> tuple[Losses, RowGradients]:
    loss_config = LossConfig(sae.cfg.k, 4, 1 / 32, products=products)
    return sae.row_gradients(z, loss_config, 1 / z.numel(), dead, len(dead))


@pytest.mark.parametrize(("clip_norm", "decay", "unit_decoder"), [(0.0, 0.0, True), (1e-3, 0.01, True), (0.0, 0.0, False)])
def test_steps_equal_autograd_and_adam(everywhere: None, clip_norm: float, decay: float, unit_decoder: bool) -> None:
    """Two steps in float64, the second with AuxK by dense products."""
    ours = make_sae().to(DEVICE)
    theirs = copy.deepcopy(ours)
    mine, twin = adam(ours, decay), adam(theirs, decay)
    for i in range(2):
        z, dead = rows(10, seed=i).to(DEVICE), (some_dead(9) if i else NO_AUX).to(DEVICE)
        gradients = one_step(ours, z, dead)[1]
        assert update._fused(ours, gradients)
        norm = update_(ours, mine, gradients, clip_norm, unit_decoder)
        (theirs.losses(z, LossConfig(5, 4, 1 / 32), dead, len(dead)).objective / z.numel()).backward()
        torch.testing.assert_close(norm, separate_update_(theirs, twin, clip_norm, unit_decoder))
    assert_same_state(ours, mine, theirs, twin)


@pytest.mark.parametrize("n_dead", [0, 9])
def test_a_step_in_bfloat16_is_one_of_rounded_operands(everywhere: None, n_dead: int) -> None:
    """Weights, rows and gradients rounded to 8 bits: loss within 1 %, direction of the gradient within 0.05."""
    sae, z, dead = make_sae(torch.float32).to(DEVICE), rows(8, torch.float32).to(DEVICE), some_dead(n_dead).to(DEVICE)
    rounded, exact = one_step(sae, z, dead, torch.bfloat16), one_step(sae, z, dead)
    torch.testing.assert_close(rounded[0].objective, exact[0].objective, rtol=1e-2, atol=0)
    assert rounded[0].main != exact[0].main
    for part, whole in zip(rounded[1].rows(0, 40), exact[1].rows(0, 40), strict=True):
        assert F.cosine_similarity(part.flatten(), whole.flatten(), dim=0) > 0.95
    before = sae.W_dec.detach().clone()
    update_(sae, adam(sae, 0.0), rounded[1])
    assert not torch.equal(before, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40, device=DEVICE))


def test_the_trainer_on_kernels_equals_the_trainer_on_pytorch(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps in float32, with dead latents from the second on; on a GPU also its loader."""
    folder = make_batches(tmp_path, randn(130, 10).cpu() + 0.5, batch_rows=32)
    settings = Hyperparameters(
        n_latents=48, k=3, batch_size=30, lr=3e-3, dead_after_tokens=30, aux_k=8, products="float32", epochs=2
    )
    plain = Trainer(settings, ALONE, Batches(folder))
    expected = [plain.train_step() for _ in range(3)]
    monkeypatch.setattr(fast, "kernels_for", lambda tensor: kernels)
    ours = Trainer(settings, replace(ALONE, device=torch.device(DEVICE)), Batches(folder))
    for theirs in expected:
        mine = ours.train_step()
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert float(mine.gradient_norm) == pytest.approx(float(theirs.gradient_norm), rel=1e-4)
        assert (mine.l0, mine.dead_fraction) == (theirs.l0, theirs.dead_fraction)
    assert len(plain.dead()) > 0
    for name, tensor in plain.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name].cpu(), tensor, rtol=1e-4, atol=1e-5)


def test_tensors_on_a_cpu_take_no_kernel() -> None:
    assert fast.kernels_for(torch.zeros(1)) is None


def test_without_triton_everything_takes_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    fast.has_kernels.cache_clear()
    monkeypatch.setattr(fast, "import_module", missing)
    assert not fast.has_kernels()
    fast.has_kernels.cache_clear()


# for a GPU that is not here ------------------------------------------------------------------------------------------

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae import kernels

def build(name, types, warps=2, **constants):
    function = getattr(kernels, name)
    types = dict(zip(function.arg_names, types.split()))
    signature = {argument: types.get(argument, "constexpr") for argument in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(key),): value for key, value in constants.items()})
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(name, len(code.asm["cubin"]))

build("_group_max", "*bf16 *bf16 i32 i32", GROUP=32, CHUNK=64)
build("_select", "*bf16 *bf16 *bf16 *i64 i32 i32 i32", GROUP=1, BLOCK=1024)
build("_select", "*fp32 *i64 *fp32 *i64 i32 i32 i32", GROUP=32, BLOCK=1024)
build("_bag", "*fp32 *i64 *bf16 *fp32 i32 i32", BLOCK=1024, ENTRIES=2)
build("_sampled", "*fp32 *bf16 *i64 *fp32 i32 i32", BLOCK=1024, ENTRIES=2)
update = 6 * "*fp32 " + "*i64 *i64 *fp32 *fp32 *bf16 *bf16 *i32 *bf16 *bf16 *fp32 *fp64 i32"
for apply in (True, False):
    build("_update", update, UNIT=True, APPLY=apply, BLOCK=1024, ENTRIES=2)
"""


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """To machine code for compute capability 9.0, which needs no GPU: the interpreter takes what the compiler would not."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", COMPILE]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 7
