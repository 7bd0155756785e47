"""A small RTSP camera on loopback that misbehaves on demand: H.264 over TCP, made with PyAV."""

from __future__ import annotations

import base64
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, cycle
from time import monotonic
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt

Fault = Literal["none", "stall", "cut", "reset", "garble", "loss", "drop_units", "resize", "frozen", "black"]

_CLOCK = 90_000
_PAYLOAD = 1400
_SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
    "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track0\r\n"
)


@dataclass(frozen=True)
class Script:
    """What a camera sends, and what goes wrong from frame `at` on, up to frame `until`.

    garble: one bit flipped in a `share` of the RTP packets; loss: that share of packets left out; drop_units: that
    share of whole pictures. faulty_plays: only so many connections are faulty (0: all). speed: times faster than real
    time. login: user:password that is asked for. frames: it stops sending after so many, the connection stays. loop:
    so many pictures are coded beforehand and sent over and over (0: each one is coded when it is due).
    """

    fault: Fault = "none"
    at: int = 25
    until: int = 1_000_000
    share: float = 0.05
    faulty_plays: int = 0
    login: str = ""
    width: int = 160
    height: int = 120
    fps: int = 25
    speed: float = 1.0
    noise: float = 0.0
    is_moving: bool = True
    frames: int = 1_000_000
    loop: int = 0
    seed: int = 3


