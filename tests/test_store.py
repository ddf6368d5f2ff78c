"""Readers of corpus and activations: right rows, in constant time, and damage refused by name."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from capture.store import CHUNKS_KEPT, Activations, open_activations, open_corpus
from core.artifact import Artifact
from tests.test_capture import CHUNK, SITES, capture, write_corpus
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus`, and `acts` of two sites."""
    folder = tmp_path_factory.mktemp("store")
    write_corpus(folder)
    capture(tiny_llama(folder / "model"), folder / "corpus", folder / "acts")
    return folder


def test_corpus_rows_by_id_in_any_order(folder: Path) -> None:
    corpus = open_corpus(folder / "corpus")
    rows = [row for i in range(len(corpus.files)) for row in corpus.table(i).to_pylist()]
    assert len(corpus.files) > 3
    ids = np.random.default_rng(0).integers(0, corpus.n_sentences, 200)
    assert corpus.texts(ids) == [rows[i]["text"] for i in ids]
    assert corpus.labels(torch.tensor(ids)) == [rows[i]["label"] for i in ids]
    assert corpus.document_ids(ids.tolist()) == [rows[i]["document_id"] for i in ids]
    assert corpus.texts([]) == []
    for start, stop in ((0, 1), (3, 27), (9, 11), (10, 20), (0, corpus.n_sentences)):
        assert corpus.rows(start, stop).to_pylist() == rows[start:stop]
    for wrong in ([-1], [corpus.n_sentences]):
        with pytest.raises(ValueError, match="sentence ids go from 0 to"):
            corpus.texts(wrong)


def test_chunks_and_sentences_agree_with_the_files(folder: Path) -> None:
    corpus = open_corpus(folder / "corpus")
    store = open_activations(folder / "acts", SITES[0])
    assert (store.site, store.d_model, store.provenance["site"]) == (SITES[0], 32, SITES[0])
    assert store.provenance["corpus_hash"] == corpus.manifest_hash
    assert len(store) == -(-corpus.n_sentences // CHUNK) > 2
    seen = 0
    for index, chunk in enumerate(store):
        plain = load((folder / "acts" / SITES[0] / f"chunk-{index:06d}.safetensors").read_bytes())
        assert chunk.index == index
        for name, tensor in plain.items():
            assert torch.equal(getattr(chunk, name), tensor)
        assert chunk.sentence_ids.tolist() == list(range(seen, seen + len(chunk.sentence_ids)))
        assert chunk.document_ids.tolist() == corpus.document_ids(chunk.sentence_ids)
        assert store.rows(index) == len(chunk.activations) == len(chunk.token_ids) == int(chunk.offsets[-1])
        assert (chunk.token_ids.dtype, chunk.offsets.dtype) == (torch.int32, torch.int64)
        for sentence_id, begin, end in zip(chunk.sentence_ids.tolist(), chunk.offsets, chunk.offsets[1:], strict=False):
            for rows, token_ids in (store.sentence(sentence_id), chunk.sentence(sentence_id)):
                assert torch.equal(rows, chunk.activations[begin:end])
                assert torch.equal(token_ids, chunk.token_ids[begin:end])
        seen += len(chunk.sentence_ids)
    assert seen == store.n_sentences
    assert store.n_tokens == sum(len(chunk.activations) for chunk in store)
    with pytest.raises(ValueError, match="sentence ids go from 0 to"):
        store.sentence(store.n_sentences)


def test_a_sentence_reads_no_whole_chunk_and_files_are_verified_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = Artifact.file

    def counted(self: Artifact, name: str) -> Path:
        asked.append(name)
        return plain(self, name)

    monkeypatch.setattr(Artifact, "file", counted)
    store = open_activations(folder / "acts", SITES[0])
    for sentence_id in range(store.n_sentences):
        store.sentence(sentence_id)
    assert asked == store.files
    monkeypatch.setattr(store, "chunk", None)
    assert len(store.sentence(0).token_ids) > 0


def test_open_files_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.store.CHUNKS_KEPT", 2)
    store = open_activations(folder / "acts", SITES[0])
    first = store.sentence(0).activations.clone()
    for _ in range(2):
        for index in range(len(store)):
            store.sentence(index * CHUNK)
    assert len(store._open) == 2 < CHUNKS_KEPT
    assert torch.equal(store.sentence(0).activations, first)


def test_writing_into_a_chunk_leaves_the_file_alone(folder: Path) -> None:
    store = open_activations(folder / "acts", SITES[0])
    before = (folder / "acts" / store.files[0]).read_bytes()
    store.chunk(0).activations.zero_()
    assert (folder / "acts" / store.files[0]).read_bytes() == before


def test_sites_must_be_named_where_there_are_several(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"several sites \(layers.1.resid_post, layers.0.attn_norm\); say which"):
        open_activations(folder / "acts")
    with pytest.raises(ValueError, match=r"does not hold site 'embed'; it holds layers.1.resid_post"):
        open_activations(folder / "acts", "embed")


@pytest.mark.parametrize(
    ("opener", "other", "message"),
    [
        (open_corpus, "acts", "expected a folder of kind corpus, found activations"),
        (open_activations, "corpus", "expected a folder of kind activations, found corpus"),
        (open_activations, "model", "holds no manifest.json"),
        (open_corpus, "nothing", "no such folder"),
    ],
)
def test_folders_of_another_kind_are_refused(folder: Path, opener: object, other: str, message: str) -> None:
    assert callable(opener)
    with pytest.raises(ValueError, match=message):
        opener(folder / other)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "acts", tmp_path / "acts")
    return tmp_path / "acts"


