"""core/cli.py: flags, presets, and errors that the user can mend in one line."""

import errno
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import tyro

from core.cli import Progress, StageConfig, machine, one_line_errors, parse, progress, run_stage, set_up_logging
from core.runtime import Runtime, Solo, open_runtime
from tests.conftest import ROOT, Launch
from tests.faults import ForkServer


@dataclass(frozen=True)
class Inner:
    steps: int = 1
    """Steps."""
    rate: float | None = None
    """Rate; None: chosen by the stage."""
    warm: bool = False
    """Whether to warm up."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    out: Path
    """Folder to write."""
    k: int | None = 3
    """Latents a token; None: all."""
    lr: float = 1.0
    names: tuple[str, ...] = ("a",)
    counts: tuple[int, ...] | None = None
    places: tuple[Path, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = field(default_factory=Inner)
    keep: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    workers: int = machine(0)
    """Processes that read ahead. Where --out lies on a slow disk one is enough, as with
    --keep; 0 reads when it is asked."""
    action: tyro.conf.Positional[Literal["run", "status"]] = "run"

    def __post_init__(self) -> None:
        if self.k is not None and self.k > 5:
            raise ValueError(f"--k must be at most 5; found {self.k}")


def parsed(*argv: str, toml: str | None = None, tmp_path: Path = Path("/")) -> Config:
    if toml is not None:
        (tmp_path / "p.toml").write_text(toml)
        argv = (*argv, "--config", str(tmp_path / "p.toml"))
    return parse(Config, "A stage.", argv)


def test_flags_become_the_config() -> None:
    assert parsed("--out", "o") == Config(out=Path("o"))
    config = parsed(
        "status", "--out", "o", "--k", "None", "--lr", "2", "--names", "x", "y", "--counts", "1", "-2", "--places", "p", "q",
        "--mode", "exact", "--inner.steps", "7", "--inner.rate", "1e-3", "--inner.warm", "--no-keep", "--weights", "u", "0.5",
        "--workers", "4", "--timeout-s", "9",
    )  # fmt: skip
    assert config == Config(
        out=Path("o"), k=None, lr=2.0, names=("x", "y"), counts=(1, -2), places=(Path("p"), Path("q")), mode="exact",
        inner=Inner(7, 1e-3, True), keep=False, weights={"u": 0.5}, workers=4, action="status", timeout_s=9.0,
    )  # fmt: skip
    assert isinstance(config.lr, float)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "^missing --out PATH; see --help$"),
        (["--zebra", "3"], "^unknown flag --zebra; missing --out PATH; see --help$"),
        (["--out"], "Missing value for argument '--out'.*; see --help"),
        (["--out", "o", "--kk", "3"], r"Unrecognized options: --kk, 3; did you mean --k\? see --help"),
        (["--out", "o", "--zebra"], "Unrecognized options: --zebra; see --help"),
        (["--out", "o", "--keeps"], r"Unrecognized options: --keeps; did you mean --keep\? see --help"),
        (["--out", "o", "--lr", "much"], "--lr: .*'much'; see --help"),
        (["--out", "o", "--k", "2.5"], r"--k: .*INT.*'2\.5'"),
        (["--out", "o", "--mode", "slow"], r"invalid choice 'slow' for argument '--mode'. Expected one of \('fast', 'exact'\)"),
        (["--out", "o", "stray"], "invalid choice 'stray' for argument 'action'"),
        (["--out", "o", "--k", "9"], "^--k must be at most 5; found 9; see --help$"),
        (["--out", "o", "--config"], "--config: expected one TOML file behind it, once"),
        (["--out", "o", "--config", "a", "--config=b"], "--config: expected one TOML file behind it, once"),
        (
            ["--out", "o", "--config", "/nowhere/p.toml"],
            "--config /nowhere/p.toml: No such file or directory; expected a TOML file",
        ),
    ],
)
def test_wrong_flags_are_one_clear_line(
    argv: list[str], message: str, encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tyro frames its messages with other characters where the terminal is not UTF-8."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)
    assert not set("│╭╯─") & set(str(caught.value))
    assert "---" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_a_preset_sets_every_type_and_flags_win(tmp_path: Path) -> None:
    toml = """
        out = "o"
        k = "None"
        lr = 2
        names = ["x", "y"]
        counts = [1, -2]
        places = ["p"]
        mode = "exact"
        keep = false
        timeout-s = 5
        [inner]
        steps = 7
        rate = 0.5
        warm = true
        [weights]
        u = 0.5
    """
    expected = Config(
        out=Path("o"), k=None, lr=2.0, names=("x", "y"), counts=(1, -2), places=(Path("p"),), mode="exact",
        inner=Inner(7, 0.5, True), keep=False, weights={"u": 0.5}, timeout_s=5.0,
    )  # fmt: skip
    config = parsed(toml=toml, tmp_path=tmp_path)
    assert config == expected
    assert isinstance(config.lr, float), "a whole number in TOML is still a float in the manifest"
    config = parsed("status", "--names", "z", "--keep", "--inner.steps", "8", toml=toml, tmp_path=tmp_path)
    assert (config.action, config.names, config.keep, config.inner) == ("status", ("z",), True, Inner(8, 0.5, True))


def test_a_positional_argument_is_not_swallowed_by_a_list_of_the_preset(tmp_path: Path) -> None:
    config = parsed("status", toml='names = ["x", "y"]\nout = "o"', tmp_path=tmp_path)
    assert (config.action, config.names) == ("status", ("x", "y"))


def test_checks_see_preset_and_flags_together(tmp_path: Path) -> None:
    """A preset that is wrong alone is fine where a flag beside it mends it."""
    assert parsed("--k", "5", "--out", "o", toml="k = 9", tmp_path=tmp_path).k == 5


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("kk = 1", r"p\.toml: unknown name 'kk'; expected some of device, threads, .*mode"),
        ("[inner]\nzebra = 1", r"p\.toml: unknown name 'inner\.zebra'; expected some of steps, rate, warm"),
        ("[outer]\nzebra = 1", r"p\.toml: unknown name 'outer'"),
        ("k = [1, 2]", r"p\.toml: 'k' must be one value; found \[1, 2\]"),
        ("keep = 1", r"p\.toml: 'keep' must be true or false; found 1"),
        ('lr = "much"', r"--lr: .*'much'; see --help \(--lr is set in .*p\.toml\)"),
        ("k = true", r"--k: .*'True'.* \(--k is set in .*p\.toml\)"),
        ('mode = "slow"', r"'slow' for argument '--mode'.*\(--mode is set in .*p\.toml\)"),
        ("k = ", r"p\.toml: not valid TOML"),
        ("mode = 'fast'", "missing --out PATH"),
    ],
)
def test_wrong_presets_are_one_clear_line(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parsed(*([] if toml.startswith("mode = 'f") else ["--out", "o"]), toml=toml, tmp_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_preset_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid TOML"):
        parsed("--config", str(tmp_path / "p.toml"))


def test_help_shows_launch_line_fields_and_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Latents a token; None: all." in out
    assert "--config FILE.toml" in out
    assert max(map(len, out.splitlines())) <= 90
    assert os.environ["COLUMNS"] == "90"


STAGE = """
import time
from dataclasses import dataclass
from pathlib import Path
from core.cli import StageConfig, run_stage

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    out: Path
    how: str = "well"
    many: tuple[str, ...] = ()

