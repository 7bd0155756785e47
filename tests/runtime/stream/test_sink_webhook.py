"""Webhooks against real HTTP servers on loopback: good, busy, broken, hanging and dripping ones."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic, sleep
from typing import Any

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.sink import ItemLost, SinkThread
from edge_anomaly_runtime.stream.sink_webhook import WebhookSink

from .scored_items import scored, wait_until


class Hook:
    """An HTTP server that gives the listed answers, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: int) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        left = list(answers)
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.requests.append((self.path, dict(self.headers), json.loads(body)))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def make_hook() -> Iterator[Callable[..., Hook]]:
    made: list[Hook] = []

    def make(*answers: int) -> Hook:
        made.append(Hook(*answers))
        return made[-1]

    yield make
    for hook in made:
        hook.server.shutdown()
        hook.server.server_close()


@pytest.fixture
def raw_server() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Serve every connection with a function that may do to it what it likes."""
    servers: list[socket.socket] = []

    def start(serve: Callable[[socket.socket], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def loop() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_the_record_is_the_body(make_hook: Callable[..., Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ANOMALY_WEBHOOK_AUTHORIZATION", "Bearer canary")
    hook = make_hook(204)
    item = scored(5, "NG")
    WebhookSink(hook.url + "/a/b?token=x").write(item)
    [(path, headers, body)] = hook.requests
    assert (path, body) == ("/a/b?token=x", item.record)
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer canary")


@pytest.mark.parametrize(
    ("answers", "requests", "fault"),
    [
        ((200,), 1, None),
        ((503, 429, 200), 3, None),
        ((500,), 3, "answer 500 after 3 tries"),
        ((400,), 1, "answer 400, which another try would not change"),
        ((302,), 1, "answer 302, which another try would not change"),
        ((503, 404), 2, "answer 404, which another try would not change"),
    ],
)
def test_answers(make_hook: Callable[..., Hook], answers: tuple[int, ...], requests: int, fault: str | None) -> None:
    hook = make_hook(*answers)
    sink = WebhookSink(hook.url, pause_s=0.01)
    if fault is None:
        sink.write(scored())
    else:
        with pytest.raises(ItemLost) as caught:
            sink.write(scored())
        assert str(caught.value) == fault
    assert len(hook.requests) == requests


def _hang(connection: socket.socket) -> None:
    sleep(3)


def _drip(connection: socket.socket) -> None:
    """One byte now and then: no single wait is ever too long."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            sleep(0.05)
            connection.sendall(b"X")
    except OSError:
        return


def _rubbish(connection: socket.socket) -> None:
    connection.sendall(b"\x00\xff" * 50 + b"\r\n\r\n")
    # A connection that is closed before the request was read is reset: another fault than this one.
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):
        pass
    connection.close()


def _cut(connection: socket.socket) -> None:
    connection.close()


@pytest.mark.parametrize(
    ("serve", "fault"),
    [(_hang, "no answer in time"), (_drip, "no answer in time"), (_rubbish, "BadStatusLine"), (_cut, "")],
)
def test_bad_servers_cost_a_bounded_time_and_the_item(
    raw_server: Callable[[Callable[[socket.socket], None]], str], serve: Callable[[socket.socket], None], fault: str
) -> None:
    sink = WebhookSink(raw_server(serve) + "/secret-canary", timeout_s=0.2, pause_s=0.01)
    start = monotonic()
    with pytest.raises(ItemLost, match=rf"{fault}.* after 3 tries") as caught:
        sink.write(scored())
    assert monotonic() - start < 2.5
    assert "canary" not in str(caught.value) + sink.name


def test_a_hanging_webhook_does_not_slow_the_scorer(
    raw_server: Callable[[Callable[[socket.socket], None]], str],
) -> None:
    told: list[str] = []
    thread = SinkThread(WebhookSink(raw_server(_hang), timeout_s=0.3, when="all"), capacity=4, warn=told.append)
    start = monotonic()
    for seq in range(500):
        thread.put(scored(seq))
    assert monotonic() - start < 1.0
    assert thread.counts().dropped >= 490
    thread.close(0.1)


def test_no_server_at_all_and_back_again(make_hook: Callable[..., Hook]) -> None:
    hook = make_hook(200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ItemLost, match="Connection refused after 2 tries"):
            WebhookSink(dead, tries=2, pause_s=0.01).write(scored())
    thread = SinkThread(WebhookSink(hook.url, when="ng"))
    for seq in range(20):
        thread.put(scored(seq, "NG" if seq % 10 == 0 else "OK"))
    wait_until(lambda: len(hook.requests) == 2)
    assert thread.close()


@pytest.mark.parametrize(
    "url", ["", "http://", "ftp://host/x", "http://host:port/", "http://h/a b", "http://h/\r\nX: y", "http://[::1/x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="not valid"):
        WebhookSink(url)


@pytest.mark.parametrize("url", ["http://me:canary@host/", "http://:canary@host/", "http://canary@host/"])
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="EDGE_ANOMALY_WEBHOOK_AUTHORIZATION") as caught:
        WebhookSink(url)
    assert "canary" not in str(caught.value)
