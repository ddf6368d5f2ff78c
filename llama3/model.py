"""The Llama 3 transformer (Dubey et al. 2024, arXiv:2407.21783), with named sites where activations are read or edited.

Shapes: B batch, T tokens, S tokens so far, H query heads, G key/value heads, K head_dim, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.product import MOST_INT8_ROWS, Int8Weight, int8_linear, linear
from llama3.args import ModelArgs
from llama3.cache import KVCache, LayerCache, attention_mask, padded_right
from llama3.rope import apply_rotary_emb, as_factors, precompute_freqs_cis
from llama3.sites import ActiveHooks, CaptureDone, Hook, SiteHooks, as_sites, check_sites


class Linear(nn.Module):
    """`x W^T`: x (..., n_in), W (n_out, n_in), result (..., n_out).

    W starts at zero: loading would overwrite random numbers, and making them on the meta device imports torch._dynamo.
    """

    int8: Int8Weight | None = None
    """A copy of W that products of a few rows read in its place (`Transformer.decode_in_8_bits`)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.zeros(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        if self.int8 is not None and x.numel() <= MOST_INT8_ROWS * x.shape[-1]:
            return int8_linear(x, self.int8)
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions; keys and values are never repeated."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: LayerCache | None, hooks: SiteHooks) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.args.n_heads, self.args.head_dim)
        k = self.wk(x).view(B, T, self.args.n_kv_heads, self.args.head_dim)
        v = self.wv(x).view(B, T, self.args.n_kv_heads, self.args.head_dim).transpose(1, 2)  # (B, G, T, K)
        q = apply_rotary_emb(q, rope)
        k = apply_rotary_emb(k, rope).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K)
        if mask is None and T > 1:  # the whole sequence, in causal order
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            out = grouped_attention(q, k, v, mask)
        return cast(Tensor, self.wo(hooks.at("attn_heads", out.reshape(B, T, -1))))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `q` (B, T, H, K) to `k`, `v` (B, G, S, K) under `mask` (see `fold_mask`); returns (B, T, H, K).

    The H/G heads of a group become further queries to the same keys: the kernels that accept a mask know no groups, and at
    T = 1 each key is read once in place of H/G times.
    """
    B, T, H, K = q.shape
    G = k.shape[1]
    if T == 1:  # the same without moving dimensions of size 1 about
        return F.scaled_dot_product_attention(q.view(B, G, H // G, K), k, v, attn_mask=mask).view(B, 1, H, K)
    folded = q.view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, K)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return out.view(B, G, H // G, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H, K)


def fold_mask(mask: Tensor, args: ModelArgs, dtype: torch.dtype) -> Tensor:
    """A bool mask (B, 1, T, S) as the summand that `grouped_attention` takes, (B, 1, H/G * T, S), once for all layers."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return bias if mask.shape[2] == 1 else bias.repeat(1, 1, args.n_heads // args.n_kv_heads, 1)


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)` (Shazeer 2020)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

    def forward(self, x: Tensor, hooks: SiteHooks) -> Tensor:
        return cast(Tensor, self.w2(hooks.at("ffn_hidden", F.silu(self.w1(x)) * self.w3(x))))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each on its normalised input and added back to the residual stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: LayerCache | None, hooks: SiteHooks) -> Tensor:
        x = hooks.at("resid_pre", x)
        attn_norm = hooks.at("attn_norm", self.attention_norm(x))
        x = x + hooks.at("attn_out", self.attention(attn_norm, rope, mask, cache, hooks))
        x = hooks.at("resid_mid", x)
        ffn_norm = hooks.at("ffn_norm", self.ffn_norm(x))
        x = x + hooks.at("ffn_out", self.feed_forward(ffn_norm, hooks))
        return hooks.at("resid_post", x)


ROPE_LENGTH = 8192
"""Positions of the first RoPE table."""


class Transformer(nn.Module):
    """A Llama 3 decoder.

    `store_layer_activ=[23]` keeps the last `layers.23.attn_norm` of every forward pass in `stored_activations[23]`;
    `sae_layer_forward_fn={23: fn}` applies `fn` there. Both are short forms for that one site; `hooks` reaches all.
    """

    freqs_cis: Tensor
    weights_hash: str = ""
    """Identifies the checkpoint that `load_model` read; empty for weights made here."""

    def __init__(
        self,
        params: ModelArgs,
        store_layer_activ: Sequence[int] = (),
        sae_layer_forward_fn: Mapping[int, Callable[[Tensor], Tensor | None]] | None = None,
    ) -> None:
        super().__init__()
        self.params = params
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim, _weight=torch.zeros(params.vocab_size, params.dim))
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = Linear(params.dim, params.vocab_size)
        if params.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("freqs_cis", self.rope_table(), persistent=False)
        self.stored_activations: dict[int, Tensor] = {}
        self._hooks = ActiveHooks()
        permanent: dict[str, list[Hook]] = {}
        for layer, fn in (sae_layer_forward_fn or {}).items():
            permanent.setdefault(f"layers.{layer}.attn_norm", []).append(fn)
        for layer in store_layer_activ:
            permanent.setdefault(f"layers.{layer}.attn_norm", []).append(partial(self.stored_activations.__setitem__, layer))
        check_sites(permanent, params.n_layers)
        self._hooks.add_permanent(permanent)

    def rope_table(self, length: int = ROPE_LENGTH) -> Tensor:
        """Cosine and sine of the first `length` positions, or of all where the context is shorter: float32 (length, K/2, 2)."""
        p = self.params
        return precompute_freqs_cis(p.head_dim, min(length, p.max_seq_len), p.rope_theta, p.rope_scaling)

    def _factors(self, positions: Tensor | slice, end: int) -> Tensor:
        """RoPE factors of `positions`, all before `end`. The table grows with the longest sequence, not with the context."""
        if end > len(self.freqs_cis):
            self.freqs_cis = self.rope_table(max(end, 2 * len(self.freqs_cis))).to(self.freqs_cis.device)
        return as_factors(self.freqs_cis[positions])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` converts buffers too, and 8 bits of mantissa cannot tell position 300 from 301.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.freqs_cis = self.rope_table(len(self.freqs_cis)).to(self.freqs_cis.device)
        return self

    def decode_in_8_bits(self) -> None:
        """Let products of up to MOST_INT8_ROWS rows, decoding steps, read weights in 8 bits; prompts read the exact ones.

        For a CPU, where a decoding step takes as long as the weights take to be read. ValueError elsewhere, and where the
        model is not in float32.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            raise ValueError(f"8-bit decoding is for a model in float32 on a CPU; found {self.dtype} on {self.device}")
        for module in self.modules():
            if isinstance(module, Linear):
                module.int8 = Int8Weight.of(module.weight)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    def width(self, site: str) -> int:
        """Entries of an activation at `site`. ValueError where the model has no such site."""
        check_sites(site, self.params.n_layers)
        widths = {"attn_heads": self.params.n_heads * self.params.head_dim, "ffn_hidden": self.params.hidden_dim}
        return widths.get(site.rpartition(".")[2], self.params.dim)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty KV cache for `batch_size` rows of up to `capacity` tokens, on the model's device and in its dtype."""
        return KVCache(self.params, batch_size, capacity, self.device, self.dtype)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V) in the model's dtype for `tokens` (B, T); (B, 1, V) of the last slot with `last_only`.

        `mask` (B, T), bool, is False at padding, on whichever side; positions count real tokens only. With `cache`, `tokens`
        continue the sequences stored there. Raises ValueError where a sequence is longer than the context.
        """
        hooks = self._hooks.current()  # here and not in `hidden`: torch.compile breaks its graph where the hooks are read
        rope, attn_mask = self._positions(tokens, mask, cache)
        x = hooks.at("embed", self.tok_embeddings(tokens))
        x = self._layers_from(0, x, rope, attn_mask, cache, hooks)
        return cast(Tensor, self.output(x[:, -1:] if last_only else x))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head, `output`, reads: (B, T, D), for `tokens` (B, T) in causal order, which may be padded on the right."""
        self._positions(tokens, None, None)  # refuses what is longer than the context
        return self.resume(self._hooks.current().at("embed", self.tok_embeddings(tokens)), 0)

    def resume(self, x: Tensor, layer: int) -> Tensor:
        """`hidden` from layer `layer` on (0 to n_layers), given what enters it: `x` (B, T, D) of the first T positions.

        Padding may stand on the right. Hooks act at the sites from there on.
        """
        return self._layers_from(layer, x, self._factors(slice(0, x.shape[1]), x.shape[1]), None, None, self._hooks.current())

    def _layers_from(
        self, first: int, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None, hooks: SiteHooks
    ) -> Tensor:
        for i in range(first, len(self.layers)):
            x = self.layers[i](x, rope, mask, cache and cache.layer(i), hooks.layer(i))
        return hooks.at("final_norm", self.norm(x))

    def _positions(self, tokens: Tensor, mask: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """RoPE factors for these tokens (see `as_factors`), and the folded attention mask if one is needed."""
        T, context = tokens.shape[1], self.params.max_seq_len
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool {list(tokens.shape)} like the tokens; found {mask.dtype} {list(mask.shape)}")
        positions: Tensor | slice = slice(0, T)
        seen = None
        if cache is not None:
            positions, seen = cache.claim(T, mask)
        elif context < T:
            raise ValueError(f"the context holds {context} tokens; this sequence has {T}")
        elif mask is None or padded_right(mask):
            pass  # the first T positions, in causal order
        else:
            positions, seen = (mask.long().cumsum(1) - 1).clamp(min=0), attention_mask(mask, T)
        factors = self._factors(positions, T if cache is None else cache.length)
        return factors, None if seen is None else fold_mask(seen, self.params, self.dtype)

    @contextmanager
    def hooks(self, fns: Mapping[str, Hook | Sequence[Hook]]) -> Iterator[None]:
        """Within the block, call each `fn(x: (B, T, width))` at its site: None to read, a tensor to replace.

        Belongs to the calling thread or task alone (a context variable), so concurrent requests on one model never see each
        other's hooks; nested blocks add up, the outer first. Raises ValueError for an unknown site.
        """
        check_sites(fns, self.params.n_layers)
        with self._hooks.adding(fns):
            yield

    def capture(self, tokens: Tensor, sites: str | Iterable[str], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Activations (B, T, width) of each site; computation stops after the last one asked for, and the head is never run.

        A string counts as one site. Raises ValueError for an unknown one.
        """
        captured: dict[str, Tensor] = {}
        wanted = set(as_sites(sites))

        def reader(site: str) -> Hook:
            def read(x: Tensor) -> None:
                captured[site] = x
                if len(captured) == len(wanted):
                    raise CaptureDone

            return read

        with self.hooks({site: reader(site) for site in wanted}):
            try:
                self(tokens, mask=mask)
            except CaptureDone:
                pass
        return captured
