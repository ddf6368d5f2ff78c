"""The line of generations: who runs, who waits, who is stopped."""

import threading
from contextlib import ExitStack

import pytest

from inference.web.queue import Turn, Turns


def waiting(turn: Turn) -> tuple[threading.Thread, list[bool]]:
    """A thread that waits for `turn`, and what `wait` gave it."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(turn.wait()), daemon=True)
    thread.start()
    return thread, answers


def joined(thread: threading.Thread) -> bool:
    thread.join(20)
    return not thread.is_alive()


def test_first_come_first_served() -> None:
    turns = Turns(running=2, waiting=8)
    with ExitStack() as third:
        with ExitStack() as second:
            with turns.take("a", "compare") as a:
                b = second.enter_context(turns.take("b", "compare"))
                c = third.enter_context(turns.take("c", "compare"))
                d = third.enter_context(turns.take("d", "compare"))
                assert [turn.ahead for turn in (a, b, c, d)] == [0, 0, 1, 2]
                assert a.wait()
                assert b.wait()
                thread_c, answers_c = waiting(c)
                thread_d, answers_d = waiting(d)
                assert not answers_c
            assert joined(thread_c)
            assert answers_c == [True]
            assert d.ahead == 1
            assert not answers_d
        assert joined(thread_d)
        assert answers_d == [True]
    assert len(turns) == 0


def test_stop_reaches_the_one_who_waits_and_no_other() -> None:
    turns = Turns(running=1, waiting=8)
    with turns.take("a", "compare") as a, turns.take("b", "compare") as b, turns.take("b", "chat") as chat:
        thread, answers = waiting(b)
        turns.stop("b", "compare", "reset")
        assert joined(thread)
        assert answers == [False]
        assert (a.stopped, b.stopped, chat.stopped) == ("", "reset", "")
        turns.stop("b")
        assert chat.stopped == "stop"
        turns.stop("nobody")
        assert a.wait()


def test_a_stop_before_the_wait_is_heard() -> None:
    turns = Turns()
    with turns.take("a", "compare") as turn:
        turns.stop("a", "compare")
        assert not turn.wait()
    with turns.take("a", "compare") as turn:
        assert turn.wait(), "the stop of one generation stopped the next"


def test_the_line_is_bounded_and_empties_on_errors() -> None:
    turns = Turns(running=1, waiting=2)
    with ExitStack() as stack:
        for client in "abc":
            stack.enter_context(turns.take(client, "compare"))
        with pytest.raises(ValueError, match="2 requests wait already"), turns.take("d", "compare"):
            pass
        assert len(turns) == 3
    with pytest.raises(RuntimeError), turns.take("a", "compare"):
        raise RuntimeError
    assert len(turns) == 0
