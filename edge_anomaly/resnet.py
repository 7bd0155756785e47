"""ResNet (He et al., CVPR 2016) for small pictures: 3x3 stem with stride 1, no max-pooling.

The four stages are those of the paper's ImageNet networks; for an input of 32 pixels they work at 32, 16, 8 and 4. The
layers of a block have torchvision's names, so that the weights of both can be exchanged tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Of the 50,000 training pictures of CIFAR-10, as shares of 255.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)

_STEM_CHANNELS = 64
_STAGE_WIDTHS = (64, 128, 256, 512)
_FLOAT_BYTES = 4


class BasicBlock(nn.Module):
    """y = relu(F(x) + x) with F two 3x3 convolutions; the first one holds the stride."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, width, H/stride, W/stride] for float32 [N, channels, H, W]."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.downsample(x), inplace=True)

    @staticmethod
    def describe(width: int) -> str:
        """Name the convolutions, for a person."""
        return f"3x3 {width}, 3x3 {width}"


class Bottleneck(nn.Module):
    """y = relu(F(x) + x) with F of 1x1, 3x3 and 1x1 convolutions; the 3x3 one holds the stride (torchvision's V1.5)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, 4 width, H/stride, W/stride] for float32 [N, channels, H, W]."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.downsample(x), inplace=True)

    @staticmethod
    def describe(width: int) -> str:
        """Name the convolutions, for a person."""
        return f"1x1 {width}, 3x3 {width}, 1x1 {4 * width}"


@dataclass(frozen=True)
class Variant:
    """The block of a depth, and how many of them each of the four stages has (table 1 of the paper)."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]

    @property
    def features(self) -> int:
        """Number of channels of the last stage."""
        return _STAGE_WIDTHS[-1] * self.block.expansion


VARIANTS = {
    18: Variant(BasicBlock, (2, 2, 2, 2)),
    34: Variant(BasicBlock, (3, 4, 6, 3)),
    50: Variant(Bottleneck, (3, 4, 6, 3)),
    101: Variant(Bottleneck, (3, 4, 23, 3)),
    152: Variant(Bottleneck, (3, 8, 36, 3)),
}


class ResNetBackbone(nn.Module):
    """From camera bytes, uint8 [N, H, W, 3] RGB, to the last feature map, float32 [N, features, H/8, W/8]."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, depth: int) -> None:
        super().__init__()
        variant = VARIANTS[depth]
        # Bytes are normalised in one step: (x / 255 - mean) / std = (x - 255 mean) / (255 std).
        self.register_buffer("mean", torch.tensor(CIFAR_MEAN).reshape(1, 3, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(CIFAR_STD).reshape(1, 3, 1, 1) * 255))
        self.stem = nn.Sequential(
            nn.Conv2d(3, _STEM_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(_STEM_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList()
        channels = _STEM_CHANNELS
        for index, (width, blocks) in enumerate(zip(_STAGE_WIDTHS, variant.blocks, strict=True)):
            self.stages.append(_stage(variant.block, channels, width, blocks, stride=1 if index == 0 else 2))
            channels = width * variant.block.expansion
        _initialise(self)

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Return the network's input, float32 [N, 3, H, W], about -2 to 2."""
        # Contiguous: bytes from a camera are channels-last, a layout in which a CPU trained 2 to 4 times slower
        # (measured with torch 2.15). On a GPU the weights decide on the layout.
        planes = image.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return (planes - self.mean) * self.scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the feature map of the last stage, float32 [N, features, H/8, W/8]."""
        x = self.stem(self.normalise(image))
        for stage in self.stages:
            x = stage(x)
        return x  # type: ignore[no-any-return]


class ResNetHead(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits float32 [N, K] and the pooled features float32 [N, features]."""
        pooled = feature_map.mean(dim=(2, 3))
        return self.linear(pooled), pooled


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, width: int, blocks: int, *, stride: int
) -> nn.Sequential:
    """Return the blocks of one stage; the first one changes channels and size."""
    first = block(channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(blocks - 1)))


