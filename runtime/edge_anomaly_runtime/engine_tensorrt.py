"""TensorRT on an NVIDIA GPU: runs an engine that `edge-anomaly engine build` has built on this very device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import Bundle, Thresholds
from .cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, Cuda, CudaError, open_cuda
from .errors import ArtefactError, EdgeAnomalyError, MissingRequirementError, UsageError
from .progress import say
from .session import SessionInfo
from .tensorrt_cache import build_command, find_engine, parts_of, read_plan, this_machine
from .tensorrt_layers import EngineLayers, read_layers
from .tensorrt_library import load_tensorrt, not_none, shared_logger, started, with_log
from .tensorrt_recipe import read_recipe

# By name, and not trt.nptype, which fails with newer numpy in old versions.
_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class _Buffer:
    """One input or output: page-locked memory of its largest shape, and its twin on the device."""

    name: str
    host: npt.NDArray[Any]
    device: int
    is_input: bool


class TensorrtSession:
    """An engine with one context, one stream and one set of buffers.

    `thresholds`: the limits that were set with this engine; None while it is being built. `cuda_graph`: "on", or why
    the engine runs without. Not safe for use from several threads at once.
    """

    def __init__(self, cuda: Cuda, trt: Any, plan: bytes, *, cuda_graph: bool = True) -> None:
        self.thresholds: Thresholds | None = None
        self.cuda_graph = "on" if cuda_graph else "switched off"
        self._cuda, self._trt = cuda, trt
        self._buffers: list[_Buffer] = []
        self._stream = self._recording = 0
        self._context: Any = None
        self._shape: tuple[int, ...] = ()
        logger = shared_logger(trt)
        if init_plugins := getattr(trt, "init_libnvinfer_plugins", None):
            init_plugins(logger, "")
        self._runtime = started(trt.Runtime, trt, "TensorRT's runtime does not start.")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        try:
            not_none(self._engine, f"TensorRT {trt.__version__} refuses the engine.", _REBUILD)
            self._context = not_none(
                self._engine.create_execution_context(), "There is no memory for the engine's context.", _MEMORY
            )
            self._stream = cuda.new_stream()
            self._allocate()
            self.info = self._describe()
        except BaseException:
            self.close()
            raise

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Run uint8 [N, H, W, 3] and return every output by name."""
        if self._context is None:
            raise UsageError("The session is closed.", "Open it again.")
        source = self._buffers[0]
        if images.dtype != source.host.dtype or images.ndim != 4 or not _fits(images.shape, source.host.shape):
            raise UsageError(
                f"The engine takes {source.host.dtype} {list(source.host.shape)}, not {images.dtype} "
                f"{list(images.shape)}.",
                "Prepare the picture with edge_anomaly_runtime.preprocess.",
            )
        if images.shape != self._shape:
            self._set_shape(images.shape)
        np.copyto(_part(source.host, images.shape), images)
        self._cuda.copy(source.device, source.host.ctypes.data, images.nbytes, HOST_TO_DEVICE, self._stream)
        if self._recording:
            self._cuda.launch(self._recording, self._stream)
        else:
            self._enqueue()
        outputs = [(buffer, self._output_shape(buffer.name)) for buffer in self._buffers[1:]]
        for buffer, shape in outputs:
            size = _part(buffer.host, shape).nbytes
            self._cuda.copy(buffer.host.ctypes.data, buffer.device, size, DEVICE_TO_HOST, self._stream)
        self._cuda.synchronize(self._stream)
        # Copied: the page-locked memory is overwritten by the next call.
        return {buffer.name: np.array(_part(buffer.host, shape), dtype=np.float32) for buffer, shape in outputs}

    def close(self) -> None:
        """Wait for the stream, then free recording, context, engine, runtime and buffers; a second call does nothing.

        A CUDA that refuses to free is told, not raised: mostly the run before has failed, and its error is the one to
        read.
        """
        cuda = self._cuda
        faults: list[CudaError] = []

        def attempt(call: Callable[[Any], None], argument: Any) -> None:
            try:
                call(argument)
            except CudaError as error:
                faults.append(error)

        stream, self._stream = self._stream, 0
        recording, self._recording = self._recording, 0
        buffers, self._buffers = self._buffers, []
        if stream:
            attempt(cuda.synchronize, stream)  # a run that failed half-way has left work that uses the buffers
        if recording:
            attempt(cuda.free_recording, recording)  # before the context, whose kernels it runs
        self._context = None
        self._engine = None
        self._runtime = None
        for buffer in buffers:
            attempt(cuda.free, buffer.device)
            attempt(cuda.free_pinned, buffer.host)
        if stream:
            attempt(cuda.free_stream, stream)
        if faults:
            say(f"not all of the engine was freed: {faults[0].what}")

    def layers(self, float_prefix: str = "head/") -> EngineLayers:
        """Ask the engine what its layers compute in."""
        inspector = self._engine.create_engine_inspector()
        return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON), float_prefix)

    def _allocate(self) -> None:
        """Make the buffers, the input first, for the largest shape that the engine takes."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            raise ArtefactError(f"The engine has the inputs {', '.join(inputs)}, not one.", _REBUILD)
        shape = tuple(engine.get_tensor_shape(inputs[0]))
        if -1 in shape:
            shape = tuple(engine.get_tensor_profile_shape(inputs[0], 0)[2])
        self._add_buffer(inputs[0], shape, is_input=True)
        self._set_input_shape(shape)
        for name in names:
            if name != inputs[0]:
                self._add_buffer(name, self._output_shape(name), is_input=False)

    def _add_buffer(self, name: str, shape: tuple[int, ...], *, is_input: bool) -> None:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise ArtefactError(f"The engine's tensor {name} has the type {kind}.", _REBUILD)
        host = self._cuda.pinned(shape, _DTYPES[kind])
        try:
            device = self._cuda.malloc(max(host.nbytes, 1))
        except CudaError:
            with contextlib.suppress(CudaError):
                self._cuda.free_pinned(host)
            raise
        self._buffers.append(_Buffer(name, host, device, is_input))
        if not self._context.set_tensor_address(name, device):
            raise ArtefactError(with_log(f"TensorRT refuses the memory for {name}."), _REBUILD)

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        """Run once at a new shape, then record that run where it can be recorded."""
        self._shape = ()
        self._forget_recording()
        self._set_input_shape(shape)
        self._enqueue()  # the first run after a change of shape allocates and must not be recorded
        self._cuda.synchronize(self._stream)
        if self.cuda_graph == "on":
            self._record()
        self._shape = shape

    def _set_input_shape(self, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(self._buffers[0].name, shape):
            raise ArtefactError(with_log(f"TensorRT refuses the input shape {list(shape)}."), _REBUILD)
        missing = self._context.infer_shapes()
        if missing:
            raise ArtefactError(with_log(f"TensorRT cannot tell the shape of {', '.join(missing)}."), _REBUILD)

    def _record(self) -> None:
        """Record one run as a CUDA graph, which saves the launch of each kernel; not every engine allows it."""
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue()
            except ArtefactError:
                # Ended all the same: a stream left in capture would refuse all further work.
                with contextlib.suppress(CudaError):
                    self._cuda.free_recording(self._cuda.end_capture(self._stream))
                raise
            self._recording = self._cuda.end_capture(self._stream)
        except (CudaError, ArtefactError) as error:
            self._cuda.forget_error()  # else TensorRT takes it for the result of its next launch
            self.cuda_graph = f"not possible: {error.what.splitlines()[0]}"

    def _forget_recording(self) -> None:
        recording, self._recording = self._recording, 0
        if recording:
            self._cuda.free_recording(recording)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise ArtefactError(with_log("TensorRT cannot run the engine."), _REBUILD)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def _describe(self) -> SessionInfo:
        device = self._cuda.device()
        counts = self.layers().counts
        kinds = [short for name, short in (("Half", "f16"), ("Float", "f32")) if counts[name]]
        return SessionInfo(
            engine="tensorrt",
            version=str(self._trt.__version__),
            device=f"{device.name} (SM {device.sm})",
            float_precision="+".join(kinds) or "unknown",
            threads=1,
        )


def open_tensorrt(bundle: Bundle, precision: str) -> TensorrtSession:
    """Load the engine that was built here for a bundle.

    EDGE_ANOMALY_CUDA_GRAPH=0 runs it without a CUDA graph.

    Raises:
        MissingRequirementError: there is no driver, device or TensorRT, or no engine was built yet.
        UsageError: the bundle was not exported for TensorRT at this precision.
        ArtefactError: the engine belongs to another TensorRT or device, is damaged, or TensorRT refuses it.
    """
    recipe = read_recipe(bundle)
    cuda = open_cuda()  # before TensorRT, which may crash without a driver
    trt = load_tensorrt()
    parts = parts_of(bundle, recipe, precision, this_machine(trt, cuda))
    found = find_engine(bundle, parts)
    if found is None:
        raise MissingRequirementError(
            f"No {precision} engine of {bundle.path} has been built on this device.",
            f"Run: {build_command(bundle, precision)}",
        )
    record, folder = found
    plan = read_plan(bundle, record, folder)
    session = TensorrtSession(cuda, trt, plan, cuda_graph=os.environ.get("EDGE_ANOMALY_CUDA_GRAPH") != "0")
    session.thresholds = record.thresholds
    return session


def why_not(bundle: Bundle, precision: str) -> str | None:
    """Say why `open_tensorrt` would refuse, in one line; None where driver, TensorRT and a fitting engine are there."""
    try:
        recipe = read_recipe(bundle)
        cuda = open_cuda()
        machine = this_machine(load_tensorrt(), cuda)
        found = find_engine(bundle, parts_of(bundle, recipe, precision, machine))
    except EdgeAnomalyError as error:
        return error.what.splitlines()[0].rstrip(".")
    return None if found else f"no engine was built on this device ({build_command(bundle, precision)})"


def _fits(shape: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    return 0 < shape[0] <= largest[0] and shape[1:] == largest[1:]


def _part(host: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the first bytes of a buffer as an array of `shape`, which may be smaller than the buffer's."""
    size = int(np.prod(shape, dtype=np.int64))
    return host.reshape(-1)[:size].reshape(shape)


_REBUILD = "Build the engine again: edge-anomaly engine build BUNDLE --force"
_MEMORY = "Close other programs that use the GPU, then try again."
