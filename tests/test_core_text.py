"""core/text.py: byte order marks, lines, and JSON that nobody wrote by hand."""

from pathlib import Path

import pytest

from core.text import decode, lines, parse_json, read_json, read_text

DEEP = "[" * 200_000 + "]" * 200_000


def test_one_leading_mark_is_dropped(tmp_path: Path) -> None:
    assert decode(b"\xef\xbb\xbftext", "it") == "text"
    assert decode("\ufeff\ufefftext \ufeff".encode(), "it") == "\ufefftext \ufeff"
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "t") == "{}"
    assert read_json(tmp_path / "t") == {}


def test_a_line_is_what_ends_in_a_line_feed() -> None:
    text = "one\u2028still\x0cone\x85\x1e\u2029\x0b\rhere\ntwo\r\n\nfour"
    assert lines(text) == ["one\u2028still\x0cone\x85\x1e\u2029\x0b\rhere", "two", "", "four"]
    assert lines("a\n") == ["a"]
    assert lines("a\n\n") == ["a", ""]
    assert lines("\n") == [""]
    assert lines("") == []


def test_what_is_no_text_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the prompts is not UTF-8 text \(byte 2\)"):
        decode(b"ab\xff", "the prompts")
    (tmp_path / "t").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"t is not UTF-8"):
        read_text(tmp_path / "t")
    with pytest.raises(ValueError, match="nested"):
        parse_json(DEEP)
    for content in ("[]", "{", DEEP):
        (tmp_path / "t").write_text(content)
        with pytest.raises(ValueError, match=r"/t: "):
            read_json(tmp_path / "t")
