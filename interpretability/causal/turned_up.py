"""What turning a latent up does to the next token, for every latent, without generating: two figures that tell which steer.

A latent is turned up at the last token of a neutral prompt by `factor` times the largest activation
that any latent has there, all else staying as it is, and the next-token distribution p' is compared
with p, that of the prompt alone:

    output score = (1 - r / V) max_{t in L} p'(t)
    change of token confidence = C(p') - C(p),   C(p) = -1/k sum of log p over its k likeliest tokens

L are the tokens that the latent's decoder row promotes most (the logit lens), r the best rank that one
of them has under p', from 0, V the size of the vocabulary. The first is that of Arad, Mueller and
Belinkov (2025, arXiv:2505.20063), with 20 tokens and a factor of 10; `output_rise` is what it gains
over the same figure of p. The second is the criterion of Wang, Hu, Wang and Zou (2025,
arXiv:2510.03659), with the confidence of Fu et al. (2025, arXiv:2508.15260). Both are means over
prompts.

Only the last token differs between latents, so the tokens before it are computed once.

Shapes: B latents at a time, T tokens of a prompt, n promoted tokens, V vocabulary, D model width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interpretability.evidence.promoted import promoted_ids, reaches_output
from llama3 import Tokenizer, Transformer
from llama3.cache import KVCache
from sae.model import SAE

CONFIDENT_TOKENS = 20
"""k: tokens whose probability makes the confidence."""


class TurnedUp(NamedTuple):
    """Of each latent, (B,) each; see the module."""

    output_score: Tensor
    output_rise: Tensor
    confidence_change: Tensor


class Prompt(NamedTuple):
    """A neutral prompt, read but for its last token."""

    past: KVCache
    """Of one row: the tokens before the last."""
    last: Tensor
    """(1, 1) the last token."""
    push: Tensor
    """What one unit of a decoder row stands for: factor * largest activation / scale, a number []."""
    logits: Tensor
    """(V,) of the prompt as it is."""


class Latents:
    """The latents of an SAE, ready to be turned up on some prompts.

    ValueError where a prompt is shorter than two tokens or longer than the context, where none of its latents is
    active at the last token of a prompt, and where its site has no logit lens.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, sae: SAE, prompts: Sequence[str], factor: float, promoted: int
    ) -> None:
        if not reaches_output(sae.site):
            raise ValueError(
                f"the SAE reads {sae.site}, whose directions reach the output through attention or feed-forward alone: they "
                "promote no tokens; choose an SAE of the residual stream, attn_out or ffn_out"
            )
        self._model, self._sae = model, sae
        self._promoted, _ = promoted_ids(model, sae.site, sae.W_dec, tokenizer, promoted)  # (n_latents, n)
        self._prompts = [self._read(prompt, tokenizer.encode_prompt(prompt), factor) for prompt in prompts]

    def _read(self, prompt: str, ids: Sequence[int], factor: float) -> Prompt:
        model, sae = self._model, self._sae
        if len(ids) < 2:
            raise ValueError(f"--prompts {prompt!r}: expected at least two tokens, found {len(ids)}; the first is not steered")
        tokens = torch.tensor([list(ids)], device=model.device)
        past = model.new_cache(1, len(ids))
        seen: list[Tensor] = []
        model(tokens[:, :-1], cache=past, last_only=True)
        with model.hooks({sae.site: seen.append}):
            logits = model(tokens[:, -1:], cache=past)[0, -1].float()
        x = seen[0][0]  # (1, D)
        largest = sae.encode(x).values.max()
        if not largest > 0:
            raise ValueError(f"--prompts {prompt!r}: no feature is active at its last token; choose another prompt")
        return Prompt(past, tokens[:, -1:], factor * largest / sae.normalise(x).scale[0, 0], logits)

    @torch.inference_mode()
    def measure(self, latents: range) -> TurnedUp:
        """The figures of some latents, meaned over the prompts."""
        rows = self._sae.W_dec[latents.start : latents.stop]  # (B, D)
        promoted = self._promoted[latents.start : latents.stop]  # (B, n)
        found = [TurnedUp(*self._on(prompt, rows, promoted)) for prompt in self._prompts]
        return TurnedUp(*(torch.stack(column).mean(0).cpu() for column in zip(*found, strict=True)))

    def _on(self, prompt: Prompt, rows: Tensor, promoted: Tensor) -> Iterator[Tensor]:
        pushes = (prompt.push * rows)[:, None]  # (B, 1, D)
        with self._model.hooks({self._sae.site: lambda x: x + pushes.to(x.dtype)}):
            last = prompt.last.expand(len(rows), 1)
            logits = self._model(last, cache=repeated(self._model, prompt.past, len(rows)))[:, -1].float()
        after = output_score(logits, promoted)
        yield after
        yield after - output_score(prompt.logits[None].expand(len(rows), -1), promoted)
        yield confidence(logits) - confidence(prompt.logits[None])


def repeated(model: Transformer, past: KVCache, rows: int) -> KVCache:
    """A cache of `rows` equal rows that holds all but the last token of `past`, which has one row."""
    cache = model.new_cache(rows, past.length)
    cache.k.copy_(past.k.expand_as(cache.k))
    cache.v.copy_(past.v.expand_as(cache.v))
    cache.length = past.length - 1
    return cache


def output_score(logits: Tensor, promoted: Tensor) -> Tensor:
    """(B,) of next-token `logits` (B, V) and the tokens that each latent promotes (B, n)."""
    chances = logits.softmax(-1)
    best = chances.gather(1, promoted).max(1).values
    rank = (chances > best[:, None]).sum(1)  # the likeliest of them has the best rank
    return best * (1 - rank / logits.shape[1])


def confidence(logits: Tensor) -> Tensor:
    """(B,) minus the mean log probability of the CONFIDENT_TOKENS likeliest tokens, in nats: large where few share all."""
    return -logits.log_softmax(-1).topk(CONFIDENT_TOKENS, dim=-1).values.mean(-1)
