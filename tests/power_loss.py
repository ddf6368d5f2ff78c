"""What a disk may hold after a power cut at any file operation, by what core/files.py had synced until then.

As LevelDB's fault injection test does it: the hook before each operation keeps book of what was synced. What was not may be
lost (names as they were when the folder was last synced) or torn (names as they are, contents cut short or full of zeros).
"""

import threading
from collections.abc import Callable
from pathlib import Path

from core import files

Tree = dict[str, bytes]
"""Relative path: content."""


class PowerLoss:
    """A `files.before_operation` for everything below `root`. `states` are the trees that a power cut may leave, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced: dict[int, bytes] = {}  # contents, by number of the file
        self._now: dict[Path, int] = {}  # names
        self._folders: dict[Path, dict[Path, int]] = {}  # the names in each folder when it was synced
        self._made: set[Path] = set()  # folders whose own name is not synced
        self._asked: dict[int, tuple[str, Path]] = {}  # by thread: the operation that has ended once it asks again
        self._lock = threading.Lock()
        self.states: dict[tuple[tuple[str, bytes], ...], Tree] = {}

    def __call__(self, operation: str, path: Path) -> None:
        with self._lock:
            if (done := self._asked.pop(threading.get_ident(), None)) is not None:
                self._settle(*done)
            for tree in self.trees():
                self.states.setdefault(tuple(sorted(tree.items())), tree)
            self._asked[threading.get_ident()] = operation, path

    def forget(self) -> None:
        """The operation that this thread asked for does not happen."""
        self._asked.pop(threading.get_ident())

    def _settle(self, operation: str, path: Path) -> None:
        if path.name == files.LOCK or self._root not in (path, *path.parents):
            return
        if operation == "open" and path not in self._now:
            self._now[path] = len(self._synced)
            self._synced[self._now[path]] = b""
        elif operation == "fsync":
            self._synced[self._now[path]] = path.read_bytes()
        elif operation == "rename":
            pattern = f".{path.name}.*.tmp"
            *_, source = (name for name in self._now if name.parent == path.parent and name.match(pattern))  # the newest
            self._now[path] = self._now.pop(source)
        elif operation == "unlink":
            self._now.pop(path, None)
        elif operation == "mkdir" and path != self._root:
            self._made.add(path)
        elif operation == "fsync_folder":
            self._made = {folder for folder in self._made if folder.parent != path}
            self._folders[path] = {name: number for name, number in self._now.items() if name.parent == path}

    def end(self) -> list[Tree]:
        """What a power cut may leave once the last operation has ended."""
        self("end", self._root)
        self.forget()
        return self.trees()

    def trees(self) -> list[Tree]:
        """Nothing that was not synced; and all names, with what was not synced missing, cut in half, or zeros."""
        lost = {name: number for names in self._folders.values() for name, number in names.items()}
        lost = {name: number for name, number in lost.items() if self._made.isdisjoint(name.parents)}
        return [
            self._tree(lost, lambda synced, whole: synced),
            self._tree(self._now, lambda synced, whole: synced),
            self._tree(self._now, lambda synced, whole: whole[: (len(synced) + len(whole)) // 2]),
            self._tree(self._now, lambda synced, whole: synced[: len(whole)] + bytes(max(0, len(whole) - len(synced)))),
        ]

    def _tree(self, names: dict[Path, int], content: Callable[[bytes, bytes], bytes]) -> Tree:
        tree = {}
        for name, number in names.items():
            synced = self._synced[number]
            whole = name.read_bytes() if self._now.get(name) == number and name.is_file() else synced
            tree[name.relative_to(self._root).as_posix()] = synced if whole == synced else content(synced, whole)
        return tree


def lay_out(tree: Tree, folder: Path) -> Path:
    """Write a tree below `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
