"""How near the INT8 backbones come to the machine's own peak, and where the rest of a graph's time goes.

    python benchmarks/roofline.py part.eab other.eab --rounds 5
    python benchmarks/roofline.py part.eab --precision fp32 --nodes 15

The peak is measured in the same run, and anew in each round: chains of INT8 (or f32) matrix products and 3x3
convolutions with nothing large between them, the best of seven shapes. A model's figures are sums over OpenVINO's own
counters of single nodes; depthwise convolutions have so few products per byte that they are listed apart. Median of the
rounds, peak and models in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.engine_openvino import openvino_core

_PRODUCTS = ((1024, 2048), (3136, 512), (784, 1024))  # rows, and inputs = outputs, as in backbones and larger
_CONVOLUTIONS = ((128, 56), (256, 28), (512, 14), (512, 28))  # channels and side
_LAYERS = 8
_CALLS = 10
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")


@dataclass(frozen=True)
class Node:
    """What one node of the compiled graph took. kind: dense, depthwise, or other, which multiplies nothing large."""

    name: str
    layer: str
    precision: str
    kind: str
    is_backbone: bool
    macs: float
    ms: float


def compiled(model: ov.Model, threads: int) -> ov.CompiledModel:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino_core().compile_model(model, "CPU", {**settings, "PERF_COUNT": "YES"})


def chain(inputs: Sequence[int], weights: Sequence[int], *, int8: bool) -> ov.Model:
    """Return `_LAYERS` products of one shape, each followed by ReLU and, if INT8, rounding.

    Weights of four dimensions make 3x3 convolutions, of two matrix products.
    """
    rng = np.random.default_rng(0)
    image = ops.parameter(list(inputs), np.float32, name="x")
    x: ov.Node = image
    for _ in range(_LAYERS):
        factor: ov.Node = ops.constant(rng.integers(-127, 128, weights).astype(np.float32))
        if int8:
            x, factor = fake_quantise(x, 256, 0.0, 255.0), fake_quantise(factor, 255, -127.0, 127.0)
        is_convolution = len(weights) == 4
        product = ops.convolution(x, factor, *[[1, 1]] * 4) if is_convolution else ops.matmul(x, factor, False, True)
        x = ops.relu(ops.multiply(product, np.float32(1e-4)))
    return ov.Model([x], [image], "chain")


def fake_quantise(x: ov.Node, levels: int, low: float, high: float) -> ov.Node:
    ends = [np.float32(end) for end in (low, high, low, high)]
    return ops.fake_quantize(x, *ends, levels)


def measured_peak(model: ov.CompiledModel, macs: float) -> float:
    """Return a chain's rate in GMAC/s, by the counters of its products."""
    _, times = profile(model)
    products = [ms for (_, layer), ms in times.items() if layer.startswith(("FullyConnected", "Convolution"))]
    assert len(products) == _LAYERS, times
    return macs / sum(products) / 1e6


def profile(model: ov.CompiledModel) -> tuple[float, dict[tuple[str, str], float]]:
    """Return a call's wall time and that of every node by name and layer, medians in milliseconds."""
    request = model.create_infer_request()
    port = model.inputs[0]
    image = np.random.default_rng(0).integers(0, 256, tuple(port.shape)).astype(port.element_type.to_dtype())
    times: dict[tuple[str, str], list[float]] = {}
    walls = []
    for index in range(_CALLS + 3):
        start = perf_counter()
        request.infer({0: image})
        if index < 3:  # the first calls fill caches
            continue
        walls.append((perf_counter() - start) * 1e3)
        for node in request.profiling_info:
            if node.status == node.status.EXECUTED:
                times.setdefault((node.node_name, node.node_type), []).append(node.real_time.total_seconds() * 1e3)
    return median(walls), {name: median(taken) for name, taken in times.items()}


def products_of(model: ov.Model) -> dict[str, tuple[float, bool]]:
    """Return the multiplications of every convolution and matrix product by name, and whether it is depthwise."""
    found = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in PRODUCTS:
            continue
        outputs = float(np.prod(list(node.output(0).shape)))
        weights = list(node.input(1).get_shape())
        if kind == "MatMul":
            transposed = node.get_attributes().get("transpose_b", False)
            found[node.get_friendly_name()] = (outputs * weights[-1 if transposed else -2], False)
        elif kind == "Convolution":
            found[node.get_friendly_name()] = (outputs * float(np.prod(weights[1:])), False)
        else:  # groups, outputs per group, inputs per group, kernel
            found[node.get_friendly_name()] = (outputs * float(np.prod(weights[2:])), weights[2] == 1)
    return found