def run(config, runtime):
    if config.how == "value":
        raise ValueError("the corpus is empty:\\n  expected a sentence")
    if config.how == "file":
        open("/nowhere/x")
    if config.how == "bug":
        raise KeyError("a bug")
    if config.how == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    if config.how == "rank1" and runtime.rank == 1:
        raise ValueError("shard 7 is cut")
    runtime.barrier()
    print(f"rank {runtime.rank} of {runtime.world_size} on {runtime.device}", flush=True)

if __name__ == "__main__":
    run_stage(Config, run, "A stage.")
"""


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "stage.py").write_text(STAGE)
    return tmp_path / "stage.py"


def main_in_child(script: str, folder: str, *flags: str) -> None:
    """What `python script flags` does, with both of its outputs in files."""
    for descriptor, name in ((1, "out"), (2, "err")):
        sys.stdout.flush()
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (["--out", "o"], 0, None),
        ([], 2, "error: missing --out PATH; see --help"),
        (["--out", "o", "--how", "value"], 2, "error: the corpus is empty: expected a sentence"),
        (["--out", "o", "--how", "file"], 2, "error: /nowhere/x: No such file or directory"),
        (["--out", "o", "--device", "tpu"], 2, "error: --device 'tpu': expected auto, cpu, cuda or cuda:N"),
        (["--out", "o", "--many", "1", "--many=2"], 2, "error: --many is given 2 times; put all of its values behind one"),
        (["--out", "o", "--timeout-s", "0"], 2, "error: --timeout-s must be more than 0, at most 1,000,000,000; found 0.0"),
        (["--out", "o", "--threads", "-1"], 2, "error: --threads must be 0 (PyTorch's choice) or more; found -1"),
    ],
)
def test_exit_codes_and_one_line_errors(
    stage: Path, fork_server: ForkServer, flags: list[str], code: int, error: str | None
) -> None:
    assert fork_server.run(main_in_child, stage, stage.parent, *flags) == code
    assert (stage.parent / "err").read_text().splitlines() == ([error] if error else [])
    assert bool((stage.parent / "out").read_text()) == (code == 0)


def test_a_bug_keeps_its_traceback(stage: Path, fork_server: ForkServer) -> None:
    assert fork_server.run(main_in_child, stage, stage.parent, "--out", "o", "--how", "bug") == 1
    assert "Traceback" in (stage.parent / "err").read_text()


def test_ctrl_c_ends_with_130_and_one_line(stage: Path) -> None:
    command = [sys.executable, str(stage), "--out", "o", "--how", "sleep"]
    # A shell that runs the tests in the background has them ignore Ctrl-C, and a child would inherit that.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, kept)
    with child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors.splitlines() == ["interrupted; the same command continues from here"]


def test_an_error_on_one_of_two_ranks_names_it_and_ends_both(stage: Path, launch: Launch) -> None:
    """The time-out of rank 0 is far longer than that of this test: the loss of its peer must end it."""
    done = launch(stage, "--out", "o", "--how", "rank1", "--device", "cpu", "--timeout-s", "3600", ranks=2, limit=300)
    assert done.returncode != 0
    assert "error (rank 1): shard 7 is cut" in done.stderr
    assert "rank 0 of 2" not in done.stdout


def test_errors_of_the_system_say_path_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for error, line in {
        OSError(errno.ENOSPC, "disk full: 3 bytes"): "error: disk full: 3 bytes",
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"): "error: x: No such file or directory",
        OSError("plain"): "error: plain",
        ValueError(): "error: ValueError",
    }.items():
        with pytest.raises(SystemExit) as caught, one_line_errors():
            raise error
        assert caught.value.code == 2
        assert capsys.readouterr().err == line + "\n"


def test_a_reader_that_leaves_ends_the_stage_without_a_word_and_another_broken_pipe_does_not() -> None:
    code = "from core.cli import one_line_errors\nwith one_line_errors():\n    "
    for body, ending, said in (
        ("while True: print('y' * 10_000)", 0, b""),
        ("raise BrokenPipeError(32, 'Broken pipe', 'socket')", 2, b"error: socket: Broken pipe\n"),
    ):
        command = [sys.executable, "-c", code + body]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            if not ending:
                process.stdout.close()
            assert process.stderr.read() == said
        assert process.returncode == ending


def test_the_lines_of_a_docstring_run_on_in_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "one is enough, as with --keep; 0 reads when" in capsys.readouterr().out


def test_the_full_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOG_TRACEBACKS", "1")
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("x")
    assert caplog.records[0].exc_info


def test_run_stage_hands_over_config_and_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", "--out", "o", "--device", "cpu", "--seed", "5"])
    got: list[tuple[Config, Runtime]] = []
    before = logging.getLogger().handlers[:]
    try:
        with pytest.raises(SystemExit) as caught:
            run_stage(Config, lambda config, runtime: got.append((config, runtime)), "A stage.")
    finally:
        logging.getLogger().handlers[:] = before
    assert caught.value.code == 0
    assert got[0][0] == Config(out=Path("o"), device="cpu", seed=5)
    assert got[0][1].device == torch.device("cpu")
    assert torch.initial_seed() == 5


def test_only_rank_0_logs_what_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        for rank in (0, 3):
            set_up_logging(rank)
            logging.getLogger("stage").info("news")
            logging.getLogger("stage").warning("trouble")
    finally:
        logging.getLogger().handlers[:] = before
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["stage: news", "stage: trouble", "[rank 3] stage: trouble"]


def test_progress_counts_and_speaks_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("core.progress.time.monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO)
    assert list(progress(iter("abcdefg"), "letters", 7, "letter")) == list("abcdefg")
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 7 letter, 0/s, 16 s left",
        "6 of 7 letter, 0/s, 4 s left",
    ]
    caplog.clear()
    silent = Runtime(1, 2, torch.device("cpu"), Solo())
    with Progress("letters", None, "letter", silent) as bar:
        for _ in range(9):
            bar.update(1, loss=0.5)
    assert bar.done == 9
    assert not caplog.records


def test_a_preset_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert parsed("--out", "o", toml="\ufeffk = 2\n", tmp_path=tmp_path).k == 2


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("counts = " + "[" * 100_000, "nested"),
        ("lr" + ".a" * 100_000 + " = 1", "nested"),
        ("workers = 1e23", "'workers' takes whole numbers; found 1e\\+23"),
        ("k = 2.0", "'k' takes whole numbers; found 2.0"),
        ("counts = [1, 2.5]", "'counts' takes whole numbers; found 2.5"),
        ("[inner]\nsteps = 1e3", "'inner.steps' takes whole numbers"),
        ("lr = nan", "--lr nan"),
        ("timeout_s = inf", "--timeout-s inf"),
        ("[inner]\nrate = -inf", "--inner.rate -inf"),
        ("[weights]\nu = nan", "--weights nan"),
    ],
)
def test_numbers_and_depth_of_a_preset_are_checked(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parsed("--out", "o", toml=toml, tmp_path=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("flags", [("--lr", "nan"), ("--timeout-s", "NaN"), ("--inner.rate", "inf"), ("--weights", "u", "nan")])
def test_flags_are_finite(flags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} (nan|inf): expected a finite number"):
        parsed("--out", "o", *flags)


def test_a_time_out_may_be_long_but_not_overflow() -> None:
    with pytest.raises(ValueError, match="--timeout-s"), open_runtime("cpu", timeout_s=1e300):
        pass


def test_bytes_that_are_no_text_are_refused_unless_they_name_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"udcff.* is not UTF-8"):
        parsed("--out", "o", "--names", "caf\udcff")
    with pytest.raises(ValueError, match=r"udcff.* is not UTF-8"):
        parsed("--out", "o", "--names=caf\udcff")
    strange = tmp_path / "caf\udcff"
    strange.touch()
    assert parsed("--out", "o", f"--places={strange}").places == (strange,)
    assert parsed("--out", "o", "--places", str(strange)).places == (strange,)
