"""Nothing is paid for twice: whatever the clocks say, whatever became of the journal, and wherever a copy of it is used."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core import files
from core.artifact import building
from core.lines import read_lines, sealed
from interpretability.batch_api import open_client
from interpretability.batch_journal import JOURNAL, Journal
from interpretability.message_batches import BatchJob
from tests.batch_client import REPLIES, ClientConfig, client_config, complete, requests
from tests.fake_batches import TRUE_TIME, BatchServer
from tests.interp_folders import solo

MINUTE, DAY = 60.0, 86_400.0


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as serving:
        yield serving


def quick(server: BatchServer, n: int, **flags: object) -> ClientConfig:
    return client_config(server.url, n, **({"settle_s": 0.05} | flags))


def check_paid_once(server: BatchServer, n: int) -> None:
    assert server.successes() == {f"r{i}": 1 for i in range(n)}
    assert max(server.prefixes().values()) == 1


# --- clocks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ahead", [0, 1, -1, 59, -59, 599, -601, 15 * MINUTE, -15 * MINUTE, DAY, -DAY, 40 * DAY, -40 * DAY], ids="{:+.0f}s".format
)
def test_creates_without_an_answer_are_found_whatever_the_clocks_say(tmp_path: Path, server: BatchServer, ahead: float) -> None:
    server.ahead_s = ahead
    server.creates = ["accepted, cut", "accepted, 500", "cut", "429"]
    complete(tmp_path / "out", quick(server, 40, batch_requests=20), solo())
    check_paid_once(server, 40)
    assert len(server.batches) == 2


@pytest.mark.parametrize("jump", [15 * MINUTE, -15 * MINUTE, 3 * DAY, -3 * DAY])
@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_clock_that_jumps_between_the_create_and_the_search(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch, jump: float, whose: str
) -> None:
    """As long as the answer is awaited, and again where a killed client is begun anew."""
    config = quick(server, 20, batch_requests=10)
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: TRUE_TIME() + clock[0])

    def leap() -> None:
        if whose == "client":
            clock[0] += jump
        else:
            server.ahead_s += jump

    honest = server.create

    def create(found: list[dict[str, Any]]) -> dict[str, Any]:
        shown = honest(found)
        leap()
        return shown

    monkeypatch.setattr(server, "create", create)
    server.creates = ["accepted, cut", "accepted, cut"]
    with pytest.raises(Killed), building(tmp_path / "out", "replies", config, solo()) as builder, open_client(config) as client:
        BatchJob(builder, config, requests(20), client, sleep=killed).run()
    leap()
    complete(tmp_path / "out", config, solo())
    check_paid_once(server, 20)


class Killed(BaseException):
    """A kill."""


def killed(seconds: float) -> None:
    raise Killed


def test_a_batch_that_the_server_dates_before_those_known_is_found(tmp_path: Path, server: BatchServer) -> None:
    """Its own machines' clocks differ: the new batch stands among 30 older ones, of the same size, in the list."""
    strangers = [[{"custom_id": f"s-{i}-x", "params": {"model": "m", "messages": [{"content": ""}]}}] for i in range(30)]
    for stranger in strangers:
        server.create(stranger)
    honest = server.create

    def create(found: list[dict[str, Any]]) -> dict[str, Any]:
        name = honest(found)["id"]
        server.batches["msgbatch_000025x"] = server.batches.pop(name)
        return server.shown("msgbatch_000025x")

    server.create = create  # type: ignore[method-assign]
    server.creates = ["accepted, cut"]
    complete(tmp_path / "out", quick(server, 1), solo())
    assert server.sent()["r0"] == 1
    assert server.calls["results"] == 2  # those known before are not looked into


def test_a_batch_that_has_not_begun_counts_as_ours(tmp_path: Path, server: BatchServer) -> None:
    """The server says of it that it holds nothing yet."""
    server.looks_until_ended = 4
    shown = server.shown

    def empty_at_first(name: str) -> dict[str, Any]:
        found = shown(name)
        if server.batches[name]["looks"] < 3:
            found["request_counts"] = dict.fromkeys(found["request_counts"], 0)
        return found

    server.shown = empty_at_first  # type: ignore[method-assign]
    server.creates = ["accepted, cut"]
    complete(tmp_path / "out", quick(server, 5), solo())
    check_paid_once(server, 5)


