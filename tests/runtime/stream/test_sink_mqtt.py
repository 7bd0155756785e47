"""MQTT against a real broker: Debian's mosquitto, started by the test on a loopback port."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError
from edge_anomaly_runtime.stream.sink import SinkThread
from edge_anomaly_runtime.stream.sink_mqtt import MqttSink

from .certificate import self_signed
from .scored_items import scored, wait_until

BROKER = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")
needs_broker = pytest.mark.skipif(BROKER is None, reason="no MQTT broker: mosquitto is not installed")


class Broker:
    """A mosquitto that can be stopped and started again on the same port."""

    def __init__(self, folder: Path, *lines: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            "\n".join([f"listener {self.port} 127.0.0.1", f"user {getpass.getuser()}", *lines]) + "\n"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert BROKER is not None
        command = [BROKER, "-c", str(self._config)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []

    def make(*lines: str) -> Broker:
        made.append(Broker(tmp_path, *(lines or ("allow_anonymous true",))))
        return made[-1]

    yield make
    for broker in made:
        broker.stop()


class Listener:
    """A subscriber to everything, with the messages in their order."""

    def __init__(self, port: int, topic: str = "line1/#") -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.messages: list[tuple[str, bytes, bool]] = []
        self._subscribed = threading.Event()
        self._client: Any = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self.messages.append(
            (message.topic, bytes(message.payload), bool(message.retain))
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(10)

    def of(self, topic: str) -> list[bytes]:
        return [payload for name, payload, _ in list(self.messages) if name == topic]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def listen() -> Iterator[Callable[[int], Listener]]:
    made: list[Listener] = []

    def start(port: int) -> Listener:
        made.append(Listener(port))
        return made[-1]

    yield start
    for listener in made:
        listener.close()


@needs_broker
@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_records_status_and_verdicts_arrive(
    make_broker: Callable[..., Broker], listen: Callable[[int], Listener], version: Any
) -> None:
    broker = make_broker()
    listener = listen(broker.port)
    thread = SinkThread(MqttSink("127.0.0.1", "line1", port=broker.port, version=version))
    for seq in range(50):
        thread.put(scored(seq, "NG" if seq >= 40 else "OK", camera="hall/2 #left"))
    assert thread.close(10.0)
    wait_until(lambda: listener.of("line1/status")[-1:] == [b"stopped"])
    records = [json.loads(payload) for payload in listener.of("line1/hall_2__left")]
    assert [record["seq"] for record in records] == list(range(50))
    assert listener.of("line1/hall_2__left/verdict") == [b"OK", b"NG"]
    assert listener.of("line1/status") == [b"online", b"stopped"]
    late = listen(broker.port)
    wait_until(lambda: len(late.messages) == 2)
    assert sorted(late.messages) == [("line1/hall_2__left/verdict", b"NG", True), ("line1/status", b"stopped", True)]


@needs_broker
def test_the_brokers_last_word_after_a_crash_is_offline(
    make_broker: Callable[..., Broker], listen: Callable[[int], Listener]
) -> None:
    broker = make_broker()
    listener = listen(broker.port)
    code = (
        "import os, sys, signal\n"
        "from edge_anomaly_runtime.stream.sink_mqtt import MqttSink\n"
        "sink = MqttSink('127.0.0.1', 'line1', port=int(sys.argv[1]))\n"
        "sink.open(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(broker.port)], timeout=30, check=False)
    wait_until(lambda: listener.of("line1/status")[-1:] == [b"offline"])


@needs_broker
def test_a_broker_that_dies_and_returns_gets_every_record(
    make_broker: Callable[..., Broker], listen: Callable[[int], Listener]
) -> None:
    broker = make_broker()
    told: list[str] = []
    sink = MqttSink("127.0.0.1", "line1", port=broker.port)
    thread = SinkThread(sink, warn=told.append, retry_s=(0.1, 0.2))
    thread.put(scored(0))
    wait_until(lambda: thread.counts().written == 1)
    broker.stop()
    for seq in range(1, 30):
        thread.put(scored(seq, "NG"))
    wait_until(lambda: thread.is_failing)
    broker.start()
    listener = listen(broker.port)
    thread.put(scored(30, "NG"))
    wait_until(lambda: thread.counts().written == 31)
    assert thread.close(10.0)
    wait_until(lambda: listener.of("line1/status")[-1:] == [b"stopped"])
    # The listener may have come after the first ones; whatever the broker confirmed is not our loss.
    arrived = {json.loads(payload)["seq"] for payload in listener.of("line1/c0")}
    assert 30 in arrived
    assert thread.counts().dropped == thread.counts().lost == 0
    assert not sink._unconfirmed
    assert "works again" in told[-1]


@needs_broker
def test_credentials_come_from_the_environment_and_go_nowhere_else(
    make_broker: Callable[..., Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = shutil.which("mosquitto_passwd")
    if passwords is None:
        pytest.skip("mosquitto_passwd is not installed")
    file = tmp_path / "passwords"
    subprocess.run([passwords, "-c", "-b", str(file), "cam", "c@nary:pw"], check=True)
    file.chmod(0o644)
    broker = make_broker("allow_anonymous false", f"password_file {file}")
    told: list[str] = []
    for password, works in (("c@nary:pw", True), ("wrong-c@nary", False)):
        monkeypatch.setenv("EDGE_ANOMALY_MQTT_USER", "cam")
        monkeypatch.setenv("EDGE_ANOMALY_MQTT_PASSWORD", password)
        thread = SinkThread(MqttSink("127.0.0.1", "line1", port=broker.port), warn=told.append)
        thread.put(scored(0))
        wait_until(lambda thread=thread, works=works: bool(thread.counts().written if works else told))  # type: ignore[misc]
        thread.close(1.0)
    assert "the broker refuses the connection: Not authorized" in told[0]
    assert "nary" not in "".join(told) + thread.name


@needs_broker
def test_tls_trusts_only_its_authority(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    broker = make_broker("allow_anonymous true", f"certfile {certificate}", f"keyfile {key}")
    sink = MqttSink("127.0.0.1", "line1", port=broker.port, tls=True, ca=str(certificate))
    sink.open()
    sink.write(scored(0))
    sink.close()
    assert not sink._unconfirmed
    stranger = MqttSink("127.0.0.1", "line1", port=broker.port, tls=True)
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.open()
    stranger.close()


def test_a_broker_that_accepts_and_says_nothing_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paho.mqtt")
    monkeypatch.setattr("edge_anomaly_runtime.stream.sink_mqtt._ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        sink = MqttSink("127.0.0.1", "line1", port=server.getsockname()[1])
        with pytest.raises(OSError, match="did not answer within"):
            sink.open()
        sink.close()


def test_no_broker_is_an_error_and_not_a_wait() -> None:
    pytest.importorskip("paho.mqtt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        sink = MqttSink("127.0.0.1", "line1", port=free.getsockname()[1])
        with pytest.raises(ConnectionRefusedError):
            sink.open()
        sink.close()


@pytest.mark.parametrize("topic", ["", "a/#", "+/b", "/a", "a/", "$SYS/x", "a\0b"])
def test_topics_that_cannot_be_published_to_are_usage_errors(topic: str) -> None:
    pytest.importorskip("paho.mqtt")
    with pytest.raises(UsageError, match="cannot publish to the topic"):
        MqttSink("127.0.0.1", topic)


def test_without_paho_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    with pytest.raises(MissingRequirementError) as caught:
        MqttSink("127.0.0.1", "line1")
    assert 'pip install "edge-anomaly[mqtt]"' in caught.value.hint
