"""Adam on an SAE, block by block of latents: projection, update and renormalisation while the block's rows are in cache.

Equal to forming all gradients, taking out what is parallel to each decoder row, `torch.optim.Adam.step`, and renormalising: the
state is that optimizer's own, and every row moves in every step.
"""

import torch
from torch import Tensor
from torch.optim.adam import adam

from sae.model import SAE
from sae.step import RowGradients

BLOCK_ELEMENTS = 2**19  # of one matrix: seven blocks of 2 MB are at work at a time


@torch.no_grad()
def update_(
    sae: SAE, optimizer: torch.optim.Adam, gradients: RowGradients, clip_norm: float = 0.0, unit_decoder: bool = True
) -> Tensor:
    """Let `gradients` act on all parameters; returns their norm [], before clipping and after projection.

    `optimizer` gives learning rate, betas, epsilon and decay, and holds the state. With `clip_norm` the gradients are formed
    twice, first for their norm.
    """
    scale = None
    if clip_norm:
        squares = [_square(part) for block in _blocks(sae) for part in _projected(sae, gradients, block, unit_decoder)]
        norm = torch.stack([*squares, _square(gradients.b_pre), _square(gradients.b_enc)]).sum().sqrt()
        scale = (clip_norm / (norm + 1e-6)).clamp_max(1)  # as torch.nn.utils.clip_grad_norm_
    squares = [_square(gradients.b_pre), _square(gradients.b_enc)]
    for block in _blocks(sae):
        parts = _projected(sae, gradients, block, unit_decoder)
        squares += [_square(part) for part in parts]
        if scale is not None:
            parts = [part.mul_(scale) for part in parts]
        _adam(optimizer, [sae.W_enc, sae.W_dec], parts, block)
        if unit_decoder:
            rows = sae.W_dec[block]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    biases = [gradients.b_pre, gradients.b_enc]
    _adam(optimizer, [sae.b_pre, sae.b_enc], biases if scale is None else [part * scale for part in biases], slice(None))
    for parameter in sae.parameters():
        optimizer.state[parameter]["step"] += 1
    return torch.stack(squares).sum().sqrt()


def _blocks(sae: SAE) -> list[slice]:
    n, d = sae.W_dec.shape
    rows = max(1, BLOCK_ELEMENTS // d)
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


def _state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter; zeros before its first step, as torch.optim.Adam makes them."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