def test_results_that_are_gone_are_not_bought_again_unasked(tmp_path: Path, server: BatchServer) -> None:
    server.creates = ["accepted, cut"]
    server.looks_until_ended = 0
    honest = server.create

    def create(found: list[dict[str, Any]]) -> dict[str, Any]:
        name = honest(found)["id"]
        server.batches[name]["archived"] = server.now().isoformat()
        return server.shown(name)

    server.create = create  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"msgbatch_000000 may be one of this job .*batches\.jsonl to send everything again"):
        complete(tmp_path / "out", quick(server, 5), solo())
    assert len(server.batches) == 1


# --- damage ------------------------------------------------------------------------------------------------------------------


def half_done(folder: Path, server: BatchServer) -> ClientConfig:
    """A folder with a batch that was collected, one under way, one refused, and one whose create was cut off."""
    config = quick(server, 4, batch_requests=1)
    with building(folder, "replies", config, solo()) as builder, open_client(config) as client:
        job = BatchJob(builder, config, requests(4), client)
        job._create(["r0"])
        while job.under_way:
            job.collect()
        server.looks_until_ended = 10**6
        server.creates = ["ok", "429", "accepted, cut"]
        job._create(["r1"])
        job._create(["r2"])
        job._sleep = killed
        with pytest.raises(Killed):
            job._create(["r2"])
    server.looks_until_ended = 0
    return config


def flip(data: bytes, place: int) -> bytes:
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def test_no_single_bit_of_the_journal_is_taken_for_truth(memory_path: Path, server: BatchServer) -> None:
    folder = memory_path / "out"
    half_done(folder, server)
    path = folder / JOURNAL
    whole = path.read_bytes()
    assert [line["event"] for line in read_lines(path, "").records] == [
        "job", "place", "intent", "created", "intent", "created", "intent", "refused", "intent",
    ]  # fmt: skip
    content = read_lines(path, "").records[0]["content"]
    for place in range(8 * len(whole)):
        path.write_bytes(flip(whole, place))
        with pytest.raises(ValueError, match=rf"{JOURNAL}: line \d .*nothing was sent") as refused:
            Journal(folder, content, [f"r{i}" for i in range(4)])
        assert "\n" not in str(refused.value)


def test_a_damaged_folder_sends_and_fetches_nothing_and_is_whole_again_with_the_file_put_back(
    memory_path: Path, server: BatchServer
) -> None:
    """A seeded sample of all bits of all files there; the whole command."""
    folder = memory_path / "out"
    config, draw = half_done(folder, server), random.Random(5)
    calls = server.calls.copy()
    names = [JOURNAL, ".journal-0.jsonl", "manifest.json", "raw/batch-00000.jsonl"]
    for name in names:
        whole = (folder / name).read_bytes()
        for place in draw.sample(range(8 * len(whole)), 60):
            (folder / name).write_bytes(flip(whole, place))
            with pytest.raises(ValueError, match=f"{name}: ") as refused:
                complete(folder, config, solo())
            assert "\n" not in str(refused.value)
        (folder / name).write_bytes(whole)
    assert server.calls == calls
    complete(folder, config, solo())
    check_paid_once(server, 4)


def test_what_the_advice_says_costs_nothing(memory_path: Path, server: BatchServer) -> None:
    """Results and the list of finished files may be removed; a journal moves into a fresh folder."""
    folder = memory_path / "out"
    half_done(folder, server)
    (folder / "raw/batch-00000.jsonl").unlink()
    (folder / ".journal-0.jsonl").unlink()
    fresh = memory_path / "fresh"
    fresh.mkdir()
    shutil.copy(folder / JOURNAL, fresh / JOURNAL)
    complete(fresh, quick(server, 4, batch_requests=1, moved=True), solo())
    check_paid_once(server, 4)


def test_events_that_do_not_follow_are_refused(memory_path: Path, server: BatchServer) -> None:
    folder = memory_path / "out"
    half_done(folder, server)
    path = folder / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    job = read_lines(path, "").records[0]
    keys = [f"r{i}" for i in range(4)]
    strange: list[dict[str, Any]] = [
        {"event": "paid"}, {"event": "created", "number": 9, "batch": "b"}, {"event": "created", "number": 3},
        {"event": "intent", "number": 5, "keys": ["r3"]}, {"event": "intent", "number": 4, "keys": ["zz"]},
        {"event": "created", "number": 0, "batch": "other"}, {"event": "refused", "number": "x"},
    ]  # fmt: skip
    for event in strange:
        path.write_bytes(b"".join(lines) + sealed(event))
        with pytest.raises(ValueError, match=rf"{JOURNAL}: line 10 does not follow"):
            Journal(folder, job["content"], keys)
    for i in range(2, len(lines) - 1):  # a line is missing
        if lines[i] in lines[-1:] or b'"created"' in lines[i] or b'"refused"' in lines[i]:
            continue
        path.write_bytes(b"".join(lines[:i] + lines[i + 1 :]))
        with pytest.raises(ValueError, match=rf"{JOURNAL}: line \d does not follow"):
            Journal(folder, job["content"], keys)


