"""Renders chat templates, one request a line, in a process that `llama3.rendering` starts and may lose.

Run as a script, so that it imports nothing of this package: PyTorch alone would not fit into its memory. Templates come from
strangers. Jinja's sandbox keeps them from Python's internals but not from nesting loops or writing `'x' * 300000000`, so the
kernel ends what takes too long or too much.

A request is `{"template", "variables"}`, its answer `{"text"}` or `{"error"}`, in JSON.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0  # of processor time, so that a busy machine changes nothing
MAX_MEMORY = 512 * 2**20
MAX_RESULT = 1_000_000


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: the settings, filters and functions that transformers gives them."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Refused(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


def refuse(message: str) -> None:
    raise Refused(message)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> str:
    return "".join(bounded(compiled(template).generate(**variables)))


def bounded(parts: Iterator[str]) -> Iterator[str]:
    size = 0
    for part in parts:
        size += len(part) if len(part) > MAX_RESULT else len(part.encode(errors="replace"))
        if size > MAX_RESULT:
            raise Refused(f"it wrote more than {MAX_RESULT:,} bytes")
        yield part


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": rendered(request["template"], request["variables"])}
    except MemoryError:
        return {"error": f"it needs more than {MAX_MEMORY >> 20} MB of memory"}
    except RecursionError:
        return {"error": "it nests too deep"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"error": f"{error.message}"}
    except Exception as error:  # whatever an expression of the template may do
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    for limit, most in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF ends this process
        reply = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
