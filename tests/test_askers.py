"""The askers that answer at once: a server that speaks OpenAI's chat completions, and a Llama in this process."""

import io
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.artifact import verify
from core.cli import parse
from interpretability.asking import SAVED
from interpretability.explain import ExplainConfig, chosen, run
from interpretability.records import read_explanations
from tests import written_latents as written
from tests.fake_batches import GOOD
from tests.interp_folders import solo
from tests.tiny import tiny_llama

KEY = "sk-test-9876543210"


class ChatHandler(BaseHTTPRequestHandler):
    """Answers with what `script` says for the n-th call: a status, or the text of a reply; GOOD behind its end."""

    script: list[Any]
    seen: list[dict[str, Any]]
    lock: threading.Lock

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            said = self.script.pop(0) if self.script else GOOD
            self.seen.append(body | {"path": self.path, "key": self.headers.get("authorization", "")})
        status, text = (said, "") if isinstance(said, int) else (200, said)
        if isinstance(said, tuple):
            status, text = said
        reply: Any = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        if text == "length":
            reply["choices"][0]["finish_reason"] = "length"
        elif text == "no chat":
            reply = {"error": KEY}
        elif isinstance(text, dict):
            reply = {"choices": [text]}
        refusal = text or f"no: {self.headers.get('authorization')}"
        content = json.dumps(reply).encode() if status == 200 else refusal.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[ChatHandler]]]:
    handler = type("Handler", (ChatHandler,), {"script": [], "seen": [], "lock": threading.Lock()})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/v1", handler
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fires = [written.on("soldiers"), written.on("she", "her"), lambda s, i: 0.0, written.on("?"), written.on("of")]
    return written.write_top(tmp_path_factory.mktemp("written") / "top", written.sentences(600), fires, n=10)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interpretability.chat_server.time.sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def config(top: Path, out: Path, *flags: str) -> ExplainConfig:
    return parse(ExplainConfig, "", ["run", "--top", str(top), "--out", str(out), *flags])


def openai(top: Path, out: Path, url: str, *flags: str) -> ExplainConfig:
    return config(top, out, "--backend", "openai", "--base-url", url, "--model", "m", "--concurrency", "1", "--yes", *flags)


def test_a_server_is_asked_again_where_it_is_busy(top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]]) -> None:
    url, handler = server
    handler.script[:] = [429, 503, GOOD, "length", "no chat", "It is about {ships."]
    with pytest.raises(ValueError, match=r"3 of 4 answers failed \(75%\), more than --max-failed-share 0.1"):
        run(openai(top, tmp_path / "out", url), solo())
    found = read_explanations(tmp_path / "out")
    states = Counter(explanation.state for explanation in found.values())
    assert states == {"valid": 1, "failed": 4}
    reasons = {explanation.reason.split(":")[0] for explanation in found.values() if explanation.state == "failed"}
    assert reasons == {"never fired", "cut off at --max-tokens", "the server's reply is no chat completion", "malformed reply"}
    assert any(explanation.reply == "It is about {ships." for explanation in found.values())
    assert len(handler.seen) == 6
    assert {(call["path"], call["model"], call["key"]) for call in handler.seen} == {
        ("/v1/chat/completions", "m", f"Bearer {KEY}")
    }
    verify(tmp_path / "out")


@pytest.mark.parametrize(("share", "ends_well"), [("0.24", False), ("0.25", True), ("1", True), ("0", False)])
def test_more_failures_than_allowed_end_with_an_error_and_all_results(
    top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]], share: str, ends_well: bool
) -> None:
    """One of four answers fails; the latent that never fires was not asked about. Given again, the command says the same."""
    url, handler = server
    handler.script[:] = ["no answer"]
    for _ in range(2):
        with nullcontext() if ends_well else pytest.raises(ValueError, match=f"1 of 4 .*--max-failed-share {share}"):
            run(openai(top, tmp_path / "out", url, "--max-failed-share", share), solo())
        assert Counter(found.state for found in read_explanations(tmp_path / "out").values()) == {"valid": 3, "failed": 2}
        verify(tmp_path / "out")
    assert len(handler.seen) == 4
    run(openai(top, tmp_path / "out", url, "--max-failed-share", "0.5"), solo())


