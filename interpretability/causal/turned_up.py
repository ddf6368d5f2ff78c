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

from interpretability.causal.last_token import LastToken
from interpretability.evidence.promoted import promoted_ids, reaches_output
from llama3 import Tokenizer, Transformer
from sae.model import SAE

CONFIDENT_TOKENS = 20
"""k: tokens whose probability makes the confidence."""


class TurnedUp(NamedTuple):
    """Of each latent, (B,) each; see the module."""

    output_score: Tensor
    output_rise: Tensor
    confidence_change: Tensor


class Prompt(NamedTuple):
    """A neutral prompt."""

    last: LastToken
    push: Tensor
    """What one unit of a decoder row stands for: factor * largest activation / scale, a number []."""


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
        last = LastToken.read(model, sae.site, ids)
        largest = sae.encode(last.x).values.max()
        if not largest > 0:
            raise ValueError(f"--prompts {prompt!r}: no feature is active at its last token; choose another prompt")
        return Prompt(last, factor * largest / sae.normalise(last.x).scale[0, 0])

    @torch.inference_mode()
    def measure(self, latents: range) -> TurnedUp:
        """The figures of some latents, meaned over the prompts."""
        rows = self._sae.W_dec[latents.start : latents.stop]  # (B, D)
        promoted = self._promoted[latents.start : latents.stop]  # (B, n)
        found = [TurnedUp(*self._on(prompt, rows, promoted)) for prompt in self._prompts]
        return TurnedUp(*(torch.stack(column).mean(0).cpu() for column in zip(*found, strict=True)))

    def _on(self, prompt: Prompt, rows: Tensor, promoted: Tensor) -> Iterator[Tensor]:
        logits = prompt.last.logits_with(prompt.push * rows)
        plain = prompt.last.logits[None]
        after = output_score(logits, promoted)
        yield after
        yield after - output_score(plain.expand(len(rows), -1), promoted)
        yield confidence(logits) - confidence(plain)


def output_score(logits: Tensor, promoted: Tensor) -> Tensor:
    """(B,) of next-token `logits` (B, V) and the tokens that each latent promotes (B, n)."""
    chances = logits.softmax(-1)
    best = chances.gather(1, promoted).max(1).values
    rank = (chances > best[:, None]).sum(1)  # the likeliest of them has the best rank
    return best * (1 - rank / logits.shape[1])


def confidence(logits: Tensor) -> Tensor:
    """(B,) minus the mean log probability of the CONFIDENT_TOKENS likeliest tokens, in nats: large where few share all."""
    return -logits.log_softmax(-1).topk(CONFIDENT_TOKENS, dim=-1).values.mean(-1)
