"""What the model predicts when other rows take the place of x at a site: one clean pass, then only the layers after the site.

Shapes: B sentences, T tokens, D model width, N rows replaced, P tokens predicted, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama3 import Transformer
from llama3.sites import entry

# Logits held at once, three times over. On a CPU 32 MB each, however large the vocabulary.
CPU_ELEMENTS, GPU_ELEMENTS = 2**23, 2**28


class Spliced:
    """A clean pass over `tokens` (B, T), padded on the right, that can be resumed with other rows at `site`.

    No mask is needed: a causal model does not look from a real token at padding on the right.
    """

    x: Tensor
    """The activation at the site, (B, T, width)."""
    hidden: Tensor
    """What the head reads in the clean pass, (B, T, D)."""

    def __init__(self, model: Transformer, site: str, tokens: Tensor) -> None:
        self._model, self._site = model, site
        self._entry, self._layer = entry(site, model.params.n_layers)
        seen: dict[str, Tensor] = {}

        def reader(name: str) -> Callable[[Tensor], None]:
            return lambda x: seen.update({name: x})

        with model.hooks({name: reader(name) for name in {site, self._entry}}):
            self.hidden = model.hidden(tokens)
        self.x, self._start = seen[site], seen[self._entry]

    def replaced(self, where: Tensor, rows: Tensor) -> Tensor:
        """What the head reads, (B, T, D), with `rows` [N, width] in place of x at `where`, bool (B, T)."""

        def edited(x: Tensor) -> Tensor:
            x = x.clone()
            x[where] = rows.to(x.dtype)
            return x

        if self._entry == self._site:
            return self._model.resume(edited(self._start), self._layer)
        with self._model.hooks({self._site: edited}):
            return self._model.resume(self._start, self._layer)


def losses(
    head: Callable[[Tensor], Tensor], clean: Tensor, spliced: Mapping[str, Tensor], targets: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Cross-entropy of the clean pass [P], and for each splice its cross-entropy and `KL(clean || spliced)`, [P] each, in nats.

    `clean` and the values of `spliced` are what the head reads where something is predicted, [P, D]; `targets` [P] int64.
    Logits exist for a block of rows at a time.
    """
    n_clean, found = [], {name: ([], []) for name in spliced}  # type: ignore[var-annotated]
    vocabulary = head(clean[:1]).shape[-1] if len(clean) else 1
    step = max(1, (CPU_ELEMENTS if clean.device.type == "cpu" else GPU_ELEMENTS) // vocabulary)
    for start in range(0, len(clean), step):
        rows = slice(start, start + step)
        logits, of_block = head(clean[rows]).float(), targets[rows, None]
        total = logits.logsumexp(1)
        p = (logits - total[:, None]).exp_()
        n_clean.append(total - logits.gather(1, of_block)[:, 0])
        for name, hidden in spliced.items():
            other = head(hidden[rows]).float()
            other_total = other.logsumexp(1)
            found[name][0].append(other_total - other.gather(1, of_block)[:, 0])
            # sum p (log p - log q) with log p = logits - total, log q = other - other_total
            found[name][1].append(torch.linalg.vecdot(p, torch.sub(logits, other, out=other)) + other_total - total)
    empty = clean.new_zeros(0, dtype=torch.float32)
    joined = {name: (torch.cat([empty, *ce]), torch.cat([empty, *kl])) for name, (ce, kl) in found.items()}
    return torch.cat([empty, *n_clean]), joined
