"""CUDA memory, streams, events and graphs through ctypes: what a TensorRT session needs, without a package for it.

The driver (libcuda) comes with the GPU; the runtime library (libcudart) comes with CUDA. A libcudart that loads is no
proof of a driver, so `open_cuda` asks the driver first: TensorRT may crash the process where there is none.
"""

from __future__ import annotations

import ctypes
import glob
import math
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MissingRequirementError

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2

_DRIVER = "libcuda.so.1"
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
# CUDA's own folders, then the folders of the pip packages nvidia-cuda-runtime*.
_FOLDERS = (
    "/usr/local/cuda*/lib64",
    "/usr/local/cuda*/targets/*/lib",
    *(f"{folder}/nvidia/*/lib" for folder in sys.path if folder.endswith("-packages")),
)

_INTEGRATED, _SM_MAJOR, _SM_MINOR = 18, 75, 76  # cudaDeviceAttr
_DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver
_CAPTURE_THREAD_LOCAL = 1  # calls of other threads do not spoil the capture

# The handles of streams, events and graphs are pointers: without argtypes ctypes would cut them to 32 bits.
_RUNTIME_CALLS: dict[str, list[Any]] = {
    "cudaGetDeviceCount": [POINTER(c_int)],
    "cudaSetDevice": [c_int],
    "cudaDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cudaRuntimeGetVersion": [POINTER(c_int)],
    "cudaGetLastError": [],
    "cudaMemGetInfo": [POINTER(c_size_t), POINTER(c_size_t)],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaMallocHost": [POINTER(c_void_p), c_size_t],
    "cudaFreeHost": [c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreate": [POINTER(c_void_p)],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
    "cudaEventCreateWithFlags": [POINTER(c_void_p), c_uint],
    "cudaEventRecord": [c_void_p, c_void_p],
    "cudaEventSynchronize": [c_void_p],
    "cudaEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cudaEventDestroy": [c_void_p],
    "cudaStreamBeginCapture": [c_void_p, c_int],
    "cudaStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    # Not cudaGraphInstantiate, which has five arguments up to CUDA 11 and three from CUDA 12 on.
    "cudaGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaGraphDestroy": [c_void_p],
}
_DRIVER_CALLS: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    # The name is the driver's: cudaGetDeviceProperties fills a structure that differs between CUDA versions.
    "cuDeviceGetName": [c_char_p, c_int, c_int],
}