def test_a_journal_of_an_earlier_release_goes_on(tmp_path: Path, server: BatchServer) -> None:
    """Without checksums, places and what the server held: the create that was cut off is looked for among all batches."""
    folder = tmp_path / "out"
    config = half_done(folder, server)
    path = folder / JOURNAL
    old = [line for line in read_lines(path, "").records if line["event"] != "place"]
    for line in old:
        if line.pop("before", None) is not None:
            line["time"] = 1e9
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    complete(folder, config, solo())
    check_paid_once(server, 4)
    assert not read_lines(path, "").unchecked


# --- two clients -------------------------------------------------------------------------------------------------------------


def submit(folder: Path, config: ClientConfig, before: Callable[[], None] = lambda: None) -> None:
    with building(folder, "replies", config, solo()) as builder, open_client(config) as client:
        job = BatchJob(builder, config, requests(config.n), client)
        before()
        job.submit()


def test_a_copy_of_the_folder_sends_nothing_until_it_is_said_to_be_the_only_one(tmp_path: Path, server: BatchServer) -> None:
    folder, copy, config = tmp_path / "a", tmp_path / "b", quick(server, 6, batch_requests=3)
    server.creates = ["ok", "400"]
    with pytest.raises(ValueError, match="injected"):
        submit(folder, config)
    shutil.copytree(folder, copy)
    with pytest.raises(ValueError, match=r"/b: this folder was copied or moved .* nothing was sent; .*--moved"):
        submit(copy, config)
    assert len(server.batches) == 1
    complete(folder, config, solo())  # where it was begun nothing has changed
    check_paid_once(server, 6)


def test_a_folder_that_was_moved_goes_on_with_consent(tmp_path: Path, server: BatchServer) -> None:
    config = quick(server, 6, batch_requests=3)
    server.creates = ["ok", "400"]
    with pytest.raises(ValueError, match="injected"):
        submit(tmp_path / "a", config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    submit(tmp_path / "b", quick(server, 6, batch_requests=3, moved=True))
    (tmp_path / "b").rename(tmp_path / "c")  # renamed, it is still the same folder
    complete(tmp_path / "c", config, solo())
    check_paid_once(server, 6)


def test_another_machine_that_shares_the_folder_is_no_copy(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(server, 6, batch_requests=3)
    server.creates = ["ok", "400"]
    with pytest.raises(ValueError, match="injected"):
        submit(tmp_path / "a", config)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    complete(tmp_path / "a", config, solo())
    check_paid_once(server, 6)


def test_two_machines_on_one_folder_that_no_lock_guards_pay_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second client runs to its end after any operation of the first on the journal; one of them stops, and the bill is
    that of one. What is left is finished by a third."""
    monkeypatch.setattr(files.fcntl, "flock", lambda descriptor, operation: None)
    stopped, n = 0, 0
    while True:
        n += 1
        with BatchServer() as fresh:
            folder, config, seen = tmp_path / str(n), quick(fresh, 4, batch_requests=2, poll_s=0.01), [0]

            def meanwhile(operation: str, path: Path, folder: Path = folder, config: ClientConfig = config) -> None:
                if path.name != JOURNAL:
                    return
                seen[0] += 1  # noqa: B023
                if seen[0] == n:  # noqa: B023
                    files.before_operation = lambda operation, path: None
                    submit(folder, config)

            files.before_operation = meanwhile
            try:
                submit(folder, config)
            except ValueError as error:
                stopped += 1
                assert "another process writes to this file" in str(error)  # noqa: PT017
            files.before_operation = lambda operation, path: None
            if seen[0] < n:
                break
            complete(folder, config, solo())
            check_paid_once(fresh, 4)
    assert n > 12
    assert stopped > n / 2


def test_place_knows_nothing_of_this_machine(tmp_path: Path, server: BatchServer) -> None:
    complete(tmp_path / "out", quick(server, 1), solo())
    text = (tmp_path / "out" / JOURNAL).read_text()
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text
    assert (tmp_path / "out" / REPLIES).exists()
