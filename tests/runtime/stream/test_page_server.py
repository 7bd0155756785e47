"""The live page over HTTP: who gets in, what the answers hold, and what hostile or many clients can do."""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.page import LiveView

from .live_items import camera_status, give, live, stream_status

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from edge_anomaly_runtime.stream import page_server
from edge_anomaly_runtime.stream.page_server import PageServer, is_loopback_name, token_from_environment

TOKEN = "correct horse/battery+staple ü"


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: PageServer, path: str = "/", method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


Serve = Callable[..., PageServer]


@pytest.fixture
def view() -> LiveView:
    view = LiveView()
    give(view, live(0), live(1, "NG"), live(2, "WARN"))
    return view


@pytest.fixture
def serve(view: LiveView) -> Iterator[Serve]:
    servers = []

    def start(**options: Any) -> PageServer:
        servers.append(PageServer(options.pop("view", view), **{"port": 0, "status": stream_status, **options}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def shot_id(view: LiveView) -> str:
    return view.cameras()[0].ng[0].id


def test_the_pages(serve: Serve, view: LiveView) -> None:
    server = serve()
    assert server.host == "127.0.0.1"
    kinds = {
        "/": "text/html; charset=utf-8",
        "/page.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/api/status": "application/json",
        "/camera/c0.jpg": "image/jpeg",
        f"/ng/{shot_id(view)}.jpg": "image/jpeg",
    }
    for path, kind in kinds.items():
        answer = ask(server, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert ask(server, path, "HEAD").status == 200
        assert "server" not in answer.headers
        assert ask(server, path + "?token=").headers["Set-Cookie"] is None
    assert ask(server, "/camera/c0.jpg?shot=1").body == view.picture("c0").jpeg  # type: ignore[union-attr]
    assert Image.open(io.BytesIO(ask(server, f"/ng/{shot_id(view)}.jpg").body)).size == (64, 48)


def test_browsers_are_told_to_run_and_fetch_nothing_from_elsewhere(serve: Serve, view: LiveView) -> None:
    server = serve()
    for path in ("/", "/page.js", "/api/status", "/camera/c0.jpg", "/nothing"):
        headers = ask(server, path, Origin="http://evil.example").headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert not [name for name in headers if name.lower().startswith("access-control")]
    assert ask(server, f"/ng/{shot_id(view)}.jpg").headers["Cache-Control"].startswith("private, max-age=")
    for path in ("/", "/page.css", "/page.js"):
        text = ask(server, path).body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|//[a-z]+\.", text)
        assert not re.search(r"<script(?! src=\"page\.js\")|<style|style=|\son[a-z]+=", text)


NOWHERE = [
    *("/x", "/../etc/passwd", "/camera/", "/camera/.jpg", "/camera/c1.jpg", "/camera/c0.png", "/camera/%00%ff.jpg"),
    *("/ng/1.jpg", "/ng/.jpg", "/ng/..%2f..%2fx.jpg", "/ng/" + 5000 * "9" + ".jpg"),
    *("/api", "/api/status/", "/web/page.js"),
]


@pytest.mark.parametrize("path", NOWHERE)
def test_what_does_not_exist_is_404(serve: Serve, path: str) -> None:
    assert ask(serve(), path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(serve: Serve, method: str) -> None:
    server = serve()
    assert {ask(server, path, method).status for path in ("/", "/api/status", "/camera/c0.jpg")} == {405}


@pytest.mark.parametrize("name", ["line 1/left", "ü?#%&+.jpg", "..", "a/../b", "%2e%2e"])
def test_cameras_of_any_name(name: str) -> None:
    view = LiveView()
    give(view, live(camera=name))
    server = PageServer(view, port=0, status=lambda: stream_status(camera_status(name)))
    try:
        assert ask(server, "/api/status").json()["cameras"][0]["camera"] == name
        assert ask(server, f"/camera/{quote(name, safe='')}.jpg").status == 200
    finally:
        server.close()


def test_the_status_sends_each_point_once(serve: Serve, view: LiveView) -> None:
    server = serve()
    first = ask(server, "/api/status").json()
    assert (first["model"], len(first["cameras"][0]["live"]["points"])) == ("part@sha256:ab12cd34ef56", 3)
    view.wants(live(3))

    def points(query: str) -> list[int]:
        live_part = ask(server, f"/api/status?{query}").json()["cameras"][0]["live"]
        return [point[0] for point in live_part["points"]]

    assert points(f"run={first['run']}&after={first['number']}") == [4]
    # Numbers of another run, or none, mean nothing.
    assert points("run=other&after=3") == points("after=3") == points(f"run={first['run']}&after=x") == [1, 2, 3, 4]


def test_the_stream_is_asked_a_few_times_a_second_however_many_ask(serve: Serve) -> None:
    calls = []

    def status() -> dict[str, Any]:
        calls.append(monotonic())
        return stream_status()

    server = serve(status=status)
    while not calls or monotonic() - calls[0] < 1.0:
        assert ask(server, "/api/status").status == 200
        sleep(0.005)  # more would be a flood
    assert 2 <= len(calls) <= 6


def test_a_status_that_fails_is_500_and_tells_nothing(
    serve: Serve, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("canary")

    server = serve(status=broken)
    answer = ask(server, "/api/status")
    assert answer.status == 500
    assert b"canary" not in answer.body
    assert answer.headers["Cache-Control"] == "no-store"
    assert ask(server).status == 200
    assert (capfd.readouterr().err, caplog.records) == ("", [])


# ---- who gets in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
@pytest.mark.parametrize("token", [None, ""])
def test_beyond_this_machine_a_token_is_needed(serve: Serve, host: str, token: str | None) -> None:
    with pytest.raises(UsageError, match="open to everybody") as caught:
        serve(host=host, token=token)
    assert "EDGE_ANOMALY_PAGE_TOKEN" in caught.value.hint


PATHS = ["/", "/page.js", "/api/status", "/camera/c0.jpg", "/camera/none.jpg", "/ng/x.jpg", "/nothing"]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_without_the_token_there_is_nothing_to_see(serve: Serve, host: str) -> None:
    server = serve(host=host, token=TOKEN)
    wrong = ["", "?token=", "?token=wrong", f"?token={quote(TOKEN)}x", f"?token={quote(TOKEN[:-1])}", "?Token=x"]
    for path in PATHS:
        for query in wrong:
            answer = ask(server, path + query)
            assert (answer.status, answer.headers["Set-Cookie"]) == (401, None)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        cookies = [f"edge_anomaly_page_{server.port}=wrong", f"edge_anomaly_page_{server.port}={quote(TOKEN)}", "x"]
        assert {ask(server, path, Cookie=cookie).status for cookie in cookies} == {401}
        assert ask(server, path, Authorization="Bearer wrong").status == 401
    assert b"<form" in ask(server).body
    assert b"That was not the token" in ask(server, "/?token=wrong").body


def test_the_token_is_given_once_and_kept_as_a_cookie(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    server = serve(host="0.0.0.0", token=TOKEN)
    entered = ask(server, f"/?token={quote(TOKEN)}")
    assert entered.status == 200
    cookie, *attributes = entered.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} < set(attributes)
    assert b'content="0; url=./"' in entered.body  # on to the page, without the token in the address
    for path in ("/", "/page.js", "/api/status", "/camera/c0.jpg"):
        answer = ask(server, path, Cookie=f"other=1; {cookie}")
        assert (answer.status, answer.headers["Set-Cookie"]) == (200, None)
        shown = answer.body + str(answer.headers).encode() + entered.body + str(entered.headers).encode()
        assert TOKEN.encode() not in shown and quote(TOKEN).encode() not in shown
    assert ask(server, "/nothing", Cookie=cookie).status == 404
    out, err = capfd.readouterr()
    assert out + err == ""


def test_the_cookie_outlives_a_restart_but_not_the_token(serve: Serve) -> None:
    first = serve(token=TOKEN)
    cookie = ask(first, f"/?token={quote(TOKEN)}").headers["Set-Cookie"].split(";")[0]
    first.close()
    again = serve(token=TOKEN, port=first.port)
    assert ask(again, "/api/status", Cookie=cookie).status == 200
    again.close()
    assert ask(serve(token="another", port=first.port), "/api/status", Cookie=cookie).status == 401


def test_programs_may_send_the_token_in_a_header(serve: Serve) -> None:
    server = serve(token="s3cret")
    assert ask(server, "/api/status", Authorization="Bearer s3cret").status == 200
    assert ask(server, "/api/status?token=s3cret").status == 200


FOREIGN = [
    *("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil"),
    *("10.0.0.1", "0.0.0.0", "[fe80::1]", "", "localhost:80:80", "[::1"),
]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_made_to_point_here_is_refused(serve: Serve, host: str) -> None:
    assert not is_loopback_name(host)
    server = serve()
    assert {ask(server, path, Host=host).status for path in PATHS} == {421}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9000", "127.0.0.1", "127.1.2.3:1", "[::1]:80", "box.localhost."]
)
def test_names_of_this_machine_are_taken_on_any_port(serve: Serve, host: str) -> None:
    assert is_loopback_name(host)
    assert ask(serve(), Host=host).status == 200


def test_an_old_request_without_a_host_is_refused(serve: Serve) -> None:
    assert raw(serve(), b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_with_a_token_any_name_will_do(serve: Serve) -> None:
    """A proxy in front passes its own name on, and the cookie belongs to one name."""
    assert ask(serve(token="t"), "/api/status?token=t", Host="box.example").status == 200


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ANOMALY_PAGE_TOKEN", "")
    assert token_from_environment() is None
    monkeypatch.setenv("EDGE_ANOMALY_PAGE_TOKEN", "t")
    assert token_from_environment() == "t"


# ---- too many, too slow, hostile -------------------------------------------------------------------------------------


def raw(server: PageServer, data: bytes) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(65536):
                answer += part
        except OSError:
            pass  # cut in mid-sentence: fine for a hostile client
    return answer


def test_viewers_are_limited_and_share_one_load(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    polls = [ask(server, f"/api/status?viewer=v{number}").json()["poll_ms"] for number in range(16)]
    assert (polls[0], polls[1], polls[-1]) == (250, 250, 2000)
    assert ask(server, "/api/status?viewer=v16").status == 503
    assert ask(server, "/api/status").status == 503
    assert ask(server, "/api/status?viewer=v3").status == 200
    monkeypatch.setattr(page_server, "_VIEWER_S", 0.2)
    sleep(0.3)
    assert ask(server, "/api/status?viewer=v16").json()["poll_ms"] == 250


def test_a_flood_is_slowed_down(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_REQUESTS_AT_ONCE", 20.0)
    monkeypatch.setattr(page_server, "_REQUESTS_PER_S", 5.0)
    monkeypatch.setattr(page_server, "_REFUSE_AFTER_S", 0.3)
    server = serve()
    start = monotonic()
    answers = [ask(server, "/page.css").status for _ in range(30)]
    assert answers[:20] == 20 * [200]
    assert answers.count(429) >= 4
    assert monotonic() - start >= 0.3 * answers.count(429)
    sleep(1.0)
    assert ask(server).status == 200


def test_idle_connections_cannot_shut_others_out_for_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_CONNECTION_S", 1.0)
    monkeypatch.setattr(page_server, "_CONNECTIONS", 8)
    server = serve()
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(40)]
    for number, client in enumerate(idle):
        if number % 2:
            try:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
            except OSError:
                continue
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(server)
    end = monotonic() + 10
    while True:
        try:
            assert ask(server).status == 200
            break
        except (OSError, http.client.HTTPException):
            assert monotonic() < end
            sleep(0.1)
    for client in idle:
        client.close()


def test_600_hostile_requests_leave_it_running_and_silent(
    serve: Serve, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server, rng = serve(token="s3cret"), random.Random(0)
    good = [
        b"GET /api/status?viewer=a&after=3&token=s3cret HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /camera/c0.jpg?token=s3cret HTTP/1.1\r\nHost: localhost\r\nCookie: edge_anomaly_page_1=x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\nContent-Length: 9\r\n\r\n",
    ]
    for number in range(600):
        request = good[number // 5 % 3]
        damaged = bytearray(request)
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        odd = rng.choice([b"%ff", b"%00", b"\xff\xfe", b"{}", b"/" * 2000, b"%d", b"..", b"\t", b"[::"])
        data = [
            bytes(damaged),
            rng.randbytes(200),
            request[: rng.randrange(len(request))],
            request.replace(b"a", odd, rng.randrange(1, 4)).replace(b"localhost", odd, rng.randrange(2)),
            b"GET /" + b"a" * 70_000,
        ][number % 5]
        answer = raw(server, data)
        assert b"Traceback" not in answer
    assert ask(server, "/api/status?token=s3cret").status == 200
    assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_bodies_and_upgrades_are_not_waited_for(serve: Serve) -> None:
    server = serve()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
    answers = [
        raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n"),
        raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n"),
    ]
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


def test_a_client_that_does_not_read_holds_nobody_up(serve: Serve) -> None:
    server = serve()
    request = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lazy = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(20)]
    for client in lazy:
        client.sendall(request * 40)
    start = monotonic()
    assert ask(server, "/api/status").status == 200
    assert monotonic() - start < 5
    for client in lazy:
        client.close()


def test_close_ends_the_thread_and_frees_the_port(serve: Serve) -> None:
    server = serve()
    open_connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    start = monotonic()
    server.close()
    server.close()
    assert monotonic() - start < 4
    assert "page" not in [thread.name for thread in threading.enumerate()]
    open_connection.close()
    assert ask(serve(port=server.port)).status == 200


def test_a_taken_port_or_a_foreign_address_is_a_usage_error(serve: Serve) -> None:
    with pytest.raises(UsageError, match="Cannot serve the live page on"):
        serve(port=serve().port)
    with pytest.raises(UsageError, match="Cannot serve the live page on"):
        serve(host="192.0.2.1", token="t")
    with pytest.raises(UsageError, match="Cannot serve the live page on"):
        serve(host="no such host.invalid", token="t")


def test_ipv6(serve: Serve) -> None:
    try:
        server = serve(host="::1")
    except UsageError as error:
        pytest.skip(str(error))
    with socket.create_connection(("::1", server.port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_packages_the_extra_is_named(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from edge_anomaly_runtime.errors import MissingRequirementError
import edge_anomaly_runtime.stream.page
try:
    import edge_anomaly_runtime.stream.page_server
except MissingRequirementError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--page needs the package starlette" in done.stdout, done.stderr
    assert 'pip install "edge-anomaly[web]"' in done.stdout
