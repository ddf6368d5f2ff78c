"""Readers of the two folders that this package writes: the corpus and the activations.

Files are mapped into memory; each is compared with its checksum once, when it is first asked for. A sentence id always comes
with its own rows: sentences and chunks are consecutive runs of ids, so their place is arithmetic and nothing is searched.

Shapes: n sentences of a chunk, N tokens of a chunk, T tokens of a sentence, D width of the site.
"""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from capture import tensorfile
from capture.storage import DTYPES
from core.artifact import Artifact, open_artifact
from core.int8 import dequantise
from core.tables import read_table

T = TypeVar("T")

TABLES_KEPT = 4  # Parquet files held decoded, some ten MB each
CHUNKS_KEPT = 64  # chunks held open; a mapped file costs address space, not memory


class _Recent(OrderedDict[int, T]):
    """The last few values that `make` made, by index."""

    def __init__(self, make: Callable[[int], T], kept: int) -> None:
        super().__init__()
        self._make, self._kept = make, kept

    def of(self, index: int) -> T:
        if index not in self:
            self[index] = self._make(index)
            if len(self) > self._kept:
                self.popitem(last=False)
        self.move_to_end(index)
        return self[index]


class Corpus:
    """A corpus folder. Sentence ids are 0 to `n_sentences` - 1, document ids 0 to `n_documents` - 1."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest_hash = artifact.manifest.hash
        self.files = sorted(name for name in artifact.names if name.startswith("sentences-"))
        self.n_sentences: int = artifact.manifest.counts["sentences"]
        self.n_documents: int = artifact.manifest.counts["documents"]
        self._starts = [0, *accumulate(artifact.rows(name) for name in self.files)]  # first id of each file, and the end
        self._tables = _Recent(self._read, TABLES_KEPT)
        self._names: pa.ChunkedArray | None = None
        assert self._starts[-1] == self.n_sentences

    def _read(self, index: int) -> pa.Table:
        return read_table(self.artifact.file(self.files[index]), memory_map=True)

    def table(self, index: int) -> pa.Table:
        """The rows of `files[index]`: sentence_id, document_id, text, label."""
        return self._tables.of(index)

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows of sentences `start` to `stop` - 1, across files."""
        assert 0 <= start < stop <= self.n_sentences
        parts = []
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[index + 1])
            parts.append(self.table(index).slice(start - self._starts[index], end - start))
            start = end
        return pa.concat_tables(parts)

    def texts(self, sentence_ids: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """The text of each sentence, in the order of `sentence_ids`."""
        return self._column("text", sentence_ids)

    def labels(self, sentence_ids: Sequence[int] | np.ndarray | Tensor) -> list[str | None]:
        """The label of each sentence's document, None where it has none."""
        return self._column("label", sentence_ids)

    def document_ids(self, sentence_ids: Sequence[int] | np.ndarray | Tensor) -> list[int]:
        """The document of each sentence."""
        return self._column("document_id", sentence_ids)

    def document_names(self, document_ids: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """The name of each document."""
        ids = _checked(document_ids, self.n_documents, f"{self.artifact.path}: document")
        if self._names is None:
            self._names = read_table(self.artifact.file("documents.parquet"), columns=["name"])["name"]
        return self._names.take(pa.array(ids)).to_pylist()  # type: ignore[no-any-return]

    def _column(self, name: str, sentence_ids: Sequence[int] | np.ndarray | Tensor) -> list[Any]:
        """Values by sentence id; each file is read at most once, in order, however the ids are mixed."""
        ids = _checked(sentence_ids, self.n_sentences, f"{self.artifact.path}: sentence")
        values = np.empty(len(ids), dtype=object)
        file_of = np.searchsorted(self._starts, ids, side="right") - 1
        for index in np.unique(file_of):
            mine = file_of == index
            values[mine] = self.table(int(index))[name].take(pa.array(ids[mine] - self._starts[index])).to_pylist()
        return values.tolist()


def _checked(ids: Sequence[int] | np.ndarray | Tensor, limit: int, what: str) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not 0 <= array.min() <= array.max() < limit:
        raise ValueError(f"{what} ids go from 0 to {limit - 1:,}; found {array.min()} to {array.max()}")
    return array


def open_corpus(path: str | Path) -> Corpus:
    """Open a corpus folder; ValueError where it is incomplete, damaged or of another kind."""
    return Corpus(open_artifact(_on_disk(path), "corpus"))


def _on_disk(path: str | Path) -> Path:
    """ValueError for an address: the readers map files, which only disks allow."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):  # Path makes one slash of two
        url = re.sub(":/+", "://", str(path), count=1)
        raise ValueError(
            f"{url}: lies in a store, and readers need a folder on a disk; fetch it with "
            f"`python -m capture.remote --remote {url} --out FOLDER` and give FOLDER"
        )
    return Path(path)


class SentenceRows(NamedTuple):
    """One sentence: activations (T, D) and token ids (T,) int32."""

    activations: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive sentences of one site, in order of id; sentence i has the rows `offsets[i] : offsets[i + 1]`."""

    index: int
    activations: Tensor
    """(N, D) as stored, bfloat16 or float32; float32 where stored as int8."""
    token_ids: Tensor
    """(N,) int32."""
    sentence_ids: Tensor
    """(n,) int64."""
    document_ids: Tensor
    """(n,) int64."""
    offsets: Tensor
    """(n + 1,) int64."""

    def sentence(self, sentence_id: int) -> SentenceRows:
        """The rows of one sentence of this chunk."""
        row = sentence_id - int(self.sentence_ids[0])
        assert 0 <= row < len(self.sentence_ids)
        begin, end = self.offsets[row : row + 2].tolist()
        return SentenceRows(self.activations[begin:end], self.token_ids[begin:end])


def chunk_name(site: str, index: int) -> str:
    """The file of chunk `index` of a site, inside the folder."""
    return f"{site}/chunk-{index:06d}.safetensors"


def site_of(name: str) -> str:
    """The site of a file that `chunk_name` named."""
    return name.rpartition("/")[0]


class Activations:
    """The activations of one site, chunk by chunk: `len()` chunks, iteration over them, `chunk(i)`, and single sentences."""

    def __init__(self, artifact: Artifact, site: str) -> None:
        manifest = artifact.manifest
        self.artifact, self.site = artifact, site
        described = dict(manifest.provenance)
        # Folders of version 0.1 hold only sites of the model's width.
        self.d_model: int = described.pop("widths", {}).get(site, described["d_model"])
        """Width of the site."""
        self.provenance: dict[str, Any] = described | {"site": site, "d_model": self.d_model}
        stored = DTYPES[manifest.provenance["dtype"]]
        self._quantised = stored == torch.int8
        self.dtype = torch.float32 if self._quantised else stored
        """Of the activations as `chunk` and `sentence` return them."""
        self.n_sentences: int = manifest.counts["sentences"]
        self._chunk_sentences: int = manifest.config["chunk_sentences"]
        self.files = [chunk_name(site, index) for index in range(-(-self.n_sentences // self._chunk_sentences))]
        self.n_tokens = sum(artifact.rows(name) for name in self.files)
        self._open = _Recent(self._open_chunk, CHUNKS_KEPT)
        self._places: dict[int, tensorfile.Place] = {}  # of the activations in each file that `read_into` has seen

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Chunk]:
        return (self.chunk(index) for index in range(len(self)))

    def rows(self, index: int) -> int:
        """Tokens of chunk `index`, from the manifest."""
        return self.artifact.rows(self.files[index])

    def chunk(self, index: int) -> Chunk:
        """Chunk `index`, its tensors mapped from the file; activations stored as int8 are computed anew each time."""
        opened = self._open.of(index)
        names = ("token_ids", "sentence_ids", "document_ids", "offsets")
        return Chunk(index, opened.rows(slice(None)), **{name: opened.file.get_tensor(name) for name in names})

    def read_into(self, index: int, out: Tensor) -> Tensor:
        """Copy the activations of chunk `index` into the first rows of `out` (at least N, D) and return that part.

        `out` is contiguous, on the CPU, of the type that `chunk` returns. Rows stored as floats go from the file to `out` in
        one copy, without a mapping in between: the fastest way to read everything. ValueError where `out` does not fit.
        """
        rows, name = self.rows(index), self.files[index]
        if out.ndim != 2 or len(out) < rows or out.shape[1] != self.d_model or out.dtype != self.dtype:
            raise ValueError(
                f"{name}: needs a buffer of at least [{rows}, {self.d_model}] {self.dtype}; found {list(out.shape)} {out.dtype}"
            )
        filled = out[:rows]
        if self._quantised:
            return filled.copy_(self._open.of(index).rows(slice(None)))
        if index not in self._places:
            self._places[index] = tensorfile.places(self.artifact.path / name)["activations"]
        place = self._places[index]
        if place.n_bytes != filled.nbytes:
            self.artifact.file(name)  # refuses it: the header is not the one that was written
        self.artifact.copy(name, place.start, filled.view(-1).view(torch.uint8).numpy().data)
        return filled

    def sentence(self, sentence_id: int) -> SentenceRows:
        """The rows of one sentence, by two look-ups: its chunk is `sentence_id` // chunk size. ValueError for an unknown id."""
        if not 0 <= sentence_id < self.n_sentences:
            raise ValueError(f"{self.artifact.path}: sentence ids go from 0 to {self.n_sentences - 1:,}; found {sentence_id}")
        index, row = divmod(sentence_id, self._chunk_sentences)
        opened = self._open.of(index)
        begin, end = opened.offsets[row : row + 2].tolist()
        return SentenceRows(opened.rows(slice(begin, end)), opened.file.get_slice("token_ids")[begin:end])

    def _open_chunk(self, index: int) -> "_OpenChunk":
        file: Any = safe_open(self.artifact.file(self.files[index]), framework="pt")
        return _OpenChunk(file, file.get_tensor("offsets"), self._quantised)


class _OpenChunk(NamedTuple):
    """A mapped chunk and its offsets (n + 1,)."""

    file: Any
    offsets: Tensor
    quantised: bool
    """Whether the rows are int8 with scales."""

    def rows(self, wanted: slice) -> Tensor:
        """Some rows of the activations, float32 where they are int8 in the file."""
        if not self.quantised:
            whole = wanted == slice(None)
            rows: Tensor = self.file.get_tensor("activations") if whole else self.file.get_slice("activations")[wanted]
            return rows
        return dequantise(self.file.get_slice("activations")[wanted], self.file.get_slice("scales")[wanted])


def open_activations(path: str | Path, site: str | None = None) -> Activations:
    """Open one site of an activations folder; `site` may be left out where there is only one.

    ValueError where the folder is incomplete, damaged or of another kind, does not hold the site, or lies in an object store,
    from which `capture.remote` fetches it.
    """
    artifact = open_artifact(_on_disk(path), "activations")
    sites = artifact.manifest.provenance["sites"]
    if site is None and len(sites) > 1:
        raise ValueError(f"{path}: holds several sites ({', '.join(sites)}); say which one with --site")
    if site is not None and site not in sites:
        raise ValueError(f"{path}: does not hold site {site!r}; it holds {', '.join(sites)}")
    return Activations(artifact, site or sites[0])
