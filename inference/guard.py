"""What stands before Gradio: requests that the page never makes are refused unread, and the browser may ask no other host."""

from urllib.parse import parse_qs

from inference.asgi import Asgi, Message, Receive, Scope, Send, header, refuse

MAX_BODY_BYTES = 512 * 1024
"""Largest request body that is read at all; the longest that the page sends, a recipe beside a text, is a fourth of it."""

EXACT = {
    "/", "/config", "/login", "/login/", "/logout", "/theme.css", "/favicon.ico", "/gradio_api/queue/join",
    "/gradio_api/queue/data", "/gradio_api/run/predict", "/gradio_api/reset", "/gradio_api/cancel", "/gradio_api/login_check",
    "/gradio_api/startup-events",
}  # fmt: skip
BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
"""What the page asks for. Gradio serves more (files, uploads, a proxy, an API), none of which this app needs."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page is built from inline scripts and templates
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "frame-ancestors 'self'",
    )
)

OTHER_PAGES = {"page", "deep_link"}
"""By these names in its query Gradio opens other pages of an app, and stored ones; there is one page, and none is stored."""


def is_known(path: str) -> bool:
    """Whether the page asks for `path`, decoded as ASGI gives it."""
    return path in EXACT or (path.startswith(BELOW) and ".." not in path and "\\" not in path)


class Guard:
    """ASGI middleware around Gradio's server."""

    def __init__(self, app: Asgi) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or not is_known(scope["path"]):
            await refuse(scope, send, 404, "there is no such page")
        elif OTHER_PAGES & set(parse_qs(scope.get("query_string", b"").decode("latin-1"))):
            await refuse(scope, send, 404, "there is one page, and none is stored")
        elif _body_bytes(scope) > MAX_BODY_BYTES:
            await refuse(scope, send, 413, f"the request is too large; at most {MAX_BODY_BYTES // 1024} KB are read")
        else:
            await self._app(scope, _counted(receive), _guarded(send))


def _body_bytes(scope: Scope) -> int:
    """What the client says that it will send; more than anything allowed where that is no number."""
    length = (header(scope, b"content-length") or ["0"])[0]
    return int(length) if length.isdecimal() and len(length) < 20 else MAX_BODY_BYTES + 1


def _counted(receive: Receive) -> Receive:
    """`receive` that ends the connection once more than MAX_BODY_BYTES came, as a chunked body does not say its length."""
    left = MAX_BODY_BYTES

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return counted


def _guarded(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"same-origin")]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return guarded
