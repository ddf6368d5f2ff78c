"""Activations whose files lie in an object store: written there while capturing, fetched from there.

torchrun ... -m capture.activations ... --out work/ --remote s3://bucket/acts
python -m capture.remote --remote s3://bucket/acts --out acts/

Addresses are Arrow's (pyarrow.fs): s3://, gs://, abfss://, hdfs://, file://; what the store needs beside, such as
`?endpoint_override=localhost:9000&scheme=http`, stands in the address. An object appears whole or not at all; its size is asked
for after it was written, and its checksum is compared when it is fetched. manifest.json comes last, as in a folder.
"""

import json
import logging
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import xxhash
from pyarrow import fs

from core import files
from core.artifact import MANIFEST, Builder, FileRecord, Manifest, verify
from core.cli import one_line_errors, parse, progress, set_up_logging
from core.files import Content, Written, locked
from core.runtime import Runtime

log = logging.getLogger("capture.remote")

READ_BYTES = 2**23


class Store:
    """A folder of an object store."""

    def __init__(self, url: str) -> None:
        """ValueError where `url` is no address that Arrow knows."""
        self.url = url
        try:
            self._system, self._folder = fs.FileSystem.from_uri(url)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"--remote {url}: {' '.join(str(error).split())[:200]}") from None

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""
        return cast("int | None", self._system.get_file_info(self._path(name)).size)

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._system.open_input_file(self._path(name)))

    def write(self, name: str, content: Content) -> Written:
        """OSError where what arrived is not as long as what was sent."""
        digest, size = xxhash.xxh3_128(), 0
        self._make_folder(posixpath.dirname(self._path(name)))
        with self._system.open_output_stream(self._path(name)) as stream:
            for piece in (content,) if isinstance(content, bytes) else content:
                size += len(piece)
                digest.update(piece)
                stream.write(piece)
        if self.size(name) != size:
            raise OSError(f"{self.url}/{name}: wrote {size:,} bytes, {self.size(name)} arrived; give the same command again")
        return Written(size, digest.hexdigest())

    def remove(self, name: str) -> None:
        self._system.delete_file(self._path(name))

    def names(self) -> Iterator[str]:
        """All objects in the folder, as paths below it."""
        found = self._system.get_file_info(fs.FileSelector(self._folder, recursive=True, allow_not_found=True))
        return (posixpath.relpath(one.path, self._folder) for one in found if one.is_file)

    def _path(self, name: str) -> str:
        return posixpath.join(self._folder, name)

    def _make_folder(self, path: str) -> None:
        if isinstance(self._system, fs.LocalFileSystem):  # the only one here that has folders
            self._system.create_dir(path, recursive=True)


class RemoteBuilder(Builder):
    """Builds an artifact whose files lie in a store; the folder `path` holds its manifest, lock and journals."""

    def __init__(self, store: Store, path: Path, begun: Manifest, runtime: Runtime) -> None:
        """ValueError where another command has finished an artifact at the same address."""
        super().__init__(path, begun, runtime)
        self._store = store
        if store.size(MANIFEST) is not None:
            with store.open(MANIFEST) as file:
                there = json.loads(file.read())
            ours = json.loads(begun.to_json())
            if any(there.get(name) != ours[name] for name in ("kind", "config", "inputs")):
                raise ValueError(f"--remote {store.url}: holds what another command wrote; choose another address")

    @classmethod
    def at(cls, url: str) -> Callable[[Path, Manifest, Runtime], Builder]:
        """Makes builders for the store at `url`."""
        store = Store(url)
        return lambda path, begun, runtime: cls(store, path, begun, runtime)

    def open(self, name: str) -> BinaryIO:
        return self._store.open(name)

    def _size(self, name: str) -> int | None:
        return self._store.size(name)

    def _there(self) -> Iterator[str]:
        return (name for name in self._store.names() if name != MANIFEST)

    def _remove(self, name: str) -> None:
        self._store.remove(name)

    def _write(self, name: str, content: Content) -> Written:
        return self._store.write(name, content)

    def _close(self, manifest: Manifest) -> None:
        self._store.write(MANIFEST, manifest.to_json().encode())
        super()._close(manifest)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Flags of fetching."""

    remote: str
    """Address of the artifact."""
    out: Path
    """The folder to write; files that are there already are not fetched again."""


def fetch(url: str, out: Path) -> Manifest:
    """Copy an artifact from a store into the folder `out` and verify it. ValueError where it is incomplete or damaged."""
    store = Store(url)
    if store.size(MANIFEST) is None:
        raise ValueError(f"--remote {url}: holds no {MANIFEST}: nothing is there, or its stage has not finished")
    with locked(out):
        files.sweep(out)
        files.publish(out / MANIFEST, _blocks(store, MANIFEST))
        names = [record.name for record in Manifest.read(out).files if not _is_there(out, record)]
        for name in progress(names, "capture.remote", len(names), "files"):
            files.make_folder((out / name).parent)
            files.publish(out / name, _blocks(store, name))
    return verify(out)


def _is_there(folder: Path, record: FileRecord) -> bool:
    path = folder / record.name
    return path.is_file() and path.stat().st_size == record.bytes


def _blocks(store: Store, name: str) -> Iterator[bytes]:
    with store.open(name) as file:
        while block := file.read(READ_BYTES):
            yield block


def main() -> None:
    set_up_logging()
    with one_line_errors():
        config = parse(FetchConfig, __doc__ or "")
        manifest = fetch(config.remote, config.out)
        log.info("%s: %d files, verified", config.out, len(manifest.files))


if __name__ == "__main__":
    main()
