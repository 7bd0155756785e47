"""ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .errors import ArtefactError
from .session import SessionInfo


class OnnxRuntimeSession:
    """A graph loaded by ONNX Runtime's CPU provider."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._outputs = [output.name for output in session.get_outputs()]
        threads = session.get_session_options().intra_op_num_threads
        self.info = SessionInfo("onnxruntime", ort.__version__, session.get_providers()[0], "f32", threads)

    def run(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Run uint8 [N, H, W, 3] and return every output by name."""
        values = self._session.run(self._outputs, {self._input: images})
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """Free the graph."""
        del self._session


def open_onnxruntime(model: bytes, *, threads: int, fuse: bool = True) -> OnnxRuntimeSession:
    """Load an ONNX graph from bytes; external data cannot be reached this way.

    With `fuse` False every node runs as it is written: quantise and dequantise stay separate float steps, so that any
    CPU gives the same numbers.

    Raises:
        ArtefactError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own per status code, with no public base
        raise ArtefactError(f"ONNX Runtime {ort.__version__} refuses the graph: {error}", _NEXT) from error
    return OnnxRuntimeSession(session)


_NEXT = "Update onnxruntime, or export the bundle with an older opset."
