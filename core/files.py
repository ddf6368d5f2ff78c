"""The one place where finished work reaches the disk.

Every operation that publishes a file passes through `_do`, so that a test can fail or kill the process at the N-th one, and
full disks read alike everywhere.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import xxhash

log = logging.getLogger("files")

T = TypeVar("T")

Content = bytes | Iterable[bytes | memoryview]
"""What a file shall hold, in one piece or in several; of memoryviews those of bytes."""

READ_BYTES = 2**18  # a block that stays in the processor's cache between reading and hashing
LOCK = ".lock"


def _nothing(operation: str, path: Path) -> None:
    pass


before_operation: Callable[[str, Path], None] = _nothing
"""Called before each operation with its name and path; tests replace it to inject faults."""


class Written(NamedTuple):
    """What was written: size in bytes, and xxh3-128 of the content in hexadecimal."""

    bytes: int
    checksum: str


def publish(path: Path, content: Content) -> Written:
    """Make `path` hold `content`, whole or not at all: temporary name in the same folder, fsync, rename, fsync of the folder.

    Raises OSError naming the path; where the disk is full also the bytes needed so far and the bytes free.
    """
    # A name of its own for each attempt: a rank of a dying job may still be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    digest, size = xxhash.xxh3_128(), 0
    try:
        with _do("open", temporary, lambda: temporary.open("wb")) as file:
            for piece in (content,) if isinstance(content, bytes) else content:
                size += len(piece)
                digest.update(piece)
                _do("write", temporary, partial(file.write, piece))
            _do("flush", temporary, file.flush)
            _do("fsync", temporary, lambda: os.fsync(file.fileno()))
        _do("rename", path, lambda: temporary.replace(path))
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what cannot be removed now, `sweep` removes when the folder is next built
            remove(temporary)
        if isinstance(error, OSError):
            raise _explained(error, path, size) from error
        raise
    return Written(size, digest.hexdigest())


def replace(path: Path, content: Content) -> Written:
    """`publish`, for a file outside an artifact with one writer at a time: what killed ones left beside it goes first."""
    sweep(path.parent, f".{path.name}.*.tmp")
    return publish(path, content)


def append(path: Path, text: bytes, end: int, torn: int = 0) -> int:
    """Append `text` to a file of `end` bytes and fsync it; returns where it ends then. The `torn` bytes behind `end`, which a
    crash left, are cut off first; a last line without its line break gets it.

    Raises ValueError where the file does not hold what its writer knows, before or after: another process writes to it.
    """
    try:
        is_new = not path.exists()
        with _do("open", path, lambda: path.open("a+b", buffering=0)) as file:
            _check_alone(path, os.fstat(file.fileno()).st_size in (end, end + torn))
            if torn:
                _do("truncate", path, lambda: file.truncate(end))
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                text = b"\n" + text
            try:
                _do("write", path, lambda: _write_all(file.fileno(), text))
                _do("fsync", path, lambda: os.fsync(file.fileno()))
            except OSError:
                with contextlib.suppress(OSError):  # else the next reader cuts it off
                    file.truncate(end)
                raise
        if is_new:
            sync_folder(path.parent)
        with path.open("rb") as file:  # opened anew, so that what another machine wrote is seen
            file.seek(end)
            _check_alone(path, file.read(len(text) + 1) == text)
    except OSError as error:
        raise _explained(error, path, len(text)) from error
    return end + len(text)


def _write_all(descriptor: int, text: bytes) -> None:
    while text:
        text = text[os.write(descriptor, text) :]


def _check_alone(path: Path, alone: bool) -> None:
    if not alone:
        raise ValueError(
            f"{path}: another process writes to this file, perhaps on another machine; end it, then give the same command again"
        )


def make_folder(path: Path) -> None:
    """Create `path` with its parents, so that they outlive a power cut. ValueError where a file or a dead link is there."""
    missing = []
    while not path.exists():
        if path.is_symlink():
            raise ValueError(f"{path}: is a link to {path.readlink()}, where nothing is; choose another --out")
        missing.append(path)
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"{path}: a file lies where a folder is needed; choose another --out")
    for folder in reversed(missing):
        try:
            _do("mkdir", folder, partial(folder.mkdir, exist_ok=True))
            sync_folder(folder.parent)
        except OSError as error:
            raise _explained(error, folder, 0) from error


def settle(folder: Path) -> None:
    """Sync the names of `folder` and of the folders in it: a process that was killed may have made some and not have come to
    that, and whoever finds them takes them for done.
    """
    above = [folder.parent] if os.access(folder.parent, os.R_OK) else []
    for one in (*above, folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(one)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlive a power cut."""
    _do("fsync_folder", folder, partial(_sync_folder, folder))


