"""Which files a source is made of: on this machine, or at an address that fsspec knows (`hf://`, `s3://`, `https://`).

Files are named in order of path; nothing of their content is read here.
"""

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import xxhash

from core.artifact import MANIFEST

FOLDER_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""What is read of a folder. A .json beside other files may hold rows or describe them: it is read where it is named, or where a
folder holds nothing else."""
COMPRESSION = (".gz", ".zst")
PRESETS = {
    "hf://openwebtext": "hf://datasets/Skylion007/openwebtext/plain_text/*.parquet",
    "hf://sentences": "hf://datasets/PaulPauls/openwebtext-sentences/**/*.parquet",
    "hf://pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
}
"""Short names: OpenWebText, the sentences that the reference run published, and the Pile without what was withdrawn from it.
Layouts as public code and the Hub's file lists gave them in 2026; not fetched by the tests, which have no network."""

log = logging.getLogger("capture.listing")


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
        packed = PurePosixPath(self.name.lower()).suffix
        return _suffix(self.name), packed if packed in COMPRESSION else ""


def source_name(spec: str) -> str:
    """How manifests name a source: without the folders above it, which differ between machines."""
    return spec if spec.startswith("nltk:") or is_remote(spec) else _shown(Path(spec).resolve().name)


def _shown(name: str) -> str:
    """The name of a file as text: bytes in it that are not UTF-8, which Linux allows, as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
        below = [(file, _shown(file.relative_to(path).as_posix())) for file in _text_files(path)]
        return [File(_shown(str(file)), name, source_name(spec), partial(_bytes, file), None) for file, name in below]
    if path.is_file():
        name = _shown(path.name)
        return [File(_shown(spec), name, name, partial(_bytes, path), None)]
    raise ValueError(
        f"--source {spec}: no such file or folder; expected a text file, a folder of texts, .jsonl, .csv, .parquet, nltk:NAME, "
        f"an address such as hf://datasets/OWNER/NAME, or {', '.join(PRESETS)}"
    )


def _bytes(path: Path) -> BinaryIO:
    return path.open("rb")


def _text_files(folder: Path) -> list[Path]:
    """The files to read below `folder`, by path, without hidden ones and without the outputs of stages."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"--source {folder}: this is the output of a stage; expected a folder of texts")
    outputs = {manifest.parent for manifest in folder.rglob(MANIFEST)}
    there = [path for path in folder.rglob("*") if path.is_file() and outputs.isdisjoint(path.parents)]
    shown = [path for path in there if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    names = set(_to_read(str(folder), [str(path) for path in shown]))
    return sorted((path for path in shown if str(path) in names), key=lambda path: path.relative_to(folder).parts)


def _to_read(spec: str, names: Sequence[str]) -> list[str]:
    """Those of the files of a folder that are read. ValueError where there is none; what is left out is logged."""
    kinds = {name: _suffix(name) for name in names}
    wanted = FOLDER_SUFFIXES if any(kind in FOLDER_SUFFIXES for kind in kinds.values()) else (".json",)
    read = [name for name, kind in kinds.items() if kind in wanted]
    others = Counter(kind or "no suffix" for kind in kinds.values() if kind not in wanted)
    left = ", ".join(f"{n} of {kind}" for kind, n in sorted(others.items()))
    if not read:
        raise ValueError(
            f"--source {_shown(spec)}: holds no {', '.join(FOLDER_SUFFIXES)} or .json file; expected at least one"
            + (f", found {left}" if left else "")
        )
    if left:
        _say_once(f"{_shown(spec)}: {len(read)} files are read; left out: {left}; name a file to have it read")
    return read


@lru_cache
def _say_once(message: str) -> None:
    log.info(message)


def _suffix(name: str) -> str:
    """The suffix that says how to read a file, without that of a compression."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSION else path.suffix


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
        infos = {name: infos[name] for name in _to_read(spec, list(infos))}
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
