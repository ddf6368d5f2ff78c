"""Questions to language models: what is asked, what comes back, what it costs, and who can be asked.

Every question of a stage has a key of its own, and every asker gives back one reply a key, so that a stage can be killed and go
on. Three askers: `message_batches.py` (Anthropic, half price), `chat_server.py` (any OpenAI-compatible server) and
`in_process.py` (our own Llama).
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from core.artifact import Builder
from core.cli import StageConfig, machine
from core.lines import LineWriter

REPLIES_FILE = "raw/replies.jsonl"
SAVED = ".replies.jsonl"
ADVICE = "nothing was asked; put back a copy of it that is whole, or remove the line, whose question is then asked again"
LARGEST_BYTES_PER_TOKEN = 3.0
"""English text has four to five bytes a token; fewer are assumed where nothing counts tokens, so that the estimate is high."""

log = logging.getLogger("interpretability.llm.client")


class Request(NamedTuple):
    """One question. `key` is unique within a job: letters, digits, `_` and `-`, at most 40."""

    key: str
    system: str
    user: str

    @property
    def bytes(self) -> int:
        return len(self.system.encode()) + len(self.user.encode())


class Reply(NamedTuple):
    """What came back. `problem` is empty where `text` is a whole answer, else it says why there is none."""

    key: str
    text: str
    problem: str = ""


class Asker(Protocol):
    """A language model that answers requests."""

    @property
    def name(self) -> str:
        """Recorded as `method`."""
        ...

    @property
    def model(self) -> str: ...

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """One reply for each of `requests`, in any order."""
        ...


@dataclass(frozen=True, kw_only=True)
class AskConfig(StageConfig):
    """Flags of the stages that ask a language model."""

    model: str = ""
    """Who answers. anthropic: a model id (empty: claude-haiku-5-5); openai: a name that the server knows; llama: a folder, a
    .gguf file, a Hub id, ollama:NAME, smollm2 or demo."""
    max_tokens: int = 2048
    """Most tokens of one answer, the model's thinking included."""
    base_url: str = machine("")
    """Server of the backends anthropic and openai. Empty: Anthropic's own, and http://127.0.0.1:11434/v1 (Ollama)."""
    price_in: float = machine(-1.0)
    """Dollars per million tokens of input, before any rebate for batches. -1: the list price, where it is known."""
    price_out: float = machine(-1.0)
    """The same for output."""
    budget: float = machine(0.0)
    """Dollars that this folder may cost in all, at worst; more is refused before anything is sent. 0: no limit."""
    yes: bool = machine(False)
    """Send without asking back; the cost is shown all the same."""
    batch_requests: int = machine(10_000)
    """anthropic: requests in one batch, at most (the API takes 100,000)."""
    poll_s: float = machine(60.0)
    """anthropic: seconds between two looks at batches under way."""
    settle_s: float = machine(60.0)
    """anthropic: seconds after which a batch whose creation was cut off must appear in the list, if it was accepted."""
    moved: bool = machine(False)
    """anthropic: send from a folder that was copied or moved here. No other copy of it may be used any more: two would
    pay for everything twice."""
    max_failed_share: float = machine(0.1)
    """Share of failed answers above which the command ends with an error; its results are kept all the same."""
    attempts: int = machine(5)
    """Times that one request is sent, at most; only expired, cancelled and overloaded ones are sent again."""
    concurrency: int = machine(4)
    """openai: requests under way at once. llama: prompts in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_requests", "attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; found {getattr(self, name)}")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"--max-failed-share must be from 0 to 1; found {self.max_failed_share}")
        if self.budget < 0 or self.poll_s <= 0 or self.settle_s < 0:
            raise ValueError(
                "--budget and --settle-s must be at least 0 and --poll-s more than 0; "
                f"found {self.budget}, {self.settle_s} and {self.poll_s}"
            )


class Price(NamedTuple):
    """Dollars per million tokens."""

    input: float
    output: float

    def of(self, input_tokens: float, output_tokens: float) -> float:
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


def in_dollars(amount: float) -> str:
    """`$12.34`, and below a dollar `$0.0123`: some batches cost less than a cent."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"


