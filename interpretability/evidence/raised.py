"""What a latent does to the output, by intervention: turned up in many contexts, which tokens rise, and which fall.

At the last token of each context every coordinate of the site is pushed by STEP times the activation's length, and what follows
in the model runs: what the unembedding reads then changes by a row of the response, whose mean over the contexts says what any
direction does there, to first order. So latents cost a product each, and not a pass each and context. On SmolLM2 it comes as
near to turning each latent up itself in 64 contexts as that does in 16 (docs/log.md, 2026-12-01).

A token's rise is the change of its log probability in the geometric mean of all contexts' distributions, with the direction
SHARE of the activation's length long. Tokens that are next to impossible rise by large factors and mean nothing: only the
likeliest of that mean count, after the edit for what rises and before it for what falls.

Log probabilities and logits differ by a constant of the context, so the order needs only the mean of what the unembedding
reads.

Shapes: L latents, W width of the site, D model width, V vocabulary, n tokens asked for.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from capture.store import Corpus
from core.cli import Progress
from core.norms import unit_rows
from core.runtime import Runtime
from interpretability.causal.last_token import LastToken
from interpretability.evidence.promoted import PromotedTokens, ordinary_tokens
from llama3 import Tokenizer, Transformer

T = TypeVar("T")

STEP = 0.1
"""Length of a push as a share of the activation's."""
SHARE = 0.4
"""The same of the edit whose rises are read: what steering uses, and leaves readable text."""
LIKELY = 16
"""One token of so many counts as likely."""
SHORTEST, LONGEST = 8, 24
"""Tokens of a context, at most."""
AT_ONCE = 256
"""Pushes in one pass, and latents whose logits are held at once."""


class Response(NamedTuple):
    """What the unembedding reads at the last token of the contexts, in the mean."""

    plain: Tensor
    """(D,) as it is."""
    change: Tensor
    """(W, D) for a push of each coordinate, per length of the activation."""


def contexts_of(corpus: Corpus, tokenizer: Tokenizer, n: int, seed: int) -> list[list[int]]:
    """Token ids of the beginnings of `n` sentences of the corpus, drawn by `seed`; those of a single token are left out."""
    draw = random.Random(f"{seed} contexts")
    chosen = sorted(draw.sample(range(corpus.n_sentences), min(n, corpus.n_sentences)))
    found = [tokenizer.encode_prompt(text)[: draw.randint(SHORTEST, LONGEST)] for text in corpus.texts(chosen)]
    return [ids for ids in found if len(ids) > 1]


def ends_the_model(site: str, n_layers: int) -> bool:
    """Whether nothing but the final norm comes after a site: what it raises is then seen without running anything."""
    return site in ("final_norm", f"layers.{n_layers - 1}.resid_post", f"layers.{n_layers - 1}.ffn_out")


def response_at(model: Transformer, site: str, contexts: Sequence[Sequence[int]], runtime: Runtime) -> Response:
    """The response of a model to pushes at `site`, over one context or more. Ranks share the coordinates."""
    read = [LastToken.read(model, site, ids) for ids in contexts]
    blocks = torch.split(torch.eye(model.width(site), device=model.device), AT_ONCE)
    own: list[tuple[int, Response]] = []
    with Progress("pushing at the site", model.width(site), "coordinates", runtime) as bar:
        for index in runtime.share(len(blocks)):
            own.append((index, _response(read, blocks[index])))
            bar.update(runtime.world_size * len(blocks[index]))
    parts = _in_order(runtime, own)
    return Response(parts[0].plain, torch.cat([part.change for part in parts]))


@torch.inference_mode()
def _response(contexts: Sequence[LastToken], pushes: Tensor) -> Response:
    """The same for unit `pushes` (w, W), in one pass a context; float64 on the CPU."""
    model = contexts[0].model
    plain = torch.zeros(model.params.dim, dtype=torch.float64, device=model.device)
    change = torch.zeros(len(pushes), model.params.dim, dtype=torch.float64, device=model.device)
    for context in contexts:
        nothing = pushes.new_zeros(1, pushes.shape[1])
        final = context.final_with(torch.cat((nothing, STEP * context.x.float().norm() * pushes)))
        plain += final[0]
        change += (final[1:] - final[:1]) / STEP
    return Response(plain.cpu() / len(contexts), change.cpu() / len(contexts))


def raised_tokens(
    model: Transformer, response: Response, directions: Tensor, tokenizer: Tokenizer, n: int, runtime: Runtime
) -> PromotedTokens:
    """The `n` tokens, at most, that each of `directions` (L, W) raises and lowers most. Ranks share the latents."""
    blocks = torch.split(unit_rows(directions.float().cpu()), AT_ONCE)
    own = [(index, _raised_by(model, response, blocks[index], tokenizer, n)) for index in runtime.share(len(blocks))]
    parts = _in_order(runtime, own)
    return PromotedTokens(*([row for part in parts for row in part[column]] for column in (0, 1)))


@torch.inference_mode()
def _raised_by(model: Transformer, response: Response, rows: Tensor, tokenizer: Tokenizer, n: int) -> PromotedTokens:
    """The same for unit `rows` (L, W) at once."""
    ids = ordinary_tokens(tokenizer).to(model.device)
    unembedding = model.output.weight[ids].float()
    final = torch.cat((response.plain[None], response.plain + SHARE * rows.double() @ response.change))
    logits = final.float().to(model.device) @ unembedding.T  # (1 + L, V)
    before, after = logits[:1].expand(len(rows), -1), logits[1:]
    rise = after.log_softmax(1) - before.log_softmax(1)
    return PromotedTokens(_named(rise, after, ids, tokenizer, n), _named(-rise, before, ids, tokenizer, n))


def _named(rise: Tensor, logits: Tensor, ids: Tensor, tokenizer: Tokenizer, n: int) -> list[list[str]]:
    """For each row the tokens of the largest positive `rise` (L, V) among the likeliest by `logits` (L, V)."""
    likely = min(len(ids), max(n, len(ids) // LIKELY))
    candidates = logits.topk(likely, dim=1).indices
    values, best = rise.gather(1, candidates).topk(min(n, likely), dim=1)
    chosen = ids[candidates.gather(1, best)]
    return [
        [tokenizer.decode([token]) for token, value in zip(tokens, amounts, strict=True) if value > 0]
        for tokens, amounts in zip(chosen.tolist(), values.tolist(), strict=True)
    ]


def _in_order(runtime: Runtime, own: Sequence[tuple[int, T]]) -> list[T]:
    """The parts of all ranks, by their number."""
    every = [part for rank in runtime.gather_objects(list(own)) for part in rank]
    return [part for _, part in sorted(every, key=lambda part: part[0])]
