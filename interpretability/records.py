"""What interpretability writes and others read: top sentences, statistics of latents, explanations.

A folder of kind `top_sentences` holds `top_sentences.parquet`, a row for each latent, aggregation and rank, with all rows of a
latent in one row group so that one latent is read without the rest, and `latents.parquet`, a row a latent. A folder of kind
`explanations` holds `explanations.jsonl.gz`, a line a latent; that of an earlier release is not compressed.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.artifact import Artifact, open_artifact
from core.tables import read_table
from core.text import parse_json
from interpretability.parquet import parquet_bytes as parquet_bytes

TOP_FILE = "top_sentences.parquet"
SHARED_FILE = "sentences.parquet"
"""Where a folder stores each sentence once (`--compact`): the columns SHARED, by sentence id."""
LATENTS_FILE = "latents.parquet"
BACKGROUND_FILE = "background.parquet"
EXPLANATIONS_FILE = "explanations.jsonl.gz"
PLAIN_EXPLANATIONS_FILE = "explanations.jsonl"
"""What it was called up to release 0.1, where it was not compressed."""
NEVER_FIRED = "never fired"
NOT_SHOWN = "fires on the text that was counted, but in no sentence that is stored"
NOTHING_TO_SHOW = (NEVER_FIRED, NOT_SHOWN)
"""Reasons of the explanations of latents that there is nothing to say about."""

AGGREGATIONS = ("max", "mean", "last")
"""How a sentence's activations become one value: the largest, the mean over all its tokens, that of its last token."""

LEVEL = "level"
"""Where it stands in the place of an aggregation: a sentence drawn from a level of the latent's activation, a bin of its
histogram."""

HISTOGRAM_BINS = 20
HISTOGRAM_FIRST_EXPONENT = -10
"""Bin i of a histogram counts activations v with 2^(i-10) <= v < 2^(i-9); the first and the last also hold what lies beyond."""

TOP_SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "aggregation": pa.string(),
        "rank": pa.int32(),
        "value": pa.float32(),
        "sentence_id": pa.int64(),
        "document": pa.string(),
        "label": pa.string(),
        "text": pa.string(),
        "tokens": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }
)
SHARED = ("document", "label", "text", "tokens")
SHARED_SCHEMA = pa.schema([TOP_SCHEMA.field(name) for name in ("sentence_id", *SHARED)])
COMPACT_SCHEMA = pa.schema([field for field in TOP_SCHEMA if field.name not in SHARED])
LATENT_SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "firing_count": pa.int64(),
        "sentence_count": pa.int64(),
        "max": pa.float32(),
        "mean": pa.float32(),
        "density": pa.float64(),
        "histogram": pa.list_(pa.int64()),
        "promoted": pa.list_(pa.string()),
        "suppressed": pa.list_(pa.string()),
    }
)
MEASURED_LATENT_SCHEMA = pa.schema(
    [
        *LATENT_SCHEMA,
        ("ngrams", pa.list_(pa.struct({"text": pa.string(), "count": pa.int32(), "z": pa.float32()}))),
        ("cofiring", pa.list_(pa.struct({"latent": pa.int32(), "count": pa.int32(), "jaccard": pa.float32()}))),
        ("shown_count", pa.int64()),
    ]
)
"""What is written now; folders of earlier releases lack the last three columns, and the background."""
COUNTED = ("firing_count", "sentence_count", "max", "mean", "density", "histogram")
"""Columns that `interpretability.top_sentences --statistics` takes from another text than the sentences."""
BACKGROUND_SCHEMA = pa.schema(
    {
        "sentence_id": pa.int64(),
        "document": pa.string(),
        "label": pa.string(),
        "text": pa.string(),
        "tokens": pa.list_(pa.string()),
        "latents": pa.list_(pa.int32()),
        "positions": pa.list_(pa.int32()),
        "activations": pa.list_(pa.float32()),
    }
)


class Named(NamedTuple):
    """What a description names, in lower case."""

    words: Collection[str]
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def has(self, word: str) -> bool:
        """Whether `word`, in lower case, is named."""
        return word in self.words or word.startswith(self.starts) or word.endswith(self.ends)


def named_in(quotations: Iterable[str], words_of: Callable[[str], Iterable[str]]) -> Named:
    """What quotations name: with a hyphen how words begin ("un-") or end ("-ing"), else the words that `words_of` finds."""
    words: set[str] = set()
    starts, ends = [], []
    for piece in map(str.lower, quotations):
        if piece.endswith("-") and piece[:-1].isalpha():
            starts.append(piece[:-1])
        elif piece.startswith("-") and piece[1:].isalpha():
            ends.append(piece[1:])
        else:
            words.update(words_of(piece))
    return Named(words, tuple(starts), tuple(ends))


@dataclass(frozen=True)
class TopSentence:
    """One of the sentences in which a latent is largest. `tokens` and `activations` have one entry a token."""

    latent: int
    aggregation: str
    rank: int
    """0 is the largest."""
    value: float
    """The aggregate of `activations` by which the sentence is ranked."""
    sentence_id: int
    document: str
    label: str | None
    text: str
    tokens: list[str]
    activations: list[float]


