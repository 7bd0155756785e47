"""The live page over HTTP: read-only, on loopback unless told otherwise, with a token when bound wider."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from importlib.resources import files
from time import monotonic
from typing import Any

from edge_anomaly_runtime.errors import UsageError, missing_extra

from .page import LiveView, Shot, page_status

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import MutableHeaders
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise missing_extra("--page", "starlette", "web") from None

DEFAULT_PORT = 9109
TOKEN_ENV = "EDGE_ANOMALY_PAGE_TOKEN"

# Pages that are open at a time; each asks less often the more there are.
_VIEWERS, _VIEWER_S = 16, 10.0
_POLL_MS = 250
_CONNECTIONS, _CONNECTION_S = 128, 30.0
# Requests per second in the long run and at once. Beyond that each waits before it is refused.
_REQUESTS_PER_S, _REQUESTS_AT_ONCE, _REFUSE_AFTER_S = 200.0, 400.0, 1.0
_STATUS_LASTS_S = 0.2

_COOKIE_S = 365 * 24 * 3600

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">{head}<title>edge-anomaly</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css"></head>
<body><main class="door"><h1>edge-anomaly</h1>{body}</main></body></html>
"""
_DOOR = """<p>{note}This page shows the cameras of an inspection line. It needs the token that it was started with.</p>
<form method="get" action="./"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required>
<button type="submit">Open</button></form>
<p>Opened before on this device? <a href="./">Try again</a> without it.</p>"""
_ASK = _FRAME.format(head="", body=_DOOR.format(note=""))
_ASK_AGAIN = _FRAME.format(head="", body=_DOOR.format(note="That was not the token. "))
# A redirect would not do: coming from another site's link, the browser would leave a strict cookie out after it.
_ENTER = _FRAME.format(
    head='<meta http-equiv="refresh" content="0; url=./">', body='<p><a href="./">Open the live page</a></p>'
)


