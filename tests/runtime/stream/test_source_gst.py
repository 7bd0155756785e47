"""GStreamer as a child, played by a script of that name: raw pictures, strides, hangs, and no password on its line."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError
from edge_anomaly_runtime.stream.raw_pipe import I420Layout, RawPipe, rgb_from_i420
from edge_anomaly_runtime.stream.source import Picture, SourceLost
from edge_anomaly_runtime.stream.source_av import AvOptions, AvSource, Packet
from edge_anomaly_runtime.stream.source_gst import (
    CSI_ELEMENTS,
    NVDEC_ELEMENTS,
    CsiSource,
    Matching,
    NvdecSource,
    csi_options,
    require_gstreamer,
)
from edge_anomaly_runtime.stream.sources import source_maker
from edge_anomaly_runtime.stream.uri import parse_source

from .camera import Camera, Script

FAKE_LAUNCH = """#!{python}
import os, re, sys, time
line = " ".join(sys.argv)
out = int(re.search(r"fdsink fd=(\\d+)", line)[1])
width, height = int(re.search(r"width=(\\d+)", line)[1]), int(re.search(r"height=(\\d+)", line)[1])
open(os.environ["FAKE_GST_LOG"], "a").write(line + "\\n")
mode = os.environ.get("FAKE_GST", "")
def put(data):
    while data:
        data = data[os.write(out, data):]
if mode == "die":
    sys.exit("ERROR: no camera at rtsp://admin:Kan4rie-7@cam/live")
if mode == "hang":
    time.sleep(60)
if "fdsrc" in line:
    import av
    decoder = av.CodecContext.create("h264", "r")
    while data := os.read(0, 65536):
        for packet in decoder.parse(data):
            for frame in decoder.decode(packet):
                put(frame.to_ndarray(format="yuv420p").tobytes())