@dataclass(frozen=True)
class LatentStatistics:
    """How one latent behaves over the whole corpus."""

    latent: int
    firing_count: int
    """Tokens on which it is above 0."""
    sentence_count: int
    """Sentences with at least one such token."""
    max: float
    mean: float
    """Over the tokens on which it fires; 0 where it never does."""
    density: float
    """Share of all tokens on which it fires."""
    histogram: list[int]
    """Firing tokens by activation, in HISTOGRAM_BINS bins that each double."""
    promoted: list[str]
    """Tokens whose logits its decoder row raises most, the strongest first; empty where the site does not reach the output."""
    suppressed: list[str]
    ngrams: list[dict[str, Any]] = field(default_factory=list)
    """One to three words over-represented in its top sentences: `text`, `count` (sentences with it) and `z`; strongest
    first."""
    cofiring: list[dict[str, Any]] = field(default_factory=list)
    """Latents that fire on the same tokens: `latent`, `count` (tokens of the background) and `jaccard`; strongest first."""
    shown_count: int | None = None
    """Sentences with at least one such token in the corpus that the stored sentences come from; None in older folders, where
    that is `sentence_count`."""


class BackgroundSentence(NamedTuple):
    """A sentence drawn from the corpus without regard to any latent, with all that fires in it."""

    sentence_id: int
    document: str
    label: str | None
    text: str
    tokens: list[str]
    latents: npt.NDArray[np.int32]
    """Of each activation above 0 its latent, in order of token; `positions` and `activations` go with it."""
    positions: npt.NDArray[np.int32]
    activations: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """What a method says about one latent."""

    latent: int
    title: str
    """At most 6 words; empty where failed."""
    explanation: str
    method: str
    """Name of the backend, such as `token_statistics`."""
    model: str
    """Model that wrote it; empty for a method without one."""
    state: Literal["valid", "failed"]
    details: dict[str, Any] = field(default_factory=dict)
    certainty: float | None = None
    """What the explainer says of itself, 0 to 1; None where it says nothing."""
    score: float | None = None
    """Balanced accuracy on sentences that the explainer did not see, 0.5 at chance; None where not measured."""
    reason: str = ""
    """Why it failed."""
    reply: str = ""
    """The raw reply of a failed request."""


class PoolSentence(NamedTuple):
    """A sentence that is among the top of some latent."""

    sentence_id: int
    text: str
    label: str | None


