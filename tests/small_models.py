"""One small model of every kind, on the drawn parts at 64 px: for what all kinds must do alike; plain pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edge_anomaly.autoencoder import AutoencoderConfig
from edge_anomaly.classifier import ClassifierConfig
from edge_anomaly.fastflow import FastflowConfig
from edge_anomaly.image_set import ImageSet
from edge_anomaly.padim import PadimConfig
from edge_anomaly.patchcore import PatchcoreConfig
from edge_anomaly.stpm import StpmConfig
from edge_anomaly.train import train_detector
from edge_anomaly.train_classifier import train_classifier
from edge_anomaly.vit_knn import VitKnnConfig
from edge_anomaly_runtime.preprocess import Preprocess

LITE = "efficientnet_lite0"
SMALL = Preprocess(64, 64)

CONFIGS: dict[str, Any] = {
    "padim": PadimConfig(LITE, dims=8),
    "patchcore": PatchcoreConfig(LITE),
    "fastflow": FastflowConfig(LITE, epochs=2, finetune_epochs=1),
    "stpm": StpmConfig(LITE, epochs=8, batch_size=8),
    "autoencoder": AutoencoderConfig(epochs=1),
    "autoencoder-b": AutoencoderConfig(encoder=LITE, epochs=1),
}


def train_small_detectors(data: Path, folder: Path) -> dict[str, Path]:
    """Train one detector of each config and return their run folders."""
    for name, config in CONFIGS.items():
        train_detector(str(data), folder / name, config=config, preprocess=SMALL)
    return {name: folder / name for name in CONFIGS}


def train_small_vit(data: Path, folder: Path) -> Path:
    """Train a k-NN detector on a transformer of three blocks with random weights and return its run folder."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model: Any = ViTForImageClassification(ViTConfig(**size, intermediate_size=64, image_size=64, patch_size=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(folder / "checkpoint")
    config = VitKnnConfig(checkpoint=str(folder / "checkpoint"), blocks=(0, 2))
    train_detector(str(data), folder / "run", config=config, preprocess=SMALL)
    return folder / "run"


def train_small_classifier(folder: Path) -> Path:
    """Train a ResNet-18 for one epoch to tell red from green and blue pictures and return its run folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 10)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{number}.png")
    config = ClassifierConfig(epochs=2, batch_size=8, learning_rate=0.02, features=True)
    train_classifier(str(folder / "data"), folder / "run", config=config)
    return folder / "run"


def grey_blocks(folder: Path, count: int, side: int) -> ImageSet:
    """Draw pictures with 8 x 8 blocks of random grey, `side` pixels high and wide."""
    for index in range(count):
        blocks = np.random.default_rng(index).integers(60, 200, (8, 8, 1), dtype=np.uint8)
        pixels = blocks.repeat(side // 8, axis=0).repeat(side // 8, axis=1).repeat(3, axis=2)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return ImageSet(sorted(folder.iterdir()), Preprocess(side, side))
