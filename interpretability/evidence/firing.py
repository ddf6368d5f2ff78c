"""Which latents fire on which rows, as one flat list: the top k of each row without their order.

`SAE.encode` gives every row k values in falling order, which costs as much on a CPU as the encoder's product where that is
small. The pass over tokens needs neither the order nor rows of one length. The k-th largest maximum of a row's groups is at
most its k-th largest element, so all of the top k are that large and lie in groups whose maximum is; the few too many are cut
at the exact k-th. A row in which equal values make the choice ambiguous goes the way of `SAE.encode`, so both always agree.

Shapes: N rows, n latents, G latents in a group, m groups, C candidates, H activations above zero.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.model import CPU_ELEMENTS, SAE

GROUP = 16  # float32 numbers of one cache line
_SMALLEST = np.nextafter(np.float32(0), np.float32(1))


class Firing(NamedTuple):
    """Activations above zero, by row."""

    rows: Tensor  # (H,) int64, ascending
    latents: Tensor  # (H,) int64
    values: Tensor  # (H,) float32


@torch.inference_mode()
def firing(sae: SAE, x: Tensor) -> Firing:
    """The latents that fire on raw rows `x` [N, d], which must be finite: those of `sae.encode(x)`."""
    cfg = sae.cfg
    in_groups = cfg.n_latents % GROUP == 0 and cfg.n_latents // GROUP >= 2 * cfg.k
    if not (in_groups and sae.selects_top_k and x.is_cpu and sae.W_enc.dtype == torch.float32):
        return _flat(*sae.encode(x))
    step = max(1, CPU_ELEMENTS // cfg.n_latents)  # as encode cuts its blocks, for the same last bits
    # Results are copied away at once: what is kept between blocks would lie between their large tensors and scatter the heap.
    most = len(x) * cfg.k
    kept, n = Firing(torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.int64), torch.empty(most)), 0
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # NumPy works in one thread, and lets others work beside it
        for begin in range(0, len(x), step):
            h = sae.pre_activations(sae.normalise(x[begin : begin + step]).z)
            maxima = F.max_pool1d(h[:, None], GROUP)[:, 0]
            parts = h.chunk(threads)
            for part, found in zip(parts, pool.map(_of_rows, [sae] * len(parts), parts, maxima.chunk(threads)), strict=True):
                last = n + len(found.rows)
                kept.rows[n:last], kept.latents[n:last], kept.values[n:last] = found.rows + begin, found.latents, found.values
                n, begin = last, begin + len(part)
    return Firing(*(column[:n] for column in kept))


def _flat(values: Tensor, indices: Tensor) -> Firing:
    fires = (values > 0).flatten().nonzero().squeeze(1)
    rows = fires.div(values.shape[1], rounding_mode="floor")
    return Firing(rows, indices.flatten()[fires], values.flatten()[fires].float())


def _of_rows(sae: SAE, h: Tensor, group_maxima: Tensor) -> Firing:
    """The top k of each row of pre-activations `h` (N, n) where above zero; `group_maxima` (N, m)."""
    k, m = sae.cfg.k, h.shape[1] // GROUP
    maxima: npt.NDArray[np.float32] = group_maxima.numpy()
    least = np.maximum(np.partition(maxima, m - k, axis=1)[:, m - k], _SMALLEST)  # (N,)
    groups = np.flatnonzero(maxima >= least[:, None])  # row * m + group
    of_group = groups // m  # their rows
    inside = h.view(-1, GROUP).numpy().take(groups, axis=0)  # (groups, G)
    at = np.flatnonzero(inside >= least[of_group, None])  # (C,), into `inside`
    rows, values = of_group[at // GROUP], inside.reshape(-1)[at]
    latents = groups[at // GROUP] % m * GROUP + at % GROUP

    counts = np.bincount(rows, minlength=len(h))
    width = int(counts.max(initial=0))
    if width > k:
        padded = np.full((len(h), width), -np.inf, dtype=np.float32)
        padded[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = values
        kept = values >= np.partition(padded, width - k, axis=1)[rows, width - k]
        rows, latents, values = rows[kept], latents[kept], values[kept]
    found = Firing(torch.from_numpy(rows), torch.from_numpy(latents), torch.from_numpy(values))
    tied = np.bincount(rows, minlength=len(h)) > k
    return _chosen_by_select(sae, h, found, torch.from_numpy(tied)) if tied.any() else found


def _chosen_by_select(sae: SAE, h: Tensor, found: Firing, tied: Tensor) -> Firing:
    """`found` with the latents of the rows `tied` as the SAE selects them."""
    rows = tied.nonzero().squeeze(1)
    selected = _flat(*sae.select(h[rows]))
    clear = ~tied[found.rows]
    parts = Firing(*(column[clear] for column in found)), selected._replace(rows=rows[selected.rows])
    joined = Firing(*(torch.cat(column) for column in zip(*parts, strict=True)))
    order = joined.rows.argsort(stable=True)
    return Firing(*(column[order] for column in joined))
