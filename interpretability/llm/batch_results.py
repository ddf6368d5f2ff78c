"""Results of message batches: whether a download is whole, and what each line of it says.

The API gives one JSON line a request, in any order; connections end early, and lines come twice. A download is taken only where
it holds each request of its batch once, in the numbers that the server announced.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from anthropic.types.messages import MessageBatch

from interpretability.llm.client import Reply, writable

FOR_GOOD = ("invalid_request_error", "request_too_large", "authentication_error", "permission_error", "not_found_error")
"""Errors of a single request that asking again does not mend."""


class Outcome(NamedTuple):
    """How one request ended in one batch."""

    kind: str
    """succeeded, errored, expired or canceled."""
    reason: str
    again: bool
    """Whether it is worth sending again."""
    input_tokens: int = 0
    output_tokens: int = 0


def counts_of(batch: MessageBatch) -> dict[str, int]:
    """Requests of a batch by how they stand, without those kinds of which there are none."""
    counts = batch.request_counts
    found = {kind: getattr(counts, kind) for kind in ("processing", "succeeded", "errored", "expired", "canceled")}
    return {kind: n for kind, n in found.items() if n}


def first_id(content: bytes) -> str:
    """The first custom id in a download, whole or not; empty where it was cut off before that."""
    for line in content.splitlines():
        try:
            return str(json.loads(line)["custom_id"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return ""


def checked(content: bytes, wanted: set[str], counts: Mapping[str, int]) -> tuple[list[bytes], str]:
    """The lines of a download, each once, and what is wrong with them: they must be those `wanted`, in such `counts`."""
    found: dict[str, tuple[bytes, dict[str, Any]]] = {}
    for number, line in enumerate(filter(None, content.split(b"\n")), 1):
        try:
            value = json.loads(line)
            key, kind = value["custom_id"], value["result"]["type"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return [], f"line {number} is damaged or cut off"
        if key not in wanted or kind not in counts:
            return [], f"line {number} is of a request ({key!r}, {kind!r}) that this batch does not hold"
        if found.setdefault(key, (line, value))[1] != value:
            return [], f"{key} has two different results"
    if len(found) < len(wanted):
        return [], f"{len(found):,} of {len(wanted):,} results arrived"
    kinds = Counter(value["result"]["type"] for _, value in found.values())
    if kinds != dict(counts):
        return [], f"found {dict(kinds)}, but the server announced {dict(counts)}"
    return [line for line, _ in found.values()], ""


def read_results(content: bytes, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and result of each line of a download that was checked; `prefix` is what the custom ids have before the key."""
    for line in filter(None, content.split(b"\n")):
        found = json.loads(line)
        yield found["custom_id"].removeprefix(prefix), found["result"]


def outcome_of(result: Mapping[str, Any]) -> Outcome:
    kind = result["type"]
    if kind == "succeeded":
        usage = result["message"].get("usage") or {}
        read = sum(usage.get(f"{name}input_tokens") or 0 for name in ("", "cache_creation_", "cache_read_"))
        return Outcome(kind, "", False, read, usage.get("output_tokens") or 0)
    reason = _problem(result)
    return Outcome(kind, reason, not any(name in reason for name in FOR_GOOD))


def reply_of(key: str, result: Mapping[str, Any]) -> Reply:
    if result["type"] != "succeeded":
        return Reply(key, "", _problem(result))
    message = result["message"]
    text = "".join(str(block.get("text", "")) for block in message.get("content") or [] if block.get("type") == "text")
    stop = message.get("stop_reason")
    problem = {"max_tokens": "cut off at --max-tokens", "refusal": "the model refused to answer"}.get(stop, "")
    return Reply(key, writable(text), problem)


def _problem(result: Mapping[str, Any]) -> str:
    """Why a request has no answer."""
    if result["type"] != "errored":
        return f"{result['type']}, as often as it was sent"
    error: Any = result.get("error") or {}
    error = error.get("error") or error
    return f"{error.get('type', 'unknown error')}: {error.get('message', '')}"
