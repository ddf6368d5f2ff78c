"""Adam on an SAE, block by block of latents: projection, update and renormalisation while the block's rows are in cache.

Equal to forming all gradients, taking out what is parallel to each decoder row, `torch.optim.Adam.step`, and renormalising: the
state is that optimizer's own, and every row moves in every step.
"""

from functools import partial

import torch
from torch import Tensor
from torch.optim.adam import adam

from core.runtime import Comm, Solo
from sae import fast
from sae.gradients import DenseRows, Entries, RowGradients
from sae.model import SAE

SOLO = Solo()
# Of one block of one matrix. On a CPU seven such blocks of 2 MB stay in cache.
CPU_ELEMENTS, GPU_ELEMENTS = 2**19, 2**26


@torch.no_grad()
def update_(
    sae: SAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    clip_norm: float = 0.0,
    unit_decoder: bool = True,
    latent: Comm = SOLO,
) -> Tensor:
    """Let `gradients` act on all parameters; returns their norm [], before clipping and after projection, over the latents of
    all ranks in the group `latent`.

    `optimizer` gives learning rate, betas, epsilon and decay, and holds the state. With `clip_norm` the gradients are formed
    twice, first for their norm.
    """
    biases = [gradients.b_pre, gradients.b_enc]
    own = _square(gradients.b_pre) * (latent.rank == 0) + _square(gradients.b_enc)  # all ranks have the same b_pre
    pass_over = partial(_by_kernel if _fused(sae, gradients) else _by_blocks, sae, optimizer, gradients, unit_decoder)
    scale = None
    if clip_norm:
        norm = latent.sum_(own + pass_over(act=False)).sqrt()
        scale = (clip_norm / (norm + 1e-6)).clamp_max(1)  # as torch.nn.utils.clip_grad_norm_
        biases = [part * scale for part in biases]
    squares = pass_over(scale)
    _adam(optimizer, [sae.b_pre, sae.b_enc], biases, slice(None))
    for parameter in sae.parameters():
        optimizer.state[parameter]["step"] += 1
    return latent.sum_(own + squares).sqrt()


def _by_blocks(
    sae: SAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    unit_decoder: bool,
    scale: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """The squared norm of the gradients of `W_enc` and `W_dec` []; with `act` they act, times `scale`."""
    squares = []
    for block in _blocks(sae):
        parts = _projected(sae, gradients, block, unit_decoder)
        squares += [_square(part) for part in parts]
        if not act:
            continue
        if scale is not None:
            parts = [part.mul_(scale) for part in parts]
        _adam(optimizer, [sae.W_enc, sae.W_dec], parts, block)
        if unit_decoder:
            rows = sae.W_dec[block]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return torch.stack(squares).sum()


def _fused(sae: SAE, gradients: RowGradients) -> bool:
    """Whether one kernel can form the gradients and let them act: on a GPU, where no gradient has to travel."""
    kinds = [type(part) for part in gradients.parts]
    return fast.kernels_for(sae.W_dec) is not None and gradients.data.size == 1 and kinds in ([Entries], [Entries, DenseRows])


def _by_kernel(
    sae: SAE,
    optimizer: torch.optim.Adam,
    gradients: RowGradients,
    unit_decoder: bool,
    scale: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """As `_by_blocks`."""
    kernels = fast.kernels_for(sae.W_dec)
    assert kernels is not None
    enc, dec = ([weight, *_moments(optimizer, weight)] for weight in (sae.W_enc, sae.W_dec))
    numbers = _adam_numbers(optimizer, sae.W_dec, scale) if act else None
    square: Tensor = kernels.update_rows(enc, dec, (*gradients.parts, None)[:2], numbers, unit_decoder)
    return square


def _adam_numbers(optimizer: torch.optim.Adam, parameter: Tensor, scale: Tensor | None) -> Tensor:
    """What `update_rows` wants to know, float64 [7], without waiting for the device."""
    group = optimizer.param_groups[0]
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    step = _state(optimizer, parameter)["step"].double() + 1
    constants = [1.0, 1 - beta1, 1 - beta2, 1 - lr * decay, lr, 1.0, group["eps"]]
    pinned = torch.tensor(constants, dtype=torch.float64, pin_memory=parameter.is_cuda)
    numbers = pinned.to(parameter.device, non_blocking=True)
    if scale is not None:
        numbers[0] = scale
    numbers[4] /= 1 - beta1**step
    numbers[5] = (1 - beta2**step).rsqrt()
    return numbers


def _blocks(sae: SAE) -> list[slice]:
    n, d = sae.W_dec.shape
    rows = max(1, (CPU_ELEMENTS if sae.W_dec.device.type == "cpu" else GPU_ELEMENTS) // d)
    return [slice(start, min(n, start + rows)) for start in range(0, n, rows)]


def _square(gradient: Tensor) -> Tensor:
    square: Tensor = torch.linalg.vector_norm(gradient).double().square()
    return square


def _projected(sae: SAE, gradients: RowGradients, block: slice, unit_decoder: bool) -> list[Tensor]:
    """Gradients of a block of `W_enc` and `W_dec`, the latter without the part along each row, which renormalising undoes."""
    enc, dec = gradients.rows(block.start, block.stop)
    if unit_decoder:
        rows = sae.W_dec[block]
        dec.addcmul_(rows, torch.linalg.vecdot(dec, rows, dim=1)[:, None], value=-1)
    return [enc, dec]


def _adam(optimizer: torch.optim.Adam, parameters: list[Tensor], gradients: list[Tensor], block: slice) -> None:
    group = optimizer.param_groups[0]
    states = [_state(optimizer, parameter) for parameter in parameters]
    adam(
        [parameter[block] for parameter in parameters],
        gradients,
        [state["exp_avg"][block] for state in states],
        [state["exp_avg_sq"][block] for state in states],
        [],
        [state["step"].clone() for state in states],  # each block counts it up
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )


def _moments(optimizer: torch.optim.Adam, parameter: Tensor) -> list[Tensor]:
    state = _state(optimizer, parameter)
    return [state["exp_avg"], state["exp_avg_sq"]]


def _state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter; zeros before its first step, as torch.optim.Adam makes them."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
