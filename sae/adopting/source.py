"""Where a foreign SAE lies: a folder, a file, or a place in a repository of the Hub; and what identifies it."""

import re
from pathlib import Path
from typing import NamedTuple

from core.files import checksum
from llama3.hub import model_name, named_errors
from sae.formats import finding

HUB_ID = r"(?P<repository>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<place>[\w./-]+))?"
CARD = "README.md"


class Source(NamedTuple):
    """An SAE on this disk."""

    path: Path
    name: str
    """A Hub id with its place, or the last part of a path."""
    revision: str | None
    """The commit of a Hub repository."""

    def hashes(self) -> dict[str, str]:
        """Checksum of each file that its layout is made of."""
        if self.path.is_file():
            return {self.path.name: checksum(self.path).checksum}
        names = finding.files_of(self.path)
        return {name: checksum(self.path / name).checksum for name in names}


def locate(source: str) -> Source:
    """The SAE at `source`: a folder or a file, or `owner/name`, `owner/name:place`, `owner/name@revision:place` on the Hub,
    of which only the files of that place are fetched. ValueError lists the places where there are several.
    """
    path = Path(source)
    if path.exists():
        found = re.search(r"/snapshots/([0-9a-f]+)(?:/|$)", path.resolve().as_posix())
        name = model_name(path)
        return Source(path, name, found[1] if found else None)
    match = re.fullmatch(HUB_ID, source)
    if not match:
        raise ValueError(
            f"{source}: no such folder or file; expected one, or a Hub id such as owner/name or owner/name:layers.23"
        )
    return _fetch(match["repository"], match["revision"], match["place"] or "")


def _fetch(repository: str, revision: str | None, place: str) -> Source:
    from huggingface_hub import HfApi, snapshot_download

    with named_errors(repository):
        listed = HfApi().list_repo_files(repository, revision=revision)
    chosen = choose(repository, listed, place)
    wanted = [chosen] if chosen in listed else [f"{chosen}/**" if chosen else "*"]
    parents = Path(chosen).parents if chosen else ()
    beside = [CARD, *(f"{parent.as_posix()}/config.json".removeprefix("./") for parent in parents)]
    with named_errors(repository):
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=[*wanted, *beside]))
    return Source(root / chosen, repository + (f":{chosen}" if chosen else ""), root.name)


def choose(repository: str, listed: list[str], place: str) -> str:
    """The folder or file of `listed` that holds the SAE, within `place`. ValueError where there is none, or are several."""
    inside = [name for name in listed if not place or name == place or name.startswith(f"{place.rstrip('/')}/")]
    if not inside:
        raise ValueError(f"{repository}: holds no {place!r}; it holds {', '.join(listed[:8])}")
    if inside == [place]:
        return place
    found = finding.places(inside)
    if not found:
        raise ValueError(f"{repository}: holds no SAE of a known layout; it holds {', '.join(inside[:8])}")
    if len(found) > 1:
        raise ValueError(f"{repository}: holds {len(found)} SAEs; give one of them as {repository}:PLACE: {', '.join(found)}")
    return found[0]
