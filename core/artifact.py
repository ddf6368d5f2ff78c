"""Artifacts: folders with a manifest, which are the only thing that stages hand to one another.

A folder is built under a lock, file by file, each whole or absent; a journal remembers what is finished, so that the same
command continues after a kill; the manifest with `complete: true` comes last. Readers refuse everything else.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from core import files
from core.file_records import JOURNAL_ADVICE, read_journals, remove_journals
from core.file_records import FileRecord as FileRecord
from core.files import locked as locked
from core.flags import changed_flags
from core.flags import config_record as config_record
from core.lines import LineWriter
from core.runtime import Runtime
from core.version import VERSION

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNLISTED = ("README.md", "log.txt", "training.html")
"""Files beside those of the manifest that a reader allows and never hashes: a model card, and what a person may read."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds and where it came from. Holds no time, host, world size or absolute path."""

    kind: str
    config: dict[str, Any]
    inputs: list[dict[str, str]] = field(default_factory=list)
    files: list[FileRecord] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of `manifest.json`: canonical, with a checksum of itself, so that one flipped bit anywhere is noticed."""
        data = json.loads(json.dumps(asdict(self) | {"files": [record._asdict() for record in self.files]}))
        data["checksum"] = xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True).encode())
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @property
    def hash(self) -> str:
        """Identifies the content: 16 hexadecimal digits of the SHA-256 of the manifest's text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of `folder`, complete or not; ValueError where there is none or it is damaged."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected the output of an earlier stage")
        if not path.is_file():
            inside = [found.parent.name for found in sorted(folder.glob(f"*/{MANIFEST}"))]
            hint = f"give one of the folders in it: {', '.join(inside)}" if inside else "check the path"
            raise ValueError(f"{folder}: holds no {MANIFEST}, so it is not the output of a stage; {hint}")
        try:
            text = path.read_text(encoding="utf-8")
            data = dict(json.loads(text))
            version = data.get("format_version")
            if isinstance(version, int) and version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, expected {FORMAT_VERSION}; use a matching release")
            data.pop("checksum", None)
            data["files"] = [FileRecord(**record) for record in data["files"]]
            manifest = cls(**data)
            if manifest.to_json() != text:
                raise ValueError("its checksum does not fit; it was altered after it was written")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: damaged manifest ({error}); run its stage again into a fresh folder") from None
        return manifest


class Artifact:
    """A complete artifact opened for reading. `file(name)` verifies a file's checksum the first time it is asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._records = {record.name: record for record in manifest.files}
        self._verified: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._records)

    def file(self, name: str) -> Path:
        if name not in self._records:
            raise ValueError(f"{self.path}: holds no file {name!r}; it holds {', '.join(self.names[:5])}")
        if name not in self._verified:
            _check_file(self.path, self._records[name])
            self._verified.add(name)
        return self.path / name

    def copy(self, name: str, start: int, out: memoryview) -> None:
        """Copy bytes of a file, from `start` on, into `out`; the first time, its checksum is taken in the same pass."""
        if name in self._verified:
            files.read_at(self.path / name, start, out)
        else:
            _check(self.path / name, self._records[name], files.checksum(self.path / name, start, out))
            self._verified.add(name)

    def rows(self, name: str) -> int:
        return self._records[name].rows

    def as_input(self) -> dict[str, str]:
        """How a later stage's manifest names this folder."""
        return {"kind": self.manifest.kind, "hash": self.manifest.hash}