def _shortcut(channels: int, channels_out: int, stride: int) -> nn.Module:
    """Return the identity, or a projection where sizes differ (option B of the paper)."""
    if stride == 1 and channels == channels_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


def _initialise(network: nn.Module) -> None:
    """Draw convolutions from N(0, 2 / fan-out) (He et al., ICCV 2015): gradients keep their size on the way down."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True)
class StageSummary:
    """One stage: its layers in words, output [C, H, W] or [K], weights, and bytes kept per image for the backward pass.

    The bytes are those of float32 training: the input of each convolution and of each BatchNorm.
    """

    stage: str
    layers: str
    output: tuple[int, ...]
    parameters: int
    activation_bytes: int


def summary(depth: int, classes: int, image_size: int = 32) -> list[StageSummary]:
    """Return one row for the stem, each of the four stages and the head; nothing is allocated."""
    variant = VARIANTS[depth]
    with torch.device("meta"):
        backbone, head = ResNetBackbone(depth), ResNetHead(variant.features, classes)
        x = backbone.normalise(torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8))
    own_input = x.numel() * _FLOAT_BYTES  # every later input is the output that the stage before has kept
    x, kept = _run_counting(backbone.stem, x)
    stem = StageSummary(
        "stem", f"3x3 {_STEM_CHANNELS}", tuple(x.shape[1:]), _parameters(backbone.stem), own_input + kept
    )
    rows = [stem]
    for width, blocks, stage in zip(_STAGE_WIDTHS, variant.blocks, backbone.stages, strict=True):
        x, kept = _run_counting(stage, x)
        layers = f"{blocks} x ({variant.block.describe(width)})"
        rows.append(StageSummary(f"stage {len(rows)}", layers, tuple(x.shape[1:]), _parameters(stage), kept))
    linear = f"mean, linear {variant.features} to {classes}"
    rows.append(StageSummary("head", linear, (classes,), _parameters(head), variant.features * _FLOAT_BYTES))
    return rows


def imagenet_parameters(depth: int) -> int:
    """Return the parameters of the published network: 7x7 stem and 1,000 classes."""
    small = sum(row.parameters for row in summary(depth, 1000))
    return small + 3 * _STEM_CHANNELS * (7 * 7 - 3 * 3)


def summary_text(depth: int, classes: int, image_size: int = 32) -> str:
    """Return the table of `summary` with its totals, for a terminal."""
    rows = summary(depth, classes, image_size)
    parameters, kept = sum(row.parameters for row in rows), sum(row.activation_bytes for row in rows)
    width = max(len(row.layers) for row in rows)
    lines = [f"{'stage':8}  {'layers':{width}}  {'output':>14}  {'parameters':>11}  {'memory':>9}"]
    for row in rows:
        output = " x ".join(map(str, row.output))
        lines.append(
            f"{row.stage:8}  {row.layers:{width}}  {output:>14}  {row.parameters:>11,}  "
            f"{row.activation_bytes / 1e6:>6.2f} MB"
        )
    lines.append(f"{'total':8}  {'':{width}}  {'':14}  {parameters:>11,}  {kept / 1e6:>6.2f} MB")
    lines.append(
        f"ResNet-{depth} for {image_size}x{image_size}, {classes} classes. Memory: what training keeps per image in "
        f"float32. With ImageNet's stem and head: {imagenet_parameters(depth):,} parameters."
    )
    return "\n".join(lines)


def _run_counting(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the output, and the bytes that autograd keeps for the backward pass beyond the module's input.

    Behind each convolution two tensors of its output's size stay: the input of BatchNorm, and what the ReLU makes of
    its output in place. Behind a projection only the first one stays: a sum needs no operands for its gradient.
    """
    kept = 0

    def count(tensors: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
            nonlocal kept
            kept += tensors * output.numel() * _FLOAT_BYTES

        return hook

    handles = [
        layer.register_forward_hook(count(1 if "downsample" in name else 2))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    x = module(x)
    for handle in handles:
        handle.remove()
    return x, kept


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
