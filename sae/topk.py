"""Exact top-k of the latents' pre-activations, in two levels.

Shapes: N rows, n latents, k kept, G latents in a group, m groups.
"""

import torch
from torch import Tensor


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `h` [N, n] in falling order: values [N, k] and indices [N, k] int64.

    Exact in values: an element of the top k lies in one of the k groups with the largest maxima, so it is enough to look there.
    Where values tie, the choice depends on the input alone. NaN must be refused before: it would rank first.
    """
    n = h.shape[-1]
    group = group_size(n, k)
    m = n // group
    if m < 2 * k:
        return torch.topk(h, k)
    # Group j holds the latents j, j + m, j + 2m, ...: the maxima then run over whole rows of m, which vectorises.
    grouped = h[:, : group * m].reshape(-1, group, m)  # (N, G, m), a view
    best = torch.topk(grouped.amax(1), k, sorted=False).indices  # (N, k)
    candidates = grouped.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)  # (N, G * k)
    columns = (best[:, None] + m * torch.arange(group, device=h.device)[:, None]).flatten(1)  # their latents, (N, G * k)
    if group * m < n:
        rest = torch.arange(group * m, n, device=h.device).expand(h.shape[0], -1)
        candidates, columns = torch.cat((candidates, h[:, group * m :]), 1), torch.cat((columns, rest), 1)
    values, where = torch.topk(candidates, k)
    return values, columns.gather(1, where)


def group_size(n: int, k: int) -> int:
    """A power of two near sqrt(n / k), at most 32: there the maxima (n / G) and the candidates (G * k) cost about the same."""
    size = 2
    while size < 32 and 2 * size * size * k <= n:
        size *= 2
    return size
