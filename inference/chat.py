"""Talk with a model in the terminal, steered or not.

    python -m inference.chat [--system "You are a gardener."] [--steer recipe.json] [--watch 896,1204 --alarm 0.5]
    printf 'Hello.\\nWhat grows in winter?\\n' | python -m inference.chat --json

One message a line; /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer. Answers, and the table of
what was watched in them, go to stdout, everything else to stderr.
"""

import contextlib
import logging
import sys
from dataclasses import dataclass, replace
from functools import partial

from core.cli import machine, run_stage
from core.runtime import Runtime
from core.terminal import json_line
from core.text import decode
from inference.dialogue import check_style, prepare, style_of
from inference.row import hooks_of, new_row
from inference.session import Session, open_session
from inference.steering import Recipe
from inference.terminal import Output, SamplingConfig, interruptible
from llama3.chat_format import Message
from llama3.generate import generate

with contextlib.suppress(ImportError):  # not on every system
    import readline  # noqa: F401  input() then knows arrows and earlier lines

log = logging.getLogger("inference.chat")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Flags of `inference.chat`."""

    system: str = ""
    """System prompt; empty sends none."""
    style: str = "auto"
    """template (the chat template of the checkpoint), llama3 (the format of the Llama 3 instruct models), plain (a transcript),
    or auto: plain for the embedded model, else the template where there is one, else llama3."""
    prompt: str = machine("> ")
    """What is shown before each message where standard input is a terminal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_style(self.style)


def run(config: ChatConfig, runtime: Runtime) -> None:
    """Read messages until the end of input and answer each."""
    config.sampling()
    out = Output(config.raw)
    with interruptible():
        session = open_session(config, runtime.device, partial(style_of, config.style, config.model))
        recipe = config.recipe(session)
        config.watcher(session)  # refuses a latent that does not exist before the first message
        opening = [Message("system", config.system)] if config.system else []
        messages = list(opening)
        if _at_keyboard():
            log.info("one message a line; /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer")
        while (line := _ask(config)) not in (None, "/quit"):
            if line == "/reset":
                messages = list(opening)
                log.info("the conversation starts anew")
            elif line:
                asked = [*messages, Message("user", line)]
                try:
                    messages = [*asked, Message("assistant", _answer(config, session, recipe, asked, out))]
                except ValueError as error:  # a message that is too long; who sits at the keyboard keeps the conversation
                    if not _at_keyboard():
                        raise
                    log.error("%s", error)


def _at_keyboard() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(config: ChatConfig) -> str | None:
    """The next line of standard input, or None at its end."""
    if _at_keyboard() and sys.stdout.isatty():
        try:
            return input(config.prompt).strip()
        except EOFError:
            print(flush=True)
            return None
    if _at_keyboard():
        print(config.prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    return decode(line, "a message on standard input").strip() if line else None


def _answer(config: ChatConfig, session: Session, recipe: Recipe, messages: list[Message], out: Output) -> str:
    """Stream the answer to the last message; returns its text."""
    turn = prepare(session, messages, style_of(config.style, config.model, session.tokenizer), config.max_new_tokens)
    if turn.dropped:
        log.info("the context is full: the oldest %d message(s) are left out", turn.dropped)
    sampling = turn.ended(config.sampling())
    rows = [new_row(session, messages[-1].content, turn.ids)]
    turns = sum(message.role == "user" for message in messages)
    watch = config.watcher(session, rows, turns - 1, out.fresh_line)
    hooks = hooks_of(session, recipe, rows, watch)
    try:
        for piece in generate(session.model, session.tokenizer, [rows[0].ids], sampling, hooks):
            text = piece.text if rows[0].text else piece.text.lstrip()  # a plain transcript's answer begins with a space
            rows[0] = rows[0].grown(piece._replace(text=text))
            if not config.json:
                out.say(text)
    except KeyboardInterrupt:
        if not _at_keyboard():
            raise
        rows[0] = replace(rows[0], finished="interrupted")  # what was said so far stays in the conversation
    row = rows[0]
    answer = row.text.strip()
    watched = watch.result(session.tokenizer, row.ids, start=row.prompt_length) if watch else None
    if config.json:
        record = {"message": row.prompt, "answer": answer, "finished": row.finished, "steered": bool(recipe.edits)}
        record |= watched.record() if watched else {}
        out.say(json_line(record) + "\n")
    else:
        out.say(f"\n{watched}\n" if watched else "\n")
    return answer


if __name__ == "__main__":
    run_stage(ChatConfig, run, __doc__ or "")