def everything(path: Path) -> Activations:
    store = open_activations(path, SITES[0])
    for _ in store:
        pass
    return store


@pytest.mark.parametrize("keep", [0, 1, 7, 0.5, -1])
def test_a_truncated_chunk_is_refused(copy: Path, keep: float) -> None:
    file = copy / SITES[0] / "chunk-000001.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(keep * size) if isinstance(keep, float) else keep % size)
    with pytest.raises(ValueError, match=rf"chunk-000001.safetensors: expected {size:,} bytes, found"):
        everything(copy)


@pytest.mark.parametrize("place", [3, 40, 0.3, 0.9, -1])
def test_one_flipped_bit_is_refused(copy: Path, place: float) -> None:
    file = copy / SITES[0] / "chunk-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"chunk-000001.safetensors: damaged: expected"):
        everything(copy)
    with pytest.raises(ValueError, match=r"chunk-000001.safetensors: damaged"):
        open_activations(copy, SITES[0]).sentence(CHUNK)


def test_missing_and_extra_files_are_refused(copy: Path) -> None:
    file = copy / SITES[0] / "chunk-000001.safetensors"
    shutil.copy(file, file.with_name("chunk-000099.safetensors"))
    with pytest.raises(ValueError, match=r"1 file\(s\) not listed in the manifest, the first is .*chunk-000099"):
        everything(copy)
    file.with_name("chunk-000099.safetensors").unlink()
    file.unlink()
    with pytest.raises(ValueError, match=r"1 file\(s\) missing, the first is layers.1.resid_post/chunk-000001"):
        everything(copy)


def test_an_altered_sentences_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    file = tmp_path / "corpus" / "sentences-00001.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    corpus = open_corpus(tmp_path / "corpus")
    assert corpus.texts([0])
    with pytest.raises(ValueError, match=r"sentences-00001.parquet: damaged"):
        corpus.texts([10])


def test_an_address_is_no_folder(folder: Path) -> None:
    """With what to do instead; also as a Path, which makes one slash of two."""
    for address in ("s3://bucket/acts", Path("s3://bucket/acts")):
        for opened in (open_activations, open_corpus):
            with pytest.raises(
                ValueError, match=r"^s3://bucket/acts: lies in a store.*capture.remote --remote s3://bucket/acts"
            ):
                opened(address)
