"""TensorRT without a GPU: exactly the names of one version (`trt_api/`), numbers from ONNX Runtime.

What is not in the version's list raises AttributeError, on reading and on writing. The names of layers' attributes and
of the enumerations LayerType and Severity are not in the lists; they are from NVIDIA's documentation.
"""

from __future__ import annotations

import importlib.machinery
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from .fake_cuda import FakeCudart

VERSIONS = ("8.6.1", "10.3.0", "10.13.3.9", "11.4.0.106")
MAGIC = b"fake plan\n"

_LAYER = {"name", "type", "num_inputs", "num_outputs", "get_input", "get_output", "set_input", "metadata"}
_WEAK_LAYER = {"precision", "precision_is_set", "reset_precision", "set_output_type", "reset_output_type"}
_LAYER_TYPES = ("CONSTANT", "SHAPE", "CONVOLUTION", "ELEMENTWISE", "QUANTIZE", "DEQUANTIZE", "REDUCE")
_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Strict:
    """An object with the public attributes of its class in one version, and no others."""

    _names: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._names:
            raise AttributeError(f"{type(self).__name__} of this version has no {name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self)._names:
            raise AttributeError(f"{type(self).__name__} of this version has no {name}")
        super().__setattr__(name, value)


class Member:
    """A value of an enumeration, as pybind11 makes them: with a name, and an int on demand."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self._value = name, value

    def __int__(self) -> int:
        return self._value


def _enumeration(names: Any) -> Any:
    return type("Enumeration", (), {name: Member(name, value) for value, name in enumerate(names)})


class FakeTensorrt:
    """The module. `failing_builds`: how many builds give None; `asked`: what the code under test has set."""

    def __init__(self, version: str, cudart: FakeCudart) -> None:
        api = json.loads((Path(__file__).parent / "trt_api" / f"{version}.json").read_text())
        members: dict[str, list[str]] = api["members"]
        self.__version__ = version
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        self._cudart = cudart
        self._major = int(version.split(".")[0])
        self._failing_builds = 0
        self._stop_build = False
        self._score_factor = 1.0
        self._refused_node = ""
        self._enqueue_works = True
        self._asked: dict[str, Any] = {"attempts": [], "plugins": 0, "destroyed": []}
        enums = {name: _enumeration(members[name]) for name in _ENUMS if name in members}
        enums["LayerType"] = _enumeration(_LAYER_TYPES)
        classes = {
            kind.__name__: type(kind.__name__, (kind,), {"_names": frozenset(members[kind.__name__]), "_trt": self})
            for kind in _CLASSES
            if kind.__name__ in members
        }
        layer = _LAYER if self._major >= 11 else _LAYER | _WEAK_LAYER
        classes["ILayer"] = type("ILayer", (ILayer,), {"_names": frozenset(layer), "_trt": self})
        severity = _enumeration(_SEVERITIES)
        logger = type("ILogger", (), {"Severity": severity, **{name: getattr(severity, name) for name in _SEVERITIES}})
        functions = {"init_libnvinfer_plugins": self._init_plugins}
        everything = {**enums, **classes, "ILogger": logger, **functions}
        self._classes = everything
        for name, value in everything.items():
            if name in api["names"]:
                setattr(self, name, value)

    def _init_plugins(self, logger: Any, namespace: str) -> bool:
        self._asked["plugins"] += 1
        return True

    def _log(self, logger: Any, severity: str, text: str) -> None:
        logger.log(getattr(self._classes["ILogger"], severity), text)


class IHostMemory(Strict):
    """Bytes that TensorRT owns."""

    _trt: FakeTensorrt

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class ITensor(Strict):
    """A tensor of the network."""

    _trt: FakeTensorrt

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...] = (), execution: bool = True) -> None:
        self.name, self.shape, self.is_execution_tensor = name, shape, execution
        known = self._trt._classes["DataType"]
        self.dtype = getattr(known, dtype if hasattr(known, dtype) else "INT32")  # 8 makes INT32 of INT64


class ILayer(Strict):
    """One node of the graph."""

    _trt: FakeTensorrt

    def __init__(self, node: onnx.NodeProto, dtypes: dict[str, str]) -> None:
        kind = {"Conv": "CONVOLUTION", "Constant": "CONSTANT", "Shape": "SHAPE"}.get(node.op_type, "ELEMENTWISE")
        self.name, self.type = node.name, getattr(self._trt._classes["LayerType"], kind)
        self.num_outputs = len(node.output)
        tensor = self._trt._classes["ITensor"]
        self._outputs = [tensor(name, dtypes.get(name, "FLOAT"), (), node.op_type != "Shape") for name in node.output]
        self._output_types: dict[int, str] = {}

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: Member) -> None:
        assert self._outputs[index].dtype.name == "FLOAT", f"{self.name} writes {self._outputs[index].dtype.name}"
        self._output_types[index] = dtype.name


class INetworkDefinition(Strict):
    """The parsed graph."""

    _trt: FakeTensorrt

    def __init__(self, flags: int) -> None:
        self._flags, self._graph = flags, b""
        self._layers: list[Any] = []
        self._inputs: list[Any] = []

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    @property
    def num_layers(self) -> int:
        return len(self._layers)


class ParserError(Strict):
    """One complaint of the parser."""

    _trt: FakeTensorrt

    def __init__(self, text: str, number: int, name: str, operator: str) -> None:
        self._text, self._number, self._name, self._operator = text, number, name, operator

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return self._number

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator


class OnnxParser(Strict):
    """Reads a graph into the network; refuses what is no ONNX, and the node that the test has named."""

    _trt: FakeTensorrt

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network
        self._errors: list[Any] = []

    def parse(self, data: bytes) -> bool:
        assert type(data) is bytes
        error = self._trt._classes["ParserError"]
        try:
            model = onnx.load_from_string(data)
            onnx.checker.check_model(model)
        except Exception as problem:
            self._errors = [error(f"Failed to parse the model: {type(problem).__name__}", -1, "", "")]
            return False
        self._errors = [
            error(f"Assertion failed in {node.op_type}", index, node.name, node.op_type)
            for index, node in enumerate(model.graph.node)
            if self._trt._refused_node and self._trt._refused_node in node.name
        ]
        if self._errors:
            return False
        inferred = onnx.shape_inference.infer_shapes(model).graph
        dtypes = {value.name: _dtype_name(value) for value in (*inferred.value_info, *inferred.output, *inferred.input)}
        layer, tensor = self._trt._classes["ILayer"], self._trt._classes["ITensor"]
        self._network._layers = [layer(node, dtypes) for node in model.graph.node]
        self._network._inputs = [tensor(value.name, _dtype_name(value), _shape(value)) for value in model.graph.input]
        self._network._graph = data
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class ITimingCache(Strict):
    """What was measured before."""

    _trt: FakeTensorrt

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> Any:
        return self._trt._classes["IHostMemory"](self._data + b"measured;")


class IOptimizationProfile(Strict):
    """Allowed shapes of an input."""

    _trt: FakeTensorrt

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> None:
        self._shapes[name] = (tuple(low), tuple(best), tuple(high))


class IBuilderConfig(Strict):
    """Flags and limits of a build."""

    _trt: FakeTensorrt

    def __init__(self) -> None:
        self._flags, self._workspace = {"TF32"}, 0
        self._profiles: list[Any] = []
        self._cache: Any = None
        self._level = 3

    def set_flag(self, flag: Member) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Member) -> None:
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Member, size: int) -> None:
        assert pool.name == "WORKSPACE"
        self._workspace = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return 0

    def create_timing_cache(self, data: bytes) -> Any:
        self._trt._asked["timing_cache"] = data
        return self._trt._classes["ITimingCache"](data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    profiling_verbosity: Any = None
    builder_optimization_level = 3
    progress_monitor: Any = None


class IProgressMonitor(Strict):
    """The base of monitors; pybind11 wants its constructor to be called."""

    _trt: FakeTensorrt

    def __init__(self) -> None:
        self._initialised = True

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)


class Builder(Strict):
    """Makes plans: the graph, with what the flags have made of it."""

    _trt: FakeTensorrt

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Any:
        self._trt._asked["network_flags"] = flags
        return self._trt._classes["INetworkDefinition"](flags)

    def create_builder_config(self) -> Any:
        return self._trt._classes["IBuilderConfig"]()

    def create_optimization_profile(self) -> Any:
        return self._trt._classes["IOptimizationProfile"]()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        trt = self._trt
        has_levels = "builder_optimization_level" in type(config)._names
        level = config.builder_optimization_level if has_levels else None
        trt._asked["attempts"].append((config._workspace >> 20, level))
        trt._asked["flags"] = sorted(config._flags)
        if not self._told("Building", config):
            trt._log(self._logger, "ERROR", "Build was cancelled")
            return None
        if len(trt._asked["attempts"]) <= trt._failing_builds:
            trt._log(self._logger, "VERBOSE", "a line that nobody needs")
            trt._log(self._logger, "ERROR", "Could not find any implementation for node backbone/pool")
            return None
        if any(-1 in tensor.shape for tensor in network._inputs) and not config._profiles:
            trt._log(self._logger, "ERROR", "Network has dynamic inputs but no optimization profile has been defined")
            return None
        header = {
            "version": trt.__version__,
            "detailed": config.profiling_verbosity is not None and config.profiling_verbosity.name == "DETAILED",
            "layers": [_layer_row(layer, config._flags, network._graph) for layer in network._layers],
            "profile": config._profiles[0]._shapes if config._profiles else {},
        }
        data = MAGIC + json.dumps(header).encode() + b"\n" + network._graph
        return trt._classes["IHostMemory"](data)

    def _told(self, phase: str, config: IBuilderConfig) -> bool:
        if "progress_monitor" not in type(config)._names:
            return True
        monitor = config.progress_monitor
        if monitor is None:
            return True
        assert monitor._initialised
        monitor.phase_start(phase, None, 2)
        if self._trt._stop_build:
            import signal

            signal.raise_signal(signal.SIGINT)
        goes_on: bool = monitor.step_complete(phase, 0)
        monitor.phase_finish(phase)
        return goes_on


class EngineInspector(Strict):
    """Tells what the layers compute in, in the words of its version."""

    _trt: FakeTensorrt

    def __init__(self, header: dict[str, Any], tensors: list[str]) -> None:
        self._header, self._tensors = header, tensors

    def get_engine_information(self, form: Member) -> str:
        assert form.name == "JSON"
        rows = [_inspected(row, self._trt._major) for row in self._header["layers"]]
        layers = rows if self._header["detailed"] else [row["Name"] for row in rows]
        key = "I/O Tensors" if self._trt._major >= 11 else "Bindings"
        entries: list[Any] = [{"Name": name} for name in self._tensors] if self._trt._major >= 11 else self._tensors
        return json.dumps({"Layers": layers, key: entries})


class ICudaEngine(Strict):
    """A loaded plan."""

    _trt: FakeTensorrt

    def __init__(self, header: dict[str, Any], graph: bytes) -> None:
        self._header, self._model = header, onnx.load_from_string(graph)
        # As the graph is written: fused INT8 kernels saturate on CPUs without dot products, which TensorRT never does.
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._values = {value.name: value for value in (*self._model.graph.input, *self._model.graph.output)}

    def __del__(self) -> None:
        self._trt._asked["destroyed"].append("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = list(self._values)
        return names[-1 - index]  # outputs first: the order is nobody's promise

    def get_tensor_mode(self, name: str) -> Member:
        is_input = name in {value.name for value in self._model.graph.input}
        mode: Member = getattr(self._trt._classes["TensorIOMode"], "INPUT" if is_input else "OUTPUT")
        return mode

    def get_tensor_dtype(self, name: str) -> Member:
        dtype: Member = getattr(self._trt._classes["DataType"], _dtype_name(self._values[name]))
        return dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape(self._values[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._header["profile"][name]]

    def create_execution_context(self) -> Any:
        return self._trt._classes["IExecutionContext"](self)

    def create_engine_inspector(self) -> Any:
        return self._trt._classes["EngineInspector"](self._header, list(self._values))


class IExecutionContext(Strict):
    """Runs the graph on the fake device's memory, in the order of the stream."""

    _trt: FakeTensorrt

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __del__(self) -> None:
        self._trt._asked["destroyed"].append("context")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        there = self._engine.get_tensor_shape(name)
        fits = len(shape) == len(there) and all(old in (-1, new) for old, new in zip(there, shape, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert type(stream) is int
        if not self._trt._enqueue_works or self._trt._cudart.last_error:  # an old error is taken for that of a launch
            return False
        assert set(self._addresses) == set(self._engine._values), "a tensor has no address"
        self._trt._cudart.enqueue(stream, self._run)
        return True

    def _run(self) -> None:
        cudart, session = self._trt._cudart, self._engine._session
        source = session.get_inputs()[0].name
        shape = self._shapes[source]
        data = cudart.read(self._addresses[source], int(np.prod(shape)), "device")
        results = session.run(None, {source: np.frombuffer(data, np.uint8).reshape(shape)})
        for output, value in zip(session.get_outputs(), results, strict=True):
            scaled = (value * self._trt._score_factor).astype(value.dtype)
            cudart.write(self._addresses[output.name], scaled.tobytes(), "device")


class Runtime(Strict):
    """Loads plans of its own version, and logs why not."""

    _trt: FakeTensorrt

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def __del__(self) -> None:
        self._trt._asked["destroyed"].append("runtime")

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        magic, header, graph = plan[: len(MAGIC)], *plan[len(MAGIC) :].partition(b"\n")[::2]
        if magic != MAGIC:
            self._trt._log(self._logger, "ERROR", "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        content = json.loads(header)
        if content["version"] != self._trt.__version__:
            self._trt._log(self._logger, "ERROR", "The engine plan file is not compatible with this version")
            return None
        return self._trt._classes["ICudaEngine"](content, graph)


def _layer_row(layer: Any, flags: set[str], graph: bytes) -> dict[str, Any]:
    """Say what a layer computes in: INT8 behind a DequantizeLinear, FP16 where it may, FP32 where it must."""
    nodes = onnx.load_from_string(graph).graph.node
    node = next(node for node in nodes if node.name == layer.name)
    dequantised = {name for other in nodes if other.op_type == "DequantizeLinear" for name in other.output}
    held = "precision" in layer.__dict__ and layer.__dict__["precision"].name == "FLOAT"
    kind = "FLOAT" if held or "FP16" not in flags else "HALF"
    if dequantised & set(node.input) and ("INT8" in flags or layer._trt._major >= 11) and not held:
        kind = "INT8"
    writes = layer.get_output(0).dtype.name
    return {"name": layer.name, "op": node.op_type, "reads": kind, "writes": kind if writes == "FLOAT" else "INT32"}


def _inspected(row: dict[str, Any], major: int) -> dict[str, Any]:
    old = {"FLOAT": "Row major linear FP32", "HALF": "Row major linear FP16 format", "INT8": "Row major Int8 format"}
    new = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8"}
    words = {**(new if major >= 11 else old), "INT32": "Row major INT32"}
    tensors = {key: [{"Name": "x", "Format/Datatype": words[row[way]]}] for key, way in _WAYS.items()}
    return {"Name": row["name"], "LayerType": row["op"], **tensors}


def _dtype_name(value: onnx.ValueInfoProto) -> str:
    names = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
    return names[value.type.tensor_type.elem_type]


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in value.type.tensor_type.shape.dim)


_WAYS = {"Inputs": "reads", "Outputs": "writes"}
_CLASSES = (
    IHostMemory, ITensor, INetworkDefinition, ParserError, OnnxParser, ITimingCache, IOptimizationProfile,
    IBuilderConfig, IProgressMonitor, Builder, EngineInspector, ICudaEngine, IExecutionContext, Runtime,
)  # fmt: skip
_ENUMS = (
    "BuilderFlag", "NetworkDefinitionCreationFlag", "DataType", "LayerInformationFormat", "ProfilingVerbosity",
    "MemoryPoolType", "TensorIOMode",
)  # fmt: skip
