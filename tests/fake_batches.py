"""A server that speaks Anthropic's Message Batches over real HTTP on the loopback, and fails as real ones do.

    python -m tests.fake_batches --port 8787 --faults 0.1

serves until it is interrupted, for a rehearsal that costs nothing: what it answers names the strongest tokens of the prompt.

Faults are drawn from a seeded generator: errors before and after a create was accepted, connections closed without an answer,
answers that never come, requests that expire or err, results shuffled, doubled and cut. `BatchServer.faults` off, it is honest.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import tyro

Answer = Callable[[str, str], str]

GOOD = '{"title": "storms at sea", "common_semantic": "Storms at sea.", "certainty": 0.8}'
TRUE_TIME = time.time
"""The clock of the server's machine, whatever a test makes of the client's."""
ERRORS = {429: "rate_limit_error", 500: "api_error", 529: "overloaded_error"}


class BatchServer:
    """`with BatchServer(...) as server:` serves at `server.url`. `answer(custom_id, prompt)` is the text of a reply."""

    def __init__(
        self,
        seed: int = 0,
        faults: float = 0.0,
        expired: float = 0.0,
        hang_s: float = 2.0,
        answer: Answer = lambda i, p: GOOD,
        port: int = 0,
    ) -> None:
        self.faults, self.expired, self.hang_s, self.answer = faults, expired, hang_s, answer
        self.batches: dict[str, dict[str, Any]] = {}
        self.calls: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.looks_until_ended = 2
        self.bytes_per_token = 5.0
        self.ahead_s = 0.0
        """How far the server's clock, in `created_at` and in the header Date, is ahead of the client's."""
        self.creates: list[str] = []
        """What befalls the next creates: "ok", a status, "accepted, cut" and the like; behind its end, what `faults` draws."""
        self.invalid: set[str] = set()
        """Ends of custom ids whose requests are answered with invalid_request_error."""
        self.keys: set[str] = set()
        """API keys seen."""
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"server_state": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "BatchServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def draw(self, share: float) -> bool:
        with self._lock:
            return self._random.random() < share

    def choose(self, options: list[Any]) -> Any:
        with self._lock:
            return self._random.choice(options)

    def create(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        results = [self._result(request) for request in requests]
        with self._lock:
            self._random.shuffle(results)
            name = f"msgbatch_{len(self.batches):06d}"
            now = self.now()
            self.batches[name] = {"requests": requests, "results": results, "looks": 0, "created": now, "archived": None}
        return self.shown(name)

    def now(self) -> datetime:
        return datetime.fromtimestamp(TRUE_TIME() + self.ahead_s, UTC)

    def _result(self, request: dict[str, Any]) -> dict[str, Any]:
        custom_id = request["custom_id"]
        if any(custom_id.endswith(end) for end in self.invalid):
            return {"custom_id": custom_id, "result": errored("invalid_request_error")}
        if self.draw(self.expired):
            kind = self.choose(["expired"] * 8 + ["errored", "canceled"])
            return {"custom_id": custom_id, "result": errored("api_error") if kind == "errored" else {"type": kind}}
        prompt = request["params"]["messages"][0]["content"]
        return {"custom_id": custom_id, "result": succeeded(request["params"]["model"], self.answer(custom_id, prompt))}

    def shown(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        ended = batch["looks"] >= self.looks_until_ended
        kinds = Counter(item["result"]["type"] for item in batch["results"]) if ended else Counter()
        counts = {kind: kinds[kind] for kind in ("succeeded", "errored", "expired", "canceled")}
        return {
            "id": name, "type": "message_batch", "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts | {"processing": 0 if ended else len(batch["results"])},
            "created_at": batch["created"].isoformat(), "expires_at": (batch["created"] + timedelta(days=1)).isoformat(),
            "ended_at": batch["created"].isoformat() if ended else None, "archived_at": batch["archived"],
            "cancel_initiated_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{name}/results" if ended else None,
        }  # fmt: skip

    def look(self, name: str) -> dict[str, Any]:
        with self._lock:
            self.batches[name]["looks"] += 1
        return self.shown(name)

    def sent(self) -> Counter[str]:
        """How often each request was accepted, by key (the custom id without job and number)."""
        return Counter(r["custom_id"].split("-", 2)[2] for b in self.batches.values() for r in b["requests"])

    def prefixes(self) -> Counter[str]:
        """Accepted batches by job and number: more than one of a kind is a batch paid for twice."""
        return Counter("-".join(b["requests"][0]["custom_id"].split("-")[:2]) for b in self.batches.values())

    def successes(self) -> Counter[str]:
        """Answers paid for, by key."""
        return Counter(
            item["custom_id"].split("-", 2)[2]
            for batch in self.batches.values()
            for item in batch["results"]
            if item["result"]["type"] == "succeeded"
        )


def errored(kind: str) -> dict[str, Any]:
    return {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": "injected"}}}


def succeeded(model: str, text: str, stop_reason: str = "end_turn") -> dict[str, Any]:
    message = {
        "id": "msg_0", "type": "message", "role": "assistant", "model": model, "stop_sequence": None,
        "stop_reason": stop_reason, "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 100, "output_tokens": 20},
    }  # fmt: skip
    return {"type": "succeeded", "message": message}


class _Handler(BaseHTTPRequestHandler):
    server_state: BatchServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
        self.server_state.keys.add(self.headers.get("x-api-key") or bearer)
        path = urlsplit(self.path).path
        if path.endswith("/count_tokens"):
            self.server_state.calls["count_tokens"] += 1
            self._json({"input_tokens": max(1, round(len(body) / self.server_state.bytes_per_token))})
        elif path.endswith("/batches"):
            self._create(json.loads(body)["requests"])
        else:
            self._error(404)

    def _create(self, requests: list[dict[str, Any]]) -> None:
        state = self.server_state
        state.calls["create"] += 1
        if state.creates:
            kind = state.creates.pop(0)
        elif not state.draw(state.faults * 2):  # creates are few, so they fail more often
            self._json(state.create(requests))
            return
        else:
            kind = state.choose(["429", "500", "529", "hang", "accepted, cut", "accepted, 500", "accepted, hang", "cut"])
        if kind == "ok":
            self._json(state.create(requests))
            return
        state.injected[kind] += 1
        if kind.startswith("accepted"):
            state.create(requests)
        self._fail(kind.removeprefix("accepted, "))

    def do_GET(self) -> None:
        state, parts = self.server_state, urlsplit(self.path)
        if state.draw(state.faults):
            kind = state.choose(["429", "500", "529", "hang", "cut"])
            state.injected[kind] += 1
            self._fail(kind)
        elif parts.path.endswith("/results"):
            self._results(parts.path.split("/")[-2])
        elif parts.path.endswith("/batches"):
            self._list({name: values[0] for name, values in parse_qs(parts.query).items()})
        else:
            state.calls["retrieve"] += 1
            name = parts.path.rsplit("/", 1)[1]
            self._json(state.look(name)) if name in state.batches else self._error(404)

    def _list(self, query: dict[str, str]) -> None:
        state = self.server_state
        state.calls["list"] += 1
        names = sorted(state.batches, reverse=True)
        if "after_id" in query:
            names = names[names.index(query["after_id"]) + 1 :]
        limit = int(query.get("limit", 20))
        page = [state.look(name) for name in names[:limit]]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        self._json({"data": page, "has_more": len(names) > limit, **ends})

    def _results(self, name: str) -> None:
        state = self.server_state
        state.calls["results"] += 1
        lines = [json.dumps(item).encode() for item in state.batches[name]["results"]]
        if state.draw(2 * state.faults):
            state.injected["doubled"] += 1
            lines += lines[: len(lines) // 2]
        content = b"\n".join(lines) + b"\n"
        cut = len(content)
        if state.draw(2 * state.faults):
            state.injected["results cut"] += 1
            cut = int(cut * state.choose([0.0, 0.1, 0.5, 0.9, 0.999]))
        self.send_response(200)
        self.send_header("content-type", "application/x-jsonl")
        if cut == len(content) or state.draw(0.5):  # without a length, nothing but the content shows that it was cut
            self.send_header("content-length", str(len(content)))
        else:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(content[:cut])
        if cut < len(content):
            self.close_connection = True

    def _fail(self, kind: str) -> None:
        if kind == "hang":
            time.sleep(self.server_state.hang_s)
            self.close_connection = True
        elif kind == "cut":
            self.close_connection = True
        else:
            self._error(int(kind))

    def _error(self, status: int) -> None:
        kind = ERRORS.get(status, "not_found_error")
        self._json({"type": "error", "error": {"type": kind, "message": "injected"}}, status)

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        if status == 429:
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(content)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(self.server_state.now(), usegmt=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the client was killed
            pass


def pretended(custom_id: str, prompt: str) -> str:
    """An answer to any question of `interpretability.explain` or `interpretability.score`, without any understanding."""
    lines = [json.loads(line) for line in prompt.splitlines() if line.startswith("{")]
    if lines and "sentence" in lines[0]:
        return json.dumps({"answers": [1] * (len(lines) if "Description:" in prompt else 1)})
    tokens = Counter(token.strip() for line in lines for token, _ in line["peaks"] if token.strip())
    names = [token for token, _ in tokens.most_common(3)] or ["white space"]
    said = f"Rehearsal, not an explanation: fires most on {', '.join(names)}."
    pieces = {"dominant_tokens": names, "patterns": said, "summary": said, "context": said}
    return json.dumps({"title": f"rehearsal: {names[0]}", "common_semantic": said, "certainty": 0.5} | pieces)


def main(port: int = 8787, faults: float = 0.0, expired: float = 0.0) -> None:
    """Serve on 127.0.0.1 until interrupted.

    Args:
        port: Port of the loopback.
        faults: Share of calls that fail: 429, 500, 529, time-outs, connections cut before and after the work was done.
        expired: Share of requests that expire, err or are cancelled.
    """
    with BatchServer(faults=faults, expired=expired, answer=pretended, port=port) as server:
        print(f"ANTHROPIC_API_KEY=any ANTHROPIC_BASE_URL={server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(server.batches)} batches, {sum(server.sent().values())} requests, faults {dict(server.injected)}")


if __name__ == "__main__":
    tyro.cli(main)
