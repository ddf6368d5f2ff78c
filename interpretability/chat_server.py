"""Questions to a server that speaks OpenAI's chat completions, such as vLLM, llama.cpp or Ollama, over plain HTTP.

The key, where the server wants one, comes from OPENAI_API_KEY.
"""

import logging
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from interpretability.asking import AskConfig, Price, Reply, Request, redacted

NAME = "openai"
DEFAULT_URL = "http://127.0.0.1:11434/v1"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
MAX_PAUSE_S = 60.0
SPARED = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": ""}
"""Parameters that some servers refuse, and what they are called there; without another name they are left out."""
_REFUSAL = re.compile(r"support|unknown|unrecogni|unexpected|extra|permitted|allowed|forbidden", re.IGNORECASE)

log = logging.getLogger("interpretability.chat_server")


class ChatServer:
    """An OpenAI-compatible server."""

    name = NAME

    def __init__(self, config: AskConfig) -> None:
        if not config.model:
            raise ValueError("--model is missing: the name under which the server of --base-url knows its model")
        self.model, self._config = config.model, config
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._url = (config.base_url or DEFAULT_URL).rstrip("/") + "/chat/completions"
        self._spared: set[str] = set()
        """Those of SPARED that this server has refused."""
        logging.getLogger("httpx2").setLevel(logging.WARNING)

    @property
    def price(self) -> Price:
        """As the flags say; nothing where they say nothing, unless there is a budget to keep."""
        found = Price(self._config.price_in, self._config.price_out)
        if self._config.budget and min(found) < 0:
            raise ValueError("--budget: give --price-in and --price-out, dollars per million tokens, which no server tells")
        return Price(*(max(0.0, price) for price in found))

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """One reply a request, as they come. ValueError where the server refuses, ConnectionError where it is out of reach."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        with (
            httpx2.Client(headers=headers, timeout=self._config.timeout_s) as client,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            futures = [pool.submit(self._ask, client, request) for request in requests]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:  # what has not begun is not asked once one has failed
                pool.shutdown(cancel_futures=True)

    def _ask(self, client: httpx2.Client, request: Request) -> Reply:
        pause, problem = 1.0, ""
        for _ in range(self._config.attempts):
            try:
                response = self._post(client, request)
            except httpx2.HTTPError as error:
                problem = redacted(f"{type(error).__name__}: {error}", self._key)
            else:
                if response.status_code == 200:
                    return _reply(request.key, response)
                problem = redacted(f"HTTP {response.status_code}: {response.text[:300]}", self._key)
                if response.status_code not in RETRIED:
                    raise ValueError(f"{self._url}: {problem}")
                pause = max(pause, _seconds(response.headers.get("retry-after")))
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, MAX_PAUSE_S)
        raise ConnectionError(f"{self._url}: {problem}, {self._config.attempts} times; the same command goes on from here")

    def _post(self, client: httpx2.Client, request: Request) -> httpx2.Response:
        """The server's answer; parameters that it refuses by name are spared, each once, and it is asked again."""
        while True:
            body = self._body(request)
            response = client.post(self._url, json=body)
            if response.status_code not in (400, 422) or not _REFUSAL.search(response.text):
                return response
            refused = [name for name in SPARED if name in body and re.search(rf"\b{name}\b", response.text)]
            if not refused:
                return response
            if refused[0] not in self._spared:
                become = f"sent as {SPARED[refused[0]]}" if SPARED[refused[0]] else "left out"
                log.warning("%s refuses the parameter %s: it is %s from now on", self._url, refused[0], become)
            self._spared.add(refused[0])

    def _body(self, request: Request) -> dict[str, Any]:
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        parameters = {"max_tokens": self._config.max_tokens, "temperature": 0, "seed": self._config.seed}
        names = {name: SPARED[name] if name in self._spared else name for name in parameters}
        kept = {names[name]: value for name, value in parameters.items() if names[name]}
        return {"model": self.model, "messages": messages} | kept


def _reply(key: str, response: httpx2.Response) -> Reply:
    try:
        choice: Any = response.json()["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = _joined(message["content"])
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return Reply(key, response.text[:2000], "the server's reply is no chat completion")
    cut = "cut off at --max-tokens" if reason == "length" else ""
    if not text and isinstance(thought, str) and thought:
        return Reply(key, thought, cut or "the model gave its reasoning and no answer")
    if text is None:
        return Reply(key, "", "the model gave no text")
    return Reply(key, text, cut)


def _joined(content: Any) -> str | None:
    """A reply's text, which may come as a list of parts; None where it is neither."""
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part.get("text") for part in content if not _is_thought(part)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") not in (None, "text", "output_text")


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), MAX_PAUSE_S)
    except ValueError:
        return 0.0
