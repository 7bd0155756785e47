"""The part of the comparison that runs in anomalib's own environment; `compare.py` makes that and calls this.

    anomalib_worker.py build --model padim --backbone resnet18 --size 256 --data DATA --weights W.pth --out OUT
    anomalib_worker.py first-score --model model.xml --image photo.jpg
    anomalib_worker.py serve --model model.xml --image photo.jpg

Every command prints one JSON line with its result on the standard output. `serve` answers a line of input, a number of
calls, with that many latencies of its inferencer, so that the two sides can take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

LITE = "tf_efficientnet_lite0"
LAYERS = {LITE: ["blocks.1", "blocks.2", "blocks.4"], "resnet18": ["layer1", "layer2", "layer3"]}
# Mean and standard deviation that the weights were trained with; anomalib itself takes ImageNet's for every backbone.
NORMALISATION = {
    LITE: ([127 / 255] * 3, [128 / 255] * 3),
    "resnet18": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def given_weights(path: Path) -> AbstractContextManager[Any]:
    """Let timm take the weights that it would download from a file."""
    import timm
    import torch

    create = timm.create_model
    state = torch.load(path, weights_only=True)

    def created(name: str, *positional: Any, pretrained: bool = False, **named: Any) -> Any:
        network = create(name, *positional, pretrained=False, **named)
        if pretrained:
            own = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
            if missing := own - set(state):
                raise SystemExit(f"{path} lacks {len(missing)} tensors of {name}, first {sorted(missing)[0]}.")
            network.load_state_dict({key: state[key] for key in own}, strict=False)
        return network

    return patch.object(timm, "create_model", created)


def model_of(arguments: argparse.Namespace) -> Any:
    from anomalib.models import Fastflow, Padim, Patchcore, Stfpm
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    size, backbone = (arguments.size, arguments.size), arguments.backbone
    mean, std = NORMALISATION[backbone]
    transform = Compose([Resize(size, antialias=True), Normalize(mean=mean, std=std)])
    common = {"backbone": backbone, "pre_processor": PreProcessor(transform), "visualizer": False, "evaluator": False}
    if arguments.model == "padim":
        return Padim(**common, layers=LAYERS[backbone], n_features=100)
    if arguments.model == "patchcore":
        return Patchcore(**common, layers=LAYERS[backbone][1:], coreset_sampling_ratio=0.01)
    if arguments.model == "stpm":
        return Stfpm(**common, layers=LAYERS[backbone])
    return Fastflow(**common)


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on `train/good`, for which PaDiM and PatchCore need one epoch, and export.

    f32 and int8_ptq take images of the model's size; photo takes those of `--photo-size` and resizes them itself.
    """
    import torch
    from anomalib.data import Folder
    from anomalib.deploy import CompressionType
    from anomalib.engine import Engine
    from torchvision.transforms.v2 import Resize

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = Folder(
        name="parts",
        root=arguments.data,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/bad",
        augmentations=Resize((arguments.size, arguments.size), antialias=True),
        num_workers=0,
        seed=0,
    )
    start = perf_counter()
    with given_weights(arguments.weights):
        model = model_of(arguments)
        engine = Engine(
            default_root_dir=arguments.out / "training",
            accelerator="cpu",
            devices=1,
            logger=False,
            max_epochs=arguments.epochs,
            check_val_every_n_epoch=arguments.epochs,
            enable_progress_bar=False,
        )
        engine.fit(model, datamodule=data)
    trained = perf_counter() - start
    size = (arguments.size, arguments.size)
    # Batch 1: PatchCore's graph is otherwise traced for two images and takes no other number.
    static = {"dynamic_axes": {}}
    paths = {"f32": model.to_openvino(arguments.out / "f32", input_size=size, onnx_kwargs=static)}
    data.eval_batch_size = 1  # its quantisation feeds the validation batches to the graph as they are
    paths["int8_ptq"] = model.to_openvino(
        arguments.out / "int8",
        input_size=size,
        compression_type=CompressionType.INT8_PTQ,
        datamodule=data,
        onnx_kwargs=static,
    )
    paths["photo"] = model.to_openvino(arguments.out / "photo", input_size=arguments.photo_size, onnx_kwargs=static)
    return {**{name: str(path) for name, path in paths.items()}, "train_seconds": trained}


def first_score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what it takes from a bare interpreter to the first verdict: seconds and the process's memory."""
    start = perf_counter()
    from anomalib.deploy import OpenVINOInferencer

    imported = perf_counter()
    inferencer = OpenVINOInferencer(arguments.model, device="CPU")
    loaded = perf_counter()
    inferencer.predict(arguments.image)
    end = perf_counter()
    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_s": end - loaded,
        "rss_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Return the peak of this process's resident memory; `ru_maxrss` would count its parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def serve(arguments: argparse.Namespace) -> None:
    from anomalib.deploy import OpenVINOInferencer

    inferencer = OpenVINOInferencer(arguments.model, device="CPU", config=json.loads(arguments.config))
    answer({"ready": True})
    for line in sys.stdin:
        samples = []
        for _ in range(int(line)):
            start = perf_counter()
            inferencer.predict(arguments.image)
            samples.append((perf_counter() - start) * 1e3)
        answer({"ms": samples})


def answer(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=_OUT, flush=True)


# Libraries print where results belong: they get the standard error.
_OUT = sys.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "first-score", "serve"])
    parser.add_argument(
        "--model", required=True, help="padim, patchcore, stpm or fastflow; an IR's .xml for the others"
    )
    parser.add_argument("--backbone", choices=list(LAYERS), default="resnet18")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--photo-size", type=int, nargs=2, default=(1080, 1920))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--config", default="{}", help="OpenVINO properties as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr
    if arguments.what == "build":
        answer(build(arguments))
    elif arguments.what == "first-score":
        answer(first_score(arguments))
    else:
        serve(arguments)


if __name__ == "__main__":
    main()