def nodes_of(model: ov.CompiledModel, products: dict[str, tuple[float, bool]]) -> tuple[list[Node], float]:
    """Return every node of a compiled graph with its median time, and the median wall time of a call."""
    infos = {}
    for node in model.get_runtime_model().get_ordered_ops():
        info = {key: value.value for key, value in node.get_rt_info().items()}
        infos[node.get_friendly_name()] = info
    wall_ms, times = profile(model)
    nodes = []
    for (name, layer), ms in times.items():
        info = infos.get(name, {})
        # A product of integers is named after the scaling that it takes in.
        origins = str(info.get("originalLayersNames", "")).replace("/DequantizationMultiply", "").split(",")
        own = [products[origin] for origin in origins if origin in products]
        kind = "other" if not own else "depthwise" if any(depthwise for _, depthwise in own) else "dense"
        nodes.append(
            Node(
                name,
                layer,
                str(info.get("runtimePrecision", "?")),
                kind,
                any("backbone/" in origin for origin in origins),
                sum(macs for macs, _ in own),
                ms,
            )
        )
    return nodes, wall_ms


def summary(name: str, nodes: Iterable[Node], wall_ms: float, peak: float) -> dict[str, Any]:
    """Return what the backbone's products reach of the peak, and how the time is divided."""
    nodes = list(nodes)
    total = sum(node.ms for node in nodes)
    backbone = [node for node in nodes if node.is_backbone]
    dense = [node for node in backbone if node.kind == "dense"]
    rate = sum(node.macs for node in dense) / max(1e-9, sum(node.ms for node in dense)) / 1e6
    whole = sum(node.macs for node in backbone) / max(1e-9, sum(node.ms for node in backbone)) / 1e6
    return {
        "model": Path(name).stem,
        "backbone_gmac": sum(node.macs for node in backbone) / 1e9,
        "wall_ms": wall_ms,
        "nodes_ms": total,
        "share_of_time": {
            "backbone, dense": sum(node.ms for node in dense) / total,
            "backbone, depthwise": sum(node.ms for node in backbone if node.kind == "depthwise") / total,
            "backbone, other": sum(node.ms for node in backbone if node.kind == "other") / total,
            "head and input": sum(node.ms for node in nodes if not node.is_backbone) / total,
        },
        "peak_gmac_s": peak,
        "dense_share_of_peak": rate / peak,
        "backbone_share_of_peak": whole / peak,
    }


def print_nodes(nodes: list[Node], count: int, peak: float) -> None:
    for node in sorted(nodes, key=lambda node: -node.ms)[:count]:
        rate = node.macs / node.ms / 1e6 if node.ms else 0.0
        share = f"{rate / peak:6.1%}" if node.macs else "      "
        print(f"  {node.ms:8.3f} ms  {share}  {node.layer:18} {node.precision:5} {node.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--precision", choices=["int8", "fp32"], default="int8")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=0, help="also list this many of the slowest nodes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    int8 = arguments.precision == "int8"
    shapes: list[tuple[Sequence[int], Sequence[int], int]]
    shapes = [((rows, width), (width, width), rows * width**2) for rows, width in _PRODUCTS]
    shapes += [((1, n, side, side), (n, n, 3, 3), (3 * n * side) ** 2) for n, side in _CONVOLUTIONS]
    chains = [
        (compiled(chain(inputs, weights, int8=int8), arguments.threads), float(_LAYERS * macs))
        for inputs, weights, macs in shapes
    ]
    models, core = [], openvino_core()
    for path in arguments.bundles:
        bundle = read_bundle(path)
        graph = bundle.manifest.graphs[f"openvino/{arguments.precision}"]
        binary = bundle.read(str(Path(graph).with_suffix(".bin"))) if graph.endswith(".xml") else None
        model = core.read_model(bundle.read(graph), binary) if binary else core.read_model(bundle.read(graph))
        models.append((str(path), compiled(model, arguments.threads), products_of(model)))
    peaks: list[float] = []
    rounds: dict[str, list[tuple[list[Node], float]]] = {name: [] for name, _, _ in models}
    for _ in range(arguments.rounds):
        peaks.append(max(measured_peak(one, macs) for one, macs in chains))
        for name, model, products in models:
            rounds[name].append(nodes_of(model, products))
    rows = []
    for name, measured in rounds.items():
        shares = [summary(name, nodes, wall, peak) for (nodes, wall), peak in zip(measured, peaks, strict=True)]
        shares.sort(key=lambda row: float(row["backbone_share_of_peak"]))
        row = {**shares[len(shares) // 2], "precision": arguments.precision, "threads": arguments.threads}
        rows.append(row)
        print(json.dumps(row))
        if arguments.nodes:
            print_nodes(measured[-1][0], arguments.nodes, peaks[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps({"peaks_gmac_s": peaks, "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
