"""A bundle's model files, one after another: each is judged on every engine that reads it as soon as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx

from edge_anomaly.prediction import Pixels
from edge_anomaly_calibration.qdq_graph import has_int8_head
from edge_anomaly_calibration.quantize import is_transformer
from edge_anomaly_runtime.bundle import ParityRow
from edge_anomaly_runtime.cpu import int8_instructions, usable_cpus
from edge_anomaly_runtime.engine_onnxruntime import open_onnxruntime
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.session import CPU_ENGINES, Session, is_installed, open_engine

from .fp16 import strongly_typed_fp16, with_fp16_weights
from .options import ExportOptions
from .quantising import CPU, OPENVINO, TENSORRT, Quantiser
from .tensorrt_target import STRONG_NAMES, say_unverified, tensorrt_files

FLOAT_MODEL = "model.onnx"
FP16_MODEL = "model.fp16.onnx"
INT8_CPU_MODEL = "model.int8.cpu.onnx"
INT8_TENSORRT_MODEL = "model.int8.trt.onnx"
TYPED_FP16_MODEL = STRONG_NAMES["fp16"]
IR_XML, IR_BIN = "openvino/model.xml", "openvino/model.bin"

# Over the guard's limit, so many tensors may be left float before the export gives up.
_MOST_FLOAT = 8
# Stands for all of the head among the tensors that are left float.
_HEAD = "head"


class Judge(Protocol):
    """Compares graphs with the trained model on real images."""

    def judge(self, session: Session, key: str) -> Any:
        """Return what a loaded graph says about the images, and close it."""
        ...

    def table(self, judged: Mapping[str, Any]) -> tuple[list[ParityRow], list[str]]:
        """Return a row for each graph, and what is wrong with the bad ones."""
        ...


@dataclass
class Assembly:
    """What the bundle will hold.

    `models`: by file, the graph; `files`: by name, the bytes; `keys`: 'engine/precision' to file; `judged`: by key;
    `float_tensors`: by file, what the guard has left float.
    """

    options: ExportOptions
    judge: Judge
    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)
    float_tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add_float(self, model: onnx.ModelProto) -> None:
        """Add the float file, which every engine can read; at precision fp16, the one with FP16 weights too."""
        self._add(FLOAT_MODEL, model, "fp32")
        is_half = self.options.precision == "fp16"
        if is_half:
            self._add(FP16_MODEL, with_fp16_weights(model), "fp16")
        if self.options.tensorrt:
            # The float file means the same to every engine; simulating TensorRT again would only take time.
            self.keys["tensorrt/fp32"], self.judged["tensorrt/fp32"] = FLOAT_MODEL, self.judged["onnxruntime/fp32"]
            if is_half:
                self.keys["tensorrt/fp16"] = FLOAT_MODEL
                typed = strongly_typed_fp16(model)
                self.models[TYPED_FP16_MODEL], self.files[TYPED_FP16_MODEL] = typed, typed.SerializeToString()
                self.judged["tensorrt/fp16"] = self.judge.judge(self.open("tensorrt/fp16"), "tensorrt/fp16")

    def add_int8(self, quantiser: Quantiser, finish: Callable[[onnx.ModelProto, bool], onnx.ModelProto]) -> None:
        """Add the INT8 file for the CPU engines and, with that target, the one for TensorRT.

        `finish` gets an emitted graph and whether to simulate it; it fits the head again. While a file fails the
        guard, what costs most is left float, one tensor more each time.
        """
        if not int8_instructions():
            say("This CPU has no INT8 dot-product instructions: INT8 is simulated in float, and cannot run here")
        own_ir = "openvino" in self.options.targets and is_transformer(quantiser.float_model)
        self._add_int8(INT8_CPU_MODEL, CPU, quantiser, finish, ("onnxruntime",) if own_ir else CPU_ENGINES)
        if own_ir:
            self._add_int8(IR_XML, OPENVINO, quantiser, finish, ("openvino",))
        if self.options.tensorrt:
            self._add_int8(INT8_TENSORRT_MODEL, TENSORRT, quantiser, finish, ("tensorrt",))

    def add_recipe(self, normal: Pixels, samples: Pixels) -> None:
        """Add what a device needs to build its engines.

        `normal`: held-out model inputs, uint8 [n, h, w, 3], for the thresholds there; `samples`: a few inputs, to run
        the graphs of TensorRT 11 on.
        """
        options = self.options
        weak = {
            key.partition("/")[2]: (name, self.models[name])
            for key, name in self.keys.items()
            if key.startswith("tensorrt/")
        }
        with stage("tensorrt"):
            files = tensorrt_files(
                weak,
                normal,
                samples,
                version=options.least_tensorrt,
                opset=options.used_opset,
                alpha_warn=options.alpha_warn,
                alpha_fail=options.alpha_fail,
                allow_drop=options.allow_drop,
                typed_fp16=self.models.get(TYPED_FP16_MODEL),
            )
            self.files.update(files)
        say_unverified()

    def open(self, key: str) -> Session:
        """Load a graph in its engine.

        What this machine cannot run is simulated in float, Q and DQ as they are written: TensorRT, and INT8 on a CPU
        without dot-product instructions.
        """
        name = self.keys[key]
        engine, _, precision = key.partition("/")
        if engine == "tensorrt":
            # The builder makes FP16 of the float file on the device; the typed graph rounds at the same places.
            data = self.files[TYPED_FP16_MODEL if precision == "fp16" else name]
            return open_onnxruntime(data, threads=usable_cpus(), fuse=precision == "fp32")
        if precision == "int8" and not int8_instructions():
            return open_onnxruntime(self.models[name].SerializeToString(), threads=usable_cpus(), fuse=False)
        return open_engine(engine, self.files[name], weights=self.files[IR_BIN] if name == IR_XML else None)

    def _add(self, name: str, model: onnx.ModelProto, precision: str, engines: Sequence[str] = CPU_ENGINES) -> None:
        """Add a file for some CPU engines and judge it on each; for OpenVINO as target, in its own format."""
        own_format = (
            "openvino" in engines and "openvino" in self.options.targets and precision == self.options.precision
        )
        keys = {f"{engine}/{precision}": name for engine in engines if is_installed(engine)}
        if own_format:
            from .openvino_ir import ir_from_onnx

            self.files[IR_XML], self.files[IR_BIN] = ir_from_onnx(model)
            self.models[IR_XML], keys[f"openvino/{precision}"] = model, IR_XML
        if name != IR_XML:
            self.models[name], self.files[name] = model, model.SerializeToString()
        self.keys |= keys
        for key in keys:
            self.judged[key] = self.judge.judge(self.open(key), key)

    def _add_int8(
        self,
        name: str,
        family: str,
        quantiser: Quantiser,
        finish: Callable[[onnx.ModelProto, bool], onnx.ModelProto],
        engines: Sequence[str],
    ) -> None:
        simulate = family != CPU or not int8_instructions()
        left_float: tuple[str, ...] = ()
        while True:
            model = finish(quantiser.emit(family, left_float), simulate)
            if family == CPU and _HEAD not in left_float:
                model = quantiser.with_int8_head(model)
            if family == TENSORRT:
                key = "tensorrt/int8"
                self.models[name], self.files[name], self.keys[key] = model, model.SerializeToString(), name
                self.judged[key] = self.judge.judge(self.open(key), key)
            else:
                self._add(name, model, "int8", engines)
            own = [f"{engine}/int8" for engine in engines]
            _, failures = self.judge.table({key: self.judged[key] for key in own if key in self.judged})
            if left_float:
                self.float_tensors[name] = left_float
            if not failures:
                return
            damaging = [_HEAD] if has_int8_head(model) else quantiser.most_damaging(family)
            rest = [tensor for tensor in damaging if tensor not in left_float]
            if not rest or len(left_float) == _MOST_FLOAT:
                say(f"{name}: over the limit with {len(left_float)} tensors left float, too; giving up")
                return
            left_float = (*left_float, rest[0])
            say(f"{name}: {'; '.join(failures)}; trying with {len(left_float)} float: {rest[0]}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say how long a stage took, once it has ended well."""
    start = time.perf_counter()
    yield
    say(f"{name}: {time.perf_counter() - start:.1f} s")