class CudaError(MissingRequirementError):
    """A CUDA call failed; `code` is CUDA's own number."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(
            f"{call} failed: {text} (CUDA error {code}).",
            _CALL_HINTS.get(code, "Free GPU memory, or restart the process; see `edge-anomaly doctor`."),
        )
        self.code = code


@dataclass(frozen=True)
class Device:
    """The GPU that is used (always the first one; CUDA_VISIBLE_DEVICES chooses).

    sm: compute capability, for instance "8.7". integrated: it shares the CPU's memory, as on a Jetson.
    """

    name: str
    sm: str
    integrated: bool


class Cuda:
    """The CUDA runtime with checked calls; pointers and handles are plain integers.

    `open_cuda` makes one. Each method raises CudaError with CUDA's own words where the call fails. `name`: of the
    runtime library, for messages.
    """

    def __init__(self, runtime: Any, driver: Any, name: str = "libcudart.so") -> None:
        self._runtime = _with_signatures(runtime, {**_RUNTIME_CALLS, "cudaGetErrorString": [c_int]}, name)
        self._driver = _with_signatures(driver, _DRIVER_CALLS, _DRIVER)
        self._runtime.cudaGetErrorString.restype = c_char_p
        self._call("cudaSetDevice", 0)

    def device(self) -> Device:
        """Return name and compute capability of the device."""
        name = ctypes.create_string_buffer(256)
        number = c_int()
        for call, code in (
            ("cuDeviceGet", self._driver.cuDeviceGet(ctypes.byref(number), 0)),
            ("cuDeviceGetName", self._driver.cuDeviceGetName(name, len(name), number.value)),
        ):
            if code:
                raise CudaError(call, code, "the driver gives no name for the device")
        major, minor = self._attribute(_SM_MAJOR), self._attribute(_SM_MINOR)
        return Device(name.value.decode(errors="replace"), f"{major}.{minor}", bool(self._attribute(_INTEGRATED)))

    def runtime_version(self) -> str:
        """Return the version of libcudart, for instance "12.6"."""
        number = c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of device memory, as CUDA sees them."""
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def malloc(self, size: int) -> int:
        """Return the address of `size` bytes of device memory."""
        return self._new("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array in page-locked host memory, which asynchronous copies need; `free_pinned` gives it back."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        address = self._new("cudaMallocHost", max(size, 1))
        raw = (ctypes.c_uint8 * size).from_address(address)
        array: npt.NDArray[Any] = np.ctypeslib.as_array(raw).view(kind).reshape(shape)
        return array

    def free_pinned(self, array: npt.NDArray[Any]) -> None:
        """Give the memory of `pinned` back; the array must not be used any more."""
        self._call("cudaFreeHost", array.ctypes.data)

    def copy(self, target: int, source: int, size: int, direction: int, stream: int) -> None:
        """Queue a copy of `size` bytes, HOST_TO_DEVICE or DEVICE_TO_HOST."""
        self._call("cudaMemcpyAsync", target, source, size, direction, stream)

    def new_stream(self) -> int:
        """Return a new stream."""
        return self._new("cudaStreamCreate")

    def synchronize(self, stream: int) -> None:
        """Wait for all that was queued on a stream; errors of that work show here."""
        self._call("cudaStreamSynchronize", stream)

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def new_event(self) -> int:
        """Return a new event that takes times."""
        return self._new("cudaEventCreateWithFlags", 0)

    def record(self, event: int, stream: int) -> None:
        """Queue an event."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Wait for `end` and return the milliseconds between two recorded events."""
        self._call("cudaEventSynchronize", end)
        value = c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(value), start, end)
        return value.value

    def free_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Record what is queued on a stream from now on, instead of running it."""
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """End the recording and return it as something that `launch` runs."""
        graph = self._new_last("cudaStreamEndCapture", stream)
        try:
            return self._new("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def forget_error(self) -> None:
        """Clear the error that CUDA keeps for the next one who asks, which may be TensorRT after a good call."""
        self._runtime.cudaGetLastError()

    def launch(self, recording: int, stream: int) -> None:
        """Queue a recording."""
        self._call("cudaGraphLaunch", recording, stream)

    def free_recording(self, recording: int) -> None:
        """Destroy what `end_capture` returned."""
        self._call("cudaGraphExecDestroy", recording)

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), which, 0)
        return value.value

    def _new(self, call: str, *arguments: Any) -> int:
        """Make a call whose first argument is where it writes a pointer, and return the pointer."""
        pointer = c_void_p()
        self._call(call, ctypes.byref(pointer), *arguments)
        return pointer.value or 0

    def _new_last(self, call: str, *arguments: Any) -> int:
        pointer = c_void_p()
        self._call(call, *arguments, ctypes.byref(pointer))
        if not pointer.value:
            raise CudaError(call, 0, "the recording is empty")
        return pointer.value

    def _call(self, call: str, *arguments: Any) -> None:
        code = getattr(self._runtime, call)(*arguments)
        if code:
            text = self._runtime.cudaGetErrorString(code)
            raise CudaError(call, code, text.decode(errors="replace") if text else "no description")


def open_cuda() -> Cuda:
    """Load driver and runtime library and choose the first device.

    The newest library counts that has all that is needed and is not too new for the driver.

    Raises:
        MissingRequirementError: there is no driver, it does not start (with its code), it sees no device, or there is
            no libcudart that it can be used with.
    """
    driver = _open_driver()
    faults: list[MissingRequirementError] = []
    for name, runtime in _runtimes():
        try:
            return Cuda(runtime, driver, name)
        except MissingRequirementError as error:
            if isinstance(error, CudaError) and error.code != _DRIVER_TOO_OLD:
                raise
            faults.append(error)
    if faults:
        raise faults[0]
    raise MissingRequirementError(
        f"There is an NVIDIA driver, but no CUDA runtime library ({', '.join(_RUNTIMES)}).",
        "On a Jetson: sudo apt install nvidia-jetpack. Elsewhere: install CUDA, or add its folder to LD_LIBRARY_PATH.",
    )


def driver_fault() -> str | None:
    """Say why the NVIDIA driver cannot be used, in one sentence; None when it can. Nothing but the driver is loaded."""
    try:
        _open_driver()
    except MissingRequirementError as error:
        return error.what
    return None


def runtime_fault() -> str | None:
    """Say why CUDA cannot be used although there is a driver, in one sentence; None when it can."""
    try:
        open_cuda()
    except MissingRequirementError as error:
        return error.what
    return None


def usable_memory(cuda: Cuda, device: Device) -> int:
    """Return the bytes that a build may count on.

    A Jetson's GPU takes from the same DRAM as the CPU: there the kernel's MemAvailable is the honest number, because
    CUDA counts the page cache as taken, although it is given back on demand. Swap helps the GPU in neither case.
    """
    free, _ = cuda.memory()
    available = available_memory() if device.integrated else None
    return free if available is None else available


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of main memory that programs can get without swapping, or None where Linux does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else None


def _open_driver() -> Any:
    """Load and start the driver; three things can be wrong, each with its own message."""
    library = _load(_DRIVER)
    if library is None:
        raise MissingRequirementError(
            f"There is no NVIDIA driver on this machine ({_DRIVER} cannot be loaded).",
            "TensorRT needs an NVIDIA GPU. In a container, start it with --runtime nvidia; else use --engine "
            "onnxruntime.",
        )
    driver = _with_signatures(library, _DRIVER_CALLS, _DRIVER)
    if code := driver.cuInit(0):
        raise MissingRequirementError(
            f"The NVIDIA driver does not start: cuInit gave CUDA error {code}.", _INIT_HINTS.get(code, _DRIVER_HINT)
        )
    count = c_int()
    if (code := driver.cuDeviceGetCount(ctypes.byref(count))) or count.value == 0:
        raise MissingRequirementError(
            f"The NVIDIA driver sees no device (count {count.value}, CUDA error {code}).",
            "Check CUDA_VISIBLE_DEVICES, and `--runtime nvidia` in a container.",
        )
    return driver


def _runtimes() -> Iterator[tuple[str, Any]]:
    """Load every libcudart there is, one at a time, and yield it with its name."""
    for name in _RUNTIMES:
        if library := _load(name):
            yield name, library
    for pattern in _FOLDERS:
        for path in sorted(glob.glob(f"{pattern}/libcudart.so*"), reverse=True):
            if library := _load(path):
                yield path, library


def _load(name: str) -> Any | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _with_signatures(library: Any, calls: dict[str, list[Any]], library_name: str) -> Any:
    for name, arguments in calls.items():
        function = getattr(library, name, None)
        if function is None:
            raise MissingRequirementError(
                f"{library_name} has no function {name}: it is too old.",
                "Install CUDA 11.4 or newer, or update JetPack.",
            )
        function.argtypes = arguments
        function.restype = c_int
    return library


_DRIVER_HINT = "Restart the machine; if that does not help, install the driver that belongs to its CUDA version."
_CALL_HINTS = {
    _DRIVER_TOO_OLD: "The CUDA library is newer than the driver: update the driver, or install a CUDA that it supports "
    "(`nvidia-smi` shows which).",
}
_INIT_HINTS = {
    100: "No CUDA device is visible: check CUDA_VISIBLE_DEVICES, and `--runtime nvidia` in a container.",
    803: "The driver's kernel part and library have different versions: restart the machine after a driver update.",
    804: "The GPU does not support this driver's compatibility mode: use the container of the device's own JetPack.",
    999: "Often a device file that this user may not open: check the groups `video` and `render`.",
}
