"""Message Batches against a server that fails as real ones do: nothing lost, nothing paid for twice, the key told to nobody."""

import io
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from core.artifact import verify
from core.cli import parse
from core.lines import sealed
from interpretability.explain import ExplainConfig, run
from interpretability.labels.llm_explainer import LLMExplainer
from interpretability.llm.batch_api import DEFAULT_MODEL, LIST_PRICES, open_client
from interpretability.llm.batch_journal import JOURNAL
from interpretability.llm.batch_results import checked
from interpretability.llm.client import Reply, Request, writable
from interpretability.llm.message_batches import BatchJob
from interpretability.records import explanation_lines, open_top, read_explanations
from tests import written_latents as written
from tests.batch_client import REPLIES, client_config, complete, requests, run_client
from tests.fake_batches import BatchServer, pretended, succeeded
from tests.faults import ForkServer
from tests.interp_folders import solo
from tests.test_prompts import malformed

KEY = "sk-ant-test-0123456789"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fires = [written.on("soldiers"), written.on("she", "her"), lambda s, i: 0.0, written.on("?"), written.on("of")]
    return written.write_top(tmp_path_factory.mktemp("written") / "top", written.sentences(600), fires, n=10)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as serving:
        yield serving


def flags(action: str, top: Path, out: Path, server: BatchServer, *more: str) -> ExplainConfig:
    argv = [
        action,
        "--top",
        str(top),
        "--out",
        str(out),
        "--backend",
        "anthropic",
        "--base-url",
        server.url,
        "--poll-s",
        "0.01",
    ]
    return parse(ExplainConfig, "", [*argv, "--settle-s", "0.1", *more])


def test_run_explains_every_latent_that_fires_and_keeps_what_came(top: Path, tmp_path: Path, server: BatchServer) -> None:
    run(flags("run", top, tmp_path / "out", server, "--yes"), solo())
    found = read_explanations(tmp_path / "out")
    assert [e.state for e in found.values()] == ["valid", "valid", "failed", "valid", "valid"]
    assert found[2].reason == "never fired"
    assert (found[0].title, found[0].explanation, found[0].certainty) == ("storms at sea", "Storms at sea.", 0.8)
    assert (found[0].method, found[0].model) == ("anthropic", DEFAULT_MODEL)
    raw = (tmp_path / "out" / "raw" / "batch-00000.jsonl").read_text().splitlines()
    assert len(raw) == 4
    assert all(json.loads(line)["result"]["message"]["usage"] for line in raw)
    verify(tmp_path / "out")
    calls = server.calls.copy()
    run(flags("run", top, tmp_path / "out", server, "--yes"), solo())
    assert server.calls == calls  # a finished folder asks nothing


def test_the_five_pieces_reach_the_folder(top: Path, tmp_path: Path) -> None:
    with BatchServer(answer=pretended) as server:
        run(flags("run", top, tmp_path / "out", server, "--yes", "--style", "title"), solo())
        assert '"dominant_tokens"' in next(iter(server.batches.values()))["requests"][0]["params"]["system"]
    found = read_explanations(tmp_path / "out")[0]
    assert (found.state, found.title) == ("valid", "rehearsal: soldiers")
    assert found.explanation == "Rehearsal, not an explanation: fires most on soldiers."
    assert set(found.details) == {"style", "dominant_tokens", "patterns", "context"}
    assert found.details["dominant_tokens"] == ["soldiers"]


