"""SAEs on the Hugging Face Hub: of a repository only the files of one SAE are fetched."""

import re
from collections.abc import Sequence
from pathlib import Path

from llama3.hub import REPOSITORY, fetch, file_names
from sae.formats.finding import FOLDERS, SUFFIXES

ON_THE_HUB = re.compile(rf"({REPOSITORY.pattern})(?:[/:](.+?))?/?")
"""A repository, and a folder or file in it."""
N_LISTED = 12


def locate(source: str | Path) -> Path:
    """The folder or file at `source`, fetched where that is a Hub id: `owner/name`, with the SAE's place behind it where there
    are several, `owner/name/layers.10` or `owner/name:layers.10`. ValueError lists the SAEs of a repository that holds several.
    """
    path = Path(source)
    return path if path.exists() or not ON_THE_HUB.fullmatch(str(source)) else fetched(str(source))


def parted(address: str) -> tuple[str, str]:
    """The repository of a Hub id and the place in it, empty where none is named. ValueError where it is no Hub id."""
    found = ON_THE_HUB.fullmatch(address)
    if not found:
        raise ValueError(f"{address}: expected a Hub id, owner/name or owner/name:folder")
    return found[1], found[2] or ""


def fetched(address: str) -> Path:
    """Where the SAE of a Hub id lies once it is fetched; without a place, the repository's only one. ValueError as `locate`."""
    repository, place = parted(address)
    names = file_names(repository)
    if not place:
        place = _only(repository, names)
    # What describes a run lies above its SAEs (sparsify).
    above = f"{place.rpartition('/')[0]}/config.json".lstrip("/")
    wanted = [name for name in names if name in (place, above) or name.startswith(f"{place}/")]
    if place == ".":
        wanted = [name for name in names if "/" not in name or name.startswith("checkpoints/")]
    if not set(wanted) - {above}:
        known = _listed(repository, held(names)) or "no SAE of a known layout"
        raise ValueError(f"{repository}: holds no {place}; it holds {known}")
    return fetch(repository, wanted) / place


def _only(repository: str, names: Sequence[str]) -> str:
    places = held(names)
    if not places:
        some = ", ".join(names[:8]) or "nothing"
        raise ValueError(f"{repository}: holds no SAE of a known layout. It holds {some}")
    if len(places) > 1:
        raise ValueError(f"{repository}: holds {len(places)} SAEs; give one of {_listed(repository, places)}")
    return places[0]


def held(names: Sequence[str]) -> list[str]:
    """The folders, and files that are a whole SAE, among the files of a repository; "." is its top."""
    known, found = set(names), dict[str, None]()
    for layout in FOLDERS:
        first, *others = layout.files
        for name in names:
            if name == first or name.endswith(f"/{first}"):
                folder = name.removesuffix(first)
                if all(f"{folder}{other}" in known for other in others):
                    found[folder.rstrip("/") or "."] = None
    inside = [name for name in names if name.endswith(SUFFIXES)]
    return list(found) or inside


def _listed(repository: str, places: Sequence[str]) -> str:
    more = f" and {len(places) - N_LISTED} more" if len(places) > N_LISTED else ""
    return ", ".join(f"{repository}/{place}" for place in places[:N_LISTED]) + more
