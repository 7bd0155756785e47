"""ONNX Runtime with its TensorRT provider: the second way onto an NVIDIA GPU, never chosen by itself.

Slower to start, because it builds its engine at every change of anything, and without the check on golden images that
`edge-anomaly engine build` makes: run `edge-anomaly selftest` after installing. It cannot hold the head in FP32 while
the rest runs in FP16, so a graph of precision int8 computes what is not quantised in FP32 here.
"""

from __future__ import annotations

from dataclasses import replace

import onnxruntime as ort

from .atomic import make_folder
from .cuda import open_cuda
from .engine_onnxruntime import OnnxRuntimeSession
from .errors import ArtefactError, MissingRequirementError
from .tensorrt_cache import cache_folder

_PROVIDER = "TensorrtExecutionProvider"


def open_onnxruntime_tensorrt(model: bytes, *, precision: str, threads: int) -> OnnxRuntimeSession:
    """Load an ONNX graph on the TensorRT provider, all of it.

    Raises:
        MissingRequirementError: no driver or device, this ONNX Runtime has no such provider, or it took another one.
        ArtefactError: the provider refuses the graph or a part of it.
    """
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
        session = ort.InferenceSession(model, options, providers=[(_PROVIDER, _provider_options(precision))])
    except Exception as error:  # ONNX Runtime raises a class of its own per status code, with no public base
        raise ArtefactError(f"ONNX Runtime {ort.__version__} refuses the graph on TensorRT: {error}", _NEXT) from error
    used = session.get_providers()[0]
    if used != _PROVIDER:
        raise MissingRequirementError(f"ONNX Runtime took {used} instead of {_PROVIDER}.", _NEXT)
    session.disable_fallback()
    loaded = OnnxRuntimeSession(session)
    loaded.info = replace(
        loaded.info, engine="onnxruntime-tensorrt", float_precision="f16" if precision == "fp16" else "f32"
    )
    return loaded


def _provider_options(precision: str) -> dict[str, str]:
    folder = cache_folder().parent / "onnxruntime"
    make_folder(folder)
    return {
        "trt_fp16_enable": str(precision == "fp16"),
        "trt_int8_enable": str(precision == "int8"),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
    }


_NEXT = "Use --engine tensorrt or --engine onnxruntime; `edge-anomaly doctor` shows what is there."
