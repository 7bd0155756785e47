"""Overlay video that can be played, with true times, after crashes as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError
from edge_anomaly_runtime.stream.sink_video import VideoSink

from .scored_items import scored

av = pytest.importorskip("av")


def frames(path: Path) -> list[tuple[float, tuple[int, int]]]:
    with av.open(str(path), timeout=5) as container:
        return [(round(float(frame.time or 0), 2), (frame.width, frame.height)) for frame in container.decode(video=0)]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_frames_keep_their_times(tmp_path: Path, suffix: str) -> None:
    sink = VideoSink(tmp_path / f"out{suffix}")
    sink.open()
    for seq in (0, 1, 2, 10, 11):
        sink.write(scored(seq, size=(49, 65)))
    sink.close()
    assert frames(tmp_path / f"out-c0.000001{suffix}") == [(time, (64, 48)) for time in (0.0, 0.04, 0.08, 0.4, 0.44)]


def test_each_camera_and_each_size_has_files_of_its_own_and_the_oldest_go(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path / "out.mkv", keep=2)
    sink.open()
    for number, size in enumerate([(48, 64), (96, 64), (48, 64)]):
        for camera in ("a", "../b"):
            sink.write(scored(number, camera=camera, size=size))
    sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"out-{camera}.00000{number}.mkv" for camera in ("___b", "a") for number in (2, 3)
    ]
    assert frames(tmp_path / "out-a.000002.mkv")[0][1] == (64, 96)


def test_a_full_file_is_followed_by_the_next(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path / "out.mkv", max_bytes=1500, keep=1000)
    sink.open()
    for seq in range(120):
        sink.write(scored(seq))
    sink.close()
    assert len(list(tmp_path.iterdir())) > 1
    assert sum(len(frames(path)) for path in tmp_path.iterdir()) == 120


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_after_a_kill_the_file_can_be_played(tmp_path: Path, suffix: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edge_anomaly_runtime.stream.sink_video import VideoSink\n"
        "from tests.runtime.stream.scored_items import scored\n"
        "sink = VideoSink(Path(sys.argv[1])); sink.open()\n"
        "for seq in range(400): sink.write(scored(seq))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / f"out{suffix}")], timeout=60, check=False)
    played = 0
    with av.open(str(tmp_path / f"out-c0.000001{suffix}"), timeout=5) as container:
        try:
            for _ in container.decode(video=0):
                played += 1
        except av.error.FFmpegError:
            pass  # the torn end
    assert played > 200


def test_other_suffixes_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot write video to"):
        VideoSink(tmp_path / "out.avi")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingRequirementError) as caught:
        VideoSink(tmp_path / "out.mkv")
    assert 'pip install "edge-anomaly[video]"' in caught.value.hint
