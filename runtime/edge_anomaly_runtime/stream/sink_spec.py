"""`--sink` on the command line: one string becomes one sink.

A string is KIND, KIND:TARGET or a URL, then options as in a query: `jsonl:out.jsonl?max_mb=50`. A webhook's own query
belongs to it, so its options stand behind '#'. `${NAME}` in a URL is taken from the environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from edge_anomaly_runtime.errors import UsageError, did_you_mean

from .sink import Draw, Sink, When

EXAMPLES = (
    "stdout",
    "jsonl:out.jsonl?max_mb=100&max_hours=24&keep=10",
    "mqtt://broker/line1/inspection?version=5",
    "https://host/hook#on=ng",
    "images:ng/?budget_mb=500&every=1000",
    "video:out.mkv?max_mb=200",
    'command:["/usr/local/bin/reject","--pin","7"]?timeout=2',
)

_KINDS = ["stdout", "jsonl", "mqtt", "mqtts", "http", "https", "images", "video", "command"]
_WHEN: tuple[When, ...] = ("all", "change", "ng")
_MB, _HOUR = 1_000_000, 3600.0

_Choice = TypeVar("_Choice", bound=str)


def sink_from_spec(text: str, *, draw: Draw | None = None) -> Sink:
    """Make the sink that a `--sink` names; nothing is opened yet. `draw` makes the pictures of images and video.

    Raises:
        UsageError: the string is not a sink; the message does not repeat URLs, which may hold secrets.
        MissingRequirementError: the sink's package is not installed.
    """
    kind = re.split(r"[:?#]", text, maxsplit=1)[0]
    if kind not in _KINDS:
        raise did_you_mean("sink", kind, _KINDS)
    if kind in ("http", "https"):
        return _webhook(_expanded(text))
    if kind in ("mqtt", "mqtts"):
        return _mqtt(_expanded(text))
    rest = text[len(kind) :].removeprefix(":")
    if kind == "command":
        return _command(rest)
    target, _, query = rest.partition("?")
    options = _Options(kind, query)
    if kind == "stdout":
        if target:
            raise UsageError(f"The sink stdout has no target, but got {target!r}.", "Give --sink stdout")
        return _stdout(options)
    if not target:
        raise UsageError(f"The sink {kind} needs a path.", f"For example: --sink {_example(kind)}")
    return _PATH_SINKS[kind](Path(target), options, draw)


class _Options:
    """The options behind a sink; each is read once, and `finish` refuses what nobody has read."""

    def __init__(self, kind: str, query: str) -> None:
        self._kind = kind
        self._known: list[str] = []
        pairs = parse_qsl(query, keep_blank_values=True)
        self._values = dict(pairs)
        if len(self._values) != len(pairs) or (query and not pairs):
            raise UsageError(f"The options of the sink {kind} cannot be read.", f"For example: --sink {_example(kind)}")

    def text(self, name: str, default: str) -> str:
        self._known.append(name)
        return self._values.get(name, default)

    def path(self, name: str) -> str | None:
        return self.text(name, "") or None

    def number(self, name: str, default: float, *, least: float) -> float:
        text = self.text(name, str(default))
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= 1e9:
            raise UsageError(f"{name}={text} is not possible for the sink {self._kind}.", f"Give {least:g} or more.")
        return value

    def choice(self, name: str, default: _Choice, choices: tuple[_Choice, ...]) -> _Choice:
        text = self.text(name, default)
        for value in choices:
            if value == text:
                return value
        raise did_you_mean(f"{name}= of the sink {self._kind}", text, list(choices))

    def when(self, default: When) -> When:
        return self.choice("on", default, _WHEN)

    def finish(self) -> None:
        for name in self._values:
            if name not in self._known:
                raise did_you_mean(f"option of the sink {self._kind}", name, self._known)


def _stdout(options: _Options) -> Sink:
    from .sink_jsonl import StdoutSink

    when = options.when("all")
    options.finish()
    return StdoutSink(when=when)


def _jsonl(path: Path, options: _Options, _draw: Draw | None) -> Sink:
    from .sink_jsonl import JsonlSink

    max_bytes = int(options.number("max_mb", 100, least=0.001) * _MB)
    max_age_s = options.number("max_hours", 24, least=0.001) * _HOUR
    keep, when = int(options.number("keep", 10, least=0)), options.when("all")
    options.finish()
    return JsonlSink(path, max_bytes=max_bytes, max_age_s=max_age_s, keep=keep, when=when)


def _images(path: Path, options: _Options, draw: Draw | None) -> Sink:
    from .sink_images import ImagesSink

    budget = int(options.number("budget_mb", 500, least=0.001) * _MB)
    every, when = int(options.number("every", 0, least=0)), options.when("ng")
    kind: Literal["overlay", "picture", "both"] = options.choice("keep", "overlay", ("overlay", "picture", "both"))
    options.finish()
    return ImagesSink(path, draw=draw, budget_bytes=budget, when=when, every=every, kind=kind)


def _video(path: Path, options: _Options, draw: Draw | None) -> Sink:
    from .sink_video import VideoSink

    max_bytes = int(options.number("max_mb", 200, least=0.001) * _MB)
    keep, bit_rate = int(options.number("keep", 10, least=1)), int(options.number("kbit", 2000, least=10) * 1000)
    options.finish()
    return VideoSink(path, draw=draw, max_bytes=max_bytes, keep=keep, bit_rate=bit_rate)


_PATH_SINKS: dict[str, Callable[[Path, _Options, Draw | None], Sink]] = {
    "jsonl": _jsonl,
    "images": _images,
    "video": _video,
}


def _command(rest: str) -> Sink:
    from .sink_command import CommandSink

    if rest.startswith("["):
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            arguments, end = None, len(rest)
        query = rest[end:]
    else:
        program, _, query = rest.partition("?")
        arguments, query = [program], f"?{query}" if query else ""
    if not _is_argument_list(arguments) or (query and query[0] != "?"):
        raise UsageError(
            "The sink command needs a program, or a JSON list of program and arguments.",
            f"For example: --sink '{_example('command')}'",
        )
    options = _Options("command", query[1:])
    timeout_s, when = options.number("timeout", 5, least=0.1), options.when("ng")
    options.finish()
    return CommandSink(arguments, timeout_s=timeout_s, when=when)


def _is_argument_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and "\0" not in word for word in value)


def _webhook(text: str) -> Sink:
    from .sink_webhook import AUTHORIZATION_ENV, WebhookSink

    url, _, query = text.partition("#")
    options = _Options("http", query)
    timeout_s, tries = options.number("timeout", 5, least=0.1), int(options.number("tries", 3, least=1))
    when, ca = options.when("change"), options.path("ca")
    authorization_env = options.text("authorization_env", AUTHORIZATION_ENV)
    options.finish()
    return WebhookSink(url, timeout_s=timeout_s, tries=tries, authorization_env=authorization_env, ca=ca, when=when)


def _mqtt(text: str) -> Sink:
    from .sink_mqtt import PASSWORD_ENV, USER_ENV, MqttSink

    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not text.startswith(("mqtt://", "mqtts://")):
        raise UsageError("The URL of the MQTT sink is not valid.", f"For example: --sink {_example('mqtt')}")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"The URL of the MQTT broker {host} holds a user or password, which everybody can see in the process list.",
            f"Put them into the environment variables {USER_ENV} and {PASSWORD_ENV}.",
        )
    options = _Options("mqtt", parts.query)
    version: Literal["3.1.1", "5"] = options.choice("version", "3.1.1", ("3.1.1", "5"))
    client_id, when = options.text("client_id", ""), options.when("all")
    ca, certificate, key = options.path("ca"), options.path("cert"), options.path("key")
    user_env, password_env = options.text("user_env", USER_ENV), options.text("password_env", PASSWORD_ENV)
    options.finish()
    return MqttSink(
        host,
        unquote(parts.path).strip("/"),
        port=port,
        tls=parts.scheme == "mqtts",
        version=version,
        client_id=client_id,
        ca=ca,
        certificate=certificate,
        key=key,
        user_env=user_env,
        password_env=password_env,
        when=when,
    )


def _expanded(text: str) -> str:
    """Put the environment's values in the place of ${NAME}."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise UsageError(f"The sink needs the environment variable {name}, which is not set.", f"Set {name}.")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _example(kind: str) -> str:
    return next(example for example in EXAMPLES if example.startswith(kind))
