"""Which files a source is made of: on this machine, or at an address that fsspec knows (`hf://`, `s3://`, `https://`).

Files are named in order of path; nothing of their content is read here.
"""

import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import xxhash

from core.artifact import MANIFEST

FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
PRESETS = {
    "hf://openwebtext": "hf://datasets/Skylion007/openwebtext/plain_text/*.parquet",
    "hf://sentences": "hf://datasets/PaulPauls/openwebtext-sentences/**/*.parquet",
    "hf://pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
}
"""Short names: OpenWebText, the sentences that the reference run published, and the Pile without what was withdrawn from it.
Layouts as public code and the Hub's file lists gave them in 2026; not fetched by the tests, which have no network."""


class File(NamedTuple):
    """One file of a source."""

    label: str
    """How messages call it: path or address."""
    name: str
    """Below the source."""
    source: str
    open: Callable[[], BinaryIO]
    """Its bytes, as they are stored."""
    version: str | None
    """What a remote store says identifies the content; None for a file that must be read to tell."""

    @property
    def suffixes(self) -> tuple[str, str]:
        """The suffix that says how to read it, and that of a compression, or nothing."""
        path = PurePosixPath(self.name.lower())
        return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in COMPRESSION else (path.suffix, "")


def source_name(spec: str) -> str:
    """How manifests name a source: without the folders above it, which differ between machines."""
    return spec if spec.startswith("nltk:") or is_remote(spec) else Path(spec).resolve().name


def source_version(spec: str) -> str | None:
    """What identifies a remote source by its listing, so that it need not be fetched twice; None where it must be read."""
    if not is_remote(spec):
        return None
    files = list_files(spec)
    if any(file.version is None for file in files):
        return None
    return xxhash.xxh3_128_hexdigest("\n".join(f"{file.name} {file.version}" for file in files).encode())[:16]


def is_remote(spec: str) -> bool:
    """Whether `spec` is an address."""
    return "://" in spec


def list_files(spec: str) -> list[File]:
    """The files of `spec` (a file, a folder, an address, one of PRESETS), in order of path; ValueError where there is none."""
    if is_remote(spec):
        return _remote_files(spec)
    path = Path(spec)
    if path.is_dir():
        source = path.resolve().name
        below = [(file, file.relative_to(path).as_posix()) for file in _text_files(path)]
        return [File(str(file), name, source, partial(_bytes, file), None) for file, name in below]
    if path.is_file():
        return [File(spec, path.name, path.name, partial(_bytes, path), None)]
    raise ValueError(
        f"--source {spec}: no such file or folder; expected a text file, a folder of texts, .jsonl, .parquet, nltk:NAME, "
        f"an address such as hf://datasets/OWNER/NAME, or {', '.join(PRESETS)}"
    )


def _bytes(path: Path) -> BinaryIO:
    return path.open("rb")


def _text_files(folder: Path) -> list[Path]:
    """The files to read below `folder`, by path, without hidden ones and without the outputs of stages."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"--source {folder}: this is the output of a stage; expected a folder of texts")
    outputs = {manifest.parent for manifest in folder.rglob(MANIFEST)}
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and _is_text(path.name)),
        key=lambda path: path.relative_to(folder).parts,
    )
    files = [
        path
        for path in files
        if outputs.isdisjoint(path.parents) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"--source {folder}: holds no {', '.join(FOLDER_SUFFIXES)} file; expected at least one")
    return files


def _is_text(name: str) -> bool:
    """Whether a folder's file of this name is read."""
    path = PurePosixPath(name.lower())
    return (PurePosixPath(path.stem).suffix if path.suffix in COMPRESSION else path.suffix) in FOLDER_SUFFIXES


def _remote_files(spec: str) -> list[File]:
    """The files at an address, in order of path; their bytes are fetched as they are read."""
    address = PRESETS.get(spec, spec)
    try:
        system, path = fsspec.core.url_to_fs(address)
        found = (system.glob if "*" in path else system.find)(path, detail=True)
    except Exception as error:  # each of fsspec's backends has errors of its own
        raise ValueError(f"--source {spec}: cannot be listed: {' '.join(str(error).split())[:200]}") from error
    infos = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    if len(infos) != 1 or "*" in path:
        infos = {name: info for name, info in infos.items() if _is_text(name)}
    if not infos:
        raise ValueError(f"--source {spec}: holds no {', '.join(FOLDER_SUFFIXES)} file; expected at least one")
    root = posixpath.commonpath([posixpath.dirname(name) for name in infos])
    return [
        File(
            system.unstrip_protocol(name),
            name.removeprefix(root).lstrip("/"),
            spec,
            partial(system.open, name, "rb"),
            _version(info),
        )
        for name, info in infos.items()
    ]


def _version(info: dict[str, Any]) -> str | None:
    """Size and content hash of a remote file, under the names that the Hub and S3 give the latter."""
    content = info.get("blob_id") or info.get("ETag")
    return None if content is None else f"{info['size']} {content}"
