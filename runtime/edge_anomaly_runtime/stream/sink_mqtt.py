"""Results to an MQTT broker, 3.1.1 or 5, at least once each, with a last will."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Literal, NamedTuple

from edge_anomaly_runtime.errors import UsageError, missing_extra

from .frame import Scored
from .record import record_line
from .sink import When, is_wanted

USER_ENV, PASSWORD_ENV = "EDGE_ANOMALY_MQTT_USER", "EDGE_ANOMALY_MQTT_PASSWORD"

_ANSWER_S = 5.0
_KEEPALIVE_S = 30
# Messages that may wait for the broker's confirmation; more would only hide that it is slow.
_IN_FLIGHT = 20
_POLL_S = 0.1


class _Message(NamedTuple):
    topic: str
    payload: bytes
    retain: bool
    info: Any


class MqttSink:
    """Publishes each item to TOPIC/CAMERA with QoS 1; retained are TOPIC/CAMERA/verdict and TOPIC/status.

    TOPIC/status is online, stopped (ended in order) or offline (the broker's word after a crash: the last will).
    A message that the broker did not confirm is sent again after a reconnect; `camera` and `seq` tell a repetition.
    User and password come from the environment variables `user_env` and `password_env`. ca, certificate, key: files
    for TLS; without `ca` the system's authorities are trusted.

    Raises:
        MissingRequirementError: paho-mqtt is not installed.
        UsageError: the topic cannot be published to, or there is a password without a user.
    """

    needs_pixels = False

    def __init__(
        self,
        host: str,
        topic: str,
        *,
        port: int | None = None,
        tls: bool = False,
        version: Literal["3.1.1", "5"] = "3.1.1",
        client_id: str = "",
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        user_env: str = USER_ENV,
        password_env: str = PASSWORD_ENV,
        when: When = "all",
    ) -> None:
        try:
            from paho.mqtt import client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
        except ImportError:
            raise missing_extra("--sink mqtt", "paho-mqtt", "mqtt") from None
        protocol = MQTTProtocolVersion.MQTTv5 if version == "5" else MQTTProtocolVersion.MQTTv311
        self._make_client: Callable[[], Any] = partial(
            mqtt.Client, CallbackAPIVersion.VERSION2, client_id, protocol=protocol
        )
        self.name = f"mqtt://{host}"
        self._host, self._port = host, port or (8883 if tls else 1883)
        self._topic = _checked_topic(topic)
        self._tls, self._ca, self._certificate, self._key = tls, ca, certificate, key
        self._user, self._password = os.environ.get(user_env), os.environ.get(password_env)
        if self._password and not self._user:
            raise UsageError(f"{password_env} is set, but {user_env} is not.", "Set both, or none.")
        self._when = when
        self._client: Any = None
        self._answered = threading.Event()
        self._refusal = ""
        self._unconfirmed: deque[_Message] = deque()
        self._verdicts: dict[str, str] = {}

    def wants(self, item: Scored) -> bool:
        return is_wanted(self._when, item)

    def open(self) -> None:
        self._answered.clear()
        self._client = self._new_client()
        self._client.connect(self._host, self._port, keepalive=_KEEPALIVE_S)
        self._client.loop_start()
        if not self._answered.wait(_ANSWER_S):
            raise TimeoutError(f"the broker did not answer within {_ANSWER_S:g} s")
        if self._refusal:
            raise ConnectionRefusedError(f"the broker refuses the connection: {self._refusal}")
        self._verdicts.clear()  # a broker that was started anew has forgotten what was retained
        unconfirmed, self._unconfirmed = self._unconfirmed, deque()
        for message in unconfirmed:
            self._publish(message.topic, message.payload, retain=message.retain)

    def write(self, item: Scored) -> None:
        if not self._client.is_connected():
            raise ConnectionError("the broker has gone")
        camera = _topic_part(str(item.record["camera"]))
        self._publish(f"{self._topic}/{camera}", record_line(item).rstrip(), retain=False)
        verdict = str(item.record["verdict"])
        if self._verdicts.get(camera) != verdict:
            self._publish(f"{self._topic}/{camera}/verdict", verdict.encode(), retain=True)
            self._verdicts[camera] = verdict
        # A bad part counts as delivered when the broker says so.
        self._wait_for_confirmation(0 if verdict == "NG" else _IN_FLIGHT, _ANSWER_S)

    def close(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            if client.is_connected():
                self._wait_for_confirmation(0, 1.0)
                client.publish(f"{self._topic}/status", "stopped", qos=1, retain=True).wait_for_publish(1.0)
        except (OSError, RuntimeError, ValueError):
            pass  # unconfirmed messages are kept for the next connection
        finally:
            self._client = None
            client.disconnect()
            client.loop_stop()

    def _new_client(self) -> Any:
        client = self._make_client()
        client.connect_timeout = _ANSWER_S
        client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        if self._user:
            client.username_pw_set(self._user, self._password)
        if self._tls:
            client.tls_set(ca_certs=self._ca, certfile=self._certificate, keyfile=self._key)
        client.on_connect = self._on_connect
        return client

    def _on_connect(self, client: Any, _data: object, _flags: object, reason: Any, _properties: object) -> None:
        """Runs in paho's thread, also when paho has reconnected by itself."""
        self._refusal = str(reason) if reason.is_failure else ""
        if not reason.is_failure:
            client.publish(f"{self._topic}/status", "online", qos=1, retain=True)
        self._answered.set()

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        self._unconfirmed.append(_Message(topic, payload, retain, info))

    def _wait_for_confirmation(self, at_most: int, seconds: float) -> None:
        """Forget what the broker has confirmed, and wait until no more than `at_most` messages are unconfirmed."""
        end = monotonic() + seconds
        while self._unconfirmed:
            info = self._unconfirmed[0].info
            if info.is_published():
                self._unconfirmed.popleft()
            elif len(self._unconfirmed) <= at_most:
                return
            elif not self._client.is_connected():
                raise ConnectionError("the broker has gone")
            elif monotonic() > end:
                raise TimeoutError("the broker does not confirm messages")
            else:
                info.wait_for_publish(_POLL_S)


def _checked_topic(topic: str) -> str:
    if not topic or re.search(r"[#+\0]", topic) or topic.startswith(("/", "$")) or topic.endswith("/"):
        raise UsageError(
            f"MQTT cannot publish to the topic {topic!r}.",
            "Give one without # and +, such as --sink mqtt://broker/line1/inspection",
        )
    return topic


def _topic_part(camera: str) -> str:
    return re.sub(r"[/#+\0\s]", "_", camera) or "_"
