"""Damaged recordings and garbled RTSP replies: pictures or a typed error, within seconds and little memory.

Run as a program it is the child that reads them: `python -m tests.runtime.stream.test_stream_fuzz PART FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import random
import socket
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import av
import numpy as np
import pytest

from edge_anomaly_runtime.errors import SourceError
from edge_anomaly_runtime.stream.reader import Reader
from edge_anomaly_runtime.stream.source import EndOfFile
from edge_anomaly_runtime.stream.source_av import AvOptions, AvSource
from edge_anomaly_runtime.stream.uri import parse_source
from tests.runtime.fuzzing import Watch, damaged, no_hang, outcomes_of, tell

from .camera import Camera, Script, draw, encode

SEED, PARTS, FILES, CALLS = 5, 4, 50, 10
LIMIT_S, LIMIT_MB = 10.0, 300.0
PICTURES = 30

# Where FFmpeg takes the container from the content, the name says how the original was written.
_WRITTEN_AS = {"ts": "mpegts", "mp4": "mp4", "mkv": "matroska", "h264": "h264", "avi": "avi", "mjpeg": "mjpeg"}
# The errors that a source may raise: see `source.FrameSource`.
_TYPED = {"SourceLost", "SourceSilent", "SourceRefused", "SourceUnsupported", "EndOfFile"}

Pixels = Any


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_streams_end_in_pictures_or_a_typed_error(part: int, tmp_path: Path) -> None:
    outcomes = outcomes_of("tests.runtime.stream.test_stream_fuzz", part, tmp_path, seconds=120)
    assert [outcome["index"] for outcome in outcomes] == list(range(FILES + CALLS))
    for outcome in outcomes:
        assert outcome["error"] in _TYPED, outcome
        assert not outcome["odd"], outcome
    worst = max(outcomes, key=lambda outcome: float(outcome["peak_mb"]))
    assert worst["peak_mb"] < LIMIT_MB, next(o for o in outcomes if o["peak_mb"] == worst["peak_mb"])
    files = outcomes[:FILES]
    assert sum(outcome["pictures"] > 0 for outcome in files) > FILES / 4, "the damage is not everything"
    assert any(0 < outcome["pictures"] < PICTURES for outcome in files), "nor is it nothing"


# The damage


def recordings() -> dict[str, bytes]:
    """Return the same short film in every container that is read from files, by its suffix."""
    return {suffix: _recorded(name) for suffix, name in _WRITTEN_AS.items()}


def _recorded(container: str) -> bytes:
    buffer = io.BytesIO()
    codec = "mjpeg" if container in ("avi", "mjpeg") else "libx264"
    script = Script(noise=1.0)
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height = script.width, script.height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "libx264":
            stream.codec_context.gop_size = 10
            stream.options = {"preset": "ultrafast", "threads": "1"}
        for index in range(PICTURES):
            picture = draw(script, index, script.width, script.height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def mutations(part: int) -> Iterator[tuple[str, bytes]]:
    """Yield the file names and contents of one part, the same every time."""
    films = list(recordings().items())
    for index in range(FILES):
        suffix, data = films[index % len(films)]
        chance = random.Random(SEED * 1_000_003 + part * 1_009 + index)
        yield f"film.{suffix}", with_other_size(data, chance) if chance.random() < 0.15 else damaged(data, chance)


def with_other_size(data: bytes, chance: random.Random) -> bytes:
    """Return a film whose parameter sets, if they stand in it, are those of one with another picture size."""
    width, height = chance.choice([(32, 32), (320, 240), (1920, 1080), (2560, 1440)])
    here, there = (_parameters(script) for script in (Script(), Script(width=width, height=height)))
    return data.replace(here, there, chance.choice([1, 2, -1])) if here in data else damaged(data, chance)


def _parameters(script: Script) -> bytes:
    """Return the sequence parameter set of a film as `_recorded` codes it, without start code."""
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = script.width, script.height, "yuv420p"
    encoder.framerate, encoder.time_base, encoder.gop_size = 25, Fraction(1, 25), 10
    encoder.options = {"preset": "ultrafast", "threads": "1"}
    frame = av.VideoFrame(script.width, script.height, "yuv420p")
    units = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    return next(unit for unit in units.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if unit and unit[0] & 31 == 7)


class GarbledCamera:
    """Answers RTSP requests with damaged replies, then sends damaged pictures; a context manager."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/live"

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        client.settimeout(2.0)
        chance, replies = self._chance, honest_replies()
        for reply in replies:
            if not client.recv(4096):
                return
            client.sendall(damaged(reply, chance) if chance.random() < 0.4 else reply)
        client.sendall(damaged(honest_pictures(), chance))


