"""Keys and values of past tokens: an explicit object that belongs to the caller, so that two generations never share one.

Shapes: B rows, T new tokens, S slots so far, G key/value heads, K head_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama3.args import ModelArgs


class KVCache:
    """Past keys and values of every layer for one batch.

    `k` and `v` are `[n_layers, B, G, capacity, K]`. Slots fill from the left, the same number for every row. While no slot
    holds padding, `valid` is None and a slot's number is its position; from then on `valid[b, s]` is False where slot `s` of
    row `b` holds padding, and `positions[b]` is the position of that row's next token.
    """

    def __init__(self, args: ModelArgs, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (args.n_layers, batch_size, args.n_kv_heads, capacity, args.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.context = args.max_seq_len
        self.length = 0
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def claim(self, n_tokens: int, mask: Tensor | None) -> tuple[Tensor | slice, Tensor | None]:
        """Reserve the next `n_tokens` slots; `mask` (B, T) is False where a new token is padding.

        Returns positions (B, T), or the slice that holds for every row, and what each new token may see, bool
        (B or 1, 1, T, S), or None where plain causal order is enough. ValueError where the cache or the context is full.
        """
        start, end = self.length, self.length + n_tokens
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens; {end} are needed")
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is None and self.valid is None:
            if end > self.context:
                raise ValueError(f"the context holds {self.context} tokens; this sequence has {end}")
            self.length = end
            # One new token sees everything; so does, in causal order, a whole sequence. Only a later chunk needs a mask.
            chunk = start > 0 and n_tokens > 1
            return slice(start, end), attention_mask(self.k.new_ones(1, end, dtype=torch.bool), n_tokens) if chunk else None
        return self._claim_padded(n_tokens, mask)

    def _claim_padded(self, n_tokens: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, start, end = self.k.shape[1], self.length, self.length + n_tokens
        valid, next_positions = self.valid, self.positions
        if valid is None or next_positions is None:
            valid = torch.zeros(rows, self.capacity, device=self.k.device, dtype=torch.bool)
            valid[:, :start] = True
            next_positions = torch.full((rows,), start, device=self.k.device)
        if mask is None:
            mask = torch.ones(rows, n_tokens, dtype=torch.bool, device=self.k.device)
        steps = mask.long().cumsum(1)
        positions = (next_positions[:, None] + steps - 1).clamp(min=0)
        # Padding takes slots, not positions, so that only beyond the context's length a look at the positions is needed.
        if end > self.context and int(positions.max()) >= self.context:
            raise ValueError(f"the context holds {self.context} tokens; a row has {int(positions.max()) + 1}")
        valid[:, start:end] = mask
        self.valid, self.positions, self.length = valid, next_positions + steps[:, -1], end
        if start == 0 and padded_right(mask):
            return positions, None
        return positions, attention_mask(valid[:, :end], n_tokens)

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self.k[index], self.v[index], self.length)


class LayerCache(NamedTuple):
    """One layer's share of a KVCache: `k`, `v` (B, G, capacity, K), of which the first `length` slots are claimed."""

    k: Tensor
    v: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' `k`, `v` (B, G, T, K) in the slots just claimed; return all so far (B, G, S, K)."""
        start, n_tokens = self.length - k.shape[2], k.shape[2]
        self.k.narrow(2, start, n_tokens).copy_(k)
        self.v.narrow(2, start, n_tokens).copy_(v)
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)


def attention_mask(valid: Tensor, n_queries: int) -> Tensor:
    """Which keys each of the last `n_queries` slots may see, bool (B, 1, T, S), from `valid` (B, S).

    A query sees valid keys up to itself, and always itself: a padding query would otherwise have no key, and softmax
    over nothing is NaN.
    """
    n_keys = valid.shape[1]
    query = torch.arange(n_keys - n_queries, n_keys, device=valid.device)[:, None]
    key = torch.arange(n_keys, device=valid.device)[None, :]
    return ((key <= query) & valid[:, None, None, :]) | (key == query)


def padded_right(mask: Tensor) -> bool:
    """Whether every row of `mask` (B, T) holds its tokens first: causal order then hides the padding from them by itself."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())
