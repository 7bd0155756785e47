"""ONNX Runtime with its TensorRT provider: the second way onto an NVIDIA GPU, never chosen by itself.

It builds its engine at the first start and keeps it in a folder per graph and precision: ONNX Runtime names engines by
the names in a graph, so a retrained model would run on the engine of the old one. No engine is checked on golden images
as `edge-anomaly engine build` does it: run `edge-anomaly selftest` after installing. The provider cannot hold the head
in FP32 while the rest runs in FP16. Hence precision fp16 is refused, and what int8 does not quantise computes in FP32.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from .atomic import make_folder
from .cuda import open_cuda
from .engine_onnxruntime import OnnxRuntimeSession
from .errors import ArtefactError, MissingRequirementError, UsageError
from .tensorrt_cache import onnxruntime_folder

_PROVIDER = "TensorrtExecutionProvider"


def open_onnxruntime_tensorrt(model: bytes, *, precision: str, threads: int) -> OnnxRuntimeSession:
    """Load an ONNX graph on the TensorRT provider, all of it.

    Raises:
        UsageError: `precision` is fp16.
        MissingRequirementError: no driver or device, this ONNX Runtime has no such provider, or it took another one.
        ArtefactError: the provider refuses the graph or a part of it.
    """
    if precision == "fp16":
        raise UsageError(
            "--engine onnxruntime-tensorrt cannot run fp16: it would compute the head in FP16 too.",
            "Use --engine tensorrt, or --precision fp32 or int8.",
        )
    if _PROVIDER not in ort.get_available_providers():
        raise MissingRequirementError(
            f"This ONNX Runtime {ort.__version__} has no {_PROVIDER}, only {', '.join(ort.get_available_providers())}.",
            "Install the onnxruntime-gpu that belongs to this JetPack or CUDA, or use --engine tensorrt.",
        )
    open_cuda()  # ONNX Runtime lists the provider on machines without a driver, too
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # What the provider cannot take would run on the CPU without a word.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(model, options, providers=[(_PROVIDER, _provider_options(model, precision))])
    except Exception as error:  # ONNX Runtime raises a class of its own per status code, with no public base
        raise ArtefactError(f"ONNX Runtime {ort.__version__} refuses the graph on TensorRT: {error}", _NEXT) from error
    used = session.get_providers()[0]
    if used != _PROVIDER:
        raise MissingRequirementError(f"ONNX Runtime took {used} instead of {_PROVIDER}.", _NEXT)
    session.disable_fallback()
    loaded = OnnxRuntimeSession(session)
    loaded.info = replace(loaded.info, engine="onnxruntime-tensorrt", float_precision="f32")
    return loaded


def engine_folder(model: bytes, precision: str) -> Path:
    """Return where the engine of a graph lies; another graph of the same names has another folder."""
    return onnxruntime_folder() / f"{hashlib.sha256(model).hexdigest()[:16]}-{precision}"


def _provider_options(model: bytes, precision: str) -> dict[str, str]:
    folder = engine_folder(model, precision)
    make_folder(folder)
    return {
        "trt_fp16_enable": "False",
        "trt_int8_enable": str(precision == "int8"),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
    }


_NEXT = "Use --engine tensorrt or --engine onnxruntime; `edge-anomaly doctor` shows what is there."
