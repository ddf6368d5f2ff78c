"""What a session returns: small values that print as tables, and in a notebook as HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from core.table import text_table
from inference.card import Card
from inference.finding import Hit
from inference.session import Feature
from interpretability.records import NOT_SHOWN
from llama3_sae import html

if TYPE_CHECKING:
    import pandas

N_SENTENCES = 5
N_WORDS = 10
"""Sentences and promoted tokens in the printed card; the HTML shows more."""


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it, BOS included where the model has one."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Active:
    """A latent that fires on a token."""

    feature: Feature
    value: float
    share: float | None
    """Of its maximum on the corpus; None where it never fired there."""
    label: str

    @property
    def latent(self) -> int:
        return self.feature.latent


@dataclass(frozen=True)
class TokenFeatures:
    """A token with the latents that are strongest on it, by share of their maximum."""

    position: int
    token: str
    latents: tuple[Active, ...]


@dataclass(frozen=True, repr=False)
class TextFeatures(Sequence[TokenFeatures]):
    """The tokens of a text, each with its strongest latents. Prints as a table; in a notebook the text is shaded."""

    tokens: tuple[TokenFeatures, ...]

    @overload
    def __getitem__(self, index: int) -> TokenFeatures: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenFeatures, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenFeatures | tuple[TokenFeatures, ...]:
        return self.tokens[index]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each token and latent; a token on which nothing fires, or that is not read, has one row without."""
        several = len({one.feature.site for token in self.tokens for one in token.latents}) > 1
        return [
            {"position": token.position, "token": token.token}
            | ({"site": one and one.feature.site} if several else {})
            | {"latent": one and one.latent, "value": one and one.value, "share": one and one.share}
            | {"label": one.label if one else ""}
            for token in self.tokens
            for one in token.latents or (None,)
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """`rows` as a pandas DataFrame. ValueError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ValueError("to_pandas needs pandas, which is not installed: pip install pandas") from None
        return pandas.DataFrame(self.rows())

    def _shown(self) -> list[dict[str, Any]]:
        """`rows` for the eye: a token stands at its first latent only, shares are percentages."""
        shown, last = [], None
        for row in self.rows():
            here = row.pop("position")
            share = row["share"]
            token = "" if here == last else row["token"].strip() or "␣"
            shown.append(row | {"token": token, "share": None if share is None else f"{share:.0%}".rjust(5)})
            last = here
        return shown

    def __repr__(self) -> str:
        return "\n".join(text_table(self._shown()))

    def _repr_html_(self) -> str:
        shades = []
        for token in self.tokens:
            tips = [f"{one.latent} {one.label}: {one.value:.3g}" for one in token.latents]
            strongest = max((one.share or 0.0 for one in token.latents), default=0.0)
            shades.append((token.token, min(1.0, strongest), "\n".join(tips)))
        return html.page(html.text(shades), html.table(self._shown()))


@dataclass(frozen=True, repr=False)
class Hits(Sequence[Hit]):
    """Features that a search found, best first."""

    query: str
    by: str
    """`words`: their explanations hold them; `prompts`: they fire on the texts."""
    hits: tuple[Hit, ...]

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def _heading(self) -> str:
        if not self.hits:
            return f"no feature found for {self.query}"
        how = "whose explanations hold" if self.by == "words" else "that fire on"
        return f"features {how} {self.query}"

    def _rows(self) -> list[dict[str, Any]]:
        return html.hit_rows(self.hits, "trust" if self.by == "words" else "score")

    def __repr__(self) -> str:
        return "\n".join([self._heading, *text_table(self._rows())])

    def _repr_html_(self) -> str:
        return html.page(html.note(self._heading), html.table(self._rows()))


@dataclass(frozen=True, repr=False)
class FeatureCard(Card):
    """All that is known about one feature; prints as text."""

    @property
    def latent(self) -> int:
        return self.feature.latent

    def _lines(self) -> Iterator[str]:
        yield f"latent {self.latent} at {self.feature.site}: {self.label or 'no label'}"
        if self.explanation is not None and self.explanation.explanation not in ("", self.label):
            yield f"  {self.explanation.explanation}"
        if self.source:
            yield f"  {self.source}"
        yield "  " + ", ".join(f"{name} {value}" for name, value in self.facts)
        for name, words in (("raises", self.statistics.promoted), ("lowers", self.statistics.suppressed)):
            if words:
                yield f"  {name}: {' '.join(repr(word) for word in words[:N_WORDS])}"
        if not self.sentences and self.statistics.max > 0:
            yield f"  It {NOT_SHOWN}."
        for sentence in self.sentences[:N_SENTENCES]:
            yield f"  {sentence.value:8.3g}  {' '.join(sentence.text.split())}"
        for name, hits in (("writes like", self.neighbours), ("fires with", self.coactive)):
            if hits:
                yield f"  {name}: {', '.join(f'{hit.latent} ({hit.value:.2f})' for hit in hits)}"

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return html.card(self)


@dataclass(frozen=True)
class Completion:
    """A prompt, or the last message of a chat, and what the model wrote after it."""

    prompt: str
    text: str
    finished: str
    """Why it ended: stop (an end token), stop_string, or length."""
    ids: tuple[int, ...] = field(repr=False)
    """Of the prompt, as the model read it, and the text."""
