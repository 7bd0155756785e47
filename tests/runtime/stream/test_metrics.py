"""Metrics as Prometheus reads them, and the server in front of hostile clients."""

from __future__ import annotations

import math
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.metrics import Counter, Gauge, Histogram, StreamMetrics, score_bounds_around
from edge_anomaly_runtime.stream.metrics_server import MetricsServer, parse_address, token_from_environment, url_of

NAMES = [
    *("frames_captured_total", "frames_scored_total", "frames_dropped_total", "source_up", "reconnects_total"),
    *("last_frame_timestamp_seconds", "frame_age_seconds", "stage_seconds", "score", "verdict_total"),
    *("sink_dropped_total", "drift_shift_sigma", "model_info"),
]


@pytest.fixture
def metrics() -> StreamMetrics:
    made = StreamMetrics(score_bounds_around(10.0))
    made.frames_captured.add("c0", by=5)
    made.frames_scored.add("c0", by=4)
    made.frames_dropped.add("c0", "mailbox")
    made.source_up.set("c0", value=1)
    made.reconnects.set_total("c0", total=2)
    made.last_frame.set("c0", value=1795256102.5)
    made.frame_age.observe(value=0.04)
    made.stage.observe("infer", value=0.012)
    for score in (1.0, 10.0, 1000.0, math.nan, math.inf):
        made.score.observe(value=score)
    made.verdict.add("NG")
    made.sink_dropped.set_total("mqtt://broker", total=3)
    made.drift_shift_sigma.set("c0", value=-0.25)
    made.model_info.set("ab12", "openvino", "int8", value=1)
    return made


def parsed(text: str) -> dict[str, Any]:
    parser = pytest.importorskip("prometheus_client.parser")
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def test_prometheus_reads_every_family(metrics: StreamMetrics) -> None:
    families = parsed(metrics.render())
    assert list(families) == [name.removesuffix("_total") for name in NAMES]
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families.values())
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["frames_captured_total", ("c0",)] == 5
    assert samples["frames_dropped_total", ("c0", "mailbox")] == 1
    assert samples["last_frame_timestamp_seconds", ("c0",)] == 1795256102.5
    assert samples["model_info", ("ab12", "openvino", "int8")] == 1
    assert samples["score_bucket", ("10",)] == 2
    assert samples["score_bucket", ("+Inf",)] == samples["score_count", ()] == 3
    assert samples["score_sum", ()] == 1011.0


def test_label_values_are_escaped() -> None:
    counter = Counter("x_total", 'Help with \\ and\nnew line and "quotes".', ("camera",))
    nasty = 'a"b\\c\nd{}=, ü \ud800'
    counter.add(nasty)
    [family] = parsed(counter.render()).values()
    assert family.samples[0].labels == {"camera": nasty.replace("\ud800", "?")}


def test_totals_taken_over_never_fall() -> None:
    counter = Counter("x_total", "X.")
    for total in (5, 3, 8):
        counter.set_total(total=total)
    assert counter.render().endswith("x_total 8\n")


def test_bounds_are_upper_limits_and_gauges_can_be_cleared() -> None:
    histogram, gauge = Histogram("h", "H.", bounds=(1.0, 2.0)), Gauge("g", "G.", ("a",))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value=value)
    buckets = [line.split()[1] for line in histogram.render().splitlines() if line.startswith("h_bucket")]
    assert buckets == ["2", "4", "5"]
    gauge.set("x", value=math.nan)
    assert 'g{a="x"} NaN' in gauge.render()
    gauge.clear()
    assert "{" not in gauge.render()


@pytest.mark.parametrize("threshold", [0.0, -3.0, math.nan, math.inf, 1e-30, 12.5])
def test_score_bounds_ascend(threshold: float) -> None:
    bounds = score_bounds_around(threshold)
    assert list(bounds) == sorted(bounds)
    assert len(bounds) >= 7


def test_counting_from_many_threads_loses_nothing() -> None:
    counter = Counter("x_total", "X.")

    def count() -> None:
        for _ in range(2000):
            counter.add()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.render().endswith("x_total 8000\n")


# The server

