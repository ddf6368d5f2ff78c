"""Texts that a model writes under many interventions at once, and what the unsteered model reads in them.

An intervention is a recipe or a direction that is added to every token; each continues every prompt. Rows of several
interventions share a batch.

Shapes: M interventions, P prompts, F features looked at, B rows of a batch, T tokens, V vocabulary, D model width.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.session import Features, Session
from inference.steering import FIRST_STEERED, Reader, Recipe
from interpretability.records import Named, named_in
from llama3.generate import HooksFor, Sampling, generate
from llama3.tokenizer import Tokenizer

ROWS = 256
"""Rows of a batch: the logits of their new tokens are held at once."""
WORD = re.compile(r"[a-z]{2,}")
QUOTED = re.compile(r'"([^"]+)"')
_FRAME = """
words beginning ending starting like with text about mixed after before
an and as at by for from in is it of on or the to
"""
FRAME_WORDS = frozenset(_FRAME.split())
"""How titles speak of words, rather than what they name."""

Interventions = Sequence[Recipe] | Tensor
"""M recipes, or directions [M, D] in the SAE's normalised units."""


def label_words(label: str) -> Named:
    """What stands in quotation marks ("un-" is the start of words, "-ing" their end), else the content words of the label.

    A single letter names nothing: the words after it say more.
    """
    quotations = [part for part in QUOTED.findall(label.lower()) if len(part.strip("-")) > 1]
    named = named_in(quotations, WORD.findall)
    return named if any(named) else Named(set(WORD.findall(label.lower())) - FRAME_WORDS)


def first_tokens(wanted: Sequence[Named], tokenizer: Tokenizer) -> Tensor:
    """[V, F] 1 where a token is a word of the feature's label, begins as that says, or is the first token of such a word."""
    pieces = [tokenizer.decode([i]).strip().lower() for i in range(tokenizer.n_vocab)]
    table = torch.zeros(tokenizer.n_vocab, len(wanted))
    for column, words in enumerate(wanted):
        ids = [i for i, piece in enumerate(pieces) if piece and words.has(piece)]
        ids += [tokenizer.encode(f" {form}")[0] for word in words.words for form in (word, word.capitalize())]
        table[ids, column] = 1
    return table


def promoted_tokens(features: Features, chosen: Sequence[int], tokenizer: Tokenizer) -> Tensor:
    """[V, F] 1 where a token is among those whose logits the feature's direction raises most, as its top sentences say."""
    return _marked([set(features.top.statistics(latent).promoted) for latent in chosen], tokenizer)


def following_tokens(features: Features, chosen: Sequence[int], tokenizer: Tokenizer) -> Tensor:
    """[V, F] 1 where a token stands right behind the one on which the feature is largest in any of its top sentences: what
    comes next where it fires, whatever its direction does to the logits."""
    followers: list[set[str]] = []
    for latent in chosen:
        peaks = [(s.tokens, s.activations.index(max(s.activations))) for s in features.top.sentences(latent)]
        followers.append({tokens[peak + 1] for tokens, peak in peaks if peak + 1 < len(tokens)})
    return _marked(followers, tokenizer)


def _marked(wanted: Sequence[Collection[str]], tokenizer: Tokenizer) -> Tensor:
    """[V, len(wanted)] 1 where the text of a token is wanted; what is no whole character names no token."""
    table = torch.zeros(tokenizer.n_vocab, len(wanted))
    for i in range(tokenizer.n_vocab):
        piece = tokenizer.pieces([i])[0]
        if "\ufffd" not in piece:
            table[i] = torch.tensor([piece in texts for texts in wanted])
    return table


class Written(NamedTuple):
    """What the unsteered model reads in new texts."""

    fired: Tensor
    """[M, P, F] new tokens on which each feature fires."""
    words: Tensor
    """[M, P, F] new words that are words of each feature's label."""
    tokens: Tensor
    """[M, P] new tokens."""
    n_words: Tensor
    """[M, P] new words."""
    loss: Tensor
    """[M, P] nats, summed over the new tokens."""


