"""Which host names a server answers to, and that no other site's page makes it do anything.

A website can point its own name at 127.0.0.1 (DNS rebinding). To the browser its pages are then of
the same origin as our server, and only the Host header tells them apart. Pages that call us by our
own name are told apart by Origin and Sec-Fetch-Site. Clients other than browsers send neither and pass.
"""

import logging
import re
from collections.abc import Collection, Iterable
from ipaddress import IPv6Address
from typing import NamedTuple

from inference.asgi import Asgi, Receive, RefusalLog, Scope, Send, header, refuse

log = logging.getLogger("inference.hosts")

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
AUTHORITY = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::(?P<port>[0-9]{0,5}))?")
SCHEMES = {"http": 80, "https": 443}
"""Those of pages, with their default ports."""
FORWARDED = (b"forwarded", b"x-forwarded-host", b"x-gradio-server")
"""Headers that claim another address than Host does: anyone can send them, so no application sees them."""


class Authority(NamedTuple):
    """The host and port of an address."""

    name: str
    """In lower case, without a final dot; an IPv6 address in its shortest form, without brackets."""
    port: int | None


def authority(text: str) -> Authority | None:
    """`text` as in a Host header, `name[:port]`; None where it is none."""
    found = AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name, port = found["name"].lower(), int(found["port"]) if found["port"] else None
    if name.startswith("["):
        try:
            name = str(IPv6Address(name[1:-1]))
        except ValueError:
            return None
    name = name.removesuffix(".")
    return Authority(name, port) if name and (port or 0) < 65536 else None


def served_names(host: str, allowed: Iterable[str]) -> set[str]:
    """The names that a server bound to `host` answers to: loopback, `host` and `allowed`, at any port.

    Bound to all addresses (0.0.0.0, ::), `host` names none of them. ValueError names the flag.
    """
    return {*LOOPBACK, _name("--host", host), *(_name("--allow-host", name) for name in allowed)}


def _name(flag: str, given: str) -> str:
    """The host of a flag as `authority` names it; an IPv6 address may stand in brackets or not."""
    bare = given.removeprefix("[").removesuffix("]").partition("%")[0]  # no zone: Host has none
    found = authority(f"[{bare}]" if ":" in bare else bare)
    if found is None:
        raise ValueError(f"{flag} {given!r}: expected a host name or an address, without scheme, port or *")
    return found.name


class _Refusal(NamedTuple):
    kind: str
    status: int
    why: str
    """For the client."""
    said: str
    """For the log."""


class HostGuard:
    """ASGI middleware that refuses other hosts and the requests of other sites' pages.

    It must be the outermost. `names` (`served_names`) may grow while the server runs. `pages` are the
    paths that other sites may link to.
    """

    def __init__(self, app: Asgi, names: Collection[str], pages: Collection[str] = ("/",)) -> None:
        self._app, self._names, self._pages = app, names, pages
        self._log = RefusalLog(log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            self._log(refusal.kind, refusal.said)
            await refuse(scope, send, refusal.status, refusal.why)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in FORWARDED]
        await self._app({**scope, "headers": headers}, receive, send)

    def _refusal(self, scope: Scope) -> _Refusal | None:
        hosts, path = header(scope, b"host"), scope["path"]
        host = authority(hosts[0]) if len(hosts) == 1 else None
        if host is None:
            said = f"a request with the Host header {', '.join(hosts)!r:.80}"
            return _Refusal("malformed", 400, "expected one Host header, name:port", said)
        if not path.startswith("/"):  # a target for proxies, which names a host of its own
            return _Refusal("malformed", 400, "expected a path", f"the request target {path!r:.80}")
        if host.name not in self._names:
            why = "this server does not answer to this host name; it would with --allow-host"
            said = f"a request for the host {host.name!r:.80}; others than {', '.join(sorted(self._names))} need --allow-host"
            return _Refusal("host", 421, why, said)
        origins = header(scope, b"origin")
        if origins and not (len(origins) == 1 and is_origin_of(origins[0], host)):
            said = f"{path!r:.60}, called by a page of the origin {', '.join(origins)!r:.80}"
            return _Refusal("origin", 403, "pages of other origins may not call this server", said)
        if self._is_foreign(scope):
            said = f"{path!r:.60}, called by a page of another site"
            return _Refusal("site", 403, "pages of other sites may only link here", said)
        return None

    def _is_foreign(self, scope: Scope) -> bool:
        """Whether a browser says that another origin's page made the request, other than by a link.

        Images, scripts and links come without Origin (https://www.w3.org/TR/fetch-metadata/). Another
        port of this machine is the same site and another origin.
        """
        if not {"cross-site", "same-site"} & set(header(scope, b"sec-fetch-site")):
            return False
        reads = scope.get("method") in ("GET", "HEAD")
        return not (reads and header(scope, b"sec-fetch-mode") == ["navigate"] and scope["path"] in self._pages)


def is_origin_of(origin: str, host: Authority) -> bool:
    """Whether an Origin header names the server that was asked as `host`.

    Schemes are not compared, as TLS may end at a proxy. A missing port is that of the origin's scheme.
    """
    scheme, _, rest = origin.partition("://")
    found, default = authority(rest), SCHEMES.get(scheme.lower())
    if found is None or default is None:
        return False
    ports = [default if port is None else port for port in (found.port, host.port)]
    return found.name == host.name and ports[0] == ports[1]
