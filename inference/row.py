"""A prompt and its continuation, as every way of generating text reports it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inference.session import Session
from llama3.generate import Piece


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