class Estimate(NamedTuple):
    """What some requests cost before they are sent."""

    requests: int
    input_tokens: int
    output_tokens: int
    """If every answer takes all of --max-tokens."""
    dollars: float
    """At worst."""
    counted: str
    """Where the number of input tokens comes from."""

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, about {self.input_tokens:,} tokens of input ({self.counted}), at most "
            f"{self.output_tokens:,} of output: at most {in_dollars(self.dollars)}"
        )


def estimate_by_bytes(requests: Sequence[Request], max_tokens: int, price: Price) -> Estimate:
    """Input tokens from the length of the text, high rather than low."""
    tokens = round(sum(request.bytes for request in requests) / LARGEST_BYTES_PER_TOKEN)
    output = len(requests) * max_tokens
    return Estimate(len(requests), tokens, output, price.of(tokens, output), f"{LARGEST_BYTES_PER_TOKEN:g} bytes a token")


def confirm(config: AskConfig, estimate: Estimate, committed: float = 0.0, confirmed: bool = False) -> None:
    """Show the cost, keep to the budget, and ask, unless it was `confirmed` before and this is for what expired.

    `committed` are the dollars that this folder has cost and may yet cost.

    Raises ValueError where the budget does not suffice, or where nobody can say yes.
    """
    log.info("about to send %s", estimate)
    total = committed + estimate.dollars
    if config.budget and total > config.budget:
        raise ValueError(
            f"--budget {config.budget:g}: sending this may bring the cost to {in_dollars(total)} ({in_dollars(committed)} of "
            "it spent or under way); nothing was sent; raise the budget, or choose fewer --latents or a lower --max-tokens"
        )
    if config.yes or confirmed:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"this would send {estimate}; nothing was sent; add --yes to go ahead")
    if input(f"Send {estimate}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not sent")


def check_failures(config: AskConfig, failed: int, asked: int) -> None:
    """ValueError where too many of the questions that were asked have no answer."""
    if failed > config.max_failed_share * asked:
        raise ValueError(
            f"{failed:,} of {asked:,} answers failed ({failed / asked:.0%}), more than --max-failed-share "
            f"{config.max_failed_share:g}; all results and the reasons were written"
        )


def redacted(text: object, key: str) -> str:
    """`text` in one line, without the API key."""
    line = " ".join(str(text).split())
    return line.replace(key, "[API key]") if key else line


class SavedReplies:
    """An asker whose replies are kept line by line in the folder under construction, so that none is asked for twice.

    For askers that answer at once; batches keep books of their own.
    """

    def __init__(self, asker: Asker, builder: Builder, before: Callable[[list[Request], list[Request]], None]) -> None:
        """`before` gets the requests to be asked and those that were saved; it may refuse, with ValueError."""
        self.name, self.model = asker.name, asker.model
        self._asker, self._builder, self._before = asker, builder, before
        self._lines = LineWriter(builder.path / SAVED, ADVICE)
        self._known = self._saved()
        self.files = [REPLIES_FILE]

    def _saved(self) -> dict[str, Reply]:
        """Replies of earlier runs, by key. Those with a problem are not among them: they are asked for again."""
        found: dict[str, Reply] = {}
        for number, line in enumerate(self._lines.records, 1):
            if line.keys() != set(Reply._fields) or not all(isinstance(value, str) for value in line.values()):
                raise ValueError(f"{self._lines.path}: line {number} is no reply; {ADVICE}")
            reply = Reply(**line)
            if not reply.problem:
                found[reply.key] = reply
        return found

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """One reply for each request; those that were saved come without asking."""
        known = self._known
        final = {request.key: known[request.key] for request in requests if request.key in known}
        missing = [request for request in requests if request.key not in known]
        if missing:
            self._before(missing, [request for request in requests if request.key in known])
        yield from final.values()
        for reply in self._asker.ask(missing):
            clean = reply._replace(text=writable(reply.text))
            self._lines.write(clean._asdict())
            final[reply.key] = clean
            if not clean.problem:
                known[reply.key] = clean
            yield clean
        self._builder.publish(REPLIES_FILE, _lines(final[request.key] for request in requests), rows=len(requests))


def _lines(replies: Iterable[Reply]) -> Iterator[bytes]:
    for reply in replies:
        yield json.dumps(reply._asdict(), ensure_ascii=False).encode() + b"\n"


def writable(text: str) -> str:
    """`text` with lone surrogates, which JSON can name and UTF-8 cannot hold, spelt out."""
    return text.encode(errors="backslashreplace").decode()
