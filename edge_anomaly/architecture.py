"""What a model is made of: a line per stage with the shape that leaves it, its parameters and its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# A part of the model that holds more than this share of its bytes, as teacher and student do, is shown by its parts.
_LARGE = 0.4


@dataclass(frozen=True)
class StageRow:
    """One line of the architecture table.

    name: where it is in the model, such as backbone.stages.1.
    output: shapes of one image's outputs without the batch, empty where the stage was not called.
    parameters: number of learnt values; trainable: how many of them take a gradient.
    bytes: size of parameters and stored buffers (statistics, banks), as in the weights file.
    """

    name: str
    output: tuple[tuple[int, ...], ...]
    parameters: int
    trainable: int
    bytes: int

    @property
    def output_text(self) -> str:
        """Return the shapes for a person, such as '40 × 28 × 28'."""
        return ", ".join(" × ".join(map(str, shape)) or "1" for shape in self.output)


def architecture_summary(model: nn.Module, height: int, width: int) -> list[StageRow]:
    """Return one row per stage of `model.backbone` and `model.head`, which together hold every value of the model once.

    One image, uint8 [1, height, width, 3], goes through the model on its own device, in evaluation mode. A stage is a
    direct child of backbone or head; lists are shown by their members, and what holds more than 40 % of the model by
    its own children. What a model keeps outside any stage stands in a row of its own.
    """
    total = sum(_bytes(tensor) for tensor in model.state_dict().values())
    stages = list(_stages(model, "", total))
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shapes.setdefault(name, tuple(_shapes(output)))

        return hook

    handles = [stage.register_forward_hook(keep(name)) for name, stage, _ in stages]
    training = model.training
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, height, width, 3, dtype=torch.uint8, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    seen: set[int] = set()
    rows = [_row(name, stage, shapes.get(name, ()), alone, seen) for name, stage, alone in stages]
    return [row for row in rows if row.output or row.bytes]


def _stages(module: nn.Module, name: str, total: int) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield name, module, and whether the row is about the module's own tensors only, its children having rows."""
    children = list(module.named_children())
    if not children or not _is_opened(module, name, total):
        yield name, module, False
        return
    if any(True for _ in module.parameters(recurse=False)) or _own_buffers(module):
        yield f"{name or 'model'} (own)", module, True
    for child_name, child in children:
        yield from _stages(child, f"{name}.{child_name}" if name else child_name, total)


def _is_opened(module: nn.Module, name: str, total: int) -> bool:
    """Say whether a module is shown by its children: the model, its backbone and head, lists, and large parts."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or name.count(".") == 0:
        return True
    size = sum(_bytes(tensor) for tensor in module.state_dict().values())
    return not isinstance(module, nn.Sequential) and size > _LARGE * total


def _row(name: str, module: nn.Module, output: tuple[tuple[int, ...], ...], alone: bool, seen: set[int]) -> StageRow:
    """Count what no earlier row has counted: a stage may share tensors with another."""
    parameters = [value for value in module.parameters(recurse=not alone) if id(value) not in seen]
    buffers = _own_buffers(module) if alone else [b for part in module.modules() for b in _own_buffers(part)]
    buffers = [value for value in buffers if id(value) not in seen]
    seen.update(id(value) for value in (*parameters, *buffers))
    return StageRow(
        name=name,
        output=() if alone else output,
        parameters=sum(value.numel() for value in parameters),
        trainable=sum(value.numel() for value in parameters if value.requires_grad),
        bytes=sum(_bytes(value) for value in (*parameters, *buffers)),
    )


def _own_buffers(module: nn.Module) -> list[torch.Tensor]:
    """Return the stored buffers of a module without its children's."""
    stored = module.state_dict(keep_vars=True)
    return [value for name, value in module.named_buffers(recurse=False) if name in stored]


def _shapes(output: Any) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of all tensors in an output, without the batch."""
    if isinstance(output, torch.Tensor):
        yield tuple(output.shape[1:])
    elif isinstance(output, dict):
        for value in output.values():
            yield from _shapes(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _shapes(value)


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
