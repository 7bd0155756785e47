"""PyAV against real files and a real RTSP server: colours, times, damage, limits, and what its errors do not say."""

from __future__ import annotations

import http.server
import io
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_anomaly_runtime.errors import SourceError
from edge_anomaly_runtime.stream.health import Trust
from edge_anomaly_runtime.stream.source import (
    EndOfFile,
    Picture,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnsupported,
)
from edge_anomaly_runtime.stream.source_av import AvOptions, AvSource
from edge_anomaly_runtime.stream.uri import parse_source

from .camera import Camera, Script, clean_pictures
from .test_uri import CANARY

QUICK = AvOptions(open_timeout=2.0, read_timeout=1.0, analyze_s=0.2, probe_bytes=50_000)


def record(path: Path, pictures: list[npt.NDArray[np.uint8]], codec: str = "libx264", gop: int = 5) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def flat(red: int, green: int, blue: int, side: int = 64) -> npt.NDArray[np.uint8]:
    return np.full((side, side, 3), (red, green, blue), np.uint8)


def read_all(source: AvSource) -> list[Picture]:
    found = []
    source.open()
    try:
        while True:
            picture = source.read(5.0)
            assert picture is not None
            found.append(picture)
    except EndOfFile:
        return found
    finally:
        source.close()


def opened(url: str, options: AvOptions = QUICK) -> AvSource:
    source = AvSource(parse_source(url), options)
    source.open()
    return source


# Files


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mjpeg")])
def test_a_recording_gives_every_picture_with_its_time_as_rgb(tmp_path: Path, name: str, codec: str) -> None:
    path = record(tmp_path / name, [flat(255, 0, 0), *[flat(0, 0, 255)] * 11], codec)

    pictures = read_all(AvSource(parse_source(str(path))))

    assert [round(picture.pts or 0, 3) for picture in pictures] == [round(n / 10, 3) for n in range(12)]
    for picture, colour in ((pictures[0], (255, 0, 0)), (pictures[-1], (0, 0, 255))):
        assert picture.pixels.dtype == np.uint8 and picture.pixels.flags.c_contiguous
        assert np.abs(picture.pixels.mean((0, 1)) - colour).max() < 6
    assert pictures[0].is_keyframe
    assert not any(picture.corrupt for picture in pictures)


def test_key_frames_are_those_of_the_recording(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mp4", [flat(n * 20, 0, 0) for n in range(11)], gop=5)

    assert [n for n, picture in enumerate(read_all(AvSource(parse_source(str(path))))) if picture.is_keyframe] == [
        *(0, 5, 10)
    ]


def test_odd_widths_have_no_padding_in_them(tmp_path: Path) -> None:
    """Rows of a decoded picture are padded to 32 bytes and more; the array's are not."""
    pictures = [np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)] * 2

    first = read_all(AvSource(parse_source(str(record(tmp_path / "a.mp4", pictures)))))[0]

    assert first.pixels.shape == (50, 70, 3)
    assert np.abs(first.pixels.astype(int) - pictures[0]).mean() < 60


def test_other_codecs_and_containers_are_refused_in_words(tmp_path: Path) -> None:
    mpeg4 = record(tmp_path / "a.mp4", [flat(0, 0, 0)] * 3, "mpeg4")
    text = tmp_path / "b.mp4"
    text.write_text("no video at all, " * 100)
    playlist = tmp_path / "c.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{mpeg4}\n")

    for path, word in ((mpeg4, "mpeg4"), (text, "not a stream that is read"), (playlist, "not a stream that is read")):
        with pytest.raises(SourceUnsupported, match=word):
            opened(str(path))


