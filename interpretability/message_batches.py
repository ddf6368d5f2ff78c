"""Anthropic's Message Batches: half the price, answers within a day, and no request paid for twice.

The API has no idempotency key, so that a create that is cut off may or may not have been accepted. Hence a journal,
`.batches.jsonl`: the intent to create a batch, with the keys of its requests, is on disk before the create goes out, which the
SDK does not repeat. An intent without an outcome is looked for in the server's list of batches. What tells ours from others is
the ids of its requests, `JOB-NUMBER-KEY`, which the results show once the batch has ended; until then its requests count as
under way.

Results are kept as they came, in `raw/`. Expired, cancelled and overloaded requests go into a batch again; invalid ones do not.
Limits of the API (100,000 requests and 256 MB a batch, ids of 64 characters, results for 29 days): platform.claude.com, "Batch
processing", read 2026-11.
"""

import json
import logging
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anthropic
import httpx2
import xxhash
from anthropic.types.messages import MessageBatch

from core.artifact import Builder
from core.files import append_line
from interpretability.asking import AskConfig, Estimate, Price, Reply, Request, confirm, redacted, writable

NAME = "anthropic"
DEFAULT_MODEL = "claude-haiku-5-5"
LIST_PRICES = {
    "claude-haiku-5-5": Price(0.10, 0.50),
    "claude-haiku-4-5": Price(1.0, 5.0),
    "claude-sonnet-5-5": Price(2.0, 10.0),
    "claude-opus-5-5": Price(4.0, 20.0),
}
"""platform.claude.com, models overview, read 2026-11; haiku-5-5: of prompts up to 100,000 tokens, which ours are."""
BATCH_SHARE = 0.5
"""What a request in a batch costs of the list price."""
MAX_BATCH_BYTES = 230_000_000
"""90 % of the API's 256 MB."""
COUNTED_REQUESTS = 8
JOURNAL = ".batches.jsonl"
CLOCK_SKEW_S = 600.0
DOWNLOADS = 20
WARN_AFTER_DAYS = 20
KEPT_DAYS = 29
READ_RETRIES = 8
"""How often the SDK repeats what may be repeated: everything but a create."""
FOR_GOOD = ("invalid_request_error", "request_too_large", "authentication_error", "permission_error", "not_found_error")
"""Errors of a single request that asking again does not mend."""
UNDECIDED = (anthropic.InternalServerError, anthropic.ConflictError, anthropic.RequestTimeoutError)
"""Answers after which a create may have been accepted all the same."""
PASSING = (anthropic.APIConnectionError, anthropic.RateLimitError, *UNDECIDED)

log = logging.getLogger("interpretability.message_batches")


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
        return f"raw/batch-{self.number:05d}.jsonl"


class Outcome(NamedTuple):
    """How one request ended in one batch."""

    kind: str
    """succeeded, errored, expired or canceled."""
    reason: str
    again: bool
    """Whether it is worth sending again."""
    input_tokens: int = 0
    output_tokens: int = 0


