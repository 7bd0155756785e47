"""The CUDA layer against a strict library out of host memory, and what is said where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_anomaly_runtime import cuda
from edge_anomaly_runtime.cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, Cuda, CudaError, Device, open_cuda
from edge_anomaly_runtime.errors import MissingRequirementError

from .fake_cuda import DRIVER_TOO_OLD, OUT_OF_MEMORY, FakeCudart, FakeDriver


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What can be loaded on this machine, by name."""
    there: dict[str, Any] = {"libcuda.so.1": FakeDriver(), "libcudart.so.12": FakeCudart()}
    monkeypatch.setattr(cuda, "_load", there.get)
    return there


def test_no_driver_for_real() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    with pytest.raises(MissingRequirementError, match=r"no NVIDIA driver .*libcuda\.so\.1") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
    assert "--runtime nvidia" in caught.value.hint
    assert cuda.driver_fault() == caught.value.what


def test_a_driver_that_does_not_start_gives_its_code(libraries: dict[str, Any]) -> None:
    libraries["libcuda.so.1"] = FakeDriver(init_code=803)
    with pytest.raises(MissingRequirementError, match="cuInit gave CUDA error 803") as caught:
        open_cuda()
    assert "restart the machine" in caught.value.hint


def test_a_driver_without_a_device(libraries: dict[str, Any]) -> None:
    libraries["libcuda.so.1"] = FakeDriver(devices=0)
    with pytest.raises(MissingRequirementError, match="sees no device") as caught:
        open_cuda()
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


