"""The last token of a prompt, run again under many edits at one site in one pass.

Edits differ from one another only there, so the tokens before it, and all layers up to the site, are computed once.

Shapes: B edits, T tokens of the prompt, W width of the site, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama3 import Transformer
from llama3.cache import KVCache, LayerCache
from llama3.sites import CaptureDone


@dataclass(frozen=True)
class LastToken:
    """A prompt, read but for its last token."""

    model: Transformer
    site: str
    past: KVCache
    """Of one row: the tokens before the last, and room for it."""
    token: Tensor
    """(1, 1) the last token."""
    x: Tensor
    """(1, W) its activation at the site."""
    logits: Tensor
    """(V,) of the prompt as it is."""

    @classmethod
    @torch.inference_mode()
    def read(cls, model: Transformer, site: str, ids: Sequence[int]) -> "LastToken":
        """`ids` are two tokens or more. ValueError where they are more than the context holds."""
        assert len(ids) > 1, ids
        tokens = torch.tensor([list(ids)], device=model.device)
        past = model.new_cache(1, len(ids))
        model(tokens[:, :-1], cache=past, last_only=True)
        seen: list[Tensor] = []
        with model.hooks({site: seen.append}):
            logits = model(tokens[:, -1:], cache=past)[0, -1].float()
        return cls(model, site, past, tokens[:, -1:], seen[0][0], logits)

    @torch.inference_mode()
    def logits_with(self, pushes: Tensor) -> Tensor:
        """(B, V) next-token logits with each of `pushes` (B, W) added at the site."""
        with self.model.hooks({self.site: lambda x: x + pushes[:, None].to(x.dtype)}):
            logits: Tensor = self.model(self.token, cache=self._fanned(len(pushes)))
        return logits[:, -1].float()

    @torch.inference_mode()
    def final_with(self, pushes: Tensor) -> Tensor:
        """(B, D) what the unembedding reads, with each of `pushes` (B, W) added at the site."""
        found: list[Tensor] = []

        def read(x: Tensor) -> None:
            found.append(x[:, -1].float())
            raise CaptureDone

        edit = {self.site: lambda x: x + pushes[:, None].to(x.dtype)}
        try:
            with self.model.hooks(edit), self.model.hooks({"final_norm": read}):
                self.model(self.token, cache=self._fanned(len(pushes)))
        except CaptureDone:
            pass
        return found[0]

    def _fanned(self, rows: int) -> KVCache:
        return FannedCache(self.model, self.past, rows, _first_layer_of_many(self.site, self.model.params.n_layers))


def _first_layer_of_many(site: str, n_layers: int) -> int:
    """The first layer whose attention reads as many rows as there are edits at `site`."""
    if site == "embed":
        return 0
    if site == "final_norm":
        return n_layers
    _, layer, name = site.split(".")
    return int(layer) + (name not in ("resid_pre", "attn_norm"))


class FannedCache(KVCache):
    """All but the last token of a cache of one row: one row in the first layers, `rows` equal rows from layer `first` on."""

    def __init__(self, model: Transformer, past: KVCache, rows: int, first: int) -> None:
        self.k = past.k[:first].clone()
        self.v = past.v[:first].clone()
        self._many = tuple(each[first:].expand(-1, rows, -1, -1, -1).clone() for each in (past.k, past.v))
        self.context, self.length = model.params.max_seq_len, past.length - 1
        self.valid = self.positions = None
        self._first = first

    def layer(self, index: int) -> LayerCache:
        if index < self._first:
            return super().layer(index)
        k, v = self._many
        return LayerCache(k[index - self._first], v[index - self._first], self.length)