def open_artifact(path: Path, *kinds: str) -> Artifact:
    """Open the complete artifact in `path`, of one of `kinds`.

    ValueError names what is missing, extra, cut or of another kind.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if kinds and manifest.kind not in kinds:
        raise ValueError(f"{path}: expected a folder of kind {' or '.join(kinds)}, found {manifest.kind}")
    if not manifest.complete:
        raise ValueError(f"{path}: the stage that writes this folder has not finished; give its command again to continue it")
    expected = {record.name: record for record in manifest.files}
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    found = {name for name in found if name != MANIFEST and not any(part.startswith(".") for part in name.split("/"))}
    extra = found - set(expected) - set(UNLISTED)
    for what, names in (("missing", set(expected) - found), ("not listed in the manifest", extra)):
        if names:
            elsewhere = "; were they written with --remote, fetch them with `python -m capture.remote`" if not found else ""
            raise ValueError(f"{path}: {len(names)} file(s) {what}, the first is {min(names)}{elsewhere}")
    for name, record in expected.items():
        size = (path / name).stat().st_size
        if size != record.bytes:
            raise ValueError(f"{path / name}: expected {record.bytes:,} bytes, found {size:,}; the file is damaged")
    return Artifact(path, manifest)


def verify(path: Path) -> Manifest:
    """Read every byte of an artifact and compare checksums; ValueError names the first file that differs."""
    artifact = open_artifact(path)
    for name in artifact.names:
        artifact.file(name)
    return artifact.manifest


def check_provenance(what: str, expected: Mapping[str, Any], found: Mapping[str, Any], keys: Iterable[str]) -> None:
    """ValueError naming both values where `found`, the provenance of `what`, differs from `expected` in one of `keys`."""
    for key in keys:
        if expected.get(key) != found.get(key):
            raise ValueError(
                f"{what}: {key} is {found.get(key)!r}, but {expected.get(key)!r} is needed; these do not belong together"
            )


class Builder:
    """An artifact under construction. Every rank holds one; each publishes its own files, rank 0 writes the manifest.

    `complete` is True where an earlier run of the same command already finished the artifact.
    """

    def __init__(self, path: Path, begun: Manifest, runtime: Runtime) -> None:
        self.path, self.complete = path, begun.complete
        self._begun, self._runtime = begun, runtime
        self._journal = LineWriter(path / f".journal-{runtime.rank}.jsonl", JOURNAL_ADVICE)
        self._done = {record.name: record for record in begun.files}

    @property
    def counts(self) -> dict[str, Any]:
        """What a complete artifact counted."""
        return self._begun.counts

    def claim(self) -> None:
        """Keep the folder for this command though nothing lies in it yet, because work for it lies elsewhere."""
        if not self._journal.records:
            self._journal.write(FileRecord("", -1, "", 0)._asdict())

    def has(self, name: str) -> FileRecord | None:
        """The record of a file that an earlier run finished, if it did."""
        record = self._done.get(name)
        return record if record and self._size(name) == record.bytes else None

    def _size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        target = self.path / name
        return target.stat().st_size if target.is_file() else None

    def open(self, name: str) -> BinaryIO:
        """A finished file, for reading."""
        return (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        """What a finished file holds. ValueError where that is not what was written."""
        with self.open(name) as file:
            content = file.read()
        record = self._done[name]
        if (len(content), xxhash.xxh3_128_hexdigest(content)) != (record.bytes, record.checksum):
            raise ValueError(
                f"{self.path / name}: damaged: its checksum does not fit; remove it, and give the same command again: it is "
                "then made or fetched again"
            )
        return content

    def publish(self, name: str, content: files.Content, rows: int = 0) -> FileRecord:
        """Write one file of the artifact, whole or not at all, and remember it in the journal."""
        self._disown(name)
        written = self._write(name, content)
        record = FileRecord(name, written.bytes, written.checksum, rows)
        self._journal.write(record._asdict())
        self._done[name] = record
        return record

    def _write(self, name: str, content: files.Content) -> files.Written:
        files.make_folder((self.path / name).parent)
        return files.publish(self.path / name, content)

    def forget(self, name: str) -> None:
        """Remove a scratch file that is no part of the result."""
        self._disown(name)
        self._remove(name)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove all other files of the artifact, whether an earlier run came to journal them or not. For rank 0 alone."""
        for name in sorted(set(self._there()) - set(names)):
            self.forget(name)

    def _there(self) -> Iterator[str]:
        """The files that lie in the folder, whole under their final names."""
        paths = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return (path.as_posix() for path in paths if not path.name.startswith(".") and path.name not in (MANIFEST, *UNLISTED))

    def _remove(self, name: str) -> None:
        files.remove(self.path / name)

    def _disown(self, name: str) -> None:
        """Journal that the record of `name` may no longer fit, before the file changes and the process is perhaps killed."""
        if self._done.pop(name, None):
            self._journal.write(FileRecord(name, -1, "", 0)._asdict())

    def finish(self, names: Iterable[str], counts: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        """Write the final manifest. `names` are this rank's files; those of all ranks together, in order of name, make up the
        artifact. `counts` and `provenance` (added to that of the beginning) are taken from rank 0.
        """
        parts = self._runtime.gather_objects([self._done[name] for name in names])
        records = sorted(record for part in parts for record in part)
        assert len({record.name for record in records}) == len(records), "two ranks claim the same file"
        manifest = replace(
            self._begun,
            files=records,
            counts=dict(counts),
            provenance=self._begun.provenance | dict(provenance or {}),
            complete=True,
        )
        self._runtime.on_main(lambda: self._close(manifest))
        self._begun, self.complete = manifest, True

    def _close(self, manifest: Manifest) -> None:
        files.publish(self.path / MANIFEST, manifest.to_json().encode())
        remove_journals(self.path)


@contextmanager
def building(
    path: Path,
    kind: str,
    config: Any,
    runtime: Runtime,
    inputs: Iterable[Artifact] = (),
    provenance: Mapping[str, Any] | None = None,
    builder: Callable[[Path, Manifest, Runtime], Builder] = Builder,
) -> Iterator[Builder]:
    """Build, or go on building, the artifact `path`. `builder.complete` is True where this very command already finished it.
    `builder` makes the builder, for artifacts whose files lie elsewhere.

    Raises ValueError where the folder is in use, holds something else, or was begun with other flags or inputs.
    """
    inputs = list(inputs)
    wanted = Manifest(
        kind=kind,
        config=config_record(config),
        inputs=[artifact.as_input() for artifact in inputs],
        provenance={"package_version": VERSION} | dict(provenance or {}),
    )
    path = Path(path)
    inputs = list(inputs)
    with ExitStack() as held:

        def begin() -> Manifest:
            _check_apart(path, inputs)
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            held.callback(_remove_empty, made)
            held.enter_context(locked(path))
            if runtime.world_size == 1 and not (path / MANIFEST).exists():  # else others may be writing their first file
                held.callback(_withdraw, path)
            return _begin(path, wanted, config, inputs)

        # What was begun reaches all ranks from rank 0: each reading the folder for itself might see more or less of it.
        yield builder(path, runtime.on_main(begin), runtime)


def _check_apart(path: Path, inputs: Iterable[Artifact]) -> None:
    """ValueError where `path` is one of the inputs or lies in the output of a stage, which would then hold files of another."""
    place = path.resolve()
    for artifact in inputs:
        if artifact.path.resolve() == place:
            raise ValueError(f"{path}: is one of the inputs; choose another --out")
    for folder in place.parents:
        if (folder / MANIFEST).is_file():
            raise ValueError(
                f"{path}: lies in {folder}, the output of a stage, which could not be read any more; choose another --out"
            )


def _withdraw(path: Path) -> None:
    """Take the manifest out of a folder in which nothing was written behind it: a start that failed claims nothing."""
    if _is_unclaimed(path):
        with suppress(OSError):
            files.remove(path / MANIFEST)


def _is_unclaimed(path: Path) -> bool:
    """Whether a folder holds an incomplete manifest and no work: any command may begin it anew."""
    found = {p.name for p in path.iterdir() if not p.match(".*.tmp")} - set(UNLISTED)
    return found <= {MANIFEST, files.LOCK} and MANIFEST in found and not Manifest.read(path).complete


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove `folders`, each inside the next, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _begin(path: Path, wanted: Manifest, config: Any, inputs: Sequence[Artifact]) -> Manifest:
    """Write the incomplete manifest into a fresh folder, or check that the one there was begun by the same command.

    Returns the manifest there; where it is incomplete, with the files that earlier runs finished.
    """
    begun = wanted
    files.settle(path)
    if (path / MANIFEST).exists() and not _is_unclaimed(path):
        begun = Manifest.read(path)
        _check_same_command(path, begun, wanted, config, inputs)
    else:
        strangers = [] if (path / MANIFEST).exists() else [p.name for p in path.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise ValueError(
                f"{path}: not empty (it holds {min(strangers)}) and not the output of a stage; choose another --out"
            )
        files.publish(path / MANIFEST, wanted.to_json().encode())
    files.sweep(path)
    if begun.complete:
        remove_journals(path)
        return begun
    return replace(begun, files=read_journals(path))


def _check_same_command(path: Path, begun: Manifest, wanted: Manifest, config: Any, inputs: Sequence[Artifact]) -> None:
    """ValueError naming every flag in which what is asked for now differs from what `path` was begun with, else the first other
    difference.
    """
    if begun.kind != wanted.kind:
        raise ValueError(f"{path}: already holds {begun.kind}; choose another --out for {wanted.kind}")
    if changed := changed_flags(begun.config, config):
        raise ValueError(f"{path}: was made with {'; '.join(changed)} is asked for; choose another --out, or remove the folder")
    if begun.inputs != wanted.inputs:
        given = ", ".join(f"{artifact.path} ({artifact.manifest.kind} {artifact.manifest.hash})" for artifact in inputs)
        held = ", ".join(f"{one.get('kind')} {one.get('hash')}" for one in begun.inputs)
        raise ValueError(
            f"{path}: was made from other inputs ({held}) than those given: {given or 'none'}; choose another --out"
        )
    for name, new in json.loads(json.dumps(wanted.provenance)).items():
        # A finished artifact stays good when the package moves on, and records more than it did; half of one is not continued
        # by other code.
        moved_on = name == "package_version" or name not in begun.provenance
        if begun.provenance.get(name) != new and not (begun.complete and moved_on):
            raise ValueError(
                f"{path}: was begun with {name} {begun.provenance.get(name)!r}, now it is {new!r}; choose another --out, "
                "or remove the folder"
            )


def _check_file(folder: Path, record: FileRecord) -> None:
    _check(folder / record.name, record, files.checksum(folder / record.name))


def _check(path: Path, record: FileRecord, found: files.Written) -> None:
    if found != (record.bytes, record.checksum):
        raise ValueError(
            f"{path}: damaged: expected {record.bytes:,} bytes with checksum {record.checksum}, "
            f"found {found.bytes:,} with {found.checksum}; run its stage again into a fresh folder"
        )