def test_saved_replies_are_damaged_by_no_bit_unnoticed(
    top: Path, memory_path: Path, server: tuple[str, type[ChatHandler]]
) -> None:
    url, handler = server
    handler.script[:] = [GOOD, 401]
    with pytest.raises(ValueError, match="HTTP 401"):
        run(openai(top, memory_path / "out", url), solo())
    path, asked = memory_path / "out" / SAVED, len(handler.seen)
    whole = path.read_bytes()
    for place in random.Random(1).sample(range(8 * len(whole)), 100):
        path.write_bytes(whole[: place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1 :])
        with pytest.raises(ValueError, match=rf"{SAVED}: line 1 does not fit its checksum.*nothing was asked"):
            run(openai(top, memory_path / "out", url), solo())
    path.write_bytes(whole)
    assert len(handler.seen) == asked
    run(openai(top, memory_path / "out", url), solo())
    assert len(handler.seen) == asked + 3


def test_parameters_that_a_server_refuses_are_spared_once(
    top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]], caplog: pytest.LogCaptureFixture
) -> None:
    url, handler = server
    handler.script[:] = [
        (400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
        (422, '{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted"}]}'),
    ]
    run(openai(top, tmp_path / "out", url, "--attempts", "1"), solo())
    assert len(handler.seen) == 2 + 4
    assert [{"max_tokens", "max_completion_tokens", "seed", "temperature"} & set(call) for call in handler.seen] == [
        {"max_tokens", "seed", "temperature"}, {"max_completion_tokens", "seed", "temperature"},
        *[{"max_completion_tokens", "temperature"}] * 4,
    ]  # fmt: skip
    assert handler.seen[-1]["max_completion_tokens"] == 2048
    assert caplog.text.count("refuses the parameter") == 2


@pytest.mark.parametrize("refusal", ["max_tokens is too large: 2048", "Extra inputs are not permitted: model"])
def test_other_refusals_end_at_once(top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]], refusal: str) -> None:
    url, handler = server
    handler.script[:] = [(400, refusal)]
    with pytest.raises(ValueError, match="HTTP 400: "):
        run(openai(top, tmp_path / "out", url), solo())
    assert all({"max_tokens", "seed", "temperature"} <= set(call) for call in handler.seen)


def test_content_in_parts_and_reasoning_without_an_answer(
    top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]]
) -> None:
    url, handler = server
    parts = [{"type": "thinking", "text": "{"}, {"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}]
    handler.script[:] = [
        {"message": {"content": parts}, "finish_reason": "stop"},
        {"message": {"content": None, "reasoning_content": f"Perhaps {GOOD}"}, "finish_reason": "stop"},
        {"message": {"content": "", "reasoning": "Let me"}, "finish_reason": "length"},
        {"message": {"content": [5]}, "finish_reason": "stop"},
    ]
    run(openai(top, tmp_path / "out", url, "--max-failed-share", "1"), solo())
    found = [e for e in read_explanations(tmp_path / "out").values() if e.reason != "never fired"]
    assert [(e.state, e.reason, e.reply) for e in found] == [
        ("valid", "", ""), ("failed", "the model gave its reasoning and no answer", f"Perhaps {GOOD}"),
        ("failed", "cut off at --max-tokens", "Let me"), ("failed", "the server's reply is no chat completion", found[3].reply),
    ]  # fmt: skip


def test_refusals_end_at_once_and_do_not_tell_the_key(top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]]) -> None:
    url, handler = server
    handler.script[:] = [GOOD, 401]
    with pytest.raises(ValueError, match=r"HTTP 401: no: Bearer \[API key\]") as refused:
        run(openai(top, tmp_path / "out", url), solo())
    assert KEY not in str(refused.value)
    asked = len(handler.seen)
    run(openai(top, tmp_path / "out", url), solo())  # what was answered is not asked again
    assert len(handler.seen) == asked + 3
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_a_server_that_is_away(top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]]) -> None:
    url, handler = server
    handler.script[:] = [500] * 9
    with pytest.raises(ConnectionError, match=r"HTTP 500: .*, 2 times; the same command goes on"):
        run(openai(top, tmp_path / "a", url, "--attempts", "2"), solo())
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9/v1/chat/completions"):
        run(openai(top, tmp_path / "b", "http://127.0.0.1:9/v1", "--attempts", "1"), solo())


