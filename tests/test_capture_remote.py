"""Activations in an object store (a real S3 server on the loopback), and parts of several machines merged."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from capture import merge
from capture.merge import MergeConfig
from capture.remote import Store, fetch
from capture.store import open_activations
from core.artifact import Builder, verify
from tests.faults import ForkServer
from tests.test_capture import capture, contents, solo, write_corpus
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `corpus` and `clean`, an uninterrupted run."""
    folder = tmp_path_factory.mktemp("remote")
    tiny_llama(folder / "model")
    write_corpus(folder)
    capture(folder / "model", folder / "corpus", folder / "clean")
    return folder


FOR_MOTO = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    # moto stores the trailing checksums of the newer AWS SDK as if they were content, which capture notices by the size.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
}

# --- an object store -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """host:port of an S3 server with a bucket `acts`."""
    pytest.importorskip("moto", reason="the S3 server of the tests: pip install 'moto[server]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    options = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FOR_MOTO.items():
            patch.setenv(name, value)
        fs.S3FileSystem(allow_bucket_creation=True, **options).create_dir("acts")
        yield f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    server.terminate()
    server.wait()


def capture_in_child(*arguments: str) -> None:
    """`capture_to`, in the fork server, which is older than the S3 server."""
    os.environ.update(FOR_MOTO)
    capture_to(*arguments)


def capture_to(model: str, corpus: str, out: str, remote: str) -> None:
    capture(model, corpus, out, remote=remote)


def test_captured_to_a_store_killed_continued_and_fetched(
    tiny: Path, tmp_path: Path, endpoint: str, fork_server: ForkServer
) -> None:
    """The folder fetched is the one that a capture to the disk writes."""
    url, work = f"s3://acts/run?{endpoint}", tmp_path / "work"
    arguments = (tiny / "model", tiny / "corpus", work, url)
    assert fork_server.run(capture_in_child, *arguments, exit_at=30) == 9
    with pytest.raises(ValueError, match="its stage has not finished"):
        fetch(url, tmp_path / "early")
    assert Store(url).size("layers.1.resid_post/chunk-000000.safetensors")
    capture_to(*map(str, arguments))
    assert sorted(contents(work)) == ["manifest.json"]
    with pytest.raises(ValueError, match=r"written with --remote, fetch them with `python -m capture.remote`"):
        open_activations(work, "layers.1.resid_post")
    fetch(url, tmp_path / "acts")
    assert contents(tmp_path / "acts") == contents(tiny / "clean")
    (tmp_path / "acts" / "layers.1.resid_post" / "chunk-000001.safetensors").unlink()
    fetch(url, tmp_path / "acts")  # the one that is missing
    assert contents(tmp_path / "acts") == contents(tiny / "clean")


def test_an_unfinished_store_is_closed(tiny: Path, tmp_path: Path) -> None:
    url, work = (tmp_path / "store").as_uri(), tmp_path / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "finish", lambda *_: None)
        capture(tiny / "model", tiny / "corpus", work, remote=url)
    (tmp_path / "store" / "layers.1.resid_post" / "chunk-000002.safetensors").unlink()
    capture(tiny / "model", tiny / "corpus", work, remote=url, finish=True)
    fetch(url, tmp_path / "acts")
    assert len(open_activations(tmp_path / "acts", "layers.1.resid_post")) == 2
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == len(verify(tmp_path / "acts").files)


def test_a_damaged_object_is_refused(tiny: Path, tmp_path: Path) -> None:
    """At file://, which is a store like any other."""
    url = (tmp_path / "store").as_uri()
    capture_to(str(tiny / "model"), str(tiny / "corpus"), str(tmp_path / "work"), url)
    damaged = tmp_path / "store" / "layers.1.resid_post" / "chunk-000001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"chunk-000001.safetensors: damaged"):
        fetch(url, tmp_path / "acts")
    with pytest.raises(ValueError, match="holds what another command wrote; choose another address"):
        capture(tiny / "model", tiny / "corpus", tmp_path / "other", remote=url, storage="fp32")


def test_addresses_that_lead_nowhere(tiny: Path, tmp_path: Path) -> None:
    for url in ("acts", "gopher://acts/x"):
        with pytest.raises(ValueError, match=rf"--remote {url}"):
            Store(url)
    with pytest.raises(ValueError, match=r"holds no manifest.json"):
        fetch(tmp_path.as_uri(), tmp_path / "acts")


# --- parts -----------------------------------------------------------------------------------------------------------------


def merged(tiny: Path, out: Path, *parts: Path) -> None:
    merge.run(MergeConfig(parts=parts, corpus=tiny / "corpus", out=out), solo())


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[Path, Path]:
    for i in (1, 2):
        capture(tiny / "model", tiny / "corpus", tiny / f"part{i}", part=f"{i}/2")
    return tiny / "part1", tiny / "part2"


def test_parts_merge_into_what_one_machine_writes(tiny: Path, tmp_path: Path, parts: tuple[Path, Path]) -> None:
    names = [set(contents(part)) - {"manifest.json"} for part in parts]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
    merged(tiny, tmp_path / "acts", *reversed(parts))
    assert contents(tmp_path / "acts") == contents(tiny / "clean")
    assert verify(parts[0]).kind == "activations-part"


def test_parts_that_do_not_belong_together_are_refused(tiny: Path, tmp_path: Path, parts: tuple[Path, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ files are in none of them, the first is layers.1.resid_post/chunk-000001"
    ):
        merged(tiny, tmp_path / "half", parts[0])
    with pytest.raises(ValueError, match="give each part once"):
        merged(tiny, tmp_path / "twice", parts[0], parts[0])
    with pytest.raises(ValueError, match="expected a folder of kind activations-part, found activations"):
        merged(tiny, tmp_path / "whole", parts[0], tiny / "clean")
    capture(tiny / "model", tiny / "corpus", tmp_path / "other", part="2/2", storage="fp32")
    with pytest.raises(ValueError, match="storage is 'fp32', but 'bf16' is needed"):
        merged(tiny, tmp_path / "mixed", parts[0], tmp_path / "other")
    write_corpus(tmp_path, n_documents=11)
    with pytest.raises(ValueError, match="another corpus"):
        merge.run(MergeConfig(parts=parts, corpus=tmp_path / "corpus", out=tmp_path / "strange"), solo())
    with pytest.raises(ValueError, match="--part 3/2: expected I/N"):
        capture(tiny / "model", tiny / "corpus", tmp_path / "third", part="3/2")
    with pytest.raises(ValueError, match="part '1/2', now it is '2/2'"):
        capture(tiny / "model", tiny / "corpus", parts[0], part="2/2")
