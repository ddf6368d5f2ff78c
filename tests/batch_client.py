"""A client of Message Batches for tests that kill it: a folder of plain requests, run to the end."""

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from core.artifact import building
from core.runtime import Runtime
from interpretability.llm.batch_api import open_client
from interpretability.llm.client import AskConfig, Reply, Request
from interpretability.llm.message_batches import BatchJob
from tests.interp_folders import solo

REPLIES = "replies.txt"


@dataclass(frozen=True, kw_only=True)
class ClientConfig(AskConfig):
    """The flags of a stage that asks."""

    n: int


def requests(n: int) -> list[Request]:
    return [Request(f"r{i}", "system", f"question {i}") for i in range(n)]


def client_config(url: str, n: int, **flags: object) -> ClientConfig:
    defaults = {"base_url": url, "yes": True, "poll_s": 0.02, "settle_s": 0.6, "timeout_s": 0.5, "attempts": 12}
    return ClientConfig(n=n, **(defaults | flags))  # type: ignore[arg-type]


def run_client(folder: str, url: str, n: str, batch_requests: str) -> None:
    """Send `n` requests and write one line a reply. Called in a process that may be killed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["ANTHROPIC_API_KEY"] = "test-key"
    complete(Path(folder), client_config(url, int(n), batch_requests=int(batch_requests)), solo())


def complete(folder: Path, config: ClientConfig, runtime: Runtime) -> dict[str, Reply]:
    with building(folder, "replies", config, runtime) as builder:
        if builder.complete:
            return {}
        with open_client(config) as client:
            job = BatchJob(builder, config, requests(config.n), client)
            job.run()
        replies = job.replies()
        builder.publish(REPLIES, (f"{key}\t{reply.problem}\n".encode() for key, reply in sorted(replies.items())))
        builder.finish([REPLIES, *job.files], {"replies": len(replies)})
    return replies