def honest_replies() -> list[bytes]:
    """Return what the camera of the tests answers to OPTIONS, DESCRIBE, SETUP and PLAY."""
    camera, found = Camera(), []
    for number, method in enumerate(("OPTIONS", "DESCRIBE", "SETUP", "PLAY"), start=1):
        status, extra, body = camera._answer(method, {})
        head = f"RTSP/1.0 {status}\r\nCSeq: {number}\r\n{extra}Content-Length: {len(body)}"
        found.append(f"{head}\r\n\r\n{body}".encode())
    return found


def honest_pictures() -> bytes:
    """Return a second of RTP packets as they stand on the connection."""
    from .camera import _rtp_packets

    sent, number = b"", 0
    for index, unit in enumerate(islice(encode(Script(noise=1.0), 25), 25)):
        for packet in _rtp_packets(unit, index * 3600, number):
            sent += b"$\0" + len(packet).to_bytes(2, "big") + packet
            number += 1
    return sent


# The child


def oddities(pixels: Pixels, seq: int, last: int) -> str:
    """Return what is wrong with a picture's array or its number, '' for nothing."""
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3):
        return f"{type(pixels).__name__} {getattr(pixels, 'dtype', '')} {getattr(pixels, 'shape', '')}"
    if not pixels.flags.c_contiguous or pixels.size == 0:
        return f"not contiguous or empty: {pixels.shape}"
    return "" if seq > last else f"number {seq} after {last}"


def read_source(uri: str, *, seconds: float = 60.0, options: AvOptions | None = None) -> dict[str, Any]:
    """Read a source to its end or error, for at most `seconds`."""
    source = AvSource(parse_source(uri), options)
    count, odd, error = 0, "", "EndOfFile"
    give_up = monotonic() + seconds
    try:
        source.open()
        while monotonic() < give_up:
            picture = source.read(0.5)
            if picture is not None:
                odd = odd or oddities(picture.pixels, count, count - 1)
                count += 1
    except (EndOfFile, SourceError) as ended:
        error = type(ended).__name__
    finally:
        source.close()
    return {"pictures": count, "odd": odd, "error": error}


def read_through_reader(uri: str) -> dict[str, Any]:
    """Read a file through a reader, as the stream does."""
    count, odd, last = 0, "", -1
    with Reader("c0", lambda: AvSource(parse_source(uri)), live=False) as reader:
        while not reader.ended:
            frame = reader.take(0.5)
            if frame is not None:
                odd = odd or oddities(frame.pixels, frame.seq, last)
                count, last = count + 1, frame.seq
        error = "EndOfFile" if reader.error is None else type(reader.error).__name__
        status = reader.status()
    if status.captured != status.delivered + sum(status.drops.values()):
        odd = odd or f"{status.captured} captured, {status.delivered} delivered, {status.drops}"
    return {"pictures": count, "odd": odd, "error": error}


def main(part: int, folder: Path) -> None:
    for suffix, data in recordings().items():
        film = folder / f"whole.{suffix}"
        film.write_bytes(data)
        assert read_source(str(film)) == {"pictures": PICTURES, "odd": "", "error": "EndOfFile"}, suffix
    watch = Watch()
    for index, (name, data) in enumerate(mutations(part)):
        (folder / name).write_bytes(data)
        read = read_through_reader if index % 2 else read_source
        with no_hang(LIMIT_S):
            outcome = read(str(folder / name))
        tell(index=index, name=name, peak_mb=watch.peak_mb(), **outcome)
    quick = AvOptions(open_timeout=0.5, read_timeout=0.5, analyze_s=0.2, probe_bytes=50_000)
    for index in range(FILES, FILES + CALLS):
        chance = random.Random(SEED * 1_000_003 + part * 1_009 + index)
        with GarbledCamera(chance) as uri, no_hang(LIMIT_S):
            outcome = read_source(uri, seconds=3.0, options=quick)
        tell(index=index, name="rtsp", peak_mb=watch.peak_mb(), **outcome)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