def test_cost_of_a_server(
    top: Path, tmp_path: Path, server: tuple[str, type[ChatHandler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    monkeypatch.setattr("sys.stdin", io.StringIO())
    prices = ("--price-in", "1", "--price-out", "2")
    with pytest.raises(ValueError, match="give --price-in and --price-out"):
        run(openai(top, tmp_path / "a", url, "--budget", "1"), solo())
    with pytest.raises(ValueError, match=r"--budget 0.01: "):  # 4 answers of 2,048 tokens cost more
        run(openai(top, tmp_path / "b", url, "--budget", "0.01", *prices), solo())
    with pytest.raises(ValueError, match="add --yes"):
        run(config(top, tmp_path / "c", "--backend", "openai", "--base-url", url, "--model", "m"), solo())
    assert not handler.seen


def test_a_llama_in_this_process(top: Path, tmp_path: Path) -> None:
    """A random model rambles: nothing it says is stored as an explanation, and what does not fit its context is told."""
    roomy = tiny_llama(tmp_path / "roomy", max_seq_len=16_384)
    flags = ("--backend", "llama", "--max-tokens", "5", "--examples", "2", "--latents", "0-2", "--max-failed-share", "1")
    run(config(top, tmp_path / "out", "--model", str(roomy), *flags), solo())
    found = read_explanations(tmp_path / "out")
    assert list(found) == [0, 1, 2]
    assert {explanation.state for explanation in found.values()} == {"failed"}
    assert found[0].method == "llama"
    assert found[0].model.startswith("roomy ")
    assert found[0].reason.startswith(("cut off", "malformed"))
    narrow = tiny_llama(tmp_path / "narrow")
    run(config(top, tmp_path / "narrow-out", "--model", str(narrow), *flags), solo())
    assert "the context holds 128" in read_explanations(tmp_path / "narrow-out")[0].reason


@pytest.mark.parametrize(("flags", "message"), [
    (["--backend", "openai"], "--model is missing"),
    (["--backend", "llama"], "--model is missing"),
    (["--latents", "3-9", "--backend", "token_statistics"], "'3-9' is no latent or range of latents from 0 to 4"),
    (["--max-tokens", "0"], "--max-tokens must be at least 1"),
    (["--max-failed-share", "1.1"], "--max-failed-share must be from 0 to 1"),
    (["--max-failed-share", "nan"], "--max-failed-share"),
])  # fmt: skip
def test_bad_flags(top: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(config(top, tmp_path / "out", *flags), solo())


def test_steps_are_for_batches(top: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"submit: only the backend anthropic works in steps; give run for token_statistics"):
        parse(ExplainConfig, "", ["submit", "--top", str(top), "--out", str(tmp_path / "out")])


def test_latents_by_number_and_range() -> None:
    assert chosen("", 3) == [0, 1, 2]
    assert chosen("5, 1-2,2", 6) == [1, 2, 5]
    for text in ("6", "2-1", "a", "-1", "1-"):
        with pytest.raises(ValueError, match="is no latent"):
            chosen(text if text != "1-" else "1-x", 6)