@dataclass(frozen=True)
class Panel:
    """What all interventions have in common."""

    session: Session
    chosen: tuple[int, ...]
    """The F latents looked at."""
    wanted: tuple[Named, ...]
    """Of each, the words of its label."""
    prompts: tuple[tuple[int, ...], ...]
    """P lists of token ids."""
    sampling: Sampling

    @property
    def features(self) -> Features:
        return self.session.needs_features()

    def write(self, interventions: Interventions, progress: Callable[[int], None] = lambda n: None) -> Written:
        """Continue every prompt under every intervention, and read the new tokens."""
        parts = []
        for block in self._blocks(len(interventions), len(self.prompts)):
            which = [m for m in block for _ in self.prompts]
            rows = [list(prompt) for _ in block for prompt in self.prompts]
            hooks = hooks_for(self.features, interventions, which, [len(row) for row in rows])
            texts = continued(self.session, rows, self.sampling, hooks)
            parts.append([part.view(len(block), -1, *part.shape[1:]) for part in self._read(rows, texts)])
            progress(len(block))
        return Written(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def next_tokens(self, interventions: Interventions, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """[M, V] the probability of each token as the next one under each intervention, meaned over the new tokens of given
        `texts`, which begin at `starts`: no sampling, so no noise."""
        found = []
        tokens, mask, new = padded(texts, starts, self.session)
        predicting = new.roll(-1, dims=1)  # the slot before each new token
        for block in self._blocks(len(interventions), len(texts)):
            which = [m for m in block for _ in texts]
            hooks = hooks_for(self.features, interventions, which, list(starts) * len(block))
            n = len(block)
            positions = torch.arange(tokens.shape[1], device=tokens.device).masked_fill(~mask, -1).repeat(n, 1)
            with self.session.model.hooks(hooks(positions) if hooks else {}):
                logits = self.session.model(tokens.repeat(n, 1), mask=mask.repeat(n, 1))
            chances = logits.view(n, -1, *logits.shape[1:])[:, predicting].float().softmax(-1)  # (n, new tokens, V)
            found.append(chances.mean(1)[:, : self.session.tokenizer.n_vocab].cpu())
        return torch.cat(found)

    def _blocks(self, n: int, rows_each: int) -> Iterable[range]:
        size = max(1, ROWS // rows_each)
        return (range(start, min(n, start + size)) for start in range(0, n, size))

    @torch.no_grad()
    def _read(self, rows: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The fields of `Written` for a batch, with B in the place of [M, P]."""
        starts = [len(row) for row in rows]
        tokens, mask, new = padded(texts, starts, self.session)
        kept: list[Tensor] = []
        with self.session.model.hooks({self.features.site: lambda x: kept.append(x[new])}):
            logits = self.session.model(tokens, mask=mask)
        device = tokens.device
        loss = torch.zeros(new.shape, device=device)
        loss[new] = F.cross_entropy(logits[new.roll(-1, dims=1)].float(), tokens[new], reduction="none")
        latents = torch.tensor(self.chosen, device=device)
        x = kept[0].float()
        values = Reader(self.features.sae, latents).values(x)  # (new tokens, F)
        fired = torch.zeros(len(rows), len(latents), device=device)
        fired.index_add_(0, new.nonzero()[:, 0], (values > 0).float())
        words = torch.zeros(len(rows), len(self.chosen))
        n_words = torch.zeros(len(rows))
        for b, (text, start) in enumerate(zip(texts, starts, strict=True)):
            for word in WORD.findall(self.session.tokenizer.decode(list(text[start:]), skip_special=True).lower()):
                n_words[b] += 1
                words[b, [f for f, label in enumerate(self.wanted) if label.has(word)]] += 1
        return fired.cpu(), words, new.sum(1).float().cpu(), n_words, loss.sum(1).cpu()


def continued(session: Session, rows: Sequence[list[int]], sampling: Sampling, hooks: HooksFor | None) -> list[list[int]]:
    """Each row with its continuation, end tokens left out."""
    texts = [list(row) for row in rows]
    for piece in generate(session.model, session.tokenizer, rows, sampling, hooks):
        if piece.finished != "stop":
            texts[piece.row].append(piece.token_id)
    return texts


def padded(texts: Sequence[Sequence[int]], starts: Sequence[int], session: Session) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T), padded on the right; which of them are real; which are new, at `starts` or behind."""
    longest = max(map(len, texts))
    pad = session.tokenizer.pad_id
    tokens = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=session.model.device)
    at = torch.arange(longest, device=tokens.device)
    mask = at < torch.tensor([len(text) for text in texts], device=tokens.device)[:, None]
    return tokens, mask, mask & (at >= torch.tensor(list(starts), device=tokens.device)[:, None])


def hooks_for(features: Features, all_of: Interventions, which: Sequence[int], lengths: Sequence[int]) -> HooksFor | None:
    """Hooks for a batch whose row b follows intervention `which[b]` and has a prompt of `lengths[b]` tokens."""
    if isinstance(all_of, Tensor):
        return pushed(features, all_of[list(which)])
    return features.steering.hooks_for([all_of[m] for m in which], lengths)


def pushed(features: Features, vectors: Tensor) -> HooksFor:
    """Hooks that add `vectors` (B, D), in the SAE's normalised units, to every token but the sink: the control for `add`."""

    def push(x: Tensor, positions: Tensor) -> Tensor:
        moved = x + (vectors[:, None] / features.sae.normalise(x).scale).to(x.dtype)
        return torch.where((positions >= FIRST_STEERED)[:, :, None], moved, x)

    return lambda positions: {features.site: partial(push, positions=positions)}
