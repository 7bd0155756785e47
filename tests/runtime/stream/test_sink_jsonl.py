"""JSON lines: whole lines always, after crashes, on full disks, across rotations."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.record import record_line
from edge_anomaly_runtime.stream.sink import SinkThread
from edge_anomaly_runtime.stream.sink_jsonl import JsonlSink, StdoutSink

from .scored_items import scored, wait_until


def rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def seqs(path: Path) -> list[int]:
    return [row["seq"] for row in rows(path)]


def write_all(sink: JsonlSink, numbers: range) -> None:
    sink.open()
    for seq in numbers:
        sink.write(scored(seq))
    sink.close()


# Standard output


def test_stdout_writes_one_line_per_item_at_once() -> None:
    reader, writer = os.pipe()
    sink = StdoutSink(descriptor=writer)
    sink.write(scored(7))
    assert os.read(reader, 10_000) == record_line(scored(7))
    os.close(reader)
    os.close(writer)


def test_stdout_that_tore_a_line_begins_a_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    real, calls = os.write, iter([10, errno.ENOSPC])

    def write(descriptor: int, data: Any) -> int:
        call = next(calls, None)
        if call == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data if call is None else data[:call])

    monkeypatch.setattr(os, "write", write)
    sink = StdoutSink(descriptor=file)
    with pytest.raises(OSError, match="No space left"):
        sink.write(scored(0))
    sink.write(scored(0))
    sink.write(scored(1))
    os.close(file)
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert [len(lines[0]), json.loads(lines[1])["seq"], json.loads(lines[2])["seq"]] == [10, 0, 1]


# The file


def test_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    write_all(JsonlSink(path), range(3))
    write_all(JsonlSink(path), range(3, 5))
    assert seqs(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tail", [b'{"schema":"edge', b"\0" * 5000, b"{" + b"x" * 200_000, b'{"a":1}'])
def test_a_torn_last_line_is_cut_and_counted(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "out.jsonl"
    write_all(JsonlSink(path), range(3))
    with open(path, "ab") as file:
        file.write(tail)
    sink = JsonlSink(path)
    write_all(sink, range(3, 4))
    assert seqs(path) == [0, 1, 2, 3]
    assert sink.cut == 1


@pytest.mark.parametrize("start", [b"{", b"\0\0\0\0"])
def test_a_file_that_holds_one_torn_line_only_begins_anew(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(start)
    write_all(JsonlSink(path), range(1))
    assert seqs(path) == [0]


def test_a_file_with_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0aweights without a newline")
    with pytest.raises(UsageError, match="holds no JSON lines"):
        JsonlSink(path)
    with pytest.raises(UsageError, match="is a folder"):
        JsonlSink(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is not a plain file"):
        JsonlSink(tmp_path / "fifo").open()
    assert path.read_bytes().startswith(b"\x08")


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    first, second = JsonlSink(tmp_path / "out.jsonl"), JsonlSink(tmp_path / "out.jsonl")
    first.open()
    with pytest.raises(UsageError, match="Another process writes to"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_rotation_by_size_keeps_the_newest_files_and_every_line_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (tmp_path / "out.000002.jsonl.bak").write_text("mine")
    size = len(record_line(scored(10)))
    write_all(JsonlSink(path, max_bytes=5 * size, keep=3), range(10, 60))
    full = sorted(tmp_path.glob("out.0*.jsonl"))
    assert [file.name for file in full] == ["out.000007.jsonl", "out.000008.jsonl", "out.000009.jsonl"]
    assert [seq for file in (*full, path) for seq in seqs(file)] == list(range(40, 60))
    assert all(file.stat().st_size <= 5 * size for file in (*full, path))
    assert (tmp_path / "out.000002.jsonl.bak").read_text() == "mine"


def test_rotation_by_age(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl", max_age_s=0.05)
    sink.open()
    sink.write(scored(0))
    sleep(0.06)
    sink.write(scored(1))
    sink.write(scored(2))
    sink.close()
    assert (seqs(tmp_path / "out.000001.jsonl"), seqs(tmp_path / "out.jsonl")) == ([0], [1, 2])


def test_ng_lines_are_on_the_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def sync(handle: int) -> None:
        synced.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    for verdict, times in (("OK", 0), ("NG", 1)):
        synced.clear()
        sink = JsonlSink(tmp_path / "out.jsonl")
        sink.open()
        sink.write(scored(0, verdict))  # type: ignore[arg-type]
        sink.close()
        assert len(synced) == times


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a 2 MB tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_tears_no_line_and_lines_go_on_when_there_is_space(small_disk: Path) -> None:
    path, ballast = small_disk / "out.jsonl", small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    told: list[str] = []
    thread = SinkThread(JsonlSink(path), capacity=50, warn=told.append, retry_s=(0.02, 0.05))
    for seq in range(5000):
        thread.put(scored(seq, "NG" if seq % 1000 == 0 else "OK"))
        if seq % 40 == 0:
            wait_until(lambda: thread.counts().waiting == 0 or thread.is_failing)
    wait_until(lambda: thread.is_failing)
    assert [text for text in told if "No space left on device" in text] == told[:1]
    before = rows(path)
    ballast.unlink()
    wait_until(lambda: not thread.is_failing)
    for seq in range(5000, 5020):
        thread.put(scored(seq))
    assert thread.close(5.0)
    written = seqs(path)
    counts = thread.counts()
    assert written[-20:] == list(range(5000, 5020))
    assert written == sorted(set(written))
    assert written[: len(before)] == [row["seq"] for row in before]
    assert (counts.accepted, counts.written) == (5020, len(written))
    assert counts.dropped == 5020 - len(written) > 0
    assert {0, 1000, 2000, 3000, 4000} <= set(written), "records of bad parts wait for the disk"


@pytest.mark.parametrize("short", [0, 100])
def test_a_write_that_fails_half_way_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl")
    sink.open()
    sink.write(scored(0))
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if short:
            return real(descriptor, data[:short])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        sink.write(scored(1))
    assert seqs(tmp_path / "out.jsonl") == [0]
    monkeypatch.undo()
    sink.write(scored(2))
    sink.close()
    assert seqs(tmp_path / "out.jsonl") == [0, 2]


# Kills

WRITER = """
import os, sys, random, signal, time
from pathlib import Path
from edge_anomaly_runtime.stream.sink_jsonl import JsonlSink
from tests.runtime.stream.scored_items import scored

