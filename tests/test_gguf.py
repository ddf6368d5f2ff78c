"""The header of GGUF files: what the package `gguf` reads, at once, and one line for every header that is wrong."""

import random
import re
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama3.gguf import Header, TensorInfo, is_gguf, read_header
from tests.gguf_files import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT64, Stored, Typed, gguf_bytes, write

F32, Q8_0 = 0, 8
MATRIX = Stored("blk.0.attn_q.weight", (2, 32), Q8_0, bytes(range(68)))
NORM = Stored("blk.0.attn_norm.weight", (3,), F32, struct.pack("<3f", 1, 2, 3))
VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Zwölf Bären",
    "llama.block_count": 1,
    "llama.rope.freq_base": 500_000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "Ġb", "", "<|end|>"],
    "tokenizer.ggml.token_type": Typed(INT32, [1, 1, 2, 3]),
    "general.tags": ["text-generation"],
    "of.each.width": Typed(UINT64, 2**63),
    "a.list.of.bools": Typed(BOOL, [True, False]),
    "a.list.of.floats": Typed(FLOAT32, [0.5, -2.0]),
    "an.empty.list": Typed(STRING, []),
    **{f"scalar.{kind}": Typed(kind, 7) for kind in (0, 1, 2, 3, 5, 11, 12)},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", list(VALUES.items()), [MATRIX, NORM])


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def test_metadata_and_tensors_are_those_that_were_written(small: Path) -> None:
    header = read_header(small)
    assert header.metadata == {key: plain(value) for key, value in VALUES.items()}
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    data = small.read_bytes()
    for stored, info in zip((MATRIX, NORM), header.tensors.values(), strict=True):
        assert info.shape == stored.shape
        assert data[info.offset : info.offset + info.bytes] == stored.data
    assert [info.type for info in header.tensors.values()] == ["Q8_0", "F32"]


def slow_header(path: Path) -> Header:
    """The twin: the package's own reader."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {
        tensor.name: TensorInfo(
            tuple(map(int, tensor.shape[::-1])), tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
        )
        for tensor in reader.tensors
    }
    return Header(metadata, tensors)


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    values = {key: value for key, value in VALUES.items() if key != "an.empty.list"}  # there the package fails
    path = write(tmp_path / "x.gguf", list(values.items()), [MATRIX, NORM])
    assert read_header(path) == slow_header(path)


@pytest.mark.parametrize("alignment", [8, 64])
def test_other_alignments_and_version_2(tmp_path: Path, alignment: int) -> None:
    metadata = [("general.alignment", alignment), *VALUES.items()]
    path = write(tmp_path / "x.gguf", metadata, [NORM, MATRIX], version=2, alignment=alignment)
    info = read_header(path).tensors["blk.0.attn_q.weight"]
    assert path.read_bytes()[info.offset : info.offset + info.bytes] == MATRIX.data


def test_without_tokens_their_lists_alone_are_left_out(small: Path) -> None:
    full, short = read_header(small), read_header(small, tokens=False)
    assert short.tensors == full.tensors
    assert set(full.metadata) - set(short.metadata) == {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}


def test_a_real_vocabulary_takes_no_time(tmp_path: Path) -> None:
    """49,152 tokens and 48,900 merges, as SmolLM2 has; the package's reader takes seconds."""
    tokens = [f"token {index}" for index in range(49_152)]
    metadata = [("tokenizer.ggml.tokens", tokens), ("tokenizer.ggml.merges", tokens[:48_900])]
    path = write(tmp_path / "x.gguf", metadata)
    read_header(path)  # imports
    begin = time.process_time()
    assert read_header(path).metadata["tokenizer.ggml.tokens"] == tokens
    assert time.process_time() - begin < 0.3