def remove(path: Path) -> None:
    _do("unlink", path, lambda: path.unlink(missing_ok=True))


def sweep(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove the temporaries that killed processes left in `folder` and below."""
    for stray in folder.glob(pattern):
        remove(stray)


def checksum(path: Path, start: int = 0, out: memoryview | None = None) -> Written:
    """Size and xxh3-128 of a file. Its bytes from `start` on are copied into `out` on the way, in the same pass."""
    digest, size = xxhash.xxh3_128(), 0
    out = memoryview(b"") if out is None else out
    spare = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while True:
            if size < start:
                block = spare[: start - size]
            elif size < start + len(out):
                block = out[size - start :][:READ_BYTES]
            else:
                block = spare
            n = file.readinto(block)
            if not n:
                return Written(size, digest.hexdigest())
            digest.update(block[:n])
            size += n


def read_at(path: Path, start: int, out: memoryview) -> None:
    """Fill `out` with the bytes of a file from `start` on. ValueError where the file ends before."""
    at = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while at < len(out):
            n = os.preadv(descriptor, [out[at:]], start + at)
            if n == 0:
                raise ValueError(f"{path}: ends {len(out) - at:,} bytes before what is asked for; the file is damaged")
            at += n
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`, made where it is missing. The kernel drops it when the process dies, so it is never stale.

    Raises ValueError naming the host and process that hold it; with `wait`, waits for them instead.
    """
    make_folder(folder)
    lock = folder / LOCK
    descriptor = _take(lock, wait)
    try:
        _do("write", lock, lambda: _sign(descriptor))
        yield
    finally:
        try:
            if _names(lock, descriptor):
                remove(lock)
        finally:
            os.close(descriptor)


def _take(lock: Path, wait: bool) -> int:
    """A descriptor that holds the exclusive lock on the file which `lock` names now."""
    while True:
        descriptor = _do("open", lock, lambda: os.open(lock, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            _lock(lock, descriptor, wait)
            if _names(lock, descriptor):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"{lock.parent}: another job is writing here ({holder}); wait for it or choose another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, f"{lock.parent}: this file system cannot lock files ({error.strerror})") from error
        os.close(descriptor)  # the holder before us removed the file between our open and our lock


def _lock(lock: Path, descriptor: int, wait: bool) -> None:
    """BlockingIOError where another process has the lock and we do not `wait`."""
    try:
        _do("lock", lock, partial(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        if not wait:
            raise
        log.info("%s: waiting for another process (%s)", lock.parent, _holder(descriptor))
        _do("lock", lock, partial(fcntl.flock, descriptor, fcntl.LOCK_EX))


def _holder(descriptor: int) -> str:
    return os.read(descriptor, 200).decode(errors="replace").strip() or "it has not said which"


def _names(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}".encode())


def _do(operation: str, path: Path, act: Callable[[], T]) -> T:
    before_operation(operation, path)
    return act()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path, size: int) -> OSError:
    """The same error with the path in its text, and with what to do where room is short."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        text = f"disk full: writing {path} needs at least {size:,} bytes, {free:,} are free there"
        return OSError(error.errno, f"{text}; free some space and give the same command again")
    if error.errno == errno.EFBIG:
        text = f"file too large: {path} needs at least {size:,} bytes, more than this process may write into one file"
        return OSError(error.errno, f"{text}; raise `ulimit -f` and give the same command again")
    return OSError(error.errno, f"cannot write {path}: {error.strerror or error}")
