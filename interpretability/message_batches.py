"""Anthropic's Message Batches: half the price, answers within a day, and no request paid for twice.

The API has no idempotency key, so that a create that is cut off may or may not have been accepted. Hence a journal
(`batch_journal.py`): the intent to create a batch, with the keys of its requests, is on disk before the create goes out, which
the SDK does not repeat. An intent without an outcome is looked for among the batches that the server did not list
before it. What tells ours from others is the ids of its requests, `JOB-NUMBER-KEY`, which the results show once the
batch has ended; until then its requests count as under way. No clock is read for any of this: those of client and
server may differ by days, or jump.

A folder that was copied is not sent from until somebody says that it was moved (`--moved`): the server cannot tell two
copies of a job apart before both were paid. Two machines that share a folder see one another's lines in the journal,
and stop.

Results are kept as they came, in `raw/`. Expired, cancelled and overloaded requests go into a batch again; invalid ones do not.
Limits of the API (100,000 requests and 256 MB a batch, ids of 64 characters, results for 29 days): platform.claude.com, "Batch
processing", read 2026-11.
"""

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anthropic
import xxhash
from anthropic.types.messages import MessageBatch

from core.artifact import Builder
from interpretability.asking import LARGEST_BYTES_PER_TOKEN, AskConfig, Estimate, Price, Reply, Request, confirm, in_dollars
from interpretability.batch_api import (
    DEFAULT_MODEL,
    UNDECIDED,
    age_in_days,
    batch_price,
    download,
    first_line,
    in_a_line,
    open_client,
    retry_after,
    told,
)
from interpretability.batch_journal import JOURNAL, Journal, Sent
from interpretability.batch_results import Outcome, checked, counts_of, first_id, outcome_of, read_results, reply_of

NAME = "anthropic"
MAX_BATCH_BYTES = 230_000_000
"""90 % of the API's 256 MB."""
COUNTED_REQUESTS = 8
KNOWN_BEFORE = 20
"""Newest batches of the server that are noted before a create."""
DOWNLOADS = 20
WARN_AFTER_DAYS = 20
KEPT_DAYS = 29

