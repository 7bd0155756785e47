"""`stream` as a process: what it prints, how it ends, what signals do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from PIL import Image

from .stream.scored_items import wait_until

ENGINE = ("--engine", "onnxruntime", "--precision", "fp32", "--threads", "1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, red in enumerate((50, 150, 220)):
        Image.new("RGB", (32, 32), (red, 60, 60)).save(folder / f"{number}.png")
    return folder


def stream(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_anomaly_runtime", "stream", *map(str, arguments), *ENGINE]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=text, check=False)


@contextmanager
def started(*arguments: object, stdin: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start a stream as a service would; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "edge_anomaly_runtime", "stream", *map(str, arguments), *ENGINE]
    # Its own session: what a shell's background job inherits about SIGINT must not matter.
    process = subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line_with(pipe: IO[str] | None, word: str) -> str:
    """Read lines up to the first that holds `word`."""
    assert pipe is not None
    for line in pipe:
        if word in line:
            return line
    raise AssertionError(f"the pipe ended without {word}")


def test_records_go_to_standard_output_and_the_rest_to_standard_error(tiny_bundle: Path, photos: Path) -> None:
    done = stream(tiny_bundle, "--source", photos)
    assert done.returncode == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["verdict"] for row in rows] == ["OK", "WARN", "NG"]
    assert "3 captured, 3 scored (1 NG, 1 OK, 1 WARN)" in done.stderr


def test_with_json_the_counts_are_the_only_output(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    done = stream(tiny_bundle, "--source", photos, "--json", "--sink", f"jsonl:{tmp_path / 'out.jsonl'}")
    status = json.loads(done.stdout)
    assert status["cameras"][0]["verdicts"] == {"OK": 1, "WARN": 1, "NG": 1}
    assert status["sinks"] == [{"sink": "jsonl:out.jsonl", "written": 3, "dropped": 0, "failing": False}]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_a_configuration_file_and_flags(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "line1.toml"
    file.write_text(f'bundle = "{tiny_bundle}"\n[[camera]]\nsource = "{photos}"\nname = "left"\nframes = "every:2"\n')
    done = stream("--config", file)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["camera"], row["seq"]) for row in rows] == [("left", 0), ("left", 2)]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "needs a model"),
        (["{bundle}"], 2, "no camera"),
        (["{bundle}", "--source", "{photos}", "--roi", "1,2"], 2, "--roi 1,2"),
        (["{bundle}", "--source", "{photos}", "--frames", "some"], 2, "some"),
        (["{bundle}", "--source", "test://moving", "--frames", "all"], 2, "--max-lag"),
        (["{bundle}", "--source", "{photos}", "--json", "--sink", "stdout"], 2, "standard output"),
        (["{bundle}", "--source", "gopher://x"], 2, "gopher"),
        (["{photos}", "--source", "{photos}"], 4, "manifest.json"),
        (["{bundle}", "--source", "rtsp://127.0.0.1:9/x", "--fail-fast", "--json"], 5, "Connection refused."),
    ],
)
def test_what_cannot_work_ends_with_its_code(
    tiny_bundle: Path, photos: Path, arguments: list[str], code: int, named: str
) -> None:
    done = stream(*(text.format(bundle=tiny_bundle, photos=photos) for text in arguments))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_bundle_ends_with_code_4(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "cut.eab"))
    (folder / "model.onnx").write_bytes(b"cut")
    done = stream(folder, "--source", photos)
    assert done.returncode == 4
    assert "model.onnx" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_drains_and_leaves_whole_lines(
    tiny_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out.jsonl"
    with started(tiny_bundle, "--source", "test://moving?fps=100", "--sink", f"jsonl:{out}") as process:
        wait_until(lambda: out.exists() and out.stat().st_size > 2000, 60)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == code
    text = out.read_text()
    assert text.endswith("\n")
    scored = len([json.loads(line) for line in text.splitlines()])
    assert f"{scored} scored" in err


def test_a_signal_before_the_first_frame_ends_the_trial_of_the_model_too(tiny_bundle: Path) -> None:
    with started(tiny_bundle, "--source", "test://moving") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text().strip() != "", 60)
        child = int(children.read_text().split()[0])
        # Until then the process is still busy with starting it.
        wait_until(lambda: b"selftest" in Path(f"/proc/{child}/cmdline").read_bytes(), 60)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not Path(f"/proc/{child}").exists()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A web server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook#on=all&timeout=30"


def test_a_second_signal_ends_at_once(tiny_bundle: Path, silent_server: str) -> None:
    """The first one waits two seconds for a sink that hangs."""
    with started(tiny_bundle, "--source", "test://moving?fps=20", "--sink", silent_server) as process:
        line_with(process.stderr, "scoring")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) == 143


def test_sighup_reads_the_configuration_again(tiny_bundle: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "line1.toml", tmp_path / "out.jsonl"

    def write(name: str) -> None:
        text = f'bundle = "{tiny_bundle}"\n[[camera]]\nsource = "test://moving?fps=50"\nname = "{name}"\n'
        file.write_text(f'{text}[[sink]]\nto = "jsonl:{out}"\n')

    write("left")
    with started("--config", file) as process:
        wait_until(lambda: out.exists() and '"left"' in out.read_text(), 60)
        write("right")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"right"' in out.read_text(), 60)
        file.write_text("bundle = 3\n")
        process.send_signal(signal.SIGHUP)
        size = out.stat().st_size
        wait_until(lambda: out.stat().st_size > size + 2000, 60)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "line1.toml:1: bundle = 3" in err


def test_a_line_on_standard_input_is_a_trigger(tiny_bundle: Path) -> None:
    arguments = (tiny_bundle, "--source", "test://moving?fps=50", "--frames", "trigger", "--stop-after", 2)
    with started(*arguments, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        line_with(process.stderr, "scoring")
        for _ in range(2):
            process.stdin.write("\n")
            process.stdin.flush()
            assert json.loads(line_with(process.stdout, "{"))["camera"] == "test-moving"
        assert process.wait(15) == 0


def test_no_password_is_shown_in_any_output(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "CAM_PW": "hunter2/@:secret"}
    command = [sys.executable, "-m", "edge_anomaly_runtime", "stream", str(tiny_bundle), *ENGINE, "--fail-fast"]
    command += ["--source", "rtsp://admin:${CAM_PW}@127.0.0.1:9/live", "--timeout", "0.5", "--sink", f"jsonl:{out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 5
    for text in (done.stdout, done.stderr, out.read_text()):
        assert "hunter2" not in text and "secret" not in text
