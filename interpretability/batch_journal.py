"""The journal of a job of message batches, `.batches.jsonl`: what is about to be sent is on disk before it is sent.

A line an event: `job` (its name and a hash of all it asks), `intent` (the keys of a batch, before its create), `created` (the
server's id), `refused` (not accepted), `not_ours` (a batch that looked like it and is another's).
"""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.files import append_line

JOURNAL = ".batches.jsonl"


@dataclass
class Sent:
    """One create, whatever became of it."""

    number: int
    keys: list[str]
    time: float
    """Seconds since 1970, before the create."""
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


class Journal:
    """What is known of a job's creates, in memory and on disk; every change is on disk when the method returns.

    ValueError where the folder was begun with another `content`, a hash of the model and all requests.
    """

    def __init__(self, folder: Path, content: str) -> None:
        self._path = folder / JOURNAL
        self.sent: list[Sent] = []
        self._job = ""
        self._read(folder, content)
        if not self._job:
            self._job = secrets.token_hex(4)
            self._note("job", job=self._job, content=content)

    def _read(self, folder: Path, content: str) -> None:
        for event in _events(self._path.read_text(encoding="utf-8") if self._path.exists() else ""):
            match event:
                case {"event": "job", "job": job, "content": found}:
                    if found != content:
                        raise ValueError(
                            f"{folder}: was begun with other requests ({found[:8]}) than these ({content[:8]}); "
                            "give the flags and the release that it was begun with, or choose another --out"
                        )
                    self._job = job
                case {"event": "intent", "number": number, "keys": keys, "time": when}:
                    assert number == len(self.sent), "intents are numbered from 0"
                    self.sent.append(Sent(number, keys, when))
                case {"event": "created", "number": number, "batch": batch}:
                    self.sent[number].batch = batch
                case {"event": "refused", "number": number}:
                    self.sent[number].refused = True
                case {"event": "not_ours", "number": number, "batch": batch}:
                    self.sent[number].not_ours.add(batch)

    def _note(self, event: str, **values: Any) -> None:
        append_line(self._path, json.dumps({"event": event} | values))

    def prefix(self, sent: Sent) -> str:
        """What the custom ids of a create's requests begin with, and no other's; their keys follow."""
        return f"{self._job}-{sent.number}-"

    def intent(self, keys: Sequence[str]) -> Sent:
        """Note that `keys` are about to be sent."""
        sent = Sent(len(self.sent), list(keys), time.time())
        self._note("intent", number=sent.number, time=sent.time, keys=sent.keys)
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


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the line being written when the process died