else:
    round4 = lambda n: (n + 3) // 4 * 4
    luma, chroma = round4(width) * (height + height % 2), round4((width + 1) // 2) * ((height + 1) // 2)
    for number in range(1000):
        put(bytes([81]) * luma + bytes([90]) * chroma + bytes([240]) * chroma)
        time.sleep(0.02)
"""


@pytest.fixture
def gstreamer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs on the PATH; returns the file that the command lines are logged to."""
    for name, text in {
        "gst-launch-1.0": FAKE_LAUNCH.replace("{python}", sys.executable),
        "gst-inspect-1.0": '#!/bin/sh\n[ "$2" != "$FAKE_GST_MISSING" ]\n',
        "lsmod": "#!/bin/sh\n",
    }.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("FAKE_GST_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def i420(width: int, height: int, level: tuple[int, int, int]) -> bytes:
    """A picture of one colour whose padding holds another."""
    layout = I420Layout(width, height)
    luma = np.full((layout.rows, layout.luma_stride), 16, np.uint8)
    luma[:height, :width] = level[0]
    planes = [luma]
    for value in level[1:]:
        plane = np.full((layout.rows // 2, layout.chroma_stride), 128, np.uint8)
        plane[:, : (width + 1) // 2] = value
        planes.append(plane)
    return b"".join(plane.tobytes() for plane in planes)


@pytest.mark.parametrize("size", [(64, 48), (62, 47), (33, 17), (1, 1)])
@pytest.mark.parametrize(
    ("level", "colour"),
    [
        ((81, 90, 240), (255, 0, 0)),
        ((145, 54, 34), (0, 255, 0)),
        ((41, 240, 110), (0, 0, 255)),
        ((16, 128, 128), (0, 0, 0)),
        ((235, 128, 128), (255, 255, 255)),
    ],
)
def test_colours_are_right_and_padding_stays_out(
    size: tuple[int, int], level: tuple[int, int, int], colour: tuple[int, int, int]
) -> None:
    layout = I420Layout(*size)
    data = i420(*size, level)
    assert len(data) == layout.size

    pixels = rgb_from_i420(data, layout)

    assert pixels.shape == (size[1], size[0], 3) and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - colour).max() <= 3


def test_a_csi_camera_gives_pictures_until_it_is_closed(gstreamer: Path) -> None:
    source = CsiSource(parse_source("csi://1?size=62x46&fps=25&flip=2"))
    source.open()
    first, second = source.read(2.0), source.read(2.0)
    start = time.monotonic()
    source.close()

    assert time.monotonic() - start < 1.0
    assert first is not None and second is not None
    assert first.pixels.shape == (46, 62, 3) and first.pts is None and first.is_keyframe
    assert np.abs(first.pixels.astype(int) - (255, 0, 0)).max() <= 3
    line = gstreamer.read_text()
    assert "sensor-id=1" in line and "flip-method=2" in line and "framerate=25/1" in line


def test_a_pipeline_that_hangs_is_lost_in_time_and_killed(gstreamer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GST", "hang")
    source = CsiSource(parse_source("csi://0?size=64x48"), start_timeout=0.5)
    start = time.monotonic()
    with pytest.raises(SourceLost, match="no picture within"):
        source.open()
    assert time.monotonic() - start < 2.0


def test_a_pipeline_that_ends_says_why_without_a_password(gstreamer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GST", "die")
    source = CsiSource(parse_source("csi://0?size=64x48"))
    with pytest.raises(SourceLost, match="no camera at") as lost:
        source.open()
    source.close()
    assert "Kan4rie" not in str(lost.value)


def test_the_decoder_gets_the_stream_and_never_the_password(gstreamer: Path) -> None:
    with Camera(Script(login="admin:Kan4rie-7", speed=2)) as camera:
        uri = parse_source(camera.url.replace("rtsp://", "rtsp://admin:Kan4rie-7@"))
        source = NvdecSource(AvSource(uri, AvOptions(2.0, 2.0, analyze_s=0.2, probe_bytes=50_000)))
        source.open()
        pictures: list[Picture] = []
        give_up = time.monotonic() + 10
        while len(pictures) < 30 and time.monotonic() < give_up:
            picture = source.read(0.5)
            pictures += [] if picture is None else [picture]
        source.close()

    assert len(pictures) == 30
    assert [n for n, picture in enumerate(pictures) if picture.is_keyframe] == [0, 25]
    assert not any(picture.corrupt for picture in pictures)
    red, green, blue = pictures[0].pixels[60, 20]
    assert red > 200 and green < 60 and blue < 60
    assert "Kan4rie" not in gstreamer.read_text()


def test_no_picture_is_believed_that_a_decoder_with_gaps_may_have_mixed_up() -> None:
    """Two pictures were left out, so the counting is two behind when the fault comes."""
    matching = Matching()

    def packet(number: int) -> Packet:
        return Packet(b"", number * 0.04, number % 10 == 0, False)

    for number in range(8):
        matching.fed(packet(number))
    assert [matching.decoded() for _ in range(6)] == [""] * 6
    matching.fed(packet(9))  # 8 was lost
    assert matching.decoded()
    matching.fed(packet(10))
    assert [bool(matching.decoded()) for _ in range(4)] == [True, True, False, False]


def test_what_is_missing_is_named_with_exit_code_3(gstreamer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_gstreamer("csi://", CSI_ELEMENTS)
    monkeypatch.setenv("FAKE_GST_MISSING", "nvvidconv")
    with pytest.raises(MissingRequirementError, match="nvvidconv"):
        require_gstreamer("csi://", CSI_ELEMENTS)
    monkeypatch.setenv("FAKE_GST_MISSING", "")
    monkeypatch.setenv("PATH", str(gstreamer.parent))
    (gstreamer.parent / "lsmod").unlink()
    with pytest.raises(MissingRequirementError, match="kmod"):
        require_gstreamer("--decoder nvdec", NVDEC_ELEMENTS)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingRequirementError, match=r"gst-launch-1\.0") as missing:
        source_maker(parse_source("csi://0"))
    assert missing.value.exit_code == 3 and "apt-get" in missing.value.hint


@pytest.mark.parametrize("query", ["size=big", "fps=fast", "speed=3", "size=4x4"])
def test_wrong_options_of_a_csi_camera_are_refused(query: str) -> None:
    with pytest.raises(UsageError):
        csi_options(parse_source(f"csi://0?{query}").options)


def test_no_child_and_no_file_is_left_behind(gstreamer: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        source = CsiSource(parse_source("csi://0?size=64x48"))
        source.open()
        source.close()
    with pytest.raises(SourceLost, match="Cannot start"):
        RawPipe(["no-such-program"], 10)

    assert len(os.listdir("/proc/self/fd")) == before