def test_steps(top: Path, tmp_path: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(flags("submit", top, out, server, "--yes"), solo())
    assert "4 requests, msgbatch_000000 in_progress" in capsys.readouterr().out
    run(flags("status", top, out, server), solo())
    assert "none answered; 0 to send" in capsys.readouterr().out
    while not (out / "explanations.jsonl.gz").exists():
        run(flags("collect", top, out, server), solo())
    assert len(read_explanations(out)) == 5
    assert server.calls["create"] == 1


def test_nothing_is_sent_without_consent_or_beyond_the_budget(
    top: Path, tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ValueError, match=r"4 requests, about [\d,]+ tokens .*\$0\.00\d\d; nothing was sent; add --yes"):
        run(flags("run", top, tmp_path / "a", server), solo())
    with pytest.raises(ValueError, match=r"--budget 0.001: .*\$0\.00\d\d .*nothing was sent"):
        run(flags("run", top, tmp_path / "b", server, "--yes", "--budget", "0.001"), solo())
    with pytest.raises(ValueError, match="price is not known"):
        run(flags("run", top, tmp_path / "c", server, "--yes", "--model", "claude-of-tomorrow"), solo())
    assert not server.calls  # not so much as a count of tokens
    run(flags("run", top, tmp_path / "b", server, "--yes", "--budget", "1"), solo())
    assert server.calls["create"] == 1


def test_a_count_above_the_guess_is_held_to_the_budget_and_asked_again(
    top: Path, tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.bytes_per_token = 0.001  # a thousand times what the length of the text promised
    with pytest.raises(ValueError, match=r"--budget 0.1: .*nothing was sent"):
        run(flags("run", top, tmp_path / "a", server, "--yes", "--budget", "0.1"), solo())
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return "y" if len(questions) == 1 else "n"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(ValueError, match="not sent"):
        run(flags("run", top, tmp_path / "b", server), solo())
    assert "3 bytes a token" in questions[0]
    assert "by the server's count of a few" in questions[1]
    assert server.calls["create"] == 0


def test_the_cost_is_that_of_the_formula(tmp_path: Path, server: BatchServer) -> None:
    """Half the list price; input by length, then as the server counts it (a fifth of it), output at most --max-tokens."""
    config = client_config(server.url, 3, max_tokens=1000)
    from core.artifact import building

    with building(tmp_path / "out", "replies", config, solo()) as builder, open_client(config) as client:
        job = BatchJob(builder, config, requests(3), client)
        guess = job.estimate(job.to_send())
        assert guess.input_tokens == round(sum(request.bytes for request in requests(3)) / 3)
        job.count()
        estimate = job.estimate(job.to_send())
        assert estimate.input_tokens > guess.input_tokens  # these requests are all envelope
        price = LIST_PRICES[DEFAULT_MODEL]
        assert estimate.output_tokens == 3000
        assert estimate.dollars == pytest.approx(0.5 * (estimate.input_tokens * price.input + 3000 * price.output) / 1e6)
        job.run()
        assert job.spent() == pytest.approx(0.5 * 3 * (100 * price.input + 20 * price.output) / 1e6)


def test_the_key_is_in_no_output(
    top: Path, tmp_path: Path, server: BatchServer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    run(flags("run", top, tmp_path / "out", server, "--yes"), solo())
    assert server.keys == {KEY}  # it did reach the server
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    streams = capsys.readouterr()
    assert KEY not in caplog.text + streams.out + streams.err


def test_no_key_is_one_line(top: Path, tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(ValueError, match="ANTHROPIC_API_KEY is not set"):
        run(flags("run", top, tmp_path / "out", server, "--yes"), solo())


def test_invalid_requests_are_not_sent_again_and_others_are(tmp_path: Path) -> None:
    with BatchServer(seed=1, expired=0.5) as server:
        server.invalid = {"-r3"}
        replies = complete(tmp_path / "out", client_config(server.url, 40), solo())
        assert len(replies) == 40
        assert replies["r3"].problem.startswith("invalid_request_error")
        assert [key for key, reply in replies.items() if reply.problem] == ["r3"]
        assert server.sent()["r3"] == 1
        assert max(server.sent().values()) > 2
        assert set(server.successes().values()) == {1}


def test_a_thousand_malformed_replies_are_failed_with_reason_and_text(top: Path, tmp_path: Path) -> None:
    """From the server's answer to the line on disk: none is taken for an explanation, and what was said is kept."""
    said = list(malformed(1000))
    with BatchServer(answer=lambda custom_id, prompt: said[int(custom_id.rsplit("r", 1)[1])]) as server:
        replies = complete(tmp_path / "out", client_config(server.url, 1000), solo())
        assert set(server.sent().values()) == {1}  # a malformed answer was paid for: it is not bought again
    explainer = LLMExplainer(Named(), open_top(top), "semantic", 20)
    by_latent = {f"latent-{i}": replies[f"r{i}"] for i in range(1000)}
    lines = [json.loads(line) for line in explanation_lines(explainer.explanations(range(1000), by_latent))]
    assert [line["latent"] for line in lines] == list(range(1000))
    assert {line["state"] for line in lines} == {"failed"}
    assert {line["title"] + line["explanation"] for line in lines} == {""}
    assert all(line["reason"].startswith("malformed reply: ") for line in lines)
    assert [line["reply"] for line in lines] == [writable(text) for text in said]


class Named:
    """An asker that is never asked."""

    name, model = "anthropic", "m"

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        raise AssertionError


def test_attempts_run_out(tmp_path: Path) -> None:
    with BatchServer(seed=1, expired=1.0) as server:
        replies = complete(tmp_path / "out", client_config(server.url, 5, attempts=3), solo())
        assert all(reply.problem and not reply.text for reply in replies.values())
        assert set(server.sent().values()) == {3}


def test_a_batch_of_somebody_else_that_looks_alike_is_not_taken(tmp_path: Path) -> None:
    """The create is cut off before it is accepted, while another job has sent a batch of the same size."""
    with BatchServer() as server:
        stranger = [{"custom_id": f"other-0-x{i}", "params": {"model": "m", "messages": [{"content": ""}]}} for i in range(4)]
        server.create(stranger)
        config = client_config(server.url, 4)
        (tmp_path / "out").mkdir()
        replies = complete(tmp_path / "out", config, solo())  # honest creates: nothing to look for
        assert len(replies) == 4
        journal = tmp_path / "late" / JOURNAL
        from core.artifact import building

        with building(tmp_path / "late", "replies", config, solo()) as builder, open_client(config) as client:
            BatchJob(builder, config, requests(4), client)
            with journal.open("ab") as file:  # as a kill between intent and create leaves it
                file.write(sealed({"event": "intent", "number": 0, "before": [], "keys": ["r0", "r1", "r2", "r3"]}))
            before = len(server.batches)
            job = BatchJob(builder, config, requests(4), client)
            job.run()
            assert len(job.replies()) == 4
            assert len(server.batches) == before + 1
        assert "not_ours" in journal.read_text()


def faulty_run(folder: Path, server: BatchServer, fork_server: ForkServer, n: int, size: int, kills: int, seed: int) -> int:
    """Kill the client `kills` times, at file operations and at moments in between, then let it end; returns the kills."""
    generator, killed = random.Random(seed), 0
    url, arguments = server.url, (str(n), str(size))
    while killed < kills:
        if killed % 2:
            status = fork_server.run(run_client, folder, url, *arguments, exit_at=generator.randint(1, 12))
        else:
            status = fork_server.run(run_client, folder, url, *arguments, kill_after=generator.uniform(0.02, 0.5))
        if status == 0:
            break
        assert status in (9, -9)
        killed += 1
    for _ in range(3):
        if fork_server.run(run_client, folder, url, *arguments) == 0:
            return killed
    raise AssertionError("the client did not come to its end")


def check_accounts(folder: Path, server: BatchServer, n: int) -> None:
    """Every request has one final record, and no batch was created twice."""
    lines = (folder / REPLIES).read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(f"r{i}" for i in range(n))
    assert max(server.prefixes().values()) == 1
    assert max(server.successes().values()) == 1
    finals = {line.split("\t")[0] for line in lines if not line.split("\t")[1]}
    assert finals == set(server.successes())
    verify(folder)


def test_faults_and_kills_neither_lose_nor_double(memory_path: Path, fork_server: ForkServer) -> None:
    with BatchServer(seed=3, faults=0.1, expired=0.2, hang_s=0.8) as server:
        assert faulty_run(memory_path / "out", server, fork_server, n=200, size=60, kills=8, seed=3) >= 4
        check_accounts(memory_path / "out", server, 200)


@pytest.mark.faults
def test_ten_thousand_requests_and_fifty_kills(memory_path: Path, fork_server: ForkServer) -> None:
    with BatchServer(seed=4, faults=0.1, expired=0.2, hang_s=0.8) as server:
        assert faulty_run(memory_path / "out", server, fork_server, n=10_000, size=200, kills=50, seed=4) == 50
        check_accounts(memory_path / "out", server, 10_000)


def line(key: str, text: str = "x") -> bytes:
    return json.dumps({"custom_id": key, "result": succeeded("m", text)}).encode()


@pytest.mark.parametrize(("lines", "problem"), [
    ([line("a"), line("b")], ""),
    ([line("b"), line("a"), line("b")], ""),
    ([line("a")], "1 of 2 results arrived"),
    ([line("a"), line("b")[:-9]], "line 2 is damaged"),
    ([line("a"), line("c")], "does not hold"),
    ([line("a"), line("b"), line("b", "y")], "two different results"),
    ([line("a"), b"[" * 100_000], "damaged"),
    ([], "0 of 2 results arrived"),
])  # fmt: skip
def test_only_whole_downloads_are_taken(lines: list[bytes], problem: str) -> None:
    found, told = checked(b"\n".join(lines), {"a", "b"}, {"succeeded": 2})
    assert problem in told
    assert len(found) == (0 if problem else 2)


def test_a_download_cut_at_any_byte_is_noticed() -> None:
    content = line("a") + b"\n" + line("b")
    for length in range(len(content)):
        assert checked(content[:length], {"a", "b"}, {"succeeded": 2})[1], length


def test_the_default_model_is_one_that_the_sdk_lists() -> None:
    from typing import get_args

    from anthropic.types import Model

    listed: Any = get_args(get_args(Model)[0])
    assert set(LIST_PRICES) <= set(listed)
    assert DEFAULT_MODEL in LIST_PRICES