class BatchJob:
    """All requests of one folder. What it knows lies in the folder; a new object goes on where the last was killed."""

    name = NAME

    def __init__(
        self,
        builder: Builder,
        config: AskConfig,
        requests: Sequence[Request],
        client: anthropic.Anthropic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.model = config.model or DEFAULT_MODEL
        self._builder, self._config, self._client, self._sleep = builder, config, client, sleep
        self._requests = {request.key: request for request in requests}
        assert len(self._requests) == len(requests), "keys are unique"
        self._key = client.api_key or ""
        self._journal = builder.path / JOURNAL
        self._sent: list[Sent] = []
        self._outcomes: dict[str, list[Outcome]] = {key: [] for key in self._requests}
        self._job = ""
        self._ratio = 0.0  # tokens a byte, once counted
        self._confirmed = False
        self._read_journal()
        for sent in self._sent:
            if builder.has(sent.file):
                self._count_in(sent)

    # --- what is known -------------------------------------------------------------------------------------------------

    def _read_journal(self) -> None:
        content = xxhash.xxh3_128_hexdigest(json.dumps([self.model, *self._requests.values()]).encode())
        for event in _events(self._journal.read_text(encoding="utf-8") if self._journal.exists() else ""):
            match event:
                case {"event": "job", "job": job, "content": found}:
                    if found != content:
                        raise ValueError(
                            f"{self._builder.path}: was begun with other requests ({found[:8]}) than these ({content[:8]}); "
                            "give the flags and the release that it was begun with, or choose another --out"
                        )
                    self._job = job
                case {"event": "intent", "number": number, "keys": keys, "time": when}:
                    assert number == len(self._sent), "intents are numbered from 0"
                    self._sent.append(Sent(number, keys, when))
                case {"event": "created", "number": number, "batch": batch}:
                    self._sent[number].batch = batch
                case {"event": "refused", "number": number}:
                    self._sent[number].refused = True
                case {"event": "not_ours", "number": number, "batch": batch}:
                    self._sent[number].not_ours.add(batch)
        if not self._job:
            self._job = secrets.token_hex(4)
            self._note("job", job=self._job, content=content)

    def _note(self, event: str, **values: Any) -> None:
        append_line(self._journal, json.dumps({"event": event} | values))

    @property
    def under_way(self) -> list[Sent]:
        """Batches that were sent, or may have been, and whose results are not here."""
        return [sent for sent in self._sent if not sent.refused and not self._builder.has(sent.file)]

    def to_send(self) -> list[str]:
        """Keys of the requests that were never answered, are not under way, and have attempts left."""
        flying = {key for sent in self.under_way for key in sent.keys}
        return [key for key, found in self._outcomes.items() if key not in flying and self._wants_another(found)]

    def _wants_another(self, found: Sequence[Outcome]) -> bool:
        return not found or (found[-1].again and len(found) < self._config.attempts)

    @property
    def price(self) -> Price:
        """What a batch costs; ValueError where that is not known."""
        listed = LIST_PRICES.get(self.model)
        price_in = self._config.price_in if self._config.price_in >= 0 else listed and listed.input
        price_out = self._config.price_out if self._config.price_out >= 0 else listed and listed.output
        if price_in is None or price_out is None:
            raise ValueError(
                f"--model {self.model}: its price is not known here; give --price-in and --price-out, dollars per million "
                f"tokens, or one of {', '.join(LIST_PRICES)}"
            )
        return Price(BATCH_SHARE * price_in, BATCH_SHARE * price_out)

    def estimate(self, keys: Sequence[str]) -> Estimate:
        """Cost of sending `keys`, from the tokens that the server counts in a few of them (counting is free)."""
        every = list(self._requests.values())
        if not self._ratio:
            sample = every[:: -(-len(every) // COUNTED_REQUESTS)]
            self._ratio = max(self._tokens(request) / request.bytes for request in sample)
        tokens = round(sum(self._requests[key].bytes for key in keys) * self._ratio)
        output = len(keys) * self._config.max_tokens
        return Estimate(len(keys), tokens, output, self.price.of(tokens, output), "by the server's count of a few")

    def _tokens(self, request: Request) -> int:
        content: Any = [{"role": "user", "content": request.user}]
        return self._client.messages.count_tokens(model=self.model, system=request.system, messages=content).input_tokens

    def spent(self) -> float:
        """Dollars for the results that are here."""
        every = [outcome for found in self._outcomes.values() for outcome in found]
        return self.price.of(sum(o.input_tokens for o in every), sum(o.output_tokens for o in every))

    def committed(self) -> float:
        """`spent`, and what the batches under way cost at worst."""
        keys = [key for sent in self.under_way for key in sent.keys]
        return self.spent() + (self.estimate(keys).dollars if keys else 0.0)

    def status(self) -> Iterator[str]:
        """A line a batch, and one for all requests."""
        for sent in self._sent:
            with self._told():
                state = self._state(sent)
            yield f"batch {sent.number}: {len(sent.keys):,} requests, {state}"
        ends = Counter(found[-1].kind for found in self._outcomes.values() if found)
        told = ", ".join(f"{n:,} {kind}" for kind, n in sorted(ends.items())) or "none answered"
        yield f"{len(self._requests):,} requests: {told}; {len(self.to_send()):,} to send; ${self.spent():,.2f} spent"

    def _state(self, sent: Sent) -> str:
        if sent.refused:
            return "not accepted"
        if self._builder.has(sent.file):
            return f"{sent.batch} collected"
        if not sent.batch:
            return "cut off while it was created; looked for among the server's batches"
        batch = self._client.messages.batches.retrieve(sent.batch)
        age = (time.time() - batch.created_at.timestamp()) / 86400
        warning = f"; {age:.0f} days old, results go after {KEPT_DAYS}: collect now" if age > WARN_AFTER_DAYS else ""
        return f"{sent.batch} {batch.processing_status}{warning}"

    # --- sending -------------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Send all that is to be sent, after showing what it costs. ValueError where that is refused."""
        with self._told():
            self._settle()
            if keys := self.to_send():
                confirm(self._config, self.estimate(keys), self.committed(), self._confirmed)
                self._confirmed = True
            pause = 1.0
            while keys := self.to_send():
                wait = self._create(self._group(keys))
                if wait is None:
                    pause = 1.0
                else:
                    self._sleep(max(wait, pause * random.uniform(0.5, 1.0)))
                    pause = min(2 * pause, 60.0)

    def _settle(self) -> None:
        """Look for the batches whose creation was cut off."""
        for sent in self._sent:
            if not sent.refused and not sent.batch:
                self._sleep(max(0.0, min(self._config.settle_s, sent.time + self._config.settle_s - time.time())))
                self._find(sent)

    def _group(self, keys: Sequence[str]) -> list[str]:
        """The first of `keys` that make up one batch."""
        size = 0
        group: list[str] = []
        for key in keys[: self._config.batch_requests]:
            size += len(json.dumps(self._params(key))) + 200
            if group and size > MAX_BATCH_BYTES:
                break
            group.append(key)
        return group

    def _params(self, key: str) -> dict[str, Any]:
        request = self._requests[key]
        messages = [{"role": "user", "content": request.user}]
        return {"model": self.model, "max_tokens": self._config.max_tokens, "system": request.system, "messages": messages}

    def _create(self, keys: list[str]) -> float | None:
        """Create one batch; where the server did not take it, the seconds that it asks to wait.

        ValueError where it will never take it.
        """
        sent = Sent(len(self._sent), keys, time.time())
        body: Any = [{"custom_id": f"{self._job}-{sent.number}-{key}", "params": self._params(key)} for key in keys]
        assert all(len(item["custom_id"]) <= 64 for item in body)
        self._note("intent", number=sent.number, time=sent.time, keys=keys)
        self._sent.append(sent)
        try:
            batch = self._client.with_options(max_retries=0).messages.batches.create(requests=body)
        except anthropic.RateLimitError as error:
            self._refuse(sent)
            return _seconds(error.response.headers.get("retry-after"))
        except (anthropic.APIConnectionError, *UNDECIDED) as error:
            log.warning("creating a batch: %s; looking whether it was accepted", redacted(error, self._key)[:200])
            if answered := not isinstance(error, anthropic.APIConnectionError):
                self._find(sent, answered)
            else:  # the server may still be at it
                self._sleep(self._config.settle_s)
                self._find(sent)
            return 0.0 if sent.refused else None
        except anthropic.APIStatusError:
            self._refuse(sent)
            raise
        self._created(sent, batch.id)
        return None

    def _created(self, sent: Sent, batch: str) -> None:
        self._note("created", number=sent.number, batch=batch)
        sent.batch = batch
        log.info("batch %d: %s, %s requests", sent.number, batch, f"{len(sent.keys):,}")

    def _refuse(self, sent: Sent) -> None:
        self._note("refused", number=sent.number)
        sent.refused = True

    def _find(self, sent: Sent, answered: bool = False) -> None:
        """Decide what became of a create without a result, as far as can be known now.

        It was not accepted where no batch of its time and size is unaccounted for, and the server has had its time, or has
        `answered`. Where there is one that has not ended, the question stays open, and its requests stay under way.
        """
        known = {other.batch for other in self._sent} | sent.not_ours
        decided = answered or time.time() >= sent.time + self._config.settle_s
        for batch in self._client.messages.batches.list(limit=100):  # newest first
            if batch.created_at.timestamp() < sent.time - CLOCK_SKEW_S:
                break
            if batch.id in known or sum(_counts(batch).values()) != len(sent.keys):
                continue
            if batch.processing_status != "ended":
                decided = False
                continue
            owner = next(iter(_ids(self._download(batch.id))), "")
            if owner.startswith(f"{self._job}-{sent.number}-"):
                self._created(sent, batch.id)
                return
            if not owner:  # cut off before its first line
                decided = False
                continue
            self._note("not_ours", number=sent.number, batch=batch.id)
            sent.not_ours.add(batch.id)
        if decided:
            self._refuse(sent)

    # --- collecting ----------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Fetch the results of all batches that have ended."""
        with self._told():
            for sent in self.under_way:
                if not sent.batch:
                    self._find(sent)
                if sent.batch:
                    self._collect(sent)

    def _collect(self, sent: Sent) -> None:
        batch = self._client.messages.batches.retrieve(sent.batch)
        if batch.archived_at:
            raise ValueError(
                f"batch {sent.batch}: its results were kept for {KEPT_DAYS} days and are gone; remove {self._journal} to send "
                "everything again, at full cost"
            )
        if batch.processing_status == "ended":
            self._builder.publish(sent.file, self._results(sent, batch), rows=len(sent.keys))
            self._count_in(sent)

    def _results(self, sent: Sent, batch: MessageBatch) -> bytes:
        """The lines of a batch, each once, complete: downloaded again until they are."""
        wanted = {f"{self._job}-{sent.number}-{key}" for key in sent.keys}
        problem = ""
        for attempt in range(DOWNLOADS):
            if attempt:
                log.warning("results of %s: %s; fetching them again", sent.batch, problem)
                self._sleep(min(2.0**attempt, 60.0) * random.uniform(0.5, 1.0) * min(1.0, self._config.poll_s))
            lines, problem = _checked(self._download(sent.batch), wanted, _counts(batch))
            if not problem:
                return b"".join(line + b"\n" for line in lines)
        raise ValueError(f"results of batch {sent.batch}: {problem}, {DOWNLOADS} times; try again later")

    def _download(self, batch: str) -> bytes:
        """The results as they come, cut off or not."""
        pieces: list[bytes] = []
        try:
            with self._client.messages.batches.with_streaming_response.results(batch) as response:
                pieces += response.iter_bytes()
        except httpx2.HTTPError as error:
            log.warning("results of %s: %s", batch, redacted(error, self._key)[:200])
        return b"".join(pieces)

    def _count_in(self, sent: Sent) -> None:
        for key, result in self._read(sent):
            self._outcomes[key].append(_outcome(result))

    def _read(self, sent: Sent) -> Iterator[tuple[str, dict[str, Any]]]:
        prefix = len(f"{self._job}-{sent.number}-")
        with (self._builder.path / sent.file).open("rb") as lines:
            for line in lines:
                found = json.loads(line)
                yield found["custom_id"][prefix:], found["result"]

    def run(self) -> None:
        """Send, wait and collect until every request is answered or out of attempts. Trouble on the way is waited out."""
        while True:
            try:
                self.submit()
                if not self.under_way:
                    return
                self.collect()
            except ConnectionError as error:
                log.warning("%s; trying again in %g s", error, self._config.poll_s)
            if self.under_way:
                self._sleep(self._config.poll_s)

    @property
    def files(self) -> list[str]:
        """The raw files, for the manifest."""
        return [sent.file for sent in self._sent if self._builder.has(sent.file)]

    def replies(self) -> dict[str, Reply]:
        """The last answer to each request, by key; all of them where nothing is under way or to be sent."""
        found: dict[str, Reply] = {}
        for sent in self._sent:
            if self._builder.has(sent.file):
                for key, result in self._read(sent):
                    found[key] = _reply(key, result)
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the API in one line without the key: ConnectionError for those that pass, ValueError for the others."""
        try:
            yield
        except PASSING as error:
            raise ConnectionError(f"Anthropic: {redacted(error, self._key)[:400]}") from None
        except anthropic.APIError as error:
            raise ValueError(f"Anthropic: {redacted(error, self._key)[:400]}") from None


class BatchAsker:
    """Asks by Message Batches and waits for them."""

    name = NAME

    def __init__(self, builder: Builder, config: AskConfig) -> None:
        self.model = config.model or DEFAULT_MODEL
        self._builder, self._config = builder, config
        self._client = open_client(config)
        self.files: list[str] = []

    def job(self, requests: Sequence[Request]) -> BatchJob:
        return BatchJob(self._builder, self._config, requests, self._client)

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        job = self.job(requests)
        job.run()
        yield from self.collected(job)

    def collected(self, job: BatchJob) -> Iterator[Reply]:
        """The replies of a job that is done."""
        self.files = job.files
        yield from job.replies().values()


def open_client(config: AskConfig) -> anthropic.Anthropic:
    """The SDK's client. ValueError without a key in the environment."""
    key = os.environ.get("ANTHROPIC_API_KEY", "").strip()
    if not key:
        raise ValueError("ANTHROPIC_API_KEY is not set; the backend anthropic needs a key, from the environment alone")
    for chatty in ("httpx2", "httpcore2", "anthropic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return anthropic.Anthropic(
        api_key=key, base_url=config.base_url or None, timeout=config.timeout_s, max_retries=READ_RETRIES
    )


def _seconds(header: str | None) -> float:
    """A `retry-after` header; 0 where it holds no number of seconds."""
    try:
        return min(max(float(header or 0), 0.0), 3600.0)
    except ValueError:
        return 0.0


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the line being written when the process died


def _counts(batch: MessageBatch) -> dict[str, int]:
    counts = batch.request_counts
    found = {kind: getattr(counts, kind) for kind in ("processing", "succeeded", "errored", "expired", "canceled")}
    return {kind: n for kind, n in found.items() if n}


def _ids(content: bytes) -> Iterator[str]:
    for line in content.splitlines():
        try:
            yield str(json.loads(line)["custom_id"])
        except (ValueError, TypeError, KeyError):
            continue


def _checked(content: bytes, wanted: set[str], counts: Mapping[str, int]) -> tuple[list[bytes], str]:
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


def _outcome(result: Mapping[str, Any]) -> Outcome:
    kind = result["type"]
    if kind == "succeeded":
        usage = result["message"].get("usage") or {}
        read = sum(usage.get(f"{name}input_tokens") or 0 for name in ("", "cache_creation_", "cache_read_"))
        return Outcome(kind, "", False, read, usage.get("output_tokens") or 0)
    reason = _problem(result)
    return Outcome(kind, reason, not any(name in reason for name in FOR_GOOD))


def _problem(result: Mapping[str, Any]) -> str:
    """Why a request has no answer."""
    if result["type"] != "errored":
        return f"{result['type']}, as often as it was sent"
    error: Any = result.get("error") or {}
    error = error.get("error") or error
    return f"{error.get('type', 'unknown error')}: {error.get('message', '')}"


def _reply(key: str, result: Mapping[str, Any]) -> Reply:
    if result["type"] != "succeeded":
        return Reply(key, "", _problem(result))
    message = result["message"]
    text = "".join(str(block.get("text", "")) for block in message.get("content") or [] if block.get("type") == "text")
    stop = message.get("stop_reason")
    problem = {"max_tokens": "cut off at --max-tokens", "refusal": "the model refused to answer"}.get(stop, "")
    return Reply(key, writable(text), problem)
