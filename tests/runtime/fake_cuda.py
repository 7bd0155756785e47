"""libcuda and libcudart out of host memory: strict about argument types, about freed memory, and about waiting.

Work on a stream runs when the stream is synchronised and not before, as on a GPU: who reads too early sees old bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NO_DEVICE = 100
OUT_OF_MEMORY = 2
BAD_VALUE = 1
DRIVER_TOO_OLD = 35
ILLEGAL_ADDRESS = 700
CAPTURE_REFUSED = 900

_KINDS = ("device", "host", "stream", "event", "graph", "recording")


class FakeFunction:
    """A function of a ctypes library: it must have been given argtypes and takes nothing that these do not allow."""

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.argtypes: list[Any] | None = None
        self.restype: Any = None
        self._name, self._body = name, body

    def __call__(self, *arguments: Any) -> Any:
        assert self.argtypes is not None, f"{self._name} has no argtypes: pointers would be cut to 32 bits"
        assert self.restype is not None, f"{self._name} has no restype"
        assert len(arguments) == len(self.argtypes), f"{self._name} takes {len(self.argtypes)} arguments"
        return self._body(*(_converted(kind, value) for kind, value in zip(self.argtypes, arguments, strict=True)))


def _converted(kind: Any, value: Any) -> Any:
    kind.from_param(value)  # raises what ctypes itself would raise
    if hasattr(value, "_obj"):
        return value._obj
    if kind is ctypes.c_char_p:
        return value
    number = kind(value).value
    if kind is not ctypes.c_void_p:
        assert number == value, f"{value} does not fit into {kind.__name__}"
    return number or 0


class _Library:
    lacking: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> FakeFunction:
        body = type(self).__dict__.get(f"do_{name}")
        if body is None or name in self.lacking:
            raise AttributeError(f"undefined symbol: {name}")
        function = FakeFunction(name, lambda *arguments: self.returned(name, body(self, *arguments)))
        setattr(self, name, function)
        return function

    def returned(self, name: str, code: Any) -> Any:
        """Take notice of what a function gives back."""
        return code


@dataclass
class FakeDriver(_Library):
    """libcuda.so.1 with one device."""

    init_code: int = 0
    devices: int = 1
    name: bytes = b"Orin"

    def do_cuInit(self, flags: int) -> int:
        return self.init_code

    def do_cuDeviceGetCount(self, count: Any) -> int:
        count.value = self.devices
        return 0

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device.value = ordinal
        return 0

    def do_cuDeviceGetName(self, buffer: Any, size: int, device: int) -> int:
        buffer.value = self.name
        return 0


@dataclass
class FakeCudart(_Library):
    """libcudart.so; `live` holds what was allocated and not yet freed, by kind.

    `set_device_code`: what the first call gives. `broken`: what every wait and every free gives, done or not.
    `last_error`: of the last call that failed, until somebody asks for it.
    """

    free_bytes: int = 6 << 30
    integrated: bool = False
    sm: tuple[int, int] = (8, 7)
    version: int = 12060
    capture_works: bool = True
    malloc_limit: int | None = None
    lacking: tuple[str, ...] = ()
    set_device_code: int = 0
    broken: int = 0
    last_error: int = 0
    on_capture: Callable[[], None] | None = None
    launches: int = 0
    live: dict[str, dict[int, Any]] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    freed: list[str] = field(default_factory=list)
    _queue: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    _capturing: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    _next: int = 1 << 40  # handles wider than 32 bits

    def returned(self, name: str, code: Any) -> Any:
        if name not in ("cudaGetErrorString", "cudaGetLastError"):
            self.last_error = code or self.last_error
        return code

    def do_cudaGetLastError(self) -> int:
        code, self.last_error = self.last_error, 0
        return code

    def do_cudaGetErrorString(self, code: int) -> bytes:
        return {
            OUT_OF_MEMORY: b"out of memory",
            DRIVER_TOO_OLD: b"CUDA driver version is insufficient for CUDA runtime version",
            ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
            CAPTURE_REFUSED: b"operation not permitted when stream is capturing",
        }.get(code, b"invalid argument")

    def do_cudaGetDeviceCount(self, count: Any) -> int:
        count.value = 1
        return 0

    def do_cudaSetDevice(self, device: int) -> int:
        return self.set_device_code if device == 0 else BAD_VALUE

    def do_cudaDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:
        value.value = {75: self.sm[0], 76: self.sm[1], 18: int(self.integrated)}[which]
        return 0

    def do_cudaRuntimeGetVersion(self, value: Any) -> int:
        value.value = self.version
        return 0

    def do_cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free.value, total.value = self.free_bytes, 8 << 30
        return 0

    def do_cudaMalloc(self, pointer: Any, size: int) -> int:
        if self.malloc_limit is not None and len(self.live["device"]) >= self.malloc_limit:
            return OUT_OF_MEMORY
        return self._allocate("device", pointer, size)

    def do_cudaFree(self, address: int) -> int:
        return self._release("device", address)

    def do_cudaMallocHost(self, pointer: Any, size: int) -> int:
        return self._allocate("host", pointer, size)

    def do_cudaFreeHost(self, address: int) -> int:
        return self._release("host", address)

    def do_cudaMemcpyAsync(self, target: int, source: int, size: int, direction: int, stream: int) -> int:
        kinds = {1: ("device", "host"), 2: ("host", "device")}[direction]
        assert stream not in self._capturing, "the copies are not part of the recording"

        def copy() -> None:
            data = self.read(source, size, kinds[1])
            self.write(target, data, kinds[0])

        self.read(source, size, kinds[1])
        return self.enqueue(stream, copy)

    def do_cudaStreamCreate(self, pointer: Any) -> int:
        self._queue[self._next] = []
        return self._handle("stream", pointer)

    def do_cudaStreamSynchronize(self, stream: int) -> int:
        if stream in self._capturing:
            return CAPTURE_REFUSED
        work, self._queue[stream] = self._queue[stream], []
        for step in work:
            step()
        return self.broken

    def do_cudaStreamDestroy(self, stream: int) -> int:
        return self._release("stream", stream)

    def do_cudaEventCreateWithFlags(self, pointer: Any, flags: int) -> int:
        return self._handle("event", pointer)

    def do_cudaEventRecord(self, event: int, stream: int) -> int:
        assert event in self.live["event"]
        return self.enqueue(stream, lambda: None)

    def do_cudaEventSynchronize(self, event: int) -> int:
        return 0 if event in self.live["event"] else BAD_VALUE

    def do_cudaEventElapsedTime(self, value: Any, start: int, end: int) -> int:
        value.value = 1.5
        return 0

    def do_cudaEventDestroy(self, event: int) -> int:
        return self._release("event", event)

    def do_cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        assert not self._queue[stream], "work is still queued"
        if not self.capture_works:
            return CAPTURE_REFUSED
        self._capturing[stream] = []
        if self.on_capture is not None:
            self.on_capture()
        return 0

    def do_cudaStreamEndCapture(self, stream: int, pointer: Any) -> int:
        return self._handle("graph", pointer, self._capturing.pop(stream))

    def do_cudaGraphInstantiateWithFlags(self, pointer: Any, graph: int, flags: int) -> int:
        return self._handle("recording", pointer, self.live["graph"][graph])

    def do_cudaGraphLaunch(self, recording: int, stream: int) -> int:
        self.launches += 1
        for step in self.live["recording"][recording]:
            self.enqueue(stream, step)
        return 0

    def do_cudaGraphExecDestroy(self, recording: int) -> int:
        return self._release("recording", recording)

    def do_cudaGraphDestroy(self, graph: int) -> int:
        return self._release("graph", graph)

    # For the fake TensorRT

    def enqueue(self, stream: int, step: Callable[[], None]) -> int:
        """Queue or record one step of work."""
        assert stream in self.live["stream"], f"stream {stream:#x} is not there (any more)"
        self._capturing.get(stream, self._queue[stream]).append(step)
        return 0

    def read(self, address: int, size: int, kind: str) -> bytes:
        """Return bytes of live memory."""
        self._check(address, size, kind)
        return ctypes.string_at(address, size)

    def write(self, address: int, data: bytes, kind: str) -> None:
        """Write into live memory."""
        self._check(address, len(data), kind)
        ctypes.memmove(address, data, len(data))

    def leaks(self) -> dict[str, int]:
        """Count what was not freed."""
        return {kind: len(entries) for kind, entries in self.live.items() if entries}

    def _check(self, address: int, size: int, kind: str) -> None:
        for start, buffer in self.live[kind].items():
            if start <= address and address + size <= start + len(buffer):
                return
        raise AssertionError(f"{size} bytes at {address:#x} are no live {kind} memory")

    def _allocate(self, kind: str, pointer: Any, size: int) -> int:
        buffer = (ctypes.c_uint8 * size)(*([0xAB] * min(size, 64)))
        pointer.value = ctypes.addressof(buffer)
        self.live[kind][pointer.value] = buffer
        return 0

    def _handle(self, kind: str, pointer: Any, content: Any = None) -> int:
        pointer.value = self._next
        self.live[kind][self._next] = content
        self._next += 1
        return 0

    def _release(self, kind: str, handle: int) -> int:
        if handle not in self.live[kind]:
            return BAD_VALUE
        assert kind == "stream" or not any(self._queue.values()), f"{kind} is freed while work is queued"
        del self.live[kind][handle]
        self.freed.append(kind)
        return self.broken