path, report = Path(sys.argv[1]), int(sys.argv[2])
items = [scored(seq, "NG") for seq in range(64)]
rng = random.Random(0)
for number in range(40):
    child = os.fork()
    if child == 0:
        sink = JsonlSink(path, max_bytes=200_000, keep=1000)
        sink.open()
        while True:
            for item in items:
                item.record["seq"] = number
                sink.write(item)
                os.write(report, b"%d\\n" % number)
    time.sleep(rng.uniform(0.005, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_40_kills_tear_no_line_and_lose_no_acknowledged_record(tmp_path: Path) -> None:
    acknowledged = open(tmp_path / "acknowledged", "w+b")
    child = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "out.jsonl"), str(acknowledged.fileno())],
        pass_fds=[acknowledged.fileno()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    JsonlSink(tmp_path / "out.jsonl").open()
    written: dict[int, int] = {}
    for file in tmp_path.glob("out*.jsonl"):
        for seq in seqs(file):
            written[seq] = written.get(seq, 0) + 1
    acknowledged.seek(0)
    confirmed: dict[int, int] = {}
    for line in acknowledged.read().splitlines():
        confirmed[int(line)] = confirmed.get(int(line), 0) + 1
    acknowledged.close()
    assert sum(confirmed.values()) > 1000
    assert all(count <= written[seq] <= count + 1 for seq, count in confirmed.items())


def test_a_line_torn_at_every_place_is_repaired(tmp_path: Path) -> None:
    whole = record_line(scored(0)) + record_line(scored(1))
    for end in random.Random(1).sample(range(len(whole)), 60):
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(whole[:end])
        write_all(JsonlSink(path), range(2, 3))
        assert seqs(path) == [*range(whole[:end].count(b"\n")), 2]