log = logging.getLogger("interpretability.message_batches")


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
        content = xxhash.xxh3_128_hexdigest(json.dumps([self.model, *self._requests.values()]).encode())
        self._journal = Journal(builder.path, content, self._requests)
        self._waited: set[int] = set()  # creates that were given --settle-s to appear since no process was at them
        self._outcomes: dict[str, list[Outcome]] = {key: [] for key in self._requests}
        self._tokens_per_byte = 1 / LARGEST_BYTES_PER_TOKEN
        self._counted = False
        self._confirmed = False
        for sent in self._collected:
            self._count_in(sent)

    # --- what is known -------------------------------------------------------------------------------------------------

    @property
    def _collected(self) -> list[Sent]:
        """Batches whose results are here."""
        return [sent for sent in self._journal.sent if self._builder.has(sent.file)]

    @property
    def under_way(self) -> list[Sent]:
        """Batches that were sent, or may have been, and whose results are not here."""
        return [sent for sent in self._journal.sent if not sent.refused and not self._builder.has(sent.file)]

    def to_send(self) -> list[str]:
        """Keys of the requests that were never answered, are not under way, and have attempts left."""
        flying = {key for sent in self.under_way for key in sent.keys}
        return [key for key, found in self._outcomes.items() if key not in flying and self._wants_another(found)]

    def _wants_another(self, found: Sequence[Outcome]) -> bool:
        return not found or (found[-1].again and len(found) < self._config.attempts)

    @property
    def price(self) -> Price:
        """What a batch costs; ValueError where that is not known."""
        return batch_price(self._config, self.model)

    def estimate(self, keys: Sequence[str]) -> Estimate:
        """Cost of sending `keys`: from the length of the text, high rather than low, or what `count` found in a few."""
        tokens = round(sum(self._requests[key].bytes for key in keys) * self._tokens_per_byte)
        output = len(keys) * self._config.max_tokens
        how = "by the server's count of a few" if self._counted else f"{LARGEST_BYTES_PER_TOKEN:g} bytes a token"
        return Estimate(len(keys), tokens, output, self.price.of(tokens, output), how)

    def count(self) -> None:
        """Let the server count the tokens of a few requests, which is free, but sends them."""
        every = list(self._requests.values())
        sample = every[:: -(-len(every) // COUNTED_REQUESTS)]
        log.info("the server counts the tokens of %d of them", len(sample))
        self._tokens_per_byte = max(self._tokens(request) / request.bytes for request in sample)
        self._counted = True

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
        for sent in self._journal.sent:
            with told(self._client):
                state = self._state(sent)
            yield f"batch {sent.number}: {len(sent.keys):,} requests, {state}"
        ends = Counter(found[-1].kind for found in self._outcomes.values() if found)
        answered = ", ".join(f"{n:,} {kind}" for kind, n in sorted(ends.items())) or "none answered"
        yield f"{len(self._requests):,} requests: {answered}; {len(self.to_send()):,} to send; {in_dollars(self.spent())} spent"

    def _state(self, sent: Sent) -> str:
        if sent.refused:
            return "not accepted"
        if self._builder.has(sent.file):
            return f"{sent.batch} collected"
        if not sent.batch:
            return "cut off while it was created; looked for among the server's batches"
        batch, age = age_in_days(self._client, sent.batch)
        warning = f"; {age:.0f} days old, results go after {KEPT_DAYS}: collect now" if age > WARN_AFTER_DAYS else ""
        return f"{sent.batch} {batch.processing_status}{warning}"

    # --- sending -------------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Send all that is to be sent, after showing what it costs. ValueError where that is refused."""
        with told(self._client):
            self._settle()
            if keys := self.to_send():
                self._check_place()
                self._agree(keys)
            pause = 1.0
            while keys := self.to_send():
                wait = self._create(self._group(keys))
                if wait is None:
                    pause = 1.0
                else:
                    self._sleep(max(wait, pause * random.uniform(0.5, 1.0)))
                    pause = min(2 * pause, 60.0)

    def _agree(self, keys: Sequence[str]) -> None:
        """Show what sending `keys` costs and ask, before any of it leaves; again where the server counts more tokens in it."""
        guess = self.estimate(keys)
        confirm(self._config, guess, self.committed(), self._confirmed)
        self._confirmed = True
        if not self._counted:
            self.count()
            counted = self.estimate(keys)
            confirm(self._config, counted, self.committed(), counted.dollars <= guess.dollars)

    def _check_place(self) -> None:
        """ValueError where this is a copy of the folder that was sent from, unless it is said to be the only one in use."""
        if self._journal.is_here:
            return
        if not self._config.moved:
            raise ValueError(
                f"{self._builder.path}: this folder was copied or moved since the job last sent from it; two copies pay "
                "for everything twice; nothing was sent; make sure that no other copy is used any more, then add --moved"
            )
        self._journal.settle_here()

    def _settle(self) -> None:
        """Look for the batches whose creation was cut off, once the server, or one behind it, has had its time with them."""
        undecided = [sent for sent in self._journal.sent if sent.is_open]
        if any(sent.number not in self._waited for sent in undecided):
            self._sleep(self._config.settle_s)
            self._waited |= {sent.number for sent in undecided}
        for sent in undecided:
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
        newest = self._client.messages.batches.list(limit=KNOWN_BEFORE).data
        sent = self._journal.intent(keys, [batch.id for batch in newest])
        prefix = self._journal.prefix(sent)
        body: Any = [{"custom_id": prefix + key, "params": self._params(key)} for key in keys]
        assert all(len(item["custom_id"]) <= 64 for item in body)
        try:
            batch = self._client.with_options(max_retries=0).messages.batches.create(requests=body)
        except anthropic.RateLimitError as error:
            self._journal.refused(sent)
            return retry_after(error)
        except (anthropic.APIConnectionError, *UNDECIDED) as error:
            log.warning("creating a batch: %s; looking whether it was accepted", in_a_line(self._client, error))
            self._settle()
            return 0.0 if sent.refused else None
        except anthropic.APIStatusError:
            self._journal.refused(sent)
            raise
        self._created(sent, batch.id)
        return None

    def _created(self, sent: Sent, batch: str) -> None:
        self._journal.created(sent, batch)
        log.info("batch %d: %s, %s requests", sent.number, batch, f"{len(sent.keys):,}")

    def _find(self, sent: Sent) -> None:
        """Decide what became of a create without a result, as far as can be known now; the server has had its time with it.

        It was not accepted where no batch of its size that was not known before is unaccounted for. Where there is one that has
        not ended, the question stays open, and its requests stay under way.
        """
        decided = True
        for batch in self._candidates(sent):
            if batch.archived_at:
                raise ValueError(
                    f"batch {batch.id} may be one of this job whose creation was cut off, but its results were kept for "
                    f"{KEPT_DAYS} days and are gone; remove {self._builder.path / JOURNAL} to send everything again, "
                    "at full cost"
                )
            if batch.processing_status != "ended":
                decided = False
                continue
            owner = first_id(first_line(self._client, batch.id))
            if owner.startswith(self._journal.prefix(sent)):
                self._created(sent, batch.id)
                return
            if not owner:  # cut off before its first line
                decided = False
                continue
            self._journal.not_ours(sent, batch.id)
        if decided:
            self._journal.refused(sent)

    def _candidates(self, sent: Sent) -> Iterator[MessageBatch]:
        """Batches that may be `sent`: as large, and not known before its create. The server lists the newest first.

        Where its own clocks differ a little, newer ones stand among those known before: the list is read on for as many
        batches as were noted.
        """
        known = {other.batch for other in self._journal.sent} | sent.not_ours
        before = set(sent.before or ())
        looked_through = 0
        for batch in self._client.messages.batches.list(limit=100):
            if batch.id in before or looked_through:
                looked_through += 1
                if looked_through > KNOWN_BEFORE:
                    return
            if batch.id in known | before or (batch.archived_at and sent.before is None):
                continue
            size = sum(counts_of(batch).values())
            if size == len(sent.keys) or (not size and batch.processing_status != "ended"):
                yield batch

    # --- collecting ----------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Fetch the results of all batches that have ended."""
        with told(self._client):
            self._settle()
            for sent in self.under_way:
                if sent.batch:
                    self._collect(sent)

    def _collect(self, sent: Sent) -> None:
        batch = self._client.messages.batches.retrieve(sent.batch)
        if batch.archived_at:
            raise ValueError(
                f"batch {sent.batch}: its results were kept for {KEPT_DAYS} days and are gone; remove "
                f"{self._builder.path / JOURNAL} to send everything again, at full cost"
            )
        if batch.processing_status == "ended":
            self._builder.publish(sent.file, self._results(sent, batch), rows=len(sent.keys))
            self._count_in(sent)

    def _results(self, sent: Sent, batch: MessageBatch) -> bytes:
        """The lines of a batch, each once, complete: downloaded again until they are."""
        wanted = {self._journal.prefix(sent) + key for key in sent.keys}
        problem = ""
        for attempt in range(DOWNLOADS):
            if attempt:
                log.warning("results of %s: %s; fetching them again", sent.batch, problem)
                self._sleep(min(2.0**attempt, 60.0) * random.uniform(0.5, 1.0) * min(1.0, self._config.poll_s))
            lines, problem = checked(download(self._client, sent.batch), wanted, counts_of(batch))
            if not problem:
                return b"".join(line + b"\n" for line in lines)
        raise ValueError(f"results of batch {sent.batch}: {problem}, {DOWNLOADS} times; try again later")

    def _count_in(self, sent: Sent) -> None:
        for key, result in self._read(sent):
            self._outcomes[key].append(outcome_of(result))

    def _read(self, sent: Sent) -> Iterator[tuple[str, dict[str, Any]]]:
        return read_results(self._builder.read(sent.file), self._journal.prefix(sent))

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
        return [sent.file for sent in self._collected]

    def replies(self) -> dict[str, Reply]:
        """The last answer to each request, by key; all of them where nothing is under way or to be sent."""
        found: dict[str, Reply] = {}
        for sent in self._collected:
            found |= {key: reply_of(key, result) for key, result in self._read(sent)}
        return found


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
