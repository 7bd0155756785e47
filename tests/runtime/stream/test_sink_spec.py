"""`--sink` strings: what they make, what is refused, and that no secret comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_anomaly_runtime.errors import EdgeAnomalyError, UsageError
from edge_anomaly_runtime.stream.sink_command import CommandSink
from edge_anomaly_runtime.stream.sink_images import ImagesSink
from edge_anomaly_runtime.stream.sink_jsonl import JsonlSink, StdoutSink
from edge_anomaly_runtime.stream.sink_spec import EXAMPLES, sink_from_spec
from edge_anomaly_runtime.stream.sink_webhook import WebhookSink

from .scored_items import scored


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("stdout", StdoutSink, "stdout"),
        ("stdout?on=ng", StdoutSink, "stdout"),
        ("jsonl:a/out.jsonl?max_mb=0.5&max_hours=1&keep=3&on=change", JsonlSink, "jsonl:out.jsonl"),
        ("images:ng?budget_mb=10&every=100&keep=both&on=change", ImagesSink, "images:ng"),
        ("http://host:8080/a?token=b", WebhookSink, "http://host"),
        ("https://host/a#on=all&timeout=2&tries=1", WebhookSink, "https://host"),
        ("command:true", CommandSink, "command:true"),
        ("command:true?on=all", CommandSink, "command:true"),
        ('command:["true","--x","a?b=c&d"]?timeout=2', CommandSink, "command:true"),
    ],
)
def test_sinks_are_made_and_nothing_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = sink_from_spec(text)
    assert (type(sink), sink.name) == (kind, name)
    assert list(tmp_path.iterdir()) == []


def test_options_arrive(tmp_path: Path) -> None:
    assert not sink_from_spec("stdout?on=ng").wants(scored())
    sink = sink_from_spec(f"jsonl:{tmp_path}/out.jsonl?max_mb=0.001&keep=1")
    sink.open()
    for seq in range(20):
        sink.write(scored(seq))
    sink.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_mqtt_and_video_sinks(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt")
    pytest.importorskip("av")
    for text, name in {
        "mqtt://broker/line1/a%20b?version=5&client_id=x&on=ng": "mqtt://broker",
        "mqtts://broker:8884/line1?ca=a.pem": "mqtt://broker",
        f"video:{tmp_path}/o.mkv?kbit=500&keep=2&max_mb=1": "video:o.mkv",
    }.items():
        assert sink_from_spec(text).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Unknown sink ''"),
        ("jsnol:x", "Did you mean 'jsonl'"),
        ("stdout:x", "has no target"),
        ("jsonl", "needs a path"),
        ("jsonl:", "needs a path"),
        ("images:?every=3", "needs a path"),
        ("jsonl:x?max_mbs=3", "Did you mean 'max_mb'"),
        ("jsonl:x?max_mb=-1", "max_mb=-1 is not possible"),
        ("jsonl:x?max_mb=nan", "max_mb=nan is not possible"),
        ("jsonl:x?keep=many", "keep=many is not possible"),
        ("jsonl:x?keep=1&keep=2", "cannot be read"),
        ("jsonl:x?rubbish", "Did you mean|Unknown option"),
        ("jsonl:x?on=NG", "Unknown on= of the sink jsonl 'NG'"),
        ("images:x?keep=all", "Choose one of: overlay, picture, both"),
        ("video:x.avi", "End the name with .mkv or .mp4"),
        ("mqtt:broker", "not valid"),
        ("mqtt://", "not valid"),
        ("mqtt://broker", "cannot publish to the topic ''"),
        ("mqtt://broker:port/x", "not valid"),
        ("mqtt://broker/x?version=4", "Unknown version= of the sink mqtt"),
        ("http:host", "not valid"),
        ("https://host/x#timeout=0", "timeout=0 is not possible"),
        ("command:", "There is no program"),
        ("command:[]", "needs a program"),
        ("command:[1]", "needs a program"),
        ('command:["a\\u0000"]', "needs a program"),
        ('command:["true"] --x', "needs a program"),
        ("command:[" + "[" * 100_000, "needs a program"),
        ("command:true; rm -rf /", "There is no program"),
    ],
)
def test_what_is_refused_and_how(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sink_from_spec(text)


SECRET = "c4n4ry"


@pytest.mark.parametrize(
    "text",
    [
        f"mqtt://user:{SECRET}@broker/x",
        f"mqtt://user.name:{SECRET}@broker/x",
        f"mqtt://us%40er:{SECRET}@broker/x",
        f"mqtts://:{SECRET}@broker/x",
        f"mqtt://user:pa@{SECRET}@broker/x",
        f"mqtt://user:{SECRET}@[::1]:1883/x",
        f"mqtt://user:{SECRET}@[::1:1883/x",
        f"mqtt://user:{SECRET}@broker:port/x",
        f"http://user:{SECRET}@host/x",
        f"https://host:port/x?token={SECRET}",
        f"https://host/{SECRET}#on=never",
        f"https://host /x?token={SECRET}",
    ],
)
def test_no_part_of_a_url_with_a_secret_is_repeated(text: str) -> None:
    with pytest.raises(EdgeAnomalyError) as caught:
        sink_from_spec(text)
    assert SECRET not in str(caught.value)


def test_urls_may_name_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", SECRET)
    sink = sink_from_spec("https://host/${HOOK_TOKEN}/x")
    assert SECRET not in sink.name
    monkeypatch.delenv("HOOK_TOKEN")
    with pytest.raises(UsageError, match="environment variable HOOK_TOKEN, which is not set"):
        sink_from_spec("https://host/${HOOK_TOKEN}/x")


def test_the_examples_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paho.mqtt")
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES:
        sink_from_spec(example.replace("/usr/local/bin/reject", "true"))
    assert os.listdir(tmp_path) == []
