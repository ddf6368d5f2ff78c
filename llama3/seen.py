"""What checkpoints held when they were first read: a weight file that changed since is named at once.

A bit that flips on a disk leaves numbers that are finite and a model that runs; nothing else would notice before an SAE is
found not to belong to it. So size, time and hash of every file are kept in `checkpoints/` of the cache folder, one small file
for each place. LLAMA3_SAE_SEEN names another folder; empty, it keeps nothing. Files of the Hub and of Ollama are named by their
SHA-256, with which they are compared when they are first read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import xxhash

from core import files
from llama3.smollm2 import cache_folder

FOLDER = "LLAMA3_SAE_SEEN"

log = logging.getLogger("llama3")


def check_seen(weight_files: Sequence[Path], hashes: Sequence[str]) -> None:
    """Compare files with what they held before, and note it where they are new. `hashes` are of the bytes up to the end of each
    file, so that the first which differs is of the file that changed.

    ValueError naming a file that holds something else than its name says, or than it did, while its size and time are as they
    were: nobody wrote to it, so the storage is damaged. Where somebody did, a warning.
    """
    place = _place(weight_files[0])
    if place is None:
        return
    seen = _read(place)
    found = {file.name: _state(file) | {"hash": digest} for file, digest in zip(weight_files, hashes, strict=True)}
    for file in weight_files:
        now, before = found[file.name], seen.get(file.name)
        untouched = before is not None and all(before.get(key) == now[key] for key in ("bytes", "mtime_ns"))
        if before is None or not untouched:
            _check_name(file)
        if before is None or before.get("hash") == now["hash"]:
            continue
        if untouched:
            raise ValueError(
                f"{file}: damaged: it holds something else than when it was first read here ({before.get('read')}), though its "
                "size and time of change are as they were; download or copy it again. Is it meant to be new, `touch` it"
            )
        log.warning("%s changed since it was first read here (%s): it is another model now", file, before.get("read"))
        break  # the hashes of all files behind it differ too
    for name, state in found.items():
        same = seen.get(name, {}).get("hash") == state["hash"]
        state["read"] = seen[name].get("read") if same else date.today().isoformat()
    if found != seen:
        with contextlib.suppress(OSError, ValueError):  # a cache that cannot be written keeps nothing
            files.make_folder(place.parent)
            files.replace(place, json.dumps(found, indent=1).encode() + b"\n")


def _place(file: Path) -> Path | None:
    """Where is kept what the checkpoint of `file` held; None where nothing shall be."""
    chosen = os.environ.get(FOLDER)
    if chosen == "":
        return None
    folder = Path(chosen) if chosen else cache_folder() / "checkpoints"
    return folder / f"{xxhash.xxh3_64_hexdigest(os.fsencode(file.absolute()))}.json"


def _read(place: Path) -> dict[str, dict[str, Any]]:
    """What was kept; nothing where that cannot be read."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: state for name, state in found.items() if isinstance(state, dict)} if isinstance(found, dict) else {}


def _state(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _check_name(file: Path) -> None:
    """ValueError where a file is kept under its SHA-256, as the Hub's cache and Ollama do, and has another one."""
    blob = file.resolve()
    named = re.fullmatch(r"(?:sha256-)?([0-9a-f]{64})", blob.name)
    if blob.parent.name != "blobs" or named is None:
        return
    log.info("comparing %s with its SHA-256, once", file.name)
    with blob.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != named[1]:
        raise ValueError(f"{file}: damaged: its SHA-256 is {found}, its name in the cache says {named[1]}; download it again")
