"""Anthropic's SDK as jobs of message batches use it: the client, its prices, and its errors in one line without the key.

Reads are repeated by the SDK; a create never is, for the API has no idempotency key. Prices and models: platform.claude.com,
models overview, read 2026-11.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import anthropic
import httpx2
from anthropic.types.messages import MessageBatch

from interpretability.asking import AskConfig, Price, redacted

DEFAULT_MODEL = "claude-haiku-5-5"
LIST_PRICES = {
    "claude-haiku-5-5": Price(0.10, 0.50),
    "claude-haiku-4-5": Price(1.0, 5.0),
    "claude-sonnet-5-5": Price(2.0, 10.0),
    "claude-opus-5-5": Price(4.0, 20.0),
}
"""Of prompts up to 100,000 tokens, which ours are."""
BATCH_SHARE = 0.5
"""What a request in a batch costs of the list price."""
READ_RETRIES = 8
"""How often the SDK repeats what may be repeated: everything but a create."""
UNDECIDED = (anthropic.InternalServerError, anthropic.ConflictError, anthropic.RequestTimeoutError)
"""Answers after which a create may have been accepted all the same."""
PASSING = (anthropic.APIConnectionError, anthropic.RateLimitError, *UNDECIDED)
MAX_WAIT_S = 3600.0

log = logging.getLogger("interpretability.batch_api")


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


def batch_price(config: AskConfig, model: str) -> Price:
    """What a batch costs; ValueError where that is not known."""
    listed = LIST_PRICES.get(model)
    price_in = config.price_in if config.price_in >= 0 else listed and listed.input
    price_out = config.price_out if config.price_out >= 0 else listed and listed.output
    if price_in is None or price_out is None:
        raise ValueError(
            f"--model {model}: its price is not known here; give --price-in and --price-out, dollars per million tokens, or "
            f"one of {', '.join(LIST_PRICES)}"
        )
    return Price(BATCH_SHARE * price_in, BATCH_SHARE * price_out)


@contextmanager
def told(client: anthropic.Anthropic) -> Iterator[None]:
    """Errors of the API in one line without the key: ConnectionError for those that pass, ValueError for the others."""
    try:
        yield
    except PASSING as error:
        raise ConnectionError(f"Anthropic: {in_a_line(client, error)}") from None
    except anthropic.AnthropicError as error:
        raise ValueError(f"Anthropic: {in_a_line(client, error)}") from None


def in_a_line(client: anthropic.Anthropic, error: Exception) -> str:
    return redacted(error, client.api_key or "")[:400]


def download(client: anthropic.Anthropic, batch: str) -> bytes:
    """The results of a batch as they come, cut off or not."""
    return b"".join(_pieces(client, batch))


def first_line(client: anthropic.Anthropic, batch: str) -> bytes:
    """The beginning of the results of a batch: their first line, and perhaps more; less where it was cut off before."""
    found = b""
    for piece in _pieces(client, batch):
        found += piece
        if b"\n" in found:
            break
    return found


def _pieces(client: anthropic.Anthropic, batch: str) -> Iterator[bytes]:
    try:
        with client.messages.batches.with_streaming_response.results(batch) as response:
            yield from response.iter_bytes()
    except httpx2.HTTPError as error:
        log.warning("results of %s: %s", batch, in_a_line(client, error))


def age_in_days(client: anthropic.Anthropic, batch: str) -> tuple[MessageBatch, float]:
    """A batch as it stands, and its age by the server's own clock."""
    response = client.messages.batches.with_raw_response.retrieve(batch)
    found = response.parse()
    try:
        now = parsedate_to_datetime(response.headers["date"])
    except (KeyError, ValueError):
        now = datetime.now(UTC)  # behind a proxy that drops the date; it is for a warning alone
    return found, (now - found.created_at).total_seconds() / 86400


def retry_after(error: anthropic.APIStatusError) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return min(max(float(error.response.headers.get("retry-after") or 0), 0.0), MAX_WAIT_S)
    except ValueError:
        return 0.0
