"""What lies in the files: the safetensors format without copies, int8 rows with scales, reading into a caller's buffer."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capture import tensorfile
from capture.ahead import ahead
from capture.storage import StoredRows
from capture.store import open_activations
from core.artifact import verify
from core.files import read_at
from core.int8 import dequantise, quantise
from tests.test_capture import SITES, capture, write_corpus
from tests.tiny import tiny_llama

TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp32` and `int8`, of the same corpus and model."""
    folder = tmp_path_factory.mktemp("storage")
    write_corpus(folder)
    tiny_llama(folder / "model")
    for storage in ("fp32", "int8"):
        capture(folder / "model", folder / "corpus", folder / storage, storage=storage)
    return folder


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_pieces_are_what_safetensors_writes(rows: int) -> None:
    tensors = {
        "zz": torch.randn(rows, 3).bfloat16(),
        "activations": torch.randint(-127, 128, (rows, 4), dtype=torch.int8),
        "scales": torch.randn(rows),
        "token_ids": torch.arange(rows, dtype=torch.int32),
        "offsets": torch.arange(rows + 1),
        "names é": torch.arange(3),
    }
    metadata = {"counts": '{"fed": 3}'}
    assert b"".join(tensorfile.pieces(tensors, metadata)) == safetensors.torch.save(tensors, metadata=metadata)


def test_places_of_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(5)}
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file(tensors, path)
    for name, place in tensorfile.places(path).items():
        out = torch.empty_like(tensors[name])
        read_at(path, place.start, out.view(-1).view(torch.uint8).numpy().data)
        assert torch.equal(out, tensors[name])
    with pytest.raises(ValueError, match="ends 9 bytes before"):
        read_at(path, path.stat().st_size - 1, memoryview(bytearray(10)))
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 no header at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensorfile.places(path)


@pytest.mark.parametrize("place", [3, 40, 0.5, -1])
def test_a_damaged_chunk_is_refused_in_the_pass_that_copies_it(folder: Path, tmp_path: Path, place: float) -> None:
    shutil.copytree(folder / "fp32", tmp_path / "acts")
    store = open_activations(tmp_path / "acts", SITES[0])
    file = tmp_path / "acts" / store.files[0]
    content = bytearray(file.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"chunk-000000.safetensors"):
        store.read_into(0, torch.empty(store.rows(0), 32))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1))
@example([[0.0, 0.0, 1.182254663029699e-37]])
@example([[0.0, 1e-45, 1.2e-38], [1.4e-36, 1.5e-36, 0.0], [-3.4028234663852886e38, 1.0, 3.4e38]])
def test_int8_is_within_half_a_scale(rows: list[list[float]]) -> None:
    """For every float32 row, on processors that take subnormal numbers for 0 too."""
    x = torch.tensor(rows)
    for flush in (False, True):
        with subnormals_are_zero(flush):
            values, scales = quantise(x)
            back = dequantise(values, scales)
        assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
        assert bool(((scales == 0) | (scales >= TINY)).all())
        error = (back.double() - x.double()).abs().amax(dim=1)
        lost = TINY * flush  # what such a processor reads as 0 in the first place
        assert bool((error <= scales.double() * 0.5001 + lost).all())


@contextmanager
def subnormals_are_zero(flush: bool) -> Iterator[None]:
    assert torch.set_flush_denormal(flush) or not flush
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_int8_of_zeros_and_of_what_is_not_finite() -> None:
    stored = StoredRows.empty(3, 2, "int8", torch.device("cpu"))
    stored.put_(torch.tensor([2, 0, 1]), torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]]))
    assert stored.scales is not None
    assert stored.norms().isfinite().tolist() == [False, False, True]
    huge = StoredRows.empty(2, 2, "fp32", torch.device("cpu"))
    huge.put_(torch.arange(2), torch.tensor([[3e38, 3e38], [1e-40, 0.0]]))
    torch.testing.assert_close(huge.norms(), torch.tensor([3e38, 1e-40]).double() * torch.tensor([2**0.5, 1]).double())
    assert stored.kept(torch.tensor([False, False, True])).activations.tolist() == [[0, 0]]


def test_an_int8_folder_is_half_the_rows_and_reads_as_float32(folder: Path) -> None:
    assert verify(folder / "int8").provenance["dtype"] == "int8"
    for site in SITES:
        full, small = open_activations(folder / "fp32", site), open_activations(folder / "int8", site)
        for a, b in zip(full, small, strict=True):
            assert b.activations.dtype == small.dtype == torch.float32
            assert torch.equal(b.activations, dequantise(*quantise(a.activations)))
            assert torch.equal(a.token_ids, b.token_ids)
        for sentence in range(full.n_sentences):
            assert torch.equal(small.sentence(sentence).activations, dequantise(*quantise(full.sentence(sentence).activations)))


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_reading_into_a_buffer_equals_the_mapped_chunk(folder: Path, storage: str) -> None:
    store = open_activations(folder / storage, SITES[0])
    buffer = torch.full((max(store.rows(i) for i in range(len(store))) + 2, 32), 7.0)
    for index in range(len(store)):
        rows = store.read_into(index, buffer)
        assert rows.data_ptr() == buffer.data_ptr()
        assert torch.equal(rows, store.chunk(index).activations)
    assert bool((buffer[-2:] == 7).all())
    for wrong in (buffer[:1], buffer.bfloat16(), buffer[:, :5].contiguous()):
        with pytest.raises(ValueError, match=r"needs a buffer of at least \[\d+, 32\] torch.float32; found"):
            store.read_into(0, wrong)


def test_ahead_keeps_order_and_raises_where_the_item_was_due() -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise OSError("the disk is gone")

    seen: list[int] = []
    with pytest.raises(OSError, match="disk is gone"):
        seen.extend(ahead(items()))
    assert seen == [0, 1, 2, 3]
    assert list(ahead(iter(()))) == []
