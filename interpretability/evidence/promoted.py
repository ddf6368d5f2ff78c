"""The tokens whose logits a decoder row raises and lowers most, without running the model.

The row goes through the weight of the final norm and the unembedding (the "logit lens" on a direction). The norm's division is
a positive factor, so it changes no order; what later layers make of the direction is not seen, and several layers below the
head that is all that matters: see `raised.py`.

Shapes: L latents, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama3 import Tokenizer, Transformer

LATENTS_AT_ONCE = 256
READ_BY = {"attn_heads": "attention.wo.weight", "ffn_hidden": "feed_forward.w2.weight"}
"""Sites inside a layer, and the matrix that takes them to the residual stream."""


class PromotedTokens(NamedTuple):
    """For each latent, the most promoted and the most suppressed tokens, strongest first."""

    promoted: list[list[str]]
    suppressed: list[list[str]]


@torch.inference_mode()
def promoted_by(model: Transformer, site: str, directions: Tensor, tokenizer: Tokenizer, n: int) -> PromotedTokens:
    """The `n` tokens of the highest and lowest logits for each of `directions` (L, width of `site`), without special tokens."""
    names: dict[int, str] = {}
    columns = (
        [[names.setdefault(i, tokenizer.decode([i])) for i in row] for row in ids.tolist()]
        for ids in promoted_ids(model, site, directions, tokenizer, n)
    )
    return PromotedTokens(*columns)


@torch.inference_mode()
def promoted_ids(model: Transformer, site: str, directions: Tensor, tokenizer: Tokenizer, n: int) -> tuple[Tensor, Tensor]:
    """The same as token ids (L, n), promoted and suppressed; n is cut off at the ordinary tokens that there are."""
    rows = _in_residual_stream(model, site, directions.float())
    if site != "final_norm":
        rows = rows * model.norm.weight.float()
    ids = ordinary_tokens(tokenizer).to(rows.device)
    unembedding = model.output.weight[ids].float()  # (V, D)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in torch.split(rows, LATENTS_AT_ONCE):
        logits = block @ unembedding.T  # (l, V)
        for sign, column in zip((1, -1), found, strict=True):
            column.append(ids[(sign * logits).topk(min(n, len(ids)), dim=1).indices])
    return torch.cat(found[0]), torch.cat(found[1])


def ordinary_tokens(tokenizer: Tokenizer) -> Tensor:
    """The ids of all tokens but the special ones, in order."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([i for i in range(tokenizer.n_vocab) if i not in special])


def reaches_output(site: str) -> bool:
    """Whether directions at `site` come to the residual stream as they are; inputs of attention and feed-forward do not."""
    return not site.endswith(("attn_norm", "ffn_norm"))


def _in_residual_stream(model: Transformer, site: str, directions: Tensor) -> Tensor:
    """What `directions` (L, width of `site`) add to the residual stream, (L, D)."""
    layer, _, name = site.rpartition(".")
    if name not in READ_BY:
        return directions
    return directions @ model.get_parameter(f"{layer}.{READ_BY[name]}").float().T
