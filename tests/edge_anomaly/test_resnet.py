from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from edge_anomaly.resnet import (
    VARIANTS,
    BasicBlock,
    Bottleneck,
    ResNetBackbone,
    ResNetHead,
    imagenet_parameters,
    summary,
    summary_text,
)

SMALL = {18: 11_173_962, 34: 21_282_122, 50: 23_520_842, 101: 42_512_970, 152: 58_156_618}
IMAGENET = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def torchvision_network(depth: int, classes: int) -> Any:
    """torchvision's ResNet with the stem for small pictures."""
    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def with_weights_of(network: Any, depth: int, classes: int) -> tuple[ResNetBackbone, ResNetHead]:
    """Our modules with torchvision's weights; every tensor must find its place."""
    backbone, head = ResNetBackbone(depth), ResNetHead(VARIANTS[depth].features, classes)
    backbone.stem[0].load_state_dict(network.conv1.state_dict())
    backbone.stem[1].load_state_dict(network.bn1.state_dict())
    for stage, theirs in zip(
        backbone.stages, (network.layer1, network.layer2, network.layer3, network.layer4), strict=True
    ):
        stage.load_state_dict(theirs.state_dict())
    head.linear.load_state_dict(network.fc.state_dict())
    return backbone, head


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("depth", VARIANTS)
def test_parameters_are_those_of_the_published_networks(depth: int) -> None:
    with torch.device("meta"):
        own = count(ResNetBackbone(depth), ResNetHead(VARIANTS[depth].features, 10))
        theirs_small = count(torchvision_network(depth, 10))
        theirs = count(getattr(torchvision.models, f"resnet{depth}")())

    assert own == theirs_small == SMALL[depth] == sum(row.parameters for row in summary(depth, 10))
    assert imagenet_parameters(depth) == theirs == IMAGENET[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_with_torchvisions_weights_the_output_and_the_gradient_are_torchvisions(depth: int) -> None:
    torch.manual_seed(0)
    network = torchvision_network(depth, 7)
    backbone, head = with_weights_of(network, depth, 7)
    image = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)

    logits, pooled = head(backbone(image))
    expected = network(backbone.normalise(image))
    own, theirs = (
        torch.autograd.grad(output.square().sum(), next(layer.parameters()))[0]
        for output, layer in ((logits, backbone.stem), (expected, network.conv1))
    )

    assert pooled.shape == (2, VARIANTS[depth].features)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_bytes_are_normalised_with_the_mean_and_the_deviation_of_cifar() -> None:
    image = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(
        image.permute(0, 3, 1, 2) / 255, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    )

    torch.testing.assert_close(ResNetBackbone(18).normalise(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "last"), [(16, 2), (32, 4), (40, 5)])
def test_the_stem_keeps_the_size_and_three_stages_halve_it(size: int, last: int) -> None:
    backbone = ResNetBackbone(18).eval()
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)

    with torch.inference_mode():
        assert backbone.stem(backbone.normalise(image)).shape == (1, 64, size, size)
        assert backbone(image).shape == (1, 512, last, last)


def test_convolutions_are_drawn_with_a_deviation_of_sqrt_2_over_fan_out() -> None:
    torch.manual_seed(0)
    backbone = ResNetBackbone(50)
    checked = 0
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 50_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
            checked += 1
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.min() == 1
            assert not module.bias.any()
    assert checked > 20


@pytest.mark.parametrize("block", [BasicBlock(64, 64, 1), Bottleneck(256, 64, 1)])
def test_a_block_whose_residual_is_zero_is_the_identity_for_its_output_and_its_gradient(
    block: BasicBlock | Bottleneck,
) -> None:
    nn.init.zeros_(block.bn2.weight if isinstance(block, BasicBlock) else block.bn3.weight)
    x = torch.rand(2, 64 if isinstance(block, BasicBlock) else 256, 4, 4, requires_grad=True)

    y = block(x)
    y.sum().backward()

    assert torch.equal(y, x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_weights_of_the_two_blocks_at_256_channels_are_those_of_the_page() -> None:
    two_convolutions = [BasicBlock(256, 256, 1).conv1, BasicBlock(256, 256, 1).conv2]
    bottleneck = Bottleneck(256, 64, 1)

    assert count(*two_convolutions) == 2 * 9 * 256 * 256 == 1_179_648
    assert count(bottleneck.conv1, bottleneck.conv2, bottleneck.conv3) == 69_632


def test_a_bottleneck_keeps_its_stride_in_the_3x3_convolution() -> None:
    block = Bottleneck(256, 128, 2)

    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("depth", [18, 50])
def test_summary_counts_the_memory_that_autograd_keeps(depth: int) -> None:
    backbone, head = ResNetBackbone(depth), ResNetHead(VARIANTS[depth].features, 10)
    weights = {parameter.data_ptr() for module in (backbone, head) for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dim() in (2, 4):  # BatchNorm's own statistics are left out
            kept[storage.data_ptr()] = tensor.numel() * 4
            alive.append(storage)  # an address that is freed could be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(backbone(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)))

    assert sum(kept.values()) == 2 * sum(row.activation_bytes for row in summary(depth, 10, 16))


def test_summary_rows_say_shapes_and_parameters_of_each_stage() -> None:
    rows = summary(50, 10)

    assert [(row.stage, row.output, row.parameters) for row in rows] == [
        ("stem", (64, 32, 32), 1_856),
        ("stage 1", (256, 32, 32), 215_808),
        ("stage 2", (512, 16, 16), 1_219_584),
        ("stage 3", (1024, 8, 8), 7_098_368),
        ("stage 4", (2048, 4, 4), 14_964_736),
        ("head", (10,), 20_490),
    ]
    assert rows[3].layers == "6 x (1x1 256, 3x3 256, 1x1 1024)"


def test_summary_text_names_the_totals() -> None:
    text = summary_text(18, 10)

    assert "11,173,962" in text
    assert "11,689,512" in text
    assert "512 x 4 x 4" in text
    assert max(map(len, text.splitlines()[:-1])) < 100
