"""A shortened training of the ResNet-18 classifier, for machines without a GPU: learning curve and test accuracy.

    python benchmarks/classifier.py --data CIFAR_FOLDER --out runs/short

CIFAR_FOLDER holds train/CLASS/ and test/CLASS/. 450 pictures of each class to learn from, 50 to choose the epoch, 10
epochs; the test set whole. With less data and fewer epochs than the recipe asks for, the accuracy is far below what the
recipe is for; what it shows is that training works, and how the curve runs.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edge_anomaly.classifier import (
    ClassifierConfig,
    LabeledImages,
    announce,
    build,
    classification_figures,
    fit,
    open_class_data,
    predict,
)
from edge_anomaly.training import FitSession
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.preprocess import Preprocess

SIZE = 32


def some_of_each(images: LabeledImages, per_class: int) -> LabeledImages:
    """Return up to `per_class` pictures of every class, chosen with seed 0."""
    labels = images.labels.numpy()
    chosen = [
        np.random.default_rng(0).permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)
    ]
    return images.chosen(np.sort(np.concatenate(chosen)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True, help="goes on from the checkpoint that it finds there")
    parser.add_argument("--per-class", type=int, default=450)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cpus())
    start = time.perf_counter()
    data = open_class_data(arguments.data, Preprocess(SIZE, SIZE))
    test = data.test
    if test is None:
        raise SystemExit(f"{arguments.data} has no test set.")
    validation = some_of_each(data.validation, max(1, arguments.per_class // 9))
    data = replace(data, train=some_of_each(data.train, arguments.per_class), validation=validation)
    # Half the batch and half the rate: ten epochs of so few pictures are 700 steps.
    config = ClassifierConfig(
        classes=data.classes, recipe="strong", epochs=arguments.epochs, batch_size=64, learning_rate=0.05, cutout=0
    )
    print(*announce(config, SIZE, SIZE, len(data.train)), sep="\n")
    model = build(config, SIZE, SIZE)
    resume = (arguments.out / "checkpoint.pt").exists()
    fit(model, data, FitSession(arguments.out, resume=resume, device="cpu", precision="bf16"))
    logits, _ = predict(model, test)
    figures = classification_figures(logits.numpy(), test.labels.numpy(), data.classes)
    figures["seconds"] = time.perf_counter() - start
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    low, high = figures["accuracy_interval"]
    print(f"test accuracy {figures['accuracy']:.2%} (95 % {low:.2%} to {high:.2%}), {figures['seconds']:.0f} s")


if __name__ == "__main__":
    main()