def list_of(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + values


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"0 bytes"),
    "shorter than its counts": (b"GGUF\3\0\0\0", r"8 bytes"),
    "another format": (gguf_bytes([], magic=b"PK\3\4") + bytes(8), r"no GGUF file"),
    "version 1": (gguf_bytes([], version=1), r"version 1, expected 2 or 3"),
    "version 4": (gguf_bytes([], version=4), r"version 4, expected 2 or 3"),
    "big-endian": (gguf_bytes([], version=3 << 24), r"big-endian"),
    "2^60 keys": (gguf_bytes([], counts=(0, 2**60)), r"1,152,921,504,606,846,976 keys do not fit"),
    "2^60 tensors": (gguf_bytes([("a", 1)], counts=(2**60, 1)), r"1,152,921,504,606,846,976 tensors do not fit"),
    "a key too many": (gguf_bytes([("a", "b" * 40)], counts=(0, 2)), r"key 1|type of"),
    "a string of 2^62 bytes": (gguf_bytes([("a", struct.pack("<IQ", STRING, 2**62) + b"x")]), r"a takes 4,611,686,018,427"),
    "2^60 strings": (gguf_bytes([("a", list_of(STRING, 2**60))]), r"values of a do not fit"),
    "a string of a list too long": (
        gguf_bytes([("a", list_of(STRING, 1, struct.pack("<Q", 2**50) + bytes(8)))]),
        r"a\[0\] ends at byte 1,125",
    ),
    "more numbers than a list may have": (gguf_bytes([("a", list_of(0, 2**22 + 1, bytes(2**22 + 1)))]), r"4,194,305 values"),
    "a list of lists": (gguf_bytes([("a", list_of(ARRAY, 1, bytes(24)))]), r"a is a list of lists"),
    "an unknown type": (gguf_bytes([("a", struct.pack("<I", 13) + bytes(8))]), r"type 13"),
    "an unknown type in a list": (gguf_bytes([("a", list_of(99, 1, bytes(8)))]), r"type 99"),
    "a bool of value 2": (gguf_bytes([("a", Typed(BOOL, 2))]), r"a is a bool and has the value 2"),
    "a string that is not UTF-8": (gguf_bytes([("a", Typed(STRING, b"\xff\xfe"))]), r"a is not valid UTF-8"),
    "a token that is not UTF-8": (gguf_bytes([("a", Typed(STRING, [b"ok", b"\xff"]))]), r"a\[1\] is not valid UTF-8"),
    "a key that is not UTF-8": (gguf_bytes([(b"\xc3", "aaaaaaaa")]), r"key 0 is not valid UTF-8"),
    "a key twice": (gguf_bytes([("a", 1), ("a", 1)]), r"key a is there twice"),
    "a key without letters": (gguf_bytes([("", 1)]), r"key 0 is ''"),
    "a key with a line break": (gguf_bytes([("a\nb", 1)]), r"key 0 is 'a\\nb'"),
    "a tensor's name with a zero byte": (gguf_bytes([], [NORM._replace(name=b"a\0")]), r"tensor 0 is 'a\\x00'"),
    "an alignment of 0": (gguf_bytes([("general.alignment", 0)]), r"alignment is 0"),
    "an alignment of 24": (gguf_bytes([("general.alignment", 24)]), r"alignment is 24"),
    "an alignment in words": (gguf_bytes([("general.alignment", "big")]), r"alignment is 'big'"),
    "a tensor twice": (gguf_bytes([], [NORM, NORM]), r"attn_norm.weight is there twice"),
    "no dimension": (gguf_bytes([], [NORM._replace(shape=())]), r"0 dimensions"),
    "five dimensions": (gguf_bytes([], [NORM._replace(shape=(1,) * 5)]), r"5 dimensions"),
    "a dimension of 0": (gguf_bytes([], [NORM._replace(shape=(3, 0))]), r"shape \[3, 0\]"),
    "a dimension of 2^63": (gguf_bytes([], [NORM._replace(shape=(2**63, 2**63))]), r"attn_norm.weight ends at byte"),
    "an unknown ggml type": (gguf_bytes([], [NORM._replace(kind=77)]), r"ggml type 77"),
    "half a block": (gguf_bytes([], [MATRIX._replace(shape=(2, 31))]), r"Q8_0 of shape \[2, 31\]"),
    "an offset outside": (gguf_bytes([], [NORM._replace(offset=2**40)]), r"should begin at byte"),
    "an overlap": (gguf_bytes([], [MATRIX, NORM._replace(offset=32)]), r"attn_norm.weight should begin at byte"),
    "a hole": (gguf_bytes([], [MATRIX, NORM._replace(offset=128)]), r"attn_norm.weight should begin at byte"),
    "an offset off the alignment": (gguf_bytes([], [MATRIX, NORM._replace(offset=68)]), r"should begin at byte"),
    "cut in its last tensor": (gguf_bytes([], [MATRIX, NORM])[:-24], r"attn_norm.weight ends at byte"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_one_line_for_each_wrong_header(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert_one_line(path, message)


def assert_one_line(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_header_cut_anywhere_is_refused(small: Path) -> None:
    data = small.read_bytes()
    end = len(data) - (32 - len(NORM.data))  # without the padding at the end nothing is missing
    for length in range(0, end, 3):
        small.write_bytes(data[:length])
        assert_one_line(small, "truncated|damaged|bytes")


def attempts(path: Path, damaged: Sequence[bytes]) -> tuple[int, int]:
    """How many of the files `damaged` were refused in one line, and the most memory, in bytes, that one took."""
    messages, peak = [], 0
    tracemalloc.start()
    for data in damaged:
        path.write_bytes(data)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        try:
            read_header(path)
        except ValueError as error:
            messages.append(str(error))
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert [m for m in messages if not re.fullmatch(rf"{re.escape(str(path))}: [^\n]+", m)] == []
    return len(messages), peak


def test_flipped_bits_cost_a_line_at_most(small: Path) -> None:
    """Seeded flips of one to four bits in the header: read, or refused in one line, and never more memory than the file."""
    rng, data = random.Random(0), small.read_bytes()
    end = read_header(small).tensors["blk.0.attn_q.weight"].offset

    def flipped() -> bytes:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return bytes(changed)

    refused, peak = attempts(small, [flipped() for _ in range(3000)])
    assert refused > 1000
    assert peak < 200_000


def test_numbers_of_the_header_replaced_by_absurd_ones(small: Path) -> None:
    """Wherever eight bytes may be a length, a count or an offset."""
    data = small.read_bytes()
    end = read_header(small).tensors["blk.0.attn_q.weight"].offset
    absurd = [2**60, 2**64 - 1, len(data), 2**31, 0]
    damaged = [data[:at] + struct.pack("<Q", n) + data[at + 8 :] for at in range(8, end - 8, 2) for n in absurd]
    refused, peak = attempts(small, damaged)
    assert refused > len(damaged) // 2
    assert peak < 200_000


def test_is_gguf_by_its_first_bytes(small: Path, tmp_path: Path) -> None:
    assert is_gguf(small)
    (tmp_path / "other").write_bytes(b"GG")
    assert not is_gguf(tmp_path / "other")
