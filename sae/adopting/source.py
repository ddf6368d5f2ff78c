"""What identifies a foreign SAE."""

import re
from pathlib import Path
from typing import NamedTuple

from core.files import checksum
from llama3.hub import model_name
from sae.formats import hub


class Source(NamedTuple):
    """An SAE on this disk."""

    path: Path
    name: str
    """A Hub id with the place in the repository, or the last part of a path."""
    revision: str | None
    """The commit of a Hub repository."""

    def hashes(self) -> dict[str, str]:
        """The xxh3-128 of the file, or of each file of the folder."""
        if self.path.is_file():
            return {self.path.name: checksum(self.path).checksum}
        names = sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())
        return {name: checksum(self.path / name).checksum for name in names}


def locate(source: str) -> Source:
    """The SAE at `source`, a folder, a file, or a Hub id as sae.formats.hub has it."""
    path = hub.locate(source)
    cached = re.search(r"/snapshots/([0-9a-f]{7,64})(?:/(.*))?$", path.absolute().as_posix())
    name = model_name(path)
    if cached and cached[2]:
        name += f":{cached[2]}"
    return Source(path, name, cached[1] if cached else None)
