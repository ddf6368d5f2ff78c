"""The one sampling loop: batched, streaming, with a KV cache, a random generator per row and hooks per step.

Shapes: B rows, T tokens of this pass, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import xxhash
from torch import Tensor

from llama3.model import Transformer
from llama3.sites import Hook
from llama3.tokenizer import Bos, Tokenizer

HooksFor = Callable[[Tensor], Mapping[str, Hook]]
Finished = Literal["", "stop", "length", "stop_string"]

# Tokens beyond the best 512 are looked at only where these do not yet hold `top_p` of the probability: a full sort of 128,256
# logits costs more than the forward pass of a small model.
CANDIDATES = 512

MIN_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave float32's range, and nothing but the most likely token has a chance."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 64
    """Tokens to generate per row, at most; a row also ends where the context is full."""
    temperature: float = 0.8
    """Logits are divided by it; 0, or less than MIN_TEMPERATURE, takes the most likely token."""
    top_p: float = 0.95
    """Keep the fewest tokens that together hold this probability (Holtzman et al. 2020); 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the row already holds (Keskar et al. 2019); 1 is off.
    Special tokens are exempt: those that end and open the turns of a chat come again by design."""
    seed: int = 0
    """Row i draws from a generator seeded with (seed, i), so that its text does not depend on its neighbours."""
    first_row: int = 0
    """Number of the first row, where a caller cuts a long list of prompts into batches."""
    stop: tuple[str, ...] = ()
    """A row ends before the first of these strings in its text."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a row beside the tokenizer's own, such as the one that ends a turn of a chat."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        limits: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("first_row", self.first_row >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100; 1 is off"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, holds, expected in limits:
            if not holds:  # NaN compares False, so it ends here too
                raise ValueError(f"{name} must be {expected}; found {getattr(self, name)!r}")


class Piece(NamedTuple):
    """One generated token of one row."""

    row: int
    token_id: int
    text: str
    """What became readable with this token: nothing while a character or a possible stop string is incomplete."""
    position: int
    """Of the token in its row, counted from the start of the prompt."""
    finished: Finished
    """Empty while the row goes on; "stop": `token_id` is an end token; "length": no room is left; "stop_string"."""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    hooks_for: HooksFor | None = None,
) -> Iterator[Piece]:
    """Continue each prompt (token ids); yields every new token of every row, row by row within a step.

    `hooks_for(positions)` gets the positions (B, T), int64, of the tokens of the pass to come, -1 at padding and in finished
    rows, and returns the hooks for that pass alone. They are entered and left within one step, so that the iterator may be
    resumed by another thread; they run in inference mode, so that what they keep takes no part in autograd unless it is cloned.
    Raises ValueError at once for prompts that are empty, too long or of another vocabulary.
    """
    check_prompts(model, tokenizer, prompts)
    return _generate(model, tokenizer, [list(prompt) for prompt in prompts], sampling, hooks_for)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    hooks_for: HooksFor | None = None,
    bos: Bos = "auto",
) -> list[str]:
    """The text that follows each prompt, end tokens and stop strings left out."""
    ids = [tokenizer.encode_prompt(prompt, bos) for prompt in prompts]
    texts = [""] * len(ids)
    for piece in generate(model, tokenizer, ids, sampling, hooks_for):
        texts[piece.row] += piece.text
    return texts


def check_prompts(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
    """ValueError in one line where the model cannot continue one of these prompts."""
    args = model.params
    if tokenizer.n_vocab > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_vocab:,} tokens, the model {args.vocab_size:,}; they do not belong together"
        )
    if not prompts:
        raise ValueError("no prompt was given; expected at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; expected at least one token")
        if len(prompt) >= args.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt):,} tokens and the context holds {args.max_seq_len:,}, the answer included; "
                "shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= tokenizer.n_vocab:
            raise ValueError(f"prompt {row} holds a token id outside 0 to {tokenizer.n_vocab - 1:,}; another tokenizer's?")


