"""Which language model is asked, by the name of its backend. Libraries are imported for the one that is chosen."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from core.artifact import Builder
from interpretability.llm.client import AskConfig, Asker, Request, SavedReplies, confirm, estimate_by_bytes

LLMBackend = Literal["anthropic", "openai", "llama"]


class KeptAsker(Asker, Protocol):
    """An asker that keeps what it was told in the folder under construction."""

    @property
    def files(self) -> list[str]:
        """The raw replies, for the manifest."""
        ...


def asker_of(backend: LLMBackend, config: AskConfig, builder: Builder, device: torch.device) -> KeptAsker:
    """ValueError where a flag, a key or the model is missing."""
    if backend == "anthropic":
        from interpretability.llm.message_batches import BatchAsker

        return BatchAsker(builder, config)
    if backend == "llama":
        from interpretability.llm.in_process import InProcess

        return SavedReplies(InProcess(config, device), builder, lambda missing, saved: None)
    from interpretability.llm.chat_server import ChatServer

    server = ChatServer(config)
    price = server.price

    def cost(missing: Sequence[Request], saved: Sequence[Request]) -> None:
        before = estimate_by_bytes(saved, config.max_tokens, price).dollars
        confirm(config, estimate_by_bytes(missing, config.max_tokens, price), before)

    return SavedReplies(server, builder, cost)