def draw(script: Script, index: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return picture `index`, RGB: a red box on a texture."""
    is_faulty = script.at <= index < script.until
    if script.fault == "frozen" and is_faulty:
        index = script.at
    if script.fault == "black" and is_faulty:
        return np.zeros((height, width, 3), np.uint8)
    picture = np.random.default_rng(7).integers(60, 120, (height, width, 3), dtype=np.uint8)
    if script.is_moving:
        left = index * 3 % (width - 40)
        picture[height // 2 - 20 : height // 2 + 20, left : left + 40] = (230, 20, 20)
    if script.noise:
        noise = np.random.default_rng((script.seed, index)).normal(0, script.noise, picture.shape)
        picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return picture


def encode(script: Script, count: int) -> Iterator[bytes]:
    """Yield one H.264 access unit per picture (Annex B), a key frame per second."""
    width, height = script.width, script.height
    encoder = _encoder(script, width, height)
    for index in range(count):
        if script.fault == "resize" and index in (script.at, script.until):
            size = 2 if index == script.at else 1
            width, height = size * script.width, size * script.height
            encoder = _encoder(script, width, height)
        frame = av.VideoFrame.from_ndarray(draw(script, index, width, height), format="rgb24")
        frame.pts = index
        yield b"".join(bytes(packet) for packet in encoder.encode(frame))


def decoded(script: Script, count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield every picture as an undisturbed decoder gives it, in order."""
    decoder: Any = av.CodecContext.create("h264", "r")
    for unit in chain(encode(script, count), [b""]):
        for frame in decoder.decode(av.Packet(unit) if unit else None):
            yield frame.to_ndarray(format="rgb24")


def clean_pictures(script: Script, count: int) -> set[bytes]:
    """Return the pixels of every picture as an undisturbed decoder gives them."""
    return {picture.tobytes() for picture in decoded(script, count)}


class Camera:
    """Serves one script on 127.0.0.1; a context manager. Each PLAY begins at frame 0."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.plays = self.connections = 0
        self._coded = list(encode(self.script, self.script.loop))
        self.is_mute = False  # pictures go on, and none is sent on any connection
        self.faulty_since: float | None = None  # monotonic clock
        self._port = 0
        self._listener: socket.socket | None = None
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Camera:
        self.plug()
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """The stream's URL, without a login."""
        return f"rtsp://{self.address}/live"

    def plug(self) -> None:
        """Listen; the second time on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        """End every connection and listen no more."""
        listener, self._listener = self._listener, None
        with self._lock:
            clients = list(self._clients)
        for sock in ([listener] if listener else []) + clients:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with self._lock:
                    self.connections += 1
                    self._clients.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        stop, sending = threading.Event(), threading.Lock()
        with contextlib.suppress(OSError, ValueError, struct.error), client.makefile("rb") as stream:
            while request := _read_request(stream):
                method, headers = request
                status, extra, body = self._answer(method, headers)
                head = f"RTSP/1.0 {status}\r\nCSeq: {headers.get('cseq', '0')}\r\n{extra}Content-Length: {len(body)}"
                with sending:
                    client.sendall(f"{head}\r\n\r\n{body}".encode())
                if method == "PLAY" and status.startswith("200"):
                    with self._lock:
                        self.plays += 1
                        is_faulty = not self.script.faulty_plays or self.plays <= self.script.faulty_plays
                    arguments = (client, sending, stop, is_faulty)
                    threading.Thread(target=self._send, args=arguments, daemon=True).start()
        stop.set()
        with self._lock:
            self._clients.discard(client)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()

    def _answer(self, method: str, headers: dict[str, str]) -> tuple[str, str, str]:
        login = "Basic " + base64.b64encode(self.script.login.encode()).decode()
        if self.script.login and method != "OPTIONS" and headers.get("authorization") != login:
            return "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n', ""
        if method == "OPTIONS":
            return "200 OK", "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""
        if method == "DESCRIBE":
            return "200 OK", "Content-Type: application/sdp\r\n", _SDP
        if method == "SETUP":
            return "200 OK", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", ""
        return "200 OK", "Session: 1\r\n", ""

    def _send(self, client: socket.socket, sending: threading.Lock, stop: threading.Event, is_faulty: bool) -> None:
        script = self.script
        chance, number, start = random.Random(script.seed), 0, monotonic()
        with contextlib.suppress(OSError):
            for index, unit in enumerate(cycle(self._coded) if script.loop else encode(script, script.frames)):
                fault = script.fault if is_faulty and script.at <= index < script.until else "none"
                if fault != "none" and self.faulty_since is None:
                    self.faulty_since = monotonic()
                if fault in ("stall", "cut", "reset"):
                    _break(client, fault)
                    return
                packets = list(_rtp_packets(unit, index * _CLOCK // script.fps, number))
                number += len(packets)
                is_lost = self.is_mute or (fault == "drop_units" and chance.random() < script.share)
                for packet in [] if is_lost else _damaged(packets, fault, script.share, chance):
                    with sending:
                        client.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)
                if stop.wait(max(0.0, start + (index + 1) / script.fps / script.speed - monotonic())):
                    return


def _encoder(script: Script, width: int, height: int) -> Any:
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.framerate, encoder.time_base, encoder.gop_size = script.fps, Fraction(1, script.fps), script.fps
    parameters = "repeat-headers=1:annexb=1"
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "threads": "1", "x264-params": parameters}
    return encoder


def _break(client: socket.socket, fault: str) -> None:
    if fault == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Only the last reference's end resets: the thread that waits for requests has one until it is woken. To shut
        # the sending side would say goodbye.
        with socket.socket(fileno=client.detach()) as last:
            last.shutdown(socket.SHUT_RD)
    elif fault == "cut":
        client.shutdown(socket.SHUT_RDWR)


def _damaged(packets: list[bytes], fault: str, share: float, chance: random.Random) -> Iterator[bytes]:
    for packet in packets:
        if fault in ("garble", "loss") and chance.random() < share:
            if fault == "loss":
                continue
            position = chance.randrange(14, max(15, len(packet)))  # behind the RTP and fragment headers
            packet = packet[:position] + bytes([packet[position] ^ 1 << chance.randrange(8)]) + packet[position + 1 :]
        yield packet


def _rtp_packets(unit: bytes, stamp: int, number: int) -> Iterator[bytes]:
    payloads = [piece for nal in re.split(b"\0\0\0\1|\0\0\1", unit) if nal for piece in _fragments(nal)]
    for position, payload in enumerate(payloads):
        marker = 0x80 if position == len(payloads) - 1 else 0
        yield struct.pack(">BBHII", 0x80, marker | 96, number + position & 0xFFFF, stamp & 0xFFFFFFFF, 1) + payload


def _fragments(nal: bytes) -> list[bytes]:
    """Return a NAL unit as RTP payloads: itself, or FU-A pieces."""
    if len(nal) <= _PAYLOAD:
        return [nal]
    pieces = [nal[at : at + _PAYLOAD] for at in range(1, len(nal), _PAYLOAD)]
    first, last = 0x80, 0x40
    flags = [first, *[0] * (len(pieces) - 2), last]
    return [
        bytes([nal[0] & 0xE0 | 28, flag | nal[0] & 0x1F]) + piece for flag, piece in zip(flags, pieces, strict=True)
    ]


def _read_request(stream: Any) -> tuple[str, dict[str, str]] | None:
    while (first := stream.read(1)) == b"$":  # RTCP from the reader
        stream.read(struct.unpack(">xH", stream.read(3))[0])
    lines = [(first + stream.readline()).decode("latin-1").strip()]
    if not lines[0]:
        return None
    while line := stream.readline().decode("latin-1").strip():
        lines.append(line)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return lines[0].split()[0], headers
