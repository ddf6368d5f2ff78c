"""The journal of a job of message batches, `.batches.jsonl`: what is about to be sent is on disk before it is sent.

A line an event, each with its checksum (core/lines.py): `job` (its name and a hash of all it asks), `place` (where it is run),
`intent` (the keys of a batch, and the server's newest batches, before its create), `created` (the server's id), `refused` (not
accepted), `not_ours` (a batch that looked like it and is another's).
"""

import secrets
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from core.lines import LineWriter

JOURNAL = ".batches.jsonl"
ADVICE = (
    "nothing was sent; put back a copy of it that is whole, and give the same command again; without it what was sent would be "
    "sent and paid for again"
)


@dataclass
class Sent:
    """One create, whatever became of it."""

    number: int
    keys: list[str]
    before: list[str] | None
    """Newest batches of the server before the create; None where an earlier release did not ask."""
    batch: str = ""
    """The server's id, once known."""
    refused: bool = False
    """The server did not take it."""
    not_ours: set[str] = field(default_factory=set)
    """Batches that looked like it and are others."""

    @property
    def file(self) -> str:
        """Where its results are kept, in the folder of the job."""
        return f"raw/batch-{self.number:05d}.jsonl"

    @property
    def is_open(self) -> bool:
        """Whether it is not known if the server took it."""
        return not self.batch and not self.refused


class Place(NamedTuple):
    """Where a job is run. A folder that was copied has another `file`; one that several machines share has not."""

    file: int
    """Number of the journal's inode."""
    folder: str
    """Hash of the machine's name and the folder's path."""


class Journal:
    """What is known of a job's creates, in memory and on disk; every change is on disk when the method returns.

    ValueError where the folder was begun with another `content`, a hash of the model and all requests, or where the journal is
    damaged.
    """

    def __init__(self, folder: Path, content: str, keys: Collection[str]) -> None:
        self._folder, self._content, self._keys = folder, content, keys
        self.sent: list[Sent] = []
        self._job = ""
        self._places: list[Place] = []
        self._lines = LineWriter(folder / JOURNAL, ADVICE)
        for number, event in enumerate(self._lines.records, 1):
            if not self._take(event):
                raise ValueError(f"{self._lines.path}: line {number} does not follow from those before it; {ADVICE}")
        if not self._job:
            self._job = secrets.token_hex(4)
            self._note("job", job=self._job, content=content)
        if not self._places:
            self.settle_here()

    def _take(self, event: dict[str, Any]) -> bool:
        """Whether an event fits what is known; what it says is known then.

        A second process that no lock kept out may have left a line of its own: it saw the others before it did what the
        line says, and ended (core/lines.py).
        """
        match event:
            case {"event": "job", "job": str(job), "content": str(content)}:
                self._check_content(content)
                self._job = self._job or job
            case {"event": "place", "file": int(file), "folder": str(folder)} if self._job:
                self._places.append(Place(file, folder))
            case {"event": "intent", "number": int(number), "keys": list(keys)} if self._job:
                return self._take_intent(number, keys, event.get("before"))
            case {"event": "created" | "refused" | "not_ours" as kind, "number": int(number)}:
                return self._take_outcome(kind, number, event.get("batch"))
            case _:
                return False
        return True

    def _take_intent(self, number: int, keys: list[str], before: list[str] | None) -> bool:
        if number > len(self.sent) or not keys or not set(keys) <= set(self._keys):
            return False
        if number == len(self.sent):
            self.sent.append(Sent(number, keys, before))
        return True

    def _take_outcome(self, kind: str, number: int, batch: object) -> bool:
        if number not in range(len(self.sent)):
            return False
        sent = self.sent[number]
        if kind == "refused":
            sent.refused = not sent.batch
        elif not isinstance(batch, str) or not batch or (kind == "created" and sent.batch not in ("", batch)):
            return False
        elif kind == "created":
            sent.batch, sent.refused = batch, False
        else:
            sent.not_ours.add(batch)
        return True

    def _check_content(self, found: str) -> None:
        if found != self._content:
            raise ValueError(
                f"{self._folder}: was begun with other requests ({found[:8]}) than these ({self._content[:8]}); "
                "give the flags and the release that it was begun with, or choose another --out"
            )

    def _note(self, event: str, **values: Any) -> None:
        self._lines.write({"event": event} | values)

    def prefix(self, sent: Sent) -> str:
        """What the custom ids of a create's requests begin with, and no other's; their keys follow."""
        return f"{self._job}-{sent.number}-"

    @property
    def is_here(self) -> bool:
        """Whether this is the folder that the job was last run in, and no copy of it."""
        last, here = self._places[-1], self._here()
        return last.file == here.file or last.folder == here.folder

    def settle_here(self) -> None:
        """Note that the job is run in this folder from now on."""
        self._places.append(self._here())
        self._note("place", **self._places[-1]._asdict())

    def _here(self) -> Place:
        place = f"{socket.gethostname()} {self._folder.resolve()}"
        return Place(self._lines.path.stat().st_ino, xxhash.xxh3_64_hexdigest(place.encode()))

    def intent(self, keys: Sequence[str], before: Sequence[str]) -> Sent:
        """Note that `keys` are about to be sent, and which batches the server held `before`, the newest of them at least."""
        sent = Sent(len(self.sent), list(keys), list(before))
        self._note("intent", number=sent.number, before=sent.before, keys=sent.keys)
        self.sent.append(sent)
        return sent

    def created(self, sent: Sent, batch: str) -> None:
        self._note("created", number=sent.number, batch=batch)
        sent.batch = batch

    def refused(self, sent: Sent) -> None:
        self._note("refused", number=sent.number)
        sent.refused = True

    def not_ours(self, sent: Sent, batch: str) -> None:
        self._note("not_ours", number=sent.number, batch=batch)
        sent.not_ours.add(batch)