Serve = Callable[..., MetricsServer]


@pytest.fixture
def serve(metrics: StreamMetrics) -> Iterator[Serve]:
    made: list[MetricsServer] = []

    def start(**options: Any) -> MetricsServer:
        options = {"is_live": lambda: True, "is_ready": lambda: False, "port": 0, **options}
        made.append(MetricsServer(metrics.render, **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


def get(server: MetricsServer, path: str, *, token: str = "", method: str = "GET") -> tuple[int, str]:
    host = f"[{server.host}]" if ":" in server.host else server.host
    request = urllib.request.Request(f"http://{host}:{server.port}{path}", method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_pages(serve: Serve, metrics: StreamMetrics) -> None:
    server = serve()
    assert server.host == "127.0.0.1"
    assert get(server, "/metrics?x=1") == (200, metrics.render())
    assert get(server, "/healthz") == (200, "ok\n")
    assert get(server, "/readyz") == (503, "not ready\n")
    assert get(server, "/")[0] == get(server, "/../etc/passwd")[0] == 404
    assert get(server, "/healthz", method="HEAD") == (200, "")
    assert get(server, "/healthz", method="POST")[0] == 501


def test_a_token_is_needed_for_everything_but_liveness(serve: Serve) -> None:
    server = serve(token="s3cret", is_ready=lambda: True)
    assert [get(server, path)[0] for path in ("/metrics", "/readyz", "/nothing", "/healthz")] == [401, 401, 401, 200]
    assert get(server, "/metrics", token="wrong")[0] == 401
    assert get(server, "/metrics", token="s3cret")[0] == 200


def test_a_page_that_cannot_be_made_is_500_and_tells_nothing(serve: Serve) -> None:
    def broken() -> bool:
        raise RuntimeError("canary")

    server = serve(is_live=broken)
    assert get(server, "/healthz") == (500, "the page could not be made\n")
    assert get(server, "/metrics")[0] == 200


def test_600_hostile_requests_leave_it_running_and_silent(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    server, rng = serve(), random.Random(0)
    good = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    for number in range(600):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        request = [bytes(data), rng.randbytes(200), good[: rng.randrange(len(good))], b"GET /" + b"a" * 70_000][
            number % 4
        ]
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
            try:
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except OSError:
                continue
    assert get(server, "/healthz") == (200, "ok\n")
    assert capfd.readouterr().err == ""


def test_idle_connections_cannot_shut_others_out_for_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.stream.metrics_server._REQUEST_S", 0.5)
    server = serve()
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(40)]
    start = monotonic()
    while monotonic() - start < 10:
        try:
            if get(server, "/healthz")[0] == 200:
                break
        except OSError:
            continue
    else:
        pytest.fail("no answer")
    assert monotonic() - start < 5
    for client in idle:
        client.close()


def test_a_taken_port_is_a_usage_error(serve: Serve) -> None:
    with pytest.raises(UsageError, match="Cannot serve metrics on"):
        serve(port=serve().port)
    with pytest.raises(UsageError, match="Cannot serve metrics on"):
        serve(host="192.0.2.1")


def test_ipv6(serve: Serve) -> None:
    try:
        server = serve(host="::1")
    except UsageError as error:
        pytest.skip(str(error))
    assert get(server, "/healthz")[0] == 200


@pytest.mark.parametrize("text", ["", "x", ":99999", "host", "host:", ":-1", ":9108x", "::²"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address(":9108") == ("127.0.0.1", 9108)
    assert url_of(*parse_address("[::1]:9108"), "/metrics") == "http://[::1]:9108/metrics"
    assert url_of(*parse_address(":9108")) == "http://127.0.0.1:9108/"
    assert parse_address("9200") == ("127.0.0.1", 9200)
    assert parse_address("0.0.0.0:1") == ("0.0.0.0", 1)
    assert parse_address("[::1]:9108") == ("::1", 9108)


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_ANOMALY_METRICS_TOKEN", raising=False)
    assert token_from_environment() is None
    monkeypatch.setenv("EDGE_ANOMALY_METRICS_TOKEN", "t")
    assert token_from_environment() == "t"
