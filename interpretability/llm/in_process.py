"""Questions to a Llama in this process: our own model, its chat format and the one sampling loop."""

from collections.abc import Iterator, Sequence

import torch

from core.cli import Progress
from interpretability.llm.client import AskConfig, Reply, Request
from llama3 import load_model, load_tokenizer
from llama3.chat import check_chat, encode_dialog, turn_ends
from llama3.chat_format import Message
from llama3.generate import Sampling, generate

NAME = "llama"


class InProcess:
    """A Llama with a chat format. Prompts that leave no room for an answer in its context are answered with that problem."""

    name = NAME

    def __init__(self, config: AskConfig, device: torch.device) -> None:
        if not config.model:
            raise ValueError(
                "--model is missing: the Llama that answers, a folder, a .gguf file, a Hub id, ollama:NAME, smollm2 or demo"
            )
        self._tokenizer = load_tokenizer(config.model)
        check_chat(self._tokenizer)  # before the weights are read
        self._llama = load_model(config.model, device).eval()
        self.model = f"{config.model.rstrip('/').rpartition('/')[2]} {self._llama.weights_hash[:8]}"
        self._rows = config.concurrency
        self._sampling = Sampling(
            max_new_tokens=config.max_tokens, temperature=0.0, seed=config.seed, stop_ids=turn_ends(self._tokenizer)
        )

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        context = self._llama.params.max_seq_len
        fitting: list[tuple[str, list[int]]] = []
        for request in requests:
            messages = [Message("system", request.system), Message("user", request.user)]
            ids = encode_dialog(self._tokenizer, messages)
            if len(ids) < context:
                fitting.append((request.key, ids))
            else:
                yield Reply(request.key, "", f"the prompt has {len(ids):,} tokens, and the context holds {context:,}")
        fitting.sort(key=lambda item: len(item[1]))  # little padding
        with Progress(NAME, len(fitting), "prompts") as bar:
            for first in range(0, len(fitting), self._rows):
                some = fitting[first : first + self._rows]
                yield from self._answers(some)
                bar.update(len(some))

    def _answers(self, prompts: Sequence[tuple[str, list[int]]]) -> Iterator[Reply]:
        texts, problems = [""] * len(prompts), [""] * len(prompts)
        for piece in generate(self._llama, self._tokenizer, [ids for _, ids in prompts], self._sampling):
            texts[piece.row] += piece.text
            if piece.finished == "length":
                problems[piece.row] = "cut off at --max-tokens, or at the end of the context"
        for (key, _), text, problem in zip(prompts, texts, problems, strict=True):
            yield Reply(key, text, problem)
