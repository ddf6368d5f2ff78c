"""A prompt and its continuation, as every way of generating text reports it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inference.session import Session
from inference.steering import Recipe, chain, hooks_for_all
from inference.watch import Watch
from llama3.generate import HooksFor, Piece, Sampling, generate


@dataclass(frozen=True)
class Row:
    """One prompt and its continuation so far."""

    prompt: str
    ids: tuple[int, ...]
    """Token ids of prompt (as `Tokenizer.encode_prompt` has it) and continuation, end token left out."""
    prompt_length: int
    text: str = ""
    """The continuation."""
    finished: str = ""
    """Why it ended (`Piece.finished`); empty while it goes on."""

    def grown(self, piece: Piece) -> "Row":
        ids = self.ids if piece.finished == "stop" else (*self.ids, piece.token_id)
        return replace(self, ids=ids, text=self.text + piece.text, finished=piece.finished)


def new_row(session: Session, prompt: str, ids: Sequence[int] | None = None) -> Row:
    """A row about to be continued; `ids` where the prompt is another than its text's."""
    ids = session.tokenizer.encode_prompt(prompt) if ids is None else ids
    if len(ids) >= session.context:
        raise ValueError(
            f"a prompt has {len(ids):,} tokens, but the context holds {session.context:,} with the answer; shorten it: "
            f"{prompt:.40}"
        )
    return Row(prompt, tuple(ids), len(ids))


def hooks_of(session: Session, recipe: Recipe, rows: Sequence[Row], watch: Watch | None = None) -> HooksFor | None:
    """The recipe for every row, and the watch over what it leaves; None where there is neither."""
    steered = None
    if recipe.active:
        lengths = [row.prompt_length for row in rows]
        steered = hooks_for_all(session.steerings(), [recipe] * len(rows), lengths)
    return chain(steered, watch.hooks_for if watch else None)


def grow(session: Session, rows: list[Row], sampling: Sampling, hooks: HooksFor | None) -> Iterator[Piece]:
    """Continue `rows` in place; yields each piece once its row holds it."""
    for piece in generate(session.model, session.tokenizer, [row.ids for row in rows], sampling, hooks):
        rows[piece.row] = rows[piece.row].grown(piece)
        yield piece
