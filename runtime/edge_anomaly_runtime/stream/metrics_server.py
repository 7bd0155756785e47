"""`/metrics`, `/healthz` and `/readyz` over HTTP: read-only, on loopback unless told otherwise."""

from __future__ import annotations

import hmac
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edge_anomaly_runtime.errors import UsageError

TOKEN_ENV = "EDGE_ANOMALY_METRICS_TOKEN"
DEFAULT_PORT = 9108

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_S = 5.0
_CONNECTIONS = 16


class MetricsServer:
    """Serves three pages from a thread of its own until `close`.

    render: makes the page /metrics. is_live, is_ready: behind /healthz and /readyz, 200 or 503. token: what /metrics
    and /readyz then ask for as `Authorization: Bearer ...`; /healthz never does. At most 16 requests at a time, 5 s
    each; a further connection is closed.

    Raises:
        UsageError: the address cannot be bound.
    """

    def __init__(
        self,
        render: Callable[[], str],
        *,
        is_live: Callable[[], bool],
        is_ready: Callable[[], bool],
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        token: str | None = None,
    ) -> None:
        pages: dict[str, Callable[[], tuple[int, str]]] = {
            "/metrics": lambda: (200, render()),
            "/healthz": lambda: (200, "ok\n") if is_live() else (503, "not alive\n"),
            "/readyz": lambda: (200, "ok\n") if is_ready() else (503, "not ready\n"),
        }

        class Handler(_Handler):
            def page(self, path: str) -> tuple[int, str]:
                if token and path != "/healthz" and not _has_token(self.headers.get("Authorization", ""), token):
                    return 401, "a token is needed\n"
                return pages[path]() if path in pages else (404, "there are /metrics, /healthz and /readyz\n")

        server_class = _Server6 if ":" in host else _Server
        try:
            self._server = server_class((host, port), Handler)
        except (OSError, OverflowError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"Cannot serve metrics on {host}:{port}: {text}.", "Choose another --metrics.") from None
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A timeout of the socket begins anew with every byte; this one is for the whole request.
        timer = threading.Timer(_REQUEST_S, _cut, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news, and its request is not for our log."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(ABC, BaseHTTPRequestHandler):
    timeout = _REQUEST_S

    @abstractmethod
    def page(self, path: str) -> tuple[int, str]: ...

    def do_GET(self) -> None:
        try:
            status, text = self.page(self.path.partition("?")[0])
        except Exception:
            status, text = 500, "the page could not be made\n"
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "edge-anomaly"

    def log_message(self, *_: object) -> None: ...


def parse_address(text: str, option: str = "--metrics") -> tuple[str, int]:
    """Return host and port of `--metrics` or another `option`; loopback where no host is named.

    >>> parse_address(":9108"), parse_address("9200"), parse_address("0.0.0.0:9108"), parse_address("[::1]:9108")
    (('127.0.0.1', 9108), ('127.0.0.1', 9200), ('0.0.0.0', 9108), ('::1', 9108))

    Raises:
        UsageError: it is not an address.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"{text!r} is not an address for {option}.", "Give :9108, or 0.0.0.0:9108 for all networks.")
    return host.strip("[]") or "127.0.0.1", int(port)


def url_of(host: str, port: int, path: str = "/") -> str:
    """Return a URL to type into a browser; an IPv6 address needs brackets.

    >>> url_of("::1", 9109)
    'http://[::1]:9109/'
    """
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def token_from_environment() -> str | None:
    """Return what EDGE_ANOMALY_METRICS_TOKEN holds."""
    return os.environ.get(TOKEN_ENV) or None


def _has_token(header: str, token: str) -> bool:
    return hmac.compare_digest(header.encode("utf-8", "replace"), f"Bearer {token}".encode())


def _cut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
