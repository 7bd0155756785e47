"""The table of stages: every value of the model once, shapes as they leave each stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_anomaly.architecture import StageRow, architecture_summary
from edge_anomaly.backbones import build_backbone
from edge_anomaly.classifier import ClassifierConfig, build
from edge_anomaly.padim import Padim, PadimConfig


class Small(nn.Module):
    """A backbone of a list and a block that is most of the model, a head with a bank, and a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Stack()
        self.head = Bank()
        self.gain = nn.Parameter(torch.ones(2))
        self.seen_training = False

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen_training |= self.training
        scored: tuple[torch.Tensor, dict[str, torch.Tensor]] = self.head(self.backbone(image))
        return scored


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)])
        self.block = Block()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.permute(0, 3, 1, 2).float()
        for layer in self.layers:
            x = layer(x)
        blocked: torch.Tensor = self.block(x)
        return blocked


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 100)
        self.narrow = nn.Linear(100, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrowed: torch.Tensor = self.narrow(self.wide(x.flatten(2).transpose(1, 2)))
        return narrowed


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(10, 4))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x.amax(dim=(1, 2)), {"map": x[:, :, 0]}


def test_rows_of_a_small_model() -> None:
    model = Small()
    model.backbone.layers.requires_grad_(False)
    assert architecture_summary(model, 6, 5) == [
        StageRow("model (own)", (), 2, 2, 8),
        StageRow("backbone.layers.0", ((4, 6, 5),), 16, 0, 64),
        StageRow("backbone.layers.1", ((4, 6, 5),), 20, 0, 80),
        StageRow("backbone.block.wide", ((30, 100),), 500, 500, 2000),
        StageRow("backbone.block.narrow", ((30, 4),), 404, 404, 1616),
        StageRow("head", ((), (30,)), 0, 0, 160),
    ]


def test_model_is_run_in_evaluation_mode_and_left_as_it_was() -> None:
    model = Small().train()
    architecture_summary(model, 4, 4)
    assert model.training and not model.seen_training
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_weights_count_once() -> None:
    model = Small()
    model.backbone.layers.append(model.backbone.layers[1])
    rows = architecture_summary(model, 4, 4)
    assert sum(row.parameters for row in rows) == sum(value.numel() for value in model.parameters())


def test_detector_has_its_backbones_stages_and_its_head() -> None:
    config = PadimConfig(backbone="efficientnet_lite0", dims=16)
    model = Padim(config, build_backbone("efficientnet_lite0", weights="random"), 64, 64)
    rows = architecture_summary(model, 64, 64)
    assert [row.name for row in rows] == ["backbone.stem", *(f"backbone.stages.{i}" for i in range(3)), "head"]
    assert [row.output_text for row in rows] == [
        "32 × 32 × 32",
        "24 × 16 × 16",
        "40 × 8 × 8",
        "112 × 4 × 4",
        "1, 8 × 8, 16 × 8 × 8",
    ]
    assert sum(row.trainable for row in rows) == 0
    assert rows[-1].parameters == 0 and rows[-1].bytes > 64 * 16 * 16 * 2
    stored = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert sum(row.bytes for row in rows) == stored


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (50, 23_520_842)])
def test_classifier_stages_add_up_to_the_network(depth: int, parameters: int) -> None:
    model = build(ClassifierConfig(depth=depth, classes=tuple("abcdefghij")), 32, 32)
    rows = architecture_summary(model, 32, 32)
    assert sum(row.parameters for row in rows) == sum(row.trainable for row in rows) == parameters
    assert rows[-1].output == ((10,),)
