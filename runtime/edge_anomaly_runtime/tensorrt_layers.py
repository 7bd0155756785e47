"""What an engine's layers really compute in, from the engine inspector's JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# TensorRT 8 says "Row major linear FP16 format" or "Thirty-two wide channel vectorized row major Int8 format", later
# versions "Half" or "Int8"; the first word that is found counts.
_WORDS = (
    ("int32", ""),
    ("int64", ""),
    ("uint8", ""),
    ("int8", "Int8"),
    ("bfloat", "Half"),
    ("bf16", "Half"),
    ("fp16", "Half"),
    ("half", "Half"),
    ("fp32", "Float"),
    ("float", "Float"),
)
_MOVING = ("reformat", "noop", "constant", "shuffle", "cast")


@dataclass(frozen=True)
class EngineLayers:
    """Read back from an engine.

    counts: layers by the type that they read, Int8, Half and Float. tensors: inputs and outputs.
    reduced: layers of the head that do not write FP32.
    """

    counts: dict[str, int]
    tensors: tuple[str, ...]
    reduced: tuple[str, ...]


def read_layers(text: str, float_prefix: str) -> EngineLayers:
    """Read the inspector's JSON; text that is none gives zeros, as the report is no reason to refuse an engine."""
    try:
        content = json.loads(text)
    except ValueError:
        content = {}
    # Layers that are only a name come from an engine that was built without details.
    layers = [layer for layer in content.get("Layers", []) if isinstance(layer, dict)]
    # Up to TensorRT 10 "Bindings", a list of names; from 11 on "I/O Tensors".
    entries = content.get("I/O Tensors", content.get("Bindings", []))
    tensors = tuple(str(entry.get("Name")) if isinstance(entry, dict) else str(entry) for entry in entries)
    return EngineLayers(count_precisions(layers), tensors, tuple(reduced_layers(layers, float_prefix)))


def count_precisions(layers: list[dict[str, Any]]) -> dict[str, int]:
    """Count the layers by the type that they read (a convolution that reads Int8 computes in Int8).

    >>> count_precisions([{"Inputs": [{"Format/Datatype": "Row major linear FP32"}], "Outputs": []}])
    {'Int8': 0, 'Half': 0, 'Float': 1}
    """
    counts = {"Int8": 0, "Half": 0, "Float": 0}
    for layer in layers:
        tensors = layer.get("Inputs") or layer.get("Outputs") or []
        if tensors and (kind := _precision(tensors[0])):
            counts[kind] += 1
    return counts


def reduced_layers(layers: list[dict[str, Any]], prefix: str) -> list[str]:
    """Name the layers of nodes that begin with `prefix` and do not write FP32 where they write a float.

    A layer may be several nodes: `head/Mul + head/Add`, `PWN(head/Mul, head/Sub)`, `{ForeignNode[head/A...head/B]}`.
    """
    in_name = re.compile(rf"(?:^|\.\.\.|[^\w./:-]){re.escape(prefix)}")
    names = []
    for layer in layers:
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", "")).lower()
        if not in_name.search(name) or any(word in kind for word in _MOVING):
            continue
        if any(_precision(tensor) in ("Half", "Int8") for tensor in layer.get("Outputs", [])):
            names.append(name)
    return names


def _precision(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return ""
    text = " ".join(str(tensor.get(key, "")) for key in ("Datatype", "Format/Datatype", "Format")).lower()
    return next((kind for word, kind in _WORDS if word in text), "")