class _Row:
    """Text and end of one row."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, prompt_length: int, context: int) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._stop_ids = tokenizer.stop_ids | sampling.stop_ids
        self._stop = sampling.stop
        self._held = ""  # text that may be the beginning of a stop string
        self.position = prompt_length
        self._end = min(prompt_length + sampling.max_new_tokens, context)
        self.done = False

    def push(self, token_id: int) -> tuple[str, Finished]:
        """The text to show now that `token_id` was chosen, and whether and how the row ends with it."""
        self.position += 1
        if token_id in self._stop_ids:
            return self._close("stop")
        self._held += self._decoder.push(token_id)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.done = True
            return self._held, "stop_string"
        if self.position == self._end:
            return self._close("length")
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, ""

    def _close(self, reason: Finished) -> tuple[str, Finished]:
        self.done = True
        return self._held + self._decoder.finish(), reason


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _generate(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling, hooks_for: HooksFor | None
) -> Iterator[Piece]:
    longest = max(map(len, prompts))
    rows = [_Row(tokenizer, sampling, len(prompt), model.params.max_seq_len) for prompt in prompts]
    tokens = torch.tensor([[tokenizer.pad_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask: Tensor | None = None
    if min(map(len, prompts)) < longest:
        mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=model.device)
    # Padding takes slots, not positions: a short row beside a long one still has its whole context.
    steps = min(sampling.max_new_tokens, model.params.max_seq_len - min(map(len, prompts)))
    with torch.inference_mode():  # in which the passes run: a step of a small model is mostly the cost of calling operations
        cache = model.new_cache(len(prompts), longest + steps)
    chooser = Chooser(replace(sampling, max_new_tokens=steps), prompts, tokenizer, model.device)
    positions = [[-1] * (longest - len(p)) + list(range(len(p))) for p in prompts]
    while True:
        with torch.inference_mode():
            hooks = hooks_for(torch.tensor(positions, device=model.device)) if hooks_for is not None else {}
            with model.hooks(hooks):
                logits = model(tokens, mask=mask, cache=cache, last_only=True)[:, -1]
        chosen = chooser.choose(logits)
        for i, (row, token_id) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if not row.done:
                position = row.position
                text, finished = row.push(token_id)
                yield Piece(i, token_id, text, position, finished)
        going = [not row.done for row in rows]
        if not any(going):
            return
        positions = [[-1 if row.done else row.position - 1] for row in rows]
        tokens, mask = chosen[:, None], None
        if not all(going):
            mask = torch.tensor(going, device=model.device)[:, None]


class Chooser:
    """Chooses the next token of every row from logits (B, V); keeps each row's random numbers and the tokens it has seen."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.sampling = sampling
        self._n_vocab = tokenizer.n_vocab
        self._unassigned = torch.tensor(tokenizer.unassigned, dtype=torch.long, device=device)
        self._step = 0
        # One uniform number per row and step, drawn on the CPU: the same numbers whatever the device and the batch.
        draws = [
            torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=_generator(sampling.seed, row))
            for row in range(sampling.first_row, sampling.first_row + len(prompts))
        ]
        self._uniform = torch.stack(draws).to(device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), self._n_vocab, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(prompt, device=device)] = True
            special = [index for index in tokenizer.special_tokens.values() if tokenizer.is_special(index)]
            self._exempt = torch.tensor(special, dtype=torch.long, device=device)
            self._seen.index_fill_(1, self._exempt, False)

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> Tensor:
        """Token ids (B), int64, for logits (B, V) of any floating dtype. ValueError where a row's are NaN or infinite."""
        logits = logits[:, : self._n_vocab].float()  # a model may have more rows than the tokenizer has tokens
        if self._unassigned.numel():
            logits = logits.index_fill(1, self._unassigned, float("-inf"))
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        largest, chosen = logits.max(dim=-1)  # NaN counts as the largest
        if not bool(largest.isfinite().all()):
            raise ValueError(
                f"the model's logits of row {int((~largest.isfinite()).nonzero()[0])} are NaN or infinite at new token "
                f"{self._step + 1}: an edit too strong for this model, or a dtype too narrow for its weights"
            )
        if self.sampling.temperature >= MIN_TEMPERATURE:
            # Less the largest first: divided by a low temperature, logits are so large that their differences are lost.
            sums, ids = candidates((logits - largest[:, None]) / self.sampling.temperature, self.sampling)
            # The first token whose running sum exceeds the row's number, which is uniform in [0, last sum).
            index = (sums <= self._uniform[:, self._step, None] * sums[:, -1:]).sum(dim=-1, keepdim=True)
            chosen = ids.gather(1, index.clamp(max=sums.shape[1] - 1)).squeeze(1)
        self._step += 1
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True).index_fill_(1, self._exempt, False)
        return chosen


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Running sum of the kept probabilities, float64, most likely first, and their token ids; both (B, n).

    A token that a filter removes adds 0 to the sum, so that a uniform number below the last sum never falls on it.
    """
    n_tokens = logits.shape[1]
    n = min(n_tokens, sampling.top_k or n_tokens)
    if not sampling.top_k and (sampling.top_p < 1 or sampling.min_p > 0):
        n = min(n, CANDIDATES)
    values, ids = logits.topk(n)
    kept = torch.softmax(values, -1) if sampling.top_k else (values - logits.logsumexp(-1, keepdim=True)).exp()
    if n < n_tokens and not sampling.top_k and not _enough(kept, sampling):
        values, ids = logits.sort(descending=True)
        kept = torch.softmax(values, -1)
    before = kept.cumsum(-1) - kept
    keep = (before < sampling.top_p) & (kept >= sampling.min_p * kept[:, :1])
    keep[:, 0] = True
    return (kept * keep).cumsum(-1, dtype=torch.float64), ids


def _enough(kept: Tensor, sampling: Sampling) -> bool:
    """Whether what lies beyond the most likely tokens `kept` (B, n) would be filtered out in every row."""
    rest_fails = kept[:, -1] < sampling.min_p * kept[:, 0]
    return bool((rest_fails | (kept.sum(-1) >= sampling.top_p) & (sampling.top_p < 1)).all())


def _generator(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {row}".encode()) >> 1)
