"""core/terminal.py: what texts, models, servers and file names say never steers a terminal."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inference.complete
from core.cli import Progress, one_line_errors, parse, set_up_logging
from core.table import text_table
from core.terminal import json_line, printable, say
from demo.showcase import highlighted
from inference.complete import CompleteConfig
from interpretability.records import TopSentence
from tests.tiny import tiny_llama
from tests.tiny_features import alone

ROOT = Path(__file__).parent.parent

CLIPBOARD = "\x1b]52;c;aGVsbG8=\x07"
HOSTILE = f"red \x1b[31m, {CLIPBOARD}, nul \x00, \rover, bell \a, C1 \x9b2J, del \x7f"


def control(text: str) -> set[str]:
    """The characters of `text` that a terminal may obey."""
    return {c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n"}


def test_every_control_character_is_shown_and_nothing_else_changes() -> None:
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        if control(c):
            assert printable(f"a{c}b") == f"a\\x{code:02x}b"
        else:
            assert printable(c) == c


@given(st.text() | st.text(alphabet=[chr(i) for i in range(0xA1)]))
def test_json_reads_back_and_holds_no_control_character(text: str) -> None:
    line = json_line({text: [text]})
    assert json.loads(line) == {text: [text]}
    assert not control(line)
    assert "\n" not in line


def test_logs_errors_tables_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logging.getLogger("x").warning("%s", HOSTILE)
    try:
        raise KeyError(HOSTILE)
    except KeyError:
        logging.getLogger("x").exception("in full: %s", HOSTILE)
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError(HOSTILE)
    with pytest.raises(SystemExit), one_line_errors():
        Path(f"/nowhere/{CLIPBOARD}").read_text()
    say(HOSTILE)
    for line in text_table([{"text": HOSTILE, "share": 0.5, "values": (1, HOSTILE)}]):
        say(line)
    sentence = TopSentence(0, "max", 0, 1.0, 0, "", None, HOSTILE, ["a", HOSTILE, "b"], [0.0, 1.0, 0.1])
    print(highlighted(sentence))
    said = capsys.readouterr()
    assert not control(said.out + said.err)
    assert said.err.count("x1b]52;c;") >= 5
    assert said.out.count("x1b]52;c;") == 4


def test_notes_of_a_progress_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("reading", 3, "files") as bar:
        monkeypatch.setattr("time.monotonic", lambda: 1e12)
        bar.update(1, file=HOSTILE)
    assert "x1b]52;c;" in caplog.text
    assert not control(caplog.text)


def flags(folder: Path) -> list[str]:
    prompt = HOSTILE.replace("\x00", "")  # no argument of a process can hold it
    return ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "40", "--temperature", "2", "--prompt", prompt]


def test_completions_on_a_real_terminal(tmp_path: Path) -> None:
    """A model of random weights says any byte."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "inference.complete", *flags(tiny_llama(tmp_path)), "--raw", "--threads", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # how a pseudo-terminal ends
            pass
    os.close(ours)
    assert process.returncode == 0, said
    text = said.decode(errors="replace").replace("\r\n", "\n")
    assert "red \\x1b[31m, \\x1b]52;c;" in text
    assert not control(text)


def test_completions_in_a_pipe_are_raw_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path)
    said = {}
    for how in ([], ["--raw"], ["--json"]):
        pipe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
        monkeypatch.setattr(sys, "stdout", pipe)
        inference.complete.run(parse(CompleteConfig, "", [*flags(folder), *how]), alone())
        pipe.flush()
        said["".join(how)] = pipe.buffer.getvalue().decode()  # type: ignore[attr-defined]
    record = json.loads(said["--json"])
    whole = record["prompt"] + record["completion"] + "\n"
    assert CLIPBOARD in whole
    assert control(record["completion"]), "the model, too, says control characters"
    assert said["--raw"] == whole
    assert said[""] == printable(whole)
    assert not control(said["--json"])
