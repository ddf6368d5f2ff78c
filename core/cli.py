"""Command lines: flags generated from a frozen dataclass, one logging set-up, progress on rank 0, and errors in one line."""

import contextlib
import io
import logging
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from core.ending import INTERRUPTED, end_at_sigterm, lack_of_memory
from core.progress import Progress as Progress
from core.progress import progress as progress
from core.runtime import Runtime, environment_rank, open_runtime
from core.terminal import PrintableFormatter, printable
from core.text import parse_toml, read_text

ConfigT = TypeVar("ConfigT")

log = logging.getLogger("core.cli")

STDOUT = 1


def machine(default: Any = MISSING) -> Any:
    """A flag that says how this machine works and not what comes out; it is left out of manifests."""
    return field(metadata={"machine": True}) if default is MISSING else field(default=default, metadata={"machine": True})


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Flags that every stage has."""

    device: str = machine("auto")
    """auto (this rank's GPU where there is one), cpu or cuda."""
    threads: int = 0
    """CPU threads per process; 0 keeps PyTorch's choice. Part of the result: float32 sums differ between 1 and 2 threads."""
    seed: int = 0
    """Seed of everything random in the stage."""
    timeout_s: float = machine(600.0)
    """Seconds after which a rank that does not answer ends the job."""


class Preset(NamedTuple):
    """A TOML file as the flags that it stands for."""

    path: str
    flags: list[str]


def parse(config_class: type[ConfigT], description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config_class` from flags, over the values of `--config FILE.toml`, over the defaults.

    Raises ValueError in one line for unknown or missing flags, wrong types, and unknown names in the TOML file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _refuse_broken_text(argv)
    given, preset = _take_preset(config_class, argv)
    _no_list_twice(config_class, given)
    n_positional = next((i for i, argument in enumerate(given) if argument.startswith("-")), len(given))
    # Of two values for one flag the later wins; positional arguments stay in front, where no list of the preset swallows them.
    arguments = [*given[:n_positional], *preset.flags, *given[n_positional:]]
    # Tyro joins lines that begin with a letter; launch lines stay apart.
    description = re.sub(r"^(?=python |torchrun )", "  ", description, flags=re.MULTILINE)
    text = f"{description}\n\n--config FILE.toml sets the same names from a file; flags given beside it win."
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _helping() if {"-h", "--help"} & set(given) else _unfolded():
            config = tyro.cli(config_class, args=arguments, description=text, prog=_program())
        _check_finite(config, "--")
        return config
    except SystemExit as exit_:
        if exit_.code in (0, None, 128 + signal.SIGTERM):
            raise
        message = _one_line(errors.getvalue(), config_class.__name__)
    raise ValueError(message + _origin(message, given, preset))


def _refuse_broken_text(argv: Sequence[str]) -> None:
    """ValueError for an argument with bytes that are not UTF-8, unless it names a file, as Linux lets it."""
    for argument in argv:
        text = argument.partition("=")[2] if argument.startswith("--") and "=" in argument else argument
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if not os.path.lexists(text):
                shown = ascii(text[max(error.start - 20, 0) : error.end + 20])
                raise ValueError(f"{shown} on the command line is not UTF-8 text; convert it first") from None


def _check_finite(config: Any, prefix: str) -> None:
    """ValueError naming the first flag that is NaN or infinite: such a number passes most comparisons by accident."""
    for item in fields(config):
        value = getattr(config, item.name)
        flag = prefix + item.name.replace("_", "-")
        if is_dataclass(value):
            _check_finite(value, f"{flag}.")
        for number in _flat(value.values() if isinstance(value, dict) else [value]):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{flag} {number}: expected a finite number")


def _no_list_twice(config_class: type[Any], given: Sequence[str]) -> None:
    """ValueError where a flag that takes several values stands there twice: the values of the first would be lost."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in given if argument.startswith("--")]
    for name, hint in get_type_hints(config_class).items():
        flag = f"--{name.replace('_', '-')}"
        if _holds_many(hint) and names.count(flag) > 1:
            raise ValueError(f"{flag} is given {names.count(flag)} times; put all of its values behind one")


@contextlib.contextmanager
def _unfolded() -> Iterator[None]:
    """Keep tyro from folding its messages to the width of the terminal, which would cut sentences apart."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def _helping() -> Iterator[None]:
    """Let the lines of a field's docstring run on in --help; tyro keeps those apart that do not begin with a letter."""
    original: Any = getattr(tyro._docstrings, "get_field_docstring", None)
    if original is None:  # a release that does it in another way
        yield
        return
    tyro._docstrings.get_field_docstring = lambda *about: " ".join((original(*about) or "").split()) or None
    try:
        yield
    finally:
        tyro._docstrings.get_field_docstring = original


def _program() -> str:
    """What the user typed, for --help."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def _take_preset(config_class: type[Any], argv: list[str]) -> tuple[list[str], Preset]:
    """The arguments without `--config FILE`, and what that file sets."""
    given, paths = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            paths.append(next(arguments, ""))
        elif argument.startswith("--config="):
            paths.append(argument.partition("=")[2])
        else:
            given.append(argument)
    if not paths:
        return given, Preset("", [])
    path = paths[0]
    if len(paths) > 1 or not path:
        raise ValueError("--config: expected one TOML file behind it, once")
    try:
        values = parse_toml(read_text(Path(path), "the file"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; expected a TOML file") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from None
    try:
        scalars, lists = _as_flags(config_class, values, "")
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    return given, Preset(path, scalars + lists)


def _as_flags(config_class: type[Any], values: dict[str, Any], prefix: str) -> tuple[list[str], list[str]]:
    """TOML values as flags, so that they pass the same checks: those with one value, and those with lists of them."""
    hints = get_type_hints(config_class)
    known = {item.name: hints[item.name] for item in fields(config_class)}
    scalars: list[str] = []
    lists: list[str] = []
    for name, value in values.items():
        hint = known.get(name.replace("-", "_"))
        if hint is None:
            raise ValueError(f"unknown name {prefix + name!r}; expected some of {', '.join(known)}")
        stem = name.replace("_", "-")
        flag = f"--{prefix}{stem}"
        if is_dataclass(hint) and isinstance(value, dict):
            nested = _as_flags(hint, value, f"{prefix}{stem}.")  # type: ignore[arg-type]
            scalars += nested[0]
            lists += nested[1]
        elif hint is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{prefix + name!r} must be true or false; found {value!r}")
            scalars.append(flag if value else f"--{prefix}no-{stem}")
        elif (odd := _not_whole(hint, value)) is not None:
            raise ValueError(f"{prefix + name!r} takes whole numbers; found {odd!r}")
        elif isinstance(value, dict | list) and not _holds_many(hint):
            raise ValueError(f"{prefix + name!r} must be one value; found {value!r}")
        elif isinstance(value, dict):
            lists += [flag, *(str(part) for pair in value.items() for part in pair)]
        elif isinstance(value, list):
            lists += [flag, *(str(part) for part in _flat(value))]
        else:
            scalars.append(f"{flag}={value}")
    return scalars, lists


def typed(config_class: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values of a TOML file as fields of `config_class`, by the checks that its flags pass. ValueError in one line."""
    scalars, lists = _as_flags(config_class, values, "")
    hints = get_type_hints(config_class)
    names = [name.replace("-", "_") for name in values]
    some = make_dataclass("Values", [(name, hints[name]) for name in names], frozen=True, kw_only=True)
    parsed: Any = parse(some, "", scalars + lists)
    return {name: getattr(parsed, name) for name in names}


def _holds_many(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_holds_many(part) for part in get_args(hint))
    return isinstance(origin or hint, type) and issubclass(origin or hint, Collection) and not issubclass(origin or hint, str)


def _not_whole(hint: Any, value: Any) -> float | None:
    """The first number with a fraction or an exponent in `value`, where `hint` knows whole numbers alone."""
    parts = set(_leaves(hint))
    fractions = (each for each in _flat([value]) if isinstance(each, float))
    return next(fractions, None) if int in parts and float not in parts else None


def _leaves(hint: Any) -> Iterator[Any]:
    if args := get_args(hint):
        for part in args:
            yield from _leaves(part)
    else:
        yield hint


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _one_line(boxed: str, class_name: str) -> str:
    """Tyro's framed message as one line: what is wrong, the nearest flags, and where to read more.

    It holds a title, the message, and sections with hints, apart from one another by rules.
    """
    sections: list[list[str]] = [[]]
    for framed in boxed.splitlines():
        line = framed.strip("│╭╮╰╯─").rstrip(" ─")
        if re.fullmatch(r" *-{3,}", line) or (not line and "─" in framed):
            sections.append([])
        elif line:
            sections[-1].append(line)
    if len(sections[0]) == 1:  # where the terminal is not UTF-8, a rule follows the title too
        sections[:2] = [sections[0] + sections[1]]
    (title, *lines), *others = sections
    if title.strip() == "Required options":  # of each its name, with its help indented below
        margin = len(lines[1]) - len(lines[1].lstrip())
        text = "missing " + ", ".join(line.strip() for line in lines[1:] if line[margin] != " ")
        strange = [line.strip() for part in others if part and "Unrecognized" in part[0] for line in part[1:]]
        if unknown := [word for word in strange if word.startswith("--")]:  # the likelier slip: a flag misspelt
            text = f"unknown flag {', '.join(unknown)}; {text}"
    else:
        text = " ".join(map(str.strip, lines)).removeprefix(f"Error parsing {class_name}: ").rstrip(".")
    hints = [section for section in others if section and ("similar" in section[0] or "meant" in section[0])]
    nearest = [line.split()[0].rstrip(",") for section in hints for line in section if line.lstrip().startswith("--")]
    meant = f"; did you mean {' or '.join(dict.fromkeys(nearest))}?" if nearest else ";"
    return f"{text}{meant} see --help"


def _origin(message: str, given: list[str], preset: Preset) -> str:
    """Where the flag that `message` complains about was set, if it was in the preset."""
    typed = {argument.partition("=")[0] for argument in given}
    for flag in preset.flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in typed and re.search(rf"{re.escape(name)}(?![\w.-])", message):
            return f" ({name} is set in {preset.path})"
    return ""


def set_up_logging(rank: int = 0) -> None:
    """Time, stage and message on stderr; ranks other than 0 speak only to warn."""
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter(f"%(asctime)s {prefix}%(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@contextlib.contextmanager
def one_line_errors(rank: int = 0) -> Iterator[None]:
    """Turn errors that the user can mend (ValueError, OSError) into one line on stderr and exit code 2; Ctrl-C into 130.

    Where whoever reads our output has seen enough, such as `head`, the block ends without a word.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise SystemExit(0) from None
        if os.environ.get("LOG_TRACEBACKS"):
            log.exception("the error in full")
        _say_error(_described(error), rank)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        said = lack_of_memory(error)
        if not said:
            raise
        _say_error(said, rank)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if not rank:
            print(INTERRUPTED, file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def _say_error(text: str, rank: int) -> None:
    where = f" (rank {rank})" if rank else ""
    print(f"error{where}: {printable(text)}", file=sys.stderr, flush=True)


def _reader_left() -> bool:
    """Whether it was standard output that broke. What Python still holds for it is dropped then, as it would fail at exit."""
    poll = select.poll()
    poll.register(STDOUT, select.POLLOUT)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return left


def _described(error: Exception) -> str:
    """The error in one line; of an OSError the path and the reason, without the number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def run_stage(config_class: type[ConfigT], run: Callable[[ConfigT, Runtime], Any], description: str) -> NoReturn:
    """The `main` of every stage: flags, logging, runtime, `run(config, runtime)`, errors in one line."""
    rank, _, _ = environment_rank()
    set_up_logging(rank)
    end_at_sigterm()
    with one_line_errors(rank):
        config: Any = parse(config_class, description)
        with open_runtime(config.device, config.threads, config.seed, config.timeout_s) as runtime:
            run(config, runtime)
    raise SystemExit(0)
