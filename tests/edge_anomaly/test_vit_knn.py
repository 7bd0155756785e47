from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors

from edge_anomaly.backbones import IMAGENET
from edge_anomaly.image_set import ImageSet
from edge_anomaly.training import FitSession
from edge_anomaly.vit_knn import (
    DEFAULT_CHECKPOINT,
    VitKnn,
    VitKnnConfig,
    VitKnnHead,
    _plain_name,
    announce,
    build,
    fit,
    fit_bytes,
    read_checkpoint,
    refit,
)
from edge_anomaly_export.graph import onnx_from_detector
from edge_anomaly_runtime.errors import MissingRequirementError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess

TINY: dict[str, Any] = {
    "hidden": 32,
    "layers": 3,
    "heads": 2,
    "mlp": 64,
    "patch": 16,
    "image_size": 64,
    "epsilon": 1e-12,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def tiny(**changes: Any) -> VitKnnConfig:
    return VitKnnConfig(**{"architecture": TINY, "blocks": (0, 2), **changes})


def unit_vectors(count: int, dims: int = 64, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)  # type: ignore[no-any-return]


def photos(count: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def saved(kind: str, folder: Path, **changes: Any) -> Any:
    """Save a random transformer of transformers' own, with weights that all matter, and return it."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64}
    if kind == "vit":
        settings = ViTConfig(**{**sizes, "patch_size": 16, "intermediate_size": 64, **changes})
        model: Any = ViTForImageClassification(settings)
    else:
        model = Dinov2Model(Dinov2Config(**{**sizes, "patch_size": 16, "mlp_ratio": 2, **changes}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(folder)
    return model.vit if kind == "vit" else model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "vit"
    saved("vit", folder)
    return folder


@pytest.fixture(scope="module")
def normal_images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("images")
    for index, pixels in enumerate(photos(20, 64, 48).numpy()):
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return ImageSet(sorted(folder.iterdir()), Preprocess(64, 48))


def fitted(normal_images: ImageSet, folder: Path, **changes: Any) -> VitKnn:
    model = build(tiny(**changes), 64, 48, weights="random")
    fit(model, normal_images, FitSession(folder, device="cpu"))
    return model


@pytest.fixture(scope="module")
def model(normal_images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> VitKnn:
    """A fitted model that no test changes; its score is the mean of the three highest of twelve distances."""
    return fitted(normal_images, tmp_path_factory.mktemp("session"), score_share=0.2)


# The transformer


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 48)])
def test_tokens_are_those_of_transformers_at_its_own_and_at_another_size(
    kind: str, height: int, width: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reference = saved(kind, tmp_path / "vit")
    capfd.readouterr()
    image = photos(2, height, width)

    model = build(VitKnnConfig(checkpoint=str(tmp_path / "vit"), blocks=(0, 2)), height, width)
    tokens = model.backbone(image)

    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (((0.5,) * 3,) * 2 if kind == "vit" else IMAGENET))
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        pixels = (image.permute(0, 3, 1, 2) / 255 - mean) / std
        states = reference(pixels, output_hidden_states=True, **options).hidden_states
        expected = [reference.layernorm(states[block + 1])[:, 1:] for block in (0, 2)]
    for own, theirs in zip(tokens, expected, strict=True):
        assert own.shape == (2, height // 16 * width // 16, 32)
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_qkv_bias_is_read(tmp_path: Path) -> None:
    saved("vit", tmp_path, qkv_bias=False)

    model = build(VitKnnConfig(checkpoint=str(tmp_path)), 64, 64)

    assert model.state_dict()["backbone.blocks.0.attention.key.bias"].abs().max() == 0


def test_blocks_after_the_last_used_one_are_not_built(checkpoint: Path) -> None:
    model = build(VitKnnConfig(checkpoint=str(checkpoint), blocks=(1,)), 64, 64)

    assert len(model.backbone.blocks) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_default_blocks_are_past_the_middle_and_near_the_end() -> None:
    assert VitKnnConfig().used_blocks == (6, 9)
    assert VitKnnConfig(architecture={**TINY, "layers": 24}).used_blocks == (13, 19)
    assert VitKnnConfig(architecture={**TINY, "layers": 1}).used_blocks == (0,)


def test_weights_path_takes_the_place_of_the_checkpoint_as_folder_and_as_file(checkpoint: Path) -> None:
    by_checkpoint = build(VitKnnConfig(checkpoint=str(checkpoint)), 64, 64)
    by_folder = build(VitKnnConfig(), 64, 64, weights=str(checkpoint))
    by_file = build(VitKnnConfig(), 64, 64, weights=str(checkpoint / "model.safetensors"))

    assert by_folder.config.architecture == by_checkpoint.config.architecture == TINY
    for name, value in by_checkpoint.state_dict().items():
        assert torch.equal(value, by_folder.state_dict()[name]), name
        assert torch.equal(value, by_file.state_dict()[name]), name


def test_names_in_files_and_of_transformers_4_mean_the_same_as_those_of_transformers_5(checkpoint: Path) -> None:
    in_file = {_plain_name(name.removeprefix("vit.")) for name in load_file(checkpoint / "model.safetensors")}

    assert in_file - {"classifier.weight", "classifier.bias"} == {
        name for name in read_checkpoint(checkpoint)[1] if not name.startswith("pooler")
    }


def test_mean_and_std_of_the_checkpoints_own_preprocessing_are_used(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))

    model = build(VitKnnConfig(checkpoint=str(tmp_path)), 64, 64)

    assert model.backbone.mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
    assert (1 / model.backbone.scale).flatten().tolist() == pytest.approx([102.0, 127.5, 153.0])


def test_parameters_are_those_of_the_modules_and_vit_base_up_to_block_11_has_as_many_as_published() -> None:
    model = build(tiny(blocks=(1,)), 64, 96, weights="random")

    assert tiny(blocks=(1,)).parameters(64, 96) == sum(value.numel() for value in model.backbone.parameters())
    # 86,567,656 with the classifier of 1000 classes; class token and its position are one vector here.
    assert VitKnnConfig(blocks=(11,)).parameters(224, 224) == 86_567_656 - 769_000 - 768


# Distances


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_map_and_score_are_those_of_scikit_learns_brute_force_in_float64(share: float) -> None:
    config = tiny(bank=40, score_share=share)
    bank, queries = unit_vectors(40), unit_vectors(2 * 30, seed=1)
    head = VitKnnHead(config, (5, 6))
    head.bank.copy_(torch.from_numpy(bank.T))

    score, anomaly_map = head.judge(torch.from_numpy(queries.reshape(2, 30, 64)))

    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(bank.astype(np.float64))
    expected = neighbours.kneighbors(queries.astype(np.float64))[0].reshape(2, 30)
    highest = np.sort(expected, axis=1)[:, -{0.01: 1, 0.2: 6, 1.0: 30}[share] :]
    np.testing.assert_allclose(anomaly_map.reshape(2, 30).numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score.numpy(), highest.mean(axis=1), rtol=1e-5)


def test_default_score_is_the_mean_of_the_two_highest_of_196_patches() -> None:
    head = VitKnnHead(VitKnnConfig(blocks=(0,)), (14, 14))
    head.bank[0] = 1.0
    embedding = torch.zeros(1, 196, 768)
    embedding[0, :, 0] = 1.0
    embedding[0, [5, 9, 100], 0] = torch.tensor([0.4, 0.8, 0.2])

    score, anomaly_map = head.judge(embedding)

    assert score.item() == pytest.approx((0.6 + 0.8) / 2)
    assert anomaly_map[0, 7, 2] == pytest.approx(0.8)


def test_cosine_of_embeddings_is_the_mean_of_the_blocks_cosines() -> None:
    first, second = torch.randn(2, 1, 2, 32, generator=torch.Generator().manual_seed(0)).double()
    head = VitKnnHead(tiny(), (1, 2))

    embedding = head.embed([first, 100 * second])

    cosine = torch.nn.functional.cosine_similarity
    expected = (cosine(first[0, 0], first[0, 1], dim=0) + cosine(second[0, 0], second[0, 1], dim=0)) / 2
    assert (embedding[0, 0] @ embedding[0, 1]).item() == pytest.approx(expected.item(), abs=1e-12)
    assert (embedding[0, 0] @ embedding[0, 0]).item() == pytest.approx(1.0, abs=1e-12)


def test_a_token_of_the_bank_is_at_distance_0_and_its_opposite_at_2() -> None:
    head = VitKnnHead(tiny(bank=1), (1, 2))
    vector = torch.from_numpy(unit_vectors(1))
    head.bank.copy_(vector.T)

    _, anomaly_map = head.judge(torch.stack([vector[0], -vector[0]])[None])

    assert anomaly_map.flatten().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    assert anomaly_map.min() >= 0


# The bank


def test_a_bank_without_vectors_is_refused_with_its_number() -> None:
    for sizes in ({"bank": 0}, {"bank": -3}, {"max_bank": 0}):
        with pytest.raises(UsageError, match=f"A bank of {min(sizes.values())} vectors"):
            tiny(**sizes)


def test_bank_is_a_share_of_the_normal_tokens_and_spreads_over_clusters_of_any_size() -> None:
    """Of 300 tokens, all but 3 are nearly the same: a random tenth would miss most of the rare ones."""
    tokens = np.repeat(unit_vectors(4, seed=2), [297, 1, 1, 1], axis=0)
    tokens[:297] += np.random.default_rng(0).standard_normal((297, 64)).astype(np.float32) * 1e-3

    bank = refit(tiny(), [tokens.reshape(10, 30, 64)])["bank"]

    assert bank.shape == (64, 30)
    assert {row.tobytes() for row in bank.T} <= {row.tobytes() for row in tokens}
    assert all(any(np.array_equal(rare, row) for row in bank.T) for rare in tokens[297:])


def test_bank_size_follows_share_cap_and_memory_whichever_is_least() -> None:
    assert tiny().bank_size(5_000) == 500
    assert tiny(max_bank=300).bank_size(5_000) == 300
    assert tiny(memory_budget=0.0512).bank_size(5_000) == 200
    assert tiny(bank=7).bank_size(5_000) == 7
    assert VitKnnConfig().bank_size(196 * 10_000) == 10_000


def test_fit_keeps_the_true_size_in_the_config_and_normal_images_score_near_0(
    normal_images: ImageSet, tmp_path: Path
) -> None:
    model = fitted(normal_images, tmp_path, share=1.0)

    assert model.config.bank == 20 * 12
    assert model.head.bank.shape == (64, 240)
    assert not model.training
    score, _, _ = model(torch.stack([normal_images[index] for index in range(20)]))
    assert score.max() < 1e-6
    assert model(photos(1, 64, 48, seed=9))[0] > 1e-4


def test_two_fits_are_bit_identical_and_another_seed_is_not(
    model: VitKnn, normal_images: ImageSet, tmp_path: Path
) -> None:
    again, other = fitted(normal_images, tmp_path), fitted(normal_images, tmp_path, seed=1)

    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.head.bank, other.head.bank)


def test_refit_on_the_models_own_embeddings_gives_the_models_bank(model: VitKnn, normal_images: ImageSet) -> None:
    with torch.no_grad():
        embeddings = [model(torch.from_numpy(batch))[2].numpy() for batch in normal_images.batches("")]
    again = refit(model.config, embeddings)

    assert list(again) == ["bank"]
    np.testing.assert_array_equal(again["bank"], model.head.bank.numpy())


def test_a_run_is_read_back_without_the_checkpoint_and_without_transformers(
    checkpoint: Path, normal_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(VitKnnConfig(checkpoint=str(checkpoint)), 64, 48)
    fit(model, normal_images, FitSession(tmp_path, device="cpu"))
    record = json.loads(json.dumps(asdict(model.config)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    config = VitKnnConfig(**{**record, "blocks": tuple(record["blocks"])})
    again = build(config, 64, 48, weights="random")
    again.load_state_dict(model.state_dict())

    assert again.config == model.config
    for ours, theirs in zip(again(photos(2, 64, 48)), model(photos(2, 64, 48)), strict=True):
        assert torch.equal(ours, theirs)


# The deployed graph


def test_exported_graph_gives_the_models_score_and_map(model: VitKnn) -> None:
    graph = onnx_from_detector(model, 64, 48)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    image = photos(1, 64, 48, seed=5)

    outputs = session.run(None, {"image": image.numpy()})

    with torch.no_grad():
        for ours, theirs in zip(outputs, model(image), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-6)
    assert graph.opset_import[0].version == 18
    # Norms are one node each, for engines that must keep them in float: two a block and one after either tap.
    assert [node.op_type for node in graph.graph.node].count("LayerNormalization") == 2 * 3 + 2
    assert {value.name: list(value.dims) for value in graph.graph.initializer}["head.bank"] == [64, model.config.bank]


def test_batch_gives_the_scores_of_single_images(model: VitKnn) -> None:
    images = photos(5, 64, 48, seed=3)

    score, anomaly_map, embedding = model(images)

    assert (score.shape, anomaly_map.shape, embedding.shape) == ((5,), (5, 4, 3), (5, 12, 64))
    for index in range(5):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone[0][0], score[index], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone[1][0], anomaly_map[index], rtol=1e-4, atol=1e-6)


# What the user is told


def test_announcement_has_parameters_bank_and_memory() -> None:
    model, bank, *rest = announce(VitKnnConfig(), 224, 224, 350)

    assert "blocks 6, 9 of 0 to 11: 71.6 M parameters (286 MB), 14x14 patches of 16 px, 1536 channels" in model
    assert "bank of 6,860 of 68,600 patches, 42.1 MB, 2.07 GMAC an image" in bank
    assert f"{fit_bytes(VitKnnConfig(), 68_600) / 1e9:.1f} GB of memory" in bank
    assert not rest
    assert "--share 1" in announce(VitKnnConfig(), 224, 224, 12)[-1]
    assert "a random 300,000" in announce(VitKnnConfig(), 224, 224, 2_000)[-1]
    assert "some/vit" in announce(VitKnnConfig(checkpoint="some/vit"), 224, 224, 350)[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"share": 0.0}, "share of 0"),
        ({"share": 1.5}, "share of 1.5"),
        ({"max_bank": 0}, "0 vectors"),
        ({"bank": -1}, "-1 vectors"),
        ({"memory_budget": 0.0}, "0 MB"),
        ({"score_share": 0.0}, "score share of 0"),
        ({"blocks": ()}, "blocks"),
        ({"blocks": (1, 1)}, "1, 1"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        tiny(**changes)


@pytest.mark.parametrize("block", [3, -1])
def test_a_block_that_is_not_there_is_refused_with_the_choice(block: int) -> None:
    with pytest.raises(UsageError, match=str(block)) as caught:
        build(tiny(blocks=(0, block)), 64, 64, weights="random")
    assert "0 to 2" in caught.value.hint


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is() -> None:
    with pytest.raises(UsageError, match="100x64 pixels do not divide into patches of 16") as caught:
        build(tiny(), 100, 64, weights="random")
    assert "96x64" in caught.value.hint


def test_a_bank_larger_than_the_patches_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="61 vectors cannot be chosen from 60 patches"):
        refit(tiny(bank=61), [unit_vectors(60).reshape(2, 30, 64)])


def test_a_memory_budget_below_one_vector_is_refused() -> None:
    with pytest.raises(UsageError, match="not one vector of 256 bytes"):
        tiny(memory_budget=0.0001).bank_size(1_000)


def test_too_few_images_are_refused_with_the_number_that_is_needed(normal_images: ImageSet, tmp_path: Path) -> None:
    few = ImageSet(normal_images.paths[:2], normal_images.spec)
    with pytest.raises(UsageError, match="2 images") as caught:
        fit(build(tiny(), 64, 48, weights="random"), few, FitSession(tmp_path, device="cpu"))
    assert "at least 3" in caught.value.hint


def test_a_fit_that_does_not_fit_into_memory_is_refused_with_both_figures(
    normal_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_anomaly.patchcore.available_bytes", lambda: 1000)
    with pytest.raises(UsageError, match=r"needs .* GB of memory, and 0\.0 GB are free"):
        fitted(normal_images, tmp_path)


def test_random_weights_of_an_unread_checkpoint_are_refused() -> None:
    with pytest.raises(UsageError, match="some/vit are not known"):
        build(VitKnnConfig(checkpoint="some/vit"), 64, 64, weights="random")


# Checkpoints that cannot be used


def break_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "swin"}))


def break_activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))


def break_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["vit.encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def cut_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def leave_only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (break_type, "type 'swin'"),
        (break_activation, "hidden_act 'relu'"),
        (break_width, "Cannot read a ViT"),
        (break_json, "config.json"),
        (remove_config, "config.json"),
        (remove_tensor, "lacks 1 tensors"),
        (cut_file, "Cannot read a ViT"),
        (leave_only_a_pickle, "model.safetensors"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    damage: Any, text: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    capfd.readouterr()

    with pytest.raises(UsageError, match=text) as caught:
        build(VitKnnConfig(checkpoint=str(tmp_path)), 64, 64)

    assert str(tmp_path) in caught.value.what
    assert caught.value.hint
    assert capfd.readouterr().out == ""


def test_a_weights_path_that_is_not_there_is_no_name_on_the_hub() -> None:
    with pytest.raises(UsageError, match="There is no checkpoint nowhere/vit"):
        build(VitKnnConfig(), 64, 64, weights="nowhere/vit")


def test_a_pth_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(b"pickle")
    with pytest.raises(UsageError, match=r"not a \.safetensors file"):
        build(VitKnnConfig(), 64, 64, weights=str(tmp_path / "vit.pth"))


def test_without_transformers_the_error_names_the_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingRequirementError, match="needs the package transformers") as caught:
        build(VitKnnConfig(checkpoint=str(checkpoint)), 64, 64)
    assert 'edge-anomaly[vit]"' in caught.value.hint


# The hub, played by a server on this machine


class Hub:
    """A server that answers as the Hugging Face hub does; `fault` is hash, cut or missing."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.fault = ""
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                hub.requests.append(self.path)
                name = self.path.rsplit("/", 1)[1]
                data = files.get(name)
                if data is None or hub.fault == "missing":
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = hashlib.sha256(data + b"!" * (hub.fault == "hash")).hexdigest()
                self.send_response(200)
                self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("ETag", f'"{content}"')
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if with_body:
                    whole = hub.fault != "cut" or not name.endswith(".safetensors")
                    self.wfile.write(data if whole else data[: len(data) // 2])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def use_hub(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do, which are read once, when the package is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({file.name: file.read_bytes() for file in checkpoint.iterdir()})
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    use_hub(hub.url, tmp_path / "cache", monkeypatch)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def test_a_checkpoint_is_downloaded_once_and_then_read_from_the_cache(
    hub: Hub, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build(VitKnnConfig(checkpoint="some/vit"), 64, 64)
    first, output = len(hub.requests), capfd.readouterr()
    build(VitKnnConfig(checkpoint="some/vit"), 64, 64)

    local = build(VitKnnConfig(checkpoint=str(checkpoint)), 64, 64)
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(hub.requests) == first > 0
    assert output.out == ""
    assert "downloading some/vit" in output.err


def test_the_default_checkpoint_is_pinned_to_a_commit(hub: Hub) -> None:
    build(VitKnnConfig(), 64, 64)

    asked = [path for path in hub.requests if "/resolve/" in path]
    assert all(
        path.startswith(f"/{DEFAULT_CHECKPOINT}/resolve/3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3/") for path in asked
    )


@pytest.mark.parametrize(("fault", "text"), [("hash", "SHA-256"), ("cut", "some/vit"), ("missing", "404")])
def test_a_download_that_fails_is_a_missing_requirement(hub: Hub, fault: str, text: str) -> None:
    hub.fault = fault

    with pytest.raises(MissingRequirementError, match=text) as caught:
        build(VitKnnConfig(checkpoint="some/vit"), 64, 64)
    assert caught.value.hint

    hub.fault = ""
    for file in Path(hub_cache()).rglob("blobs/*"):
        file.unlink()
    build(VitKnnConfig(checkpoint="some/vit"), 64, 64)


def hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def test_a_hub_that_cannot_be_reached_fails_at_once_and_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    use_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setattr("time.sleep", waits.append)

    with pytest.raises(MissingRequirementError, match="google/vit-base-patch16-224") as caught:
        build(VitKnnConfig(), 224, 224)

    assert "--weights PATH" in caught.value.hint
    assert "edge-anomaly train patchcore --backbone efficientnet_lite0" in caught.value.hint
    assert waits == []