def test_a_truncated_jpeg_in_a_recording_is_marked(tmp_path: Path) -> None:
    data = b"".join(_jpeg(n)[: -400 if n == 2 else None] for n in range(5))
    (tmp_path / "a.mjpeg").write_bytes(data)

    marks = [picture.corrupt for picture in read_all(AvSource(parse_source(str(tmp_path / "a.mjpeg"))))]

    assert [n for n, mark in enumerate(marks) if mark] == [2]


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_damaged_recordings_end_or_give_pictures_but_never_anything_else(tmp_path: Path) -> None:
    whole = record(tmp_path / "a.mp4", [flat(n * 10, 50, 0) for n in range(20)]).read_bytes()
    chance = np.random.default_rng(0)
    for number in range(30):
        data = bytearray(whole)
        for position in chance.integers(0, len(data), 20):
            data[position] = chance.integers(0, 256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(data[: chance.integers(1, len(data))] if number % 3 == 0 else data)
        try:
            for picture in read_all(AvSource(parse_source(str(path)))):
                assert picture.pixels.shape[2] == 3
        except SourceError:
            pass


# RTSP


def test_a_camera_gives_times_key_frames_and_a_red_box_after_every_connection() -> None:
    with Camera(Script(speed=3)) as camera:
        source = AvSource(parse_source(camera.url), QUICK)
        for _ in range(2):
            source.open()
            pictures = [picture for picture in (source.read(2.0) for _ in range(30)) if picture is not None]
            source.close()
            times = [picture.pts for picture in pictures if picture.pts is not None]
            assert np.allclose(np.diff(times), 0.04, atol=0.001)
            assert [n for n, picture in enumerate(pictures) if picture.is_keyframe] == [0, 25]
            red, green, blue = pictures[0].pixels[60, 20]
            assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(("fault", "share"), [("loss", 0.05), ("loss", 0.2), ("drop_units", 0.05)])
def test_no_wrong_picture_is_trusted_after_lost_packets(fault: Any, share: float) -> None:
    """Every trusted picture is bit for bit one that an undisturbed decoder gives."""
    script = Script(fault=fault, share=share, at=5, speed=8, frames=250, noise=2.0)
    clean = clean_pictures(script, script.frames)
    trusted = wrong = wrong_and_trusted = 0
    with Camera(script) as camera:
        source, trust = opened(camera.url), Trust()
        try:
            while (picture := source.read(0.5)) is not None:
                is_wrong = picture.pixels.tobytes() not in clean
                is_trusted = not trust.check(picture)
                trusted, wrong = trusted + is_trusted, wrong + is_wrong
                wrong_and_trusted += is_wrong and is_trusted
        except SourceLost:
            pass  # all have been sent
        source.close()

    assert wrong > 20
    assert trusted >= 5
    assert wrong_and_trusted == 0


def test_flipped_bits_never_end_the_reading() -> None:
    """TCP's checksum keeps them away; a flip that still decodes cannot be known for one by any decoder."""
    with Camera(Script(fault="garble", share=0.3, at=5, speed=8, frames=150, noise=2.0)) as camera:
        source, trust = opened(camera.url), Trust()
        marks = []
        try:
            while (picture := source.read(0.5)) is not None:
                marks.append(trust.check(picture))
        except SourceLost:
            pass
        source.close()

    assert sum(bool(mark) for mark in marks) > 20


def test_a_change_of_size_is_seen() -> None:
    with Camera(Script(fault="resize", at=10, speed=4)) as camera:
        source = opened(camera.url)
        shapes = [picture.pixels.shape for picture in (source.read(2.0) for _ in range(20)) if picture is not None]
        source.close()

    assert shapes[0] == (120, 160, 3) and shapes[-1] == (240, 320, 3)


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_the_end_of_a_live_stream_is_a_loss(fault: Any) -> None:
    with Camera(Script(fault=fault, at=10, speed=4)) as camera:
        source = opened(camera.url)
        with pytest.raises(SourceLost):
            for _ in range(20):
                source.read(2.0)
        source.close()


def test_a_stall_ends_within_the_read_timeout() -> None:
    with Camera(Script(fault="stall", at=10, speed=4)) as camera:
        source = opened(camera.url)
        start = time.monotonic()
        with pytest.raises(SourceLost, match="no answer within 1 s"):
            for _ in range(20):
                source.read(0.5)
        source.close()

    assert time.monotonic() - start < 5  # 10 pictures, then FFmpeg's held one, then the timeout


def test_a_server_that_accepts_and_says_nothing_is_lost_within_the_open_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(SourceLost, match="no answer within 2 s"):
            opened(f"rtsp://127.0.0.1:{listener.getsockname()[1]}/live")

    assert time.monotonic() - start < 4


def test_a_camera_that_promises_pictures_and_sends_none_is_lost_within_the_open_timeout() -> None:
    with Camera(Script(fault="stall", at=0)) as camera:
        start = time.monotonic()
        with pytest.raises(SourceSilent, match="no answer within 2 s"):
            opened(camera.url)

    assert time.monotonic() - start < 4


def test_a_camera_with_few_pictures_is_not_taken_for_a_silent_one() -> None:
    with Camera(Script(fps=1)) as camera:
        source = AvSource(parse_source(camera.url), AvOptions(open_timeout=1.5, read_timeout=2.0))
        source.open()
        assert source.read(0.5) is not None
        source.close()


def test_wrong_credentials_are_refused_and_right_ones_work() -> None:
    with Camera(Script(login="us@er:p/w?1", speed=4)) as camera:
        with pytest.raises(SourceRefused, match="401"):
            opened(camera.url.replace("rtsp://", "rtsp://us%40er:wrong@"))
        source = opened(camera.url.replace("rtsp://", "rtsp://us%40er:p%2Fw%3F1@"))
        assert source.read(2.0) is not None
        source.close()


# Passwords

FORMS = [
    "rtsp://admin:{}@{}/live",
    "rtsp://user.name:{}@{}/live",
    "rtsp://us%40er:{}@{}/live",
    "rtsp://:{}@{}/live",
    "rtsp://{}@{}/live",
    "rtsp://admin:p@{}@{}/live",
    "rtsp://admin:{}%40%2F@{}/live",
    "http://admin:{}@{}/video",
    "http://user.name:{}@{}/video?channel=1",
    "http://{1}/video?user=admin&password={0}",
    "http://{1}/video?access_token={0}&size=2",
    "http://{1}/video?usr=a&pwd={0}",
]


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """Four servers that fail: none there, hangs up, talks nonsense, says 401 or 404."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = f"127.0.0.1:{closed.getsockname()[1]}"

    def serve(listener: socket.socket, answer: bytes) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.recv(4096)
                client.sendall(answer)

    answers = [b"", b"nonsense\r\n\r\n" * 20, b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\nContent-Length: 0\r\n\r\n"]
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in answers]
    for listener, answer in zip(listeners, answers, strict=True):
        threading.Thread(target=serve, args=(listener, answer), daemon=True).start()
    yield [refusing, *(f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)]
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("form", FORMS)
def test_no_exception_holds_a_password(form: str, addresses: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for address in addresses:
        with pytest.raises(SourceError) as failed:
            opened(form.format(CANARY, address), AvOptions(open_timeout=1.0, read_timeout=1.0))
        texts = [str(failed.value), repr(failed.value), failed.value.hint]
        texts += traceback.format_exception(failed.value)
        assert failed.value.__context__ is None and failed.value.__cause__ is None
        assert not any(CANARY in text for text in texts)
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err


# HTTP


class _MjpegCamera(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path != "/video":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(40):
            data = _jpeg(number)[: -300 if number == 20 else None]
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + data + b"\r\n")
            except OSError:
                return
            time.sleep(0.01)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mjpeg_camera() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _MjpegCamera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_mjpeg_over_http_has_no_invented_time_and_shows_half_pictures(mjpeg_camera: str) -> None:
    source = opened(f"{mjpeg_camera}/video")
    pictures = []
    with pytest.raises(SourceLost):
        while (picture := source.read(2.0)) is not None:
            pictures.append(picture)
    source.close()

    assert len(pictures) == 40
    assert all(picture.pts is None and picture.is_keyframe for picture in pictures)
    assert [n for n, picture in enumerate(pictures) if picture.corrupt] == [20]


def test_a_stream_that_is_not_there_is_refused(mjpeg_camera: str) -> None:
    with pytest.raises(SourceRefused, match="404"):
        opened(f"{mjpeg_camera}/other")


# USB


def test_a_usb_camera_that_is_not_there_is_lost() -> None:
    with pytest.raises(SourceLost, match="video97"):
        opened("v4l2:///dev/video97")


def test_connections_leave_no_file_open() -> None:
    with Camera(Script(fault="cut", at=3, speed=8)) as camera:
        for _ in range(3):
            _drain(camera)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(15):
            _drain(camera)
        time.sleep(0.2)
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def _drain(camera: Camera) -> None:
    source = AvSource(parse_source(camera.url), QUICK)
    with pytest.raises(SourceError):
        source.open()
        while True:
            source.read(1.0)
    source.close()