class TopSentences:
    """A complete folder of top sentences. Reading is safe from several threads.

    `provenance` is that of the activations with `sae_hash` and `n_latents`; `max_values` (n_latents,) is each latent's largest
    activation. Where counts come from another text than the sentences, `statistics_corpus_hash` names that.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.provenance: dict[str, Any] = artifact.manifest.provenance
        self.aggregations: tuple[str, ...] = tuple(artifact.manifest.config["aggregations"])
        self.n_tokens: int = artifact.manifest.counts["tokens"]
        self.n_sentences: int = artifact.manifest.counts["sentences"]
        self._latents = read_table(artifact.file(LATENTS_FILE))
        self.max_values: npt.NDArray[np.float32] = self._latents["max"].to_numpy()
        self.firing_counts: npt.NDArray[np.int64] = self._latents["firing_count"].to_numpy()
        shown = "shown_count" if "shown_count" in self._latents.column_names else "sentence_count"
        self._shown_counts: npt.NDArray[np.int64] = self._latents[shown].to_numpy()
        self.n_latents = len(self.max_values)
        self._file = pq.ParquetFile(artifact.file(TOP_FILE))
        groups = [self._file.metadata.row_group(i).column(0).statistics for i in range(self._file.num_row_groups)]
        self._last_latent_of_group = np.array([group.max for group in groups], dtype=np.int64)
        shared = read_table(artifact.file(SHARED_FILE)) if SHARED_FILE in artifact.names else None
        self._shared: pa.Table | None = shared
        self._lock = Lock()
        self._group = lru_cache(maxsize=8)(self._read_group)

    def _read_group(self, index: int) -> tuple[pa.Table, npt.NDArray[np.int32]]:
        with self._lock:
            table = self._file.read_row_group(index)
        return self._with_shared(table), table["latent"].to_numpy()

    def _with_shared(self, rows: pa.Table) -> pa.Table:
        """`rows` with the columns SHARED, where those lie in a file of their own."""
        if self._shared is None:
            return rows
        at = pa.array(np.searchsorted(self._shared["sentence_id"].to_numpy(), rows["sentence_id"].to_numpy()))
        for name in SHARED:
            rows = rows.append_column(name, self._shared[name].take(at))
        return rows

    def check_latent(self, latent: int) -> None:
        """ValueError where this SAE has no such latent."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"latent {latent}: expected one of 0 to {self.n_latents - 1}")

    @property
    def counted(self) -> pa.Table:
        """The columns COUNTED, a row a latent."""
        return self._latents.select(COUNTED)

    def silence(self, latent: int) -> str:
        """Why there is no sentence of a latent, one of NOTHING_TO_SHOW; empty where there are some."""
        self.check_latent(latent)
        if self._shown_counts[latent]:
            return ""
        return NOT_SHOWN if self.firing_counts[latent] else NEVER_FIRED

    def sentences(self, latent: int, aggregation: str = "max", n: int | None = None) -> list[TopSentence]:
        """The `n` largest sentences (None: all that are stored), largest first; empty where `silence` says why."""
        self.check_latent(latent)
        if aggregation not in self.aggregations:
            raise ValueError(f"aggregation {aggregation!r}: {self.artifact.path} holds {', '.join(self.aggregations)}")
        return self._rows(latent, aggregation, n)

    def levels(self, latent: int) -> list[TopSentence]:
        """Sentences drawn from each level of a latent's activation, the highest level first; empty in folders without them."""
        self.check_latent(latent)
        return self._rows(latent, LEVEL, None)

    def _rows(self, latent: int, aggregation: str, n: int | None) -> list[TopSentence]:
        group = int(np.searchsorted(self._last_latent_of_group, latent))
        if group == len(self._last_latent_of_group):
            return []
        table, latents = self._group(group)
        first, last = np.searchsorted(latents, [latent, latent + 1])
        rows = table.slice(first, last - first)
        rows = rows.filter(pc.equal(rows["aggregation"], aggregation)).slice(0, n)
        return [TopSentence(**row) for row in rows.to_pylist()]

    def statistics(self, latent: int) -> LatentStatistics:
        self.check_latent(latent)
        row = self._latents.slice(latent, 1).to_pylist()[0]
        return LatentStatistics(**{name: value for name, value in row.items() if value is not None})

    def background(self) -> list[BackgroundSentence]:
        """Sentences drawn from the whole corpus, by id; empty in folders without them."""
        if BACKGROUND_FILE not in self.artifact.names:
            return []
        columns = read_table(self.artifact.file(BACKGROUND_FILE)).to_pydict()
        arrays = {"latents": np.int32, "positions": np.int32, "activations": np.float32}
        columns |= {name: [np.array(row, kind) for row in columns[name]] for name, kind in arrays.items()}
        return [BackgroundSentence(*row) for row in zip(*(columns[name] for name in BACKGROUND_SCHEMA.names), strict=True)]

    def pool(self) -> list[PoolSentence]:
        """Every sentence that is stored for some latent, once, by sentence id: the nearest to a sample of the corpus here."""
        found: dict[int, PoolSentence] = {}
        if self._shared is not None:
            return [PoolSentence(**row) for row in self._shared.select(PoolSentence._fields).to_pylist()]
        for index in range(self._file.num_row_groups):
            with self._lock:
                table = self._file.read_row_group(index, columns=["sentence_id", "text", "label"])
            ids, first = np.unique(table["sentence_id"].to_numpy(), return_index=True)
            fresh = first[[i for i, sentence_id in enumerate(ids) if sentence_id not in found]]
            found |= {row["sentence_id"]: PoolSentence(**row) for row in table.take(fresh).to_pylist()}
        return [found[sentence_id] for sentence_id in sorted(found)]


def open_top(path: Path) -> TopSentences:
    """Open a folder of top sentences; ValueError names what is missing, damaged or of another kind."""
    return TopSentences(open_artifact(Path(path), "top_sentences"))


def explanation_lines(explanations: Iterable[Explanation]) -> Iterator[bytes]:
    """JSON Lines, a line an explanation."""
    for explanation in explanations:
        yield json.dumps(asdict(explanation), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """`pieces` as one gzip file; the same pieces give the same bytes."""
    packer = zlib.compressobj(level=9, wbits=31)  # 31: gzip, with a header that holds no time
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def read_explanations(path: Path) -> dict[int, Explanation]:
    """Explanations by latent. ValueError names a line that is damaged."""
    artifact = open_artifact(Path(path), "explanations")
    is_plain = PLAIN_EXPLANATIONS_FILE in artifact.names
    file = artifact.file(PLAIN_EXPLANATIONS_FILE if is_plain else EXPLANATIONS_FILE)
    known = {item.name for item in fields(Explanation)}
    found: dict[int, Explanation] = {}
    with file.open("rb") if is_plain else gzip.open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                explanation = Explanation(**parse_json(line))
            except (ValueError, TypeError):
                raise ValueError(
                    f"{file}: line {number} is no explanation; expected JSON with {', '.join(sorted(known))}"
                ) from None
            found[explanation.latent] = explanation
    return found


def trust(explanation: Explanation) -> float:
    """Its score where that was measured, else what the explainer says of itself; 0 without either."""
    return explanation.score if explanation.score is not None else explanation.certainty or 0.0


def title_of(explanation: Explanation | None) -> str:
    """Its title; empty where the latent is not explained."""
    return explanation.title if explanation is not None and explanation.state == "valid" else ""
