"""OpenVINO on the CPU, float nodes pinned to f32."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from .errors import ArtefactError
from .openvino_lean import ov
from .session import SessionInfo


class OpenVinoSession:
    """A graph compiled by OpenVINO with one reused inference request."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        # Buffers set once: passing arrays to every call and reading them from its result takes 0.2 ms of Python.
        self._image: npt.NDArray[np.uint8] = np.empty(tuple(compiled.inputs[0].shape), np.uint8)
        self._request.set_input_tensor(ov.Tensor(self._image, shared_memory=True))
        self._outputs = {
            output.get_any_name(): self._request.get_output_tensor(index).data
            for index, output in enumerate(compiled.outputs)
        }
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        devices = ",".join(compiled.get_property("EXECUTION_DEVICES"))
        threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self.info = SessionInfo("openvino", ov.__version__.split("-")[0], devices, precision, threads)

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Run uint8 [N, H, W, 3] and return every output by name."""
        if images.shape != self._image.shape:  # copyto would repeat a smaller array
            raise ValueError(f"The graph takes images {list(self._image.shape)}, not {list(images.shape)}.")
        np.copyto(self._image, images, casting="no")
        self._request.start_async()
        self._request.wait()
        # Copied: the request's own buffers are overwritten by the next call.
        return {name: values.copy() for name, values in self._outputs.items()}

    def close(self) -> None:
        """Free the compiled graph."""
        self._outputs.clear()
        del self._request
        del self._compiled

    @property
    def engine_ms(self) -> float:
        """How long the last call took by OpenVINO's clock, in milliseconds: without copies and Python."""
        return float(self._request.latency)

    def executed_precisions(self) -> dict[str, int]:
        """Count the convolutions and matrix products by the precision that they really run in."""
        counts: dict[str, int] = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if info["layerType"].value in ("Convolution", "FullyConnected", "MatMul"):
                precision = info["runtimePrecision"].value
                counts[precision] = counts.get(precision, 0) + 1
        return counts


@functools.cache
def openvino_core() -> ov.Core:
    """Return the one Core of this process; it is never freed.

    The CPU plugin sets an alternative signal stack for the thread that loads it and takes it away when its Core goes.
    With two Cores closed in the order they were opened, the thread is left with a stack that is unmapped, and the next
    signal with a handler, a SIGTERM say, kills the process with SIGSEGV (OpenVINO 2026.1).
    """
    return ov.Core()


def open_openvino(model: bytes, *, weights: bytes | None, threads: int) -> OpenVinoSession:
    """Compile an ONNX graph (`weights` None) or an IR from bytes.

    Raises:
        ArtefactError: OpenVINO refuses the graph, or does not keep to f32.
    """
    core = openvino_core()
    settings = {
        # Without it an FP32 model silently runs in bf16 on CPUs that have it.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    try:
        graph = core.read_model(model, weights) if weights is not None else core.read_model(model)
        compiled = core.compile_model(graph, "CPU", settings)
    except RuntimeError as error:
        raise ArtefactError(f"OpenVINO {ov.__version__} refuses the graph: {error}", _NEXT) from error
    session = OpenVinoSession(compiled)
    if session.info.float_precision != "f32":
        raise ArtefactError(f"OpenVINO runs the graph in {session.info.float_precision} although f32 was set.", _NEXT)
    return session


_NEXT = "Update openvino, or use --engine onnxruntime."
