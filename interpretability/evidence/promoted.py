"""What a latent does to the output: the tokens whose logits its decoder row raises and lowers most.

The row goes through the weight of the final norm and the unembedding (the "logit lens" on a direction). The norm's division is
a positive factor, so it changes no order; what later layers make of the direction is not seen.

Shapes: L latents, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.artifact import check_provenance
from llama3 import Tokenizer, Transformer, load_model
from sae.model import SAE

LATENTS_AT_ONCE = 256
READ_BY = {"attn_heads": "attention.wo.weight", "ffn_hidden": "feed_forward.w2.weight"}
"""Sites inside a layer, and the matrix that takes them to the residual stream."""


class PromotedTokens(NamedTuple):
    """For each latent, the most promoted and the most suppressed tokens, strongest first."""

    promoted: list[list[str]]
    suppressed: list[list[str]]


def promoted_tokens(model_path: str, sae: SAE, tokenizer: Tokenizer, n: int) -> PromotedTokens:
    """`n` tokens each way for every latent of `sae`; empty lists where `n` is 0 or the site is read before the residual stream.

    Raises ValueError where the model is not the one that the SAE was trained on.
    """
    nothing = PromotedTokens([[]] * sae.cfg.n_latents, [[]] * sae.cfg.n_latents)
    if n == 0:
        return nothing
    model = load_model(model_path)
    check_provenance("the model of --model", sae.cfg.provenance, {"model_hash": model.weights_hash}, ("model_hash",))
    return promoted_by(model, sae.site, sae.W_dec, tokenizer, n) if reaches_output(sae.site) else nothing


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
    unembedding = model.output.weight[: tokenizer.n_vocab].float()  # (V, D)
    special = torch.tensor(sorted(tokenizer.special_tokens.values()), device=rows.device)
    n = min(n, tokenizer.n_vocab - len(special))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in torch.split(rows, LATENTS_AT_ONCE):
        logits = block @ unembedding.T  # (l, V)
        for sign, column in zip((1, -1), found, strict=True):
            column.append((sign * logits).index_fill_(1, special, -torch.inf).topk(n, dim=1).indices)
    return torch.cat(found[0]), torch.cat(found[1])


def reaches_output(site: str) -> bool:
    """Whether directions at `site` come to the residual stream as they are; inputs of attention and feed-forward do not."""
    return not site.endswith(("attn_norm", "ffn_norm"))


def _in_residual_stream(model: Transformer, site: str, directions: Tensor) -> Tensor:
    """What `directions` (L, width of `site`) add to the residual stream, (L, D)."""
    layer, _, name = site.rpartition(".")
    if name not in READ_BY:
        return directions
    return directions @ model.get_parameter(f"{layer}.{READ_BY[name]}").float().T