def test_a_driver_without_the_runtime_library(libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    del libraries["libcudart.so.12"]
    monkeypatch.setattr(cuda, "_FOLDERS", ())
    with pytest.raises(MissingRequirementError, match="no CUDA runtime library"):
        open_cuda()


def test_the_newest_runtime_is_taken_then_the_folders(
    libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    del libraries["libcudart.so.12"]
    (tmp_path / "libcudart.so.12.6.77").touch()
    libraries[str(tmp_path / "libcudart.so.12.6.77")] = FakeCudart()

    def load(name: str) -> Any:
        asked.append(name)
        return libraries.get(name)

    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "_FOLDERS", (str(tmp_path),))
    open_cuda()
    assert asked == [
        "libcuda.so.1",
        "libcudart.so.13",
        "libcudart.so.12",
        "libcudart.so.11.0",
        "libcudart.so",
        str(tmp_path / "libcudart.so.12.6.77"),
    ]


def test_a_runtime_newer_than_the_driver_is_passed_over(libraries: dict[str, Any]) -> None:
    libraries["libcudart.so.13"] = FakeCudart(version=13000, set_device_code=DRIVER_TOO_OLD)
    assert open_cuda().runtime_version() == "12.6"
    assert cuda.runtime_fault() is None


def test_a_driver_older_than_every_runtime_has_a_hint_of_its_own(
    libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_FOLDERS", ())
    libraries["libcudart.so.12"] = FakeCudart(set_device_code=DRIVER_TOO_OLD)
    with pytest.raises(CudaError, match=r"driver version is insufficient .*\(CUDA error 35\)") as caught:
        open_cuda()
    assert "update the driver" in caught.value.hint
    assert cuda.runtime_fault() == caught.value.what


def test_another_error_is_no_reason_to_try_an_older_runtime(libraries: dict[str, Any]) -> None:
    libraries["libcudart.so.13"] = FakeCudart(set_device_code=OUT_OF_MEMORY)
    with pytest.raises(CudaError, match="out of memory"):
        open_cuda()


@pytest.mark.parametrize("symbol", ["cudaGraphInstantiateWithFlags", "cudaGetErrorString"])
def test_a_runtime_without_a_function_is_passed_over_or_named(
    libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, symbol: str
) -> None:
    monkeypatch.setattr(cuda, "_FOLDERS", ())
    libraries["libcudart.so.13"] = FakeCudart(lacking=(symbol,))
    assert open_cuda().runtime_version() == "12.6"
    del libraries["libcudart.so.12"]
    with pytest.raises(MissingRequirementError, match=rf"libcudart\.so\.13 has no function {symbol}"):
        open_cuda()


def test_a_driver_without_a_function_is_named(libraries: dict[str, Any]) -> None:
    libraries["libcuda.so.1"].lacking = ("cuDeviceGetName",)
    with pytest.raises(MissingRequirementError, match=r"libcuda\.so\.1 has no function cuDeviceGetName"):
        open_cuda()


def test_the_device_is_described(libraries: dict[str, Any]) -> None:
    opened = open_cuda()
    assert opened.device() == Device("Orin", "8.7", integrated=False)
    assert opened.runtime_version() == "12.6"
    assert opened.memory() == (6 << 30, 8 << 30)


def test_a_copy_there_and_back_needs_a_wait() -> None:
    library = FakeCudart()
    opened = Cuda(library, FakeDriver())
    stream, device = opened.new_stream(), opened.malloc(12)
    assert stream > 1 << 32, "handles are pointers"
    source, target = opened.pinned((3,), np.float32), opened.pinned((3,), np.float32)
    source[:] = [1, 2, 3]
    opened.copy(device, source.ctypes.data, 12, HOST_TO_DEVICE, stream)
    opened.copy(target.ctypes.data, device, 12, DEVICE_TO_HOST, stream)
    assert target.tolist() != [1, 2, 3]
    opened.synchronize(stream)
    assert target.tolist() == [1, 2, 3]
    opened.free(device)
    opened.free_pinned(source)
    opened.free_pinned(target)
    opened.free_stream(stream)
    assert library.leaks() == {}


@pytest.mark.parametrize(("dtype", "size"), [(np.uint8, 6), (np.float16, 12), (np.int64, 48)])
def test_pinned_arrays_have_shape_and_type(dtype: type[np.generic], size: int) -> None:
    array = Cuda(FakeCudart(), FakeDriver()).pinned((1, 2, 3), dtype)
    assert (array.shape, array.dtype, array.nbytes) == ((1, 2, 3), np.dtype(dtype), size)


def test_events_and_recordings() -> None:
    library = FakeCudart()
    opened = Cuda(library, FakeDriver())
    stream, start, end = opened.new_stream(), opened.new_event(), opened.new_event()
    opened.record(start, stream)
    opened.record(end, stream)
    assert opened.elapsed_ms(start, end) == 1.5
    opened.synchronize(stream)
    ran: list[int] = []
    opened.begin_capture(stream)
    library.enqueue(stream, lambda: ran.append(1))
    recording = opened.end_capture(stream)
    opened.launch(recording, stream)
    opened.launch(recording, stream)
    opened.synchronize(stream)
    assert ran == [1, 1]
    for free, handle in ((opened.free_recording, recording), (opened.free_event, start), (opened.free_event, end)):
        free(handle)
    opened.free_stream(stream)
    assert library.leaks() == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda opened: opened.free(1 << 40), r"cudaFree failed: invalid argument \(CUDA error 1\)"),
        (lambda opened: opened.malloc(8), r"cudaMalloc failed: out of memory \(CUDA error 2\)"),
    ],
)
def test_a_failed_call_says_what_cuda_says(call: Callable[[Cuda], object], message: str) -> None:
    with pytest.raises(CudaError, match=message) as caught:
        call(Cuda(FakeCudart(malloc_limit=0), FakeDriver()))
    assert caught.value.code in (1, 2)


def test_every_function_has_a_signature_and_pointers_are_wide() -> None:
    library = FakeCudart()
    Cuda(library, FakeDriver())
    assert library.cudaMalloc.argtypes == [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
    assert library.cudaGetErrorString.restype is ctypes.c_char_p
    for name in cuda._RUNTIME_CALLS:
        assert getattr(library, name).argtypes is not None
        assert getattr(library, name).restype is ctypes.c_int


@pytest.mark.parametrize(
    ("integrated", "available", "expected"), [(False, 5, 100), (True, 5, 5), (True, None, 100), (True, 500, 500)]
)
def test_on_a_jetson_the_kernels_number_counts(
    monkeypatch: pytest.MonkeyPatch, integrated: bool, available: int | None, expected: int
) -> None:
    monkeypatch.setattr(cuda, "available_memory", lambda: available)
    opened = Cuda(FakeCudart(free_bytes=100), FakeDriver())
    assert cuda.usable_memory(opened, Device("Orin", "8.7", integrated)) == expected


def test_available_memory_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  7990000 kB\nMemFree:  100 kB\nMemAvailable:   2048 kB\n")
    assert cuda.available_memory(tmp_path / "meminfo") == 2 << 20
    assert cuda.available_memory(tmp_path / "nothing") is None
