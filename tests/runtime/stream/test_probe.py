"""Whether a camera answers: asked of real servers, of one that hangs, and of one whose answer is encrypted."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from edge_anomaly_runtime.stream.probe import answers
from edge_anomaly_runtime.stream.uri import parse_source

from .camera import Camera
from .certificate import self_signed


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server(tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve errors only: no method is known."""
    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/video"
        server.shutdown()


def test_an_rtsp_camera_answers_until_it_is_unplugged() -> None:
    with Camera() as camera:
        assert answers(parse_source(camera.url))
    assert not answers(parse_source(camera.url))


def test_an_error_is_an_answer() -> None:
    with web_server() as place:
        assert answers(parse_source(f"http://{place}"))


def test_an_encrypted_source_has_to_answer_encrypted(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))
    with web_server(context) as place:
        assert answers(parse_source(f"https://{place}"))
        assert not answers(parse_source(f"http://{place}"))
    with web_server() as place:
        assert not answers(parse_source(f"https://{place}"))


def test_who_takes_connections_and_says_nothing_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for scheme in ("rtsp", "rtsps", "http"):
            start = time.monotonic()
            assert not answers(parse_source(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/live"))
            assert time.monotonic() - start < 2.0


def test_an_unknown_host_does_not_answer() -> None:
    assert not answers(parse_source("rtsp://no-host-of-that-name.invalid/live"))