class PageServer:
    """Serves the page of `view` from a thread of its own until `close`.

    status: the stream's state, asked for at most five times a second whatever the number of viewers. token: what every
    request then needs, once as `?token=...` and from there on in a cookie, or as `Authorization: Bearer ...`; an
    address that other machines reach is not served without one. port: 0 takes a free one.

    Raises:
        UsageError: the address cannot be bound, or reaches beyond this machine and there is no token.
    """

    def __init__(
        self,
        view: LiveView,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        token: str | None = None,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._listener, is_loopback = _listen(host, port, token)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        app = Starlette(routes=_Pages(view, status).routes())
        app.router.redirect_slashes = False
        guard = _Guard(
            app,
            token=token or "",
            cookie=f"edge_anomaly_page_{self.port}",  # ports of one host share their cookies
            loopback_names_only=is_loopback and not token,
        )
        config = uvicorn.Config(
            guard,
            http=_Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            backlog=64,
            log_config=None,
            # A client's nonsense is no news, its request is not for our log, and a fault would come with every poll.
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(3.0)
        self._server.force_exit = True
        self._listener.close()  # a server that was stopped before it had started leaves it open


class _Connection(H11Protocol):
    """One of a limited number of connections, cut after a while whatever it is doing.

    The page connects anew without anybody noticing; a client that sends or reads nothing cannot keep its place.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(_CONNECTION_S, transport.abort)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)


class _Guard:
    """Stands before the pages: asks for the token, refuses names of other sites, bounds the rate, adds the headers."""

    def __init__(self, app: ASGIApp, *, token: str, cookie: str, loopback_names_only: bool) -> None:
        self._app = app
        self._token, self._cookie = token, cookie
        # The cookie is not the token itself, since browsers send it to every port of the host.
        self._cookie_value = hashlib.sha256(b"edge-anomaly page " + token.encode("utf-8", "replace")).hexdigest()
        self._loopback_names_only = loopback_names_only
        self._budget, self._counted_at = _REQUESTS_AT_ONCE, monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        has_brought_token = self._is_token(request.query_params.get("token"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if has_brought_token:
                    headers.append("Set-Cookie", self._set_cookie())
            await send(message)

        answer = await self._refusal(request, has_brought_token)
        if answer is None and has_brought_token and scope["path"] == "/":
            answer = HTMLResponse(_ENTER)
        await (answer or self._app)(scope, receive, send_with_headers)

    async def _refusal(self, request: Request, has_brought_token: bool) -> Response | None:
        if not self._is_in_budget():
            await asyncio.sleep(_REFUSE_AFTER_S)
            return PlainTextResponse("too many requests\n", 429, {"Retry-After": "5"})
        if self._loopback_names_only and not is_loopback_name(request.headers.get("host", "")):
            # A site whose name was made to point here must not read the pictures in its visitor's browser.
            return PlainTextResponse("this page is for localhost; start it with a token to use another name\n", 421)
        if not self._token or has_brought_token or self._has_cookie_or_bearer(request):
            return None
        if request.scope["path"] == "/page.css":
            return None  # for the page that asks for the token
        if request.scope["path"] == "/":
            return HTMLResponse(
                _ASK_AGAIN if "token" in request.query_params else _ASK, 401, {"WWW-Authenticate": "Bearer"}
            )
        return PlainTextResponse("a token is needed\n", 401, {"WWW-Authenticate": "Bearer"})

    def _has_cookie_or_bearer(self, request: Request) -> bool:
        if _is_same(request.cookies.get(self._cookie, ""), self._cookie_value):
            return True
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._is_token(value)

    def _is_token(self, text: str | None) -> bool:
        return bool(self._token) and text is not None and _is_same(text, self._token)

    def _set_cookie(self) -> str:
        return f"{self._cookie}={self._cookie_value}; Max-Age={_COOKIE_S}; Path=/; HttpOnly; SameSite=Strict"

    def _is_in_budget(self) -> bool:
        now = monotonic()
        self._budget = min(_REQUESTS_AT_ONCE, self._budget + (now - self._counted_at) * _REQUESTS_PER_S)
        self._counted_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


class _Pages:
    """The answers, all made in the server's one thread."""

    def __init__(self, view: LiveView, status: Callable[[], Mapping[str, Any]]) -> None:
        self._view, self._status = view, status
        self._last_status: Mapping[str, Any] = {}
        self._status_until = -1.0
        self._viewers: dict[str, float] = {}
        self._files = {name: files(__package__).joinpath("web", name).read_bytes() for name in _FILES}
        self._version = _version(self._files)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.file),
            Route("/page.css", self.file),
            Route("/page.js", self.file),
            Route("/api/status", self.status),
            Route("/camera/{name:path}.jpg", self.camera),
            Route("/ng/{id}.jpg", self.ng),
        ]

    async def file(self, request: Request) -> Response:
        name = request.scope["path"].lstrip("/") or "index.html"
        return Response(self._files[name], media_type=_FILES[name])

    async def status(self, request: Request) -> Response:
        asked = request.query_params
        viewers = self._count_viewers(asked.get("viewer", ""), request)
        if viewers > _VIEWERS:
            return PlainTextResponse(f"{_VIEWERS} pages are open already\n", 503, {"Retry-After": "10"})
        self._view.watch()
        is_same_run = asked.get("run") == self._view.run
        answer = page_status(self._fresh_status(), self._view, _number(asked.get("after", "")) if is_same_run else 0)
        # The same load for two viewers as for sixteen.
        answer |= {"page": self._version, "poll_ms": max(_POLL_MS, viewers * _POLL_MS // 2)}
        return JSONResponse(answer)

    async def camera(self, request: Request) -> Response:
        return _picture(self._view.picture(request.path_params["name"]), "no-store")

    async def ng(self, request: Request) -> Response:
        # An id never names another picture.
        return _picture(self._view.ng_picture(request.path_params["id"]), "private, max-age=3600, immutable")

    def _fresh_status(self) -> Mapping[str, Any]:
        now = monotonic()
        if now >= self._status_until:
            self._last_status = self._status()
            self._status_until = now + _STATUS_LASTS_S
        return self._last_status

    def _count_viewers(self, name: str, request: Request) -> int:
        """Return the number of viewers, this one included; one too many is not counted in."""
        now = monotonic()
        self._viewers = {viewer: seen for viewer, seen in self._viewers.items() if now - seen < _VIEWER_S}
        if not re.fullmatch(r"[0-9a-z]{1,32}", name, re.ASCII):
            name = request.client.host if request.client else ""
        if name in self._viewers or len(self._viewers) < _VIEWERS:
            self._viewers[name] = now
            return len(self._viewers)
        return _VIEWERS + 1


_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}


def token_from_environment() -> str | None:
    """Return what EDGE_ANOMALY_PAGE_TOKEN holds."""
    return os.environ.get(TOKEN_ENV) or None


def is_loopback_name(host: str) -> bool:
    """Tell whether a Host header names this machine for itself, whatever the port (a tunnel has another).

    >>> [is_loopback_name(host) for host in ("127.0.0.1:9109", "localhost", "[::1]:80", "evil.example", "10.0.0.1")]
    [True, True, True, False, False]
    """
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]*)?", host.strip().lower(), re.ASCII)
    if match is None:
        return False
    name = (match[1] or match[2]).removesuffix(".")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _listen(host: str, port: int, token: str | None) -> tuple[socket.socket, bool]:
    """Return a listening socket, and whether only this machine reaches it."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # By the address, not by the name: a name may stand for anything.
        is_loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        if not (is_loopback or token):
            raise UsageError(
                f"The live page on {host or '*'} would be open to everybody who reaches this machine.",
                f"Set {TOKEN_ENV} to a long random text, or keep it on 127.0.0.1.",
            )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        text = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"Cannot serve the live page on {host}:{port}: {text}.", "Choose another --page.") from None
    return listener, is_loopback


def _picture(shot: Shot | None, cache: str) -> Response:
    if shot is None:
        return PlainTextResponse("there is no such picture\n", 404)
    return Response(shot.jpeg, media_type="image/jpeg", headers={"Cache-Control": cache, "X-Shot": shot.id})


def _version(contents: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(contents.values())).hexdigest()[:8]


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text, re.ASCII) else 0


def _is_same(given: str, expected: str) -> bool:
    """Compare in constant time, whatever the lengths."""
    first, second = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, expected))
    return hmac.compare_digest(first, second)
