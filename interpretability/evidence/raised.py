"""What a latent does to the output, by intervention: turned up a little in many contexts, which tokens rise, and which fall.

At the last token of each context the latent's decoder row is added, SHARE of the activation's length long, and what follows in
the model runs. A token's rise is the change of its log probability in the geometric mean of all contexts' distributions. Tokens
that are next to impossible rise by large factors and mean nothing: only the likeliest of that mean count, after the edit for
what rises and before it for what falls.

Log probabilities and logits differ by a constant of the context, so the order needs only the mean of what the unembedding
reads: one product a latent, and not one a latent and context.

Shapes: L latents, W width of the site, D model width, V vocabulary, n tokens asked for.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from capture.store import Corpus
from core.cli import Progress
from core.norms import unit_rows
from core.runtime import Runtime
from interpretability.causal.last_token import LastToken
from interpretability.evidence.promoted import PromotedTokens, ordinary_tokens
from llama3 import Tokenizer, Transformer

SHARE = 0.4
"""Length of the edit as a share of the activation's: what steering uses, and leaves readable text."""
LIKELY = 16
"""One token of so many counts as likely."""
SHORTEST, LONGEST = 8, 24
"""Tokens of a context, at most."""
LATENTS_AT_ONCE = 256


def contexts_of(corpus: Corpus, tokenizer: Tokenizer, n: int, seed: int) -> list[list[int]]:
    """Token ids of the beginnings of `n` sentences of the corpus, drawn by `seed`; those of a single token are left out."""
    draw = random.Random(f"{seed} contexts")
    chosen = sorted(draw.sample(range(corpus.n_sentences), min(n, corpus.n_sentences)))
    found = [tokenizer.encode_prompt(text)[: draw.randint(SHORTEST, LONGEST)] for text in corpus.texts(chosen)]
    return [ids for ids in found if len(ids) > 1]


def ends_the_model(site: str, n_layers: int) -> bool:
    """Whether nothing but the final norm comes after a site: what it raises is then seen without running anything."""
    return site in ("final_norm", f"layers.{n_layers - 1}.resid_post", f"layers.{n_layers - 1}.ffn_out")


def raised_tokens(
    model: Transformer, site: str, directions: Tensor, tokenizer: Tokenizer, contexts: Sequence[Sequence[int]], n: int,
    runtime: Runtime,
) -> PromotedTokens:  # fmt: skip
    """The `n` tokens, at most, that each of `directions` (L, W) raises and lowers most. Ranks share the latents."""
    read = [LastToken.read(model, site, ids) for ids in contexts]
    blocks = torch.split(unit_rows(directions.float().to(model.device)), LATENTS_AT_ONCE)
    own: list[tuple[int, PromotedTokens]] = []
    with Progress("turning latents up", len(directions), "latents", runtime) as bar:
        for index in runtime.share(len(blocks)):
            own.append((index, raised_by(read, blocks[index], tokenizer, n)))
            bar.update(runtime.world_size * len(blocks[index]))
    parts = sorted((part for rank in runtime.gather_objects(own) for part in rank), key=lambda part: part[0])
    return PromotedTokens(*([row for _, part in parts for row in part[column]] for column in (0, 1)))


@torch.inference_mode()
def raised_by(contexts: Sequence[LastToken], rows: Tensor, tokenizer: Tokenizer, n: int) -> PromotedTokens:
    """The same for unit `rows` (L, W) in one batch a context; empty lists without contexts."""
    if not contexts:
        return PromotedTokens([[]] * len(rows), [[]] * len(rows))
    model = contexts[0].model
    plain = torch.zeros(1, model.params.dim, dtype=torch.float64, device=rows.device)
    steered = torch.zeros(len(rows), model.params.dim, dtype=torch.float64, device=rows.device)
    for context in contexts:
        nothing = rows.new_zeros(1, rows.shape[1])
        final = context.final_with(torch.cat((nothing, SHARE * context.x.float().norm() * rows)))
        plain += final[:1]
        steered += final[1:]
    ids = ordinary_tokens(tokenizer).to(rows.device)
    unembedding = model.output.weight[ids].float()
    before = (plain / len(contexts)).float() @ unembedding.T  # (1, V)
    after = (steered / len(contexts)).float() @ unembedding.T  # (L, V)
    rise = after - after.logsumexp(1, keepdim=True) - (before - before.logsumexp(1, keepdim=True))
    return PromotedTokens(_named(rise, after, ids, tokenizer, n), _named(-rise, before.expand_as(after), ids, tokenizer, n))


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
