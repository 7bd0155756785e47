"""A bundle is read when every byte is as it was written, and refused otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_anomaly_runtime.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    SCHEMA,
    Bundle,
    digest_line,
    file_entry,
    manifest_bytes,
    read_bundle,
)
from edge_anomaly_runtime.errors import ArtefactError, UsageError

Json = dict[str, Any]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.eab"))


def _sign(bundle: Path, manifest: bytes) -> None:
    """Write a manifest together with the digest that fits it, as somebody with bad intentions would."""
    (bundle / MANIFEST).write_bytes(manifest)
    (bundle / MANIFEST_DIGEST).write_bytes(digest_line(manifest))


def _edit(bundle: Path, edit: Callable[[Json], None]) -> None:
    manifest: Json = json.loads((bundle / MANIFEST).read_text())
    edit(manifest)
    _sign(bundle, json.dumps(manifest).encode())


def _refusal(bundle: Path) -> ArtefactError:
    with pytest.raises(ArtefactError) as caught:
        read_bundle(bundle)
    assert caught.value.hint
    return caught.value


# Whole bundles


def test_a_bundle_is_read_with_every_file_checked(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    manifest = bundle.manifest
    assert manifest.schema_ == SCHEMA == "edge-anomaly.bundle/1"
    assert manifest.precision == "int8"
    assert manifest.input.shape == (1, 128, 128, 3)
    on_disk = {path.relative_to(bundle_folder).as_posix() for path in bundle_folder.rglob("*") if path.is_file()}
    assert on_disk == {*manifest.files, MANIFEST, MANIFEST_DIGEST}
    for engine in ("openvino", "onnxruntime"):
        for precision in ("fp32", "int8"):
            assert bundle.graph(engine, precision) in manifest.files


def test_a_path_may_be_a_string_a_relative_path_or_a_link_to_the_bundle(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_bundle(str(copy)).manifest.name == "tiny"
    monkeypatch.chdir(copy.parent)
    assert read_bundle("copy.eab").manifest.name == "tiny"
    Path("active.eab").symlink_to("copy.eab")  # how an installation switches bundles
    assert read_bundle("active.eab").manifest.name == "tiny"


def test_the_digest_is_in_the_form_that_sha256sum_reads() -> None:
    assert digest_line(b"abc") == (b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  manifest.json\n")


def test_file_entry_holds_size_and_digest() -> None:
    entry = file_entry(b"abc")
    assert (entry.size, entry.sha256[:8]) == (3, "ba7816bf")


def test_a_manifest_survives_writing_and_reading(copy: Path) -> None:
    manifest = read_bundle(copy).manifest
    assert manifest_bytes(manifest) == (copy / MANIFEST).read_bytes()
    _sign(copy, manifest_bytes(manifest))
    assert read_bundle(copy).manifest == manifest


# Damage to files


class Flipper:
    """Changes one byte in place, and puts it back."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())

    def is_refused(self, seed: int) -> bool:
        rng = np.random.default_rng(seed)
        # In turn, so that the small files are hit as often as the large ones.
        name = self.names[seed % len(self.names)]
        offset = int(rng.integers(0, (self.bundle / name).stat().st_size))
        with open(self.bundle / name, "r+b") as file:
            file.seek(offset)
            before = file.read(1)[0]
            self._put(file, offset, before ^ int(rng.integers(1, 256)))
            try:
                read_bundle(self.bundle)
            except ArtefactError as error:
                named = MANIFEST if name == MANIFEST_DIGEST else name
                return named in error.what
            finally:
                self._put(file, offset, before)
        return False

    @staticmethod
    def _put(file: Any, offset: int, value: int) -> None:
        file.seek(offset)
        file.write(bytes([value]))
        file.flush()


def test_one_changed_byte_anywhere_is_refused_and_the_file_named(bundle_folder: Path, tmp_path: Path) -> None:
    flipper = Flipper(Path(shutil.copytree(bundle_folder, tmp_path / "copy.eab")))
    assert {MANIFEST, MANIFEST_DIGEST, "model.onnx", "openvino/model.bin", "golden/000.png"} <= set(flipper.names)
    accepted = [seed for seed in range(300) if not flipper.is_refused(seed)]
    assert accepted == []
    read_bundle(flipper.bundle)  # all bytes are back: it was the flips that were refused


def test_every_byte_of_manifest_and_digest_counts(copy: Path) -> None:
    for name in (MANIFEST, MANIFEST_DIGEST):
        data = (copy / name).read_bytes()
        for offset in range(0, len(data), 1 + len(data) // 200):
            (copy / name).write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
            _refusal(copy)
        (copy / name).write_bytes(data)
    read_bundle(copy)


FILES = ["model.onnx", "golden/maps.npz", "golden/050.png", MANIFEST, MANIFEST_DIGEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="one byte short"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data + b"\n", id="one byte more"),
        pytest.param(lambda data: bytes(len(data)), id="zeros, as after a power cut"),
    ],
)
def test_damaged_files_are_refused(copy: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    assert name.removesuffix(".sha256") in _refusal(copy).what


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert name in _refusal(copy).what
    if name not in (MANIFEST, MANIFEST_DIGEST):
        assert "is missing" in _refusal(copy).what


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "golden/extra.png", "model.onnx.bak", "new/extra.bin"])
def test_extra_files_are_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    assert repr(name) in _refusal(copy).what


def test_an_extra_link_to_a_folder_is_refused(copy: Path) -> None:
    (copy / "more").symlink_to(copy.parent)
    assert "'more'" in _refusal(copy).what


def test_swapped_files_are_refused(copy: Path) -> None:
    first, second = copy / "golden/050.png", copy / "golden/150.png"
    assert first.stat().st_size == second.stat().st_size
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    assert "golden/050.png is damaged: its SHA-256" in _refusal(copy).what


@pytest.mark.parametrize("name", ["model.onnx", "golden", MANIFEST, MANIFEST_DIGEST])
def test_links_are_refused_even_to_the_right_content(copy: Path, name: str) -> None:
    outside = copy.parent / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    _refusal(copy)


def test_special_files_and_folders_in_place_of_files_are_refused(copy: Path) -> None:
    (copy / "model.onnx").unlink()
    os.mkfifo(copy / "model.onnx")
    assert "special file" in _refusal(copy).what
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    assert "model.onnx" in _refusal(copy).what


@pytest.mark.parametrize("name", ["file.eab", "empty.eab"])
def test_what_is_not_a_bundle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.eab").write_bytes(b"PK\3\4")
    (tmp_path / "empty.eab").mkdir()
    assert name in _refusal(tmp_path / name).what


def test_a_bundle_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.eab") as caught:
        read_bundle(tmp_path / "absent.eab")
    assert "edge-anomaly export" in caught.value.hint


# Manifests that fit their digest and are wrong all the same


@pytest.mark.parametrize("schema", ["edge-anomaly.bundle/2", "edge-anomaly.run/1", None, 1, "\ud800"])
def test_another_schema_is_refused_and_both_are_named(copy: Path, schema: object) -> None:
    _edit(copy, lambda manifest: manifest.update(schema=schema))
    error = _refusal(copy)
    assert repr(schema) in error.what
    assert "'edge-anomaly.bundle/1'" in error.what
    assert "Install" in error.hint


def test_a_newer_schema_is_refused_for_its_schema_and_not_for_what_else_is_new(copy: Path) -> None:
    _sign(copy, b'{"schema": "edge-anomaly.bundle/2", "graphs": []}')
    assert "'edge-anomaly.bundle/2'" in _refusal(copy).what


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b"\xff\xfe\xfd", id="not text"),
        pytest.param(b'{"schema": "edge-anomaly.bundle/1"}', id="nothing but the schema"),
        pytest.param(b'{"schema": ' + b"9" * 5000 + b"}", id="a number of 5000 digits"),
        pytest.param(b'{"schema": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", id="50000 brackets deep"),
    ],
)
def test_manifests_that_are_not_manifests_are_refused(copy: Path, manifest: bytes) -> None:
    _sign(copy, manifest)
    assert str(copy) in _refusal(copy).what


def test_a_manifest_of_more_than_a_quarter_of_a_megabyte_is_refused(copy: Path) -> None:
    _edit(copy, _set("training", "note", to="x" * 200_000))
    read_bundle(copy)
    _edit(copy, _set("training", "note", to="x" * 300_000))
    assert "more than 262144" in _refusal(copy).what


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("place", ['"value": ', '"dims": '])
def test_numbers_that_are_none_are_refused(copy: Path, number: str, place: str) -> None:
    text = (copy / MANIFEST).read_text().replace(": ", ":").replace(":", ": ")
    assert place in text
    _sign(copy, text.replace(place, f'{place}{number}, "x": ', 1).encode())
    assert f"{number} is not a number" in _refusal(copy).what


def test_a_threshold_too_large_for_a_float_is_refused(copy: Path) -> None:
    text = json.dumps(json.loads((copy / MANIFEST).read_text()))
    _sign(copy, text.replace('"value": 200.0', '"value": 1e999', 1).encode())
    assert "1e999 is not a number" in _refusal(copy).what


@pytest.mark.parametrize("key", ["schema", "files", "thresholds"])
def test_keys_that_stand_twice_are_refused(copy: Path, key: str) -> None:
    manifest: Json = json.loads((copy / MANIFEST).read_text())
    text = json.dumps(manifest)
    _sign(copy, f"{text[:-1]}, {json.dumps(key)}: {json.dumps(manifest[key])}}}".encode())
    assert "stands twice" in _refusal(copy).what


def test_keys_that_stand_twice_inside_are_refused(copy: Path) -> None:
    text = json.dumps(json.loads((copy / MANIFEST).read_text()))
    _sign(copy, text.replace('"alpha"', '"alpha": 0.5, "alpha"', 1).encode())
    assert "stands twice" in _refusal(copy).what


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "golden/../../x",
        "a/b/c",
        "..",
        ".",
        "",
        "golden//x",
        "golden/",
        ".hidden",
        "a\\b",
        "a b",
        "a\0",
        "a\n",
        "ä.png",
        "x" * 65,
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(copy: Path, name: str) -> None:
    _edit(copy, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    assert f"names a file {name!r}" in _refusal(copy).what


def _set(*path: str | int, to: object) -> Callable[[Json], None]:
    def edit(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        pytest.param(_set("graphs", "openvino/fp32", to="other.onnx"), "other.onnx", id="graph"),
        pytest.param(_set("golden", 0, "file", to="golden/999.png"), "golden/999.png", id="golden image"),
        pytest.param(_set("graphs", "openvino/int8", to="golden/ir.xml"), "golden/ir", id="IR"),
    ],
)
def test_references_to_files_that_are_not_in_the_bundle_are_refused(
    copy: Path, edit: Callable[[Json], None], named: str
) -> None:
    (copy / "golden/ir.xml").write_bytes(b"<net/>")  # has no .bin beside it

    def change(manifest: Json) -> None:
        manifest["files"]["golden/ir.xml"] = file_entry(b"<net/>").model_dump()
        edit(manifest)

    _edit(copy, change)
    assert named in _refusal(copy).what


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_set("files", "model.onnx", "size", to=-1), id="negative size"),
        pytest.param(_set("files", "model.onnx", "sha256", to="0" * 63), id="short digest"),
        pytest.param(_set("files", "model.onnx", "sha256", to="G" * 64), id="digest that is no number"),
        pytest.param(_set("precision", to="int4"), id="unknown precision"),
        pytest.param(_set("input", "layout", to="NCHW"), id="another layout"),
        pytest.param(_set("input", "color", to="BGR"), id="another order of colours"),
        pytest.param(_set("input", "dtype", to="float32"), id="another type"),
        pytest.param(_set("input", "shape", to=[1, 16, 16]), id="three dimensions"),
        pytest.param(_set("input", "preprocess", "policy", to="zoom"), id="unknown resize policy"),
        pytest.param(_set("input", "preprocess", "height", to=1), id="input of one row"),
        pytest.param(_set("input", "preprocess", "version", to=3), id="newer preprocessing"),
        pytest.param(_set("input", "preprocess", "roi", to=[0, 0, 2, 1]), id="region outside"),
        pytest.param(_set("thresholds", "openvino/fp32", to={}), id="no threshold"),
        pytest.param(_set("thresholds", "openvino/fp32", "fail", "value", to="high"), id="threshold that is no number"),
        pytest.param(_set("seq", to=-1), id="negative sequence number"),
        pytest.param(_set("name", to=None), id="no name"),
    ],
)
def test_values_outside_the_contract_are_refused(copy: Path, edit: Callable[[Json], None]) -> None:
    _edit(copy, edit)
    assert "not a valid manifest" in _refusal(copy).what


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("input",),
        ("model",),
        ("model", "parameters"),
        ("outputs", 0),
        ("thresholds", "openvino/int8"),
        ("thresholds", "openvino/int8", "fail"),
        ("golden", 1),
        ("files", "model.onnx"),
    ],
)
def test_unknown_fields_are_kept(copy: Path, path: tuple[str | int, ...]) -> None:
    _edit(copy, _set(*path, "novel", to={"since": [1, 2]}))
    manifest: Any = json.loads(manifest_bytes(read_bundle(copy).manifest))
    for key in path:
        manifest = manifest[key]
    assert manifest["novel"] == {"since": [1, 2]}


def test_an_unknown_field_of_the_preprocessing_is_kept_or_refused_but_not_dropped(copy: Path) -> None:
    _edit(copy, _set("input", "preprocess", "novel", to="gamma"))
    try:
        manifest = read_bundle(copy).manifest
    except ArtefactError as error:
        assert "novel" in error.what
    else:
        assert b'"novel"' in manifest_bytes(manifest)


# Reading files


def test_a_graph_that_is_not_there_is_a_usage_error_that_says_what_is(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    with pytest.raises(UsageError, match="no graph and thresholds for openvino/fp16") as caught:
        bundle.graph("openvino", "fp16")
    assert "openvino/fp32, openvino/int8, onnxruntime/fp32, onnxruntime/int8" in caught.value.what
    assert "--precision fp16" in caught.value.hint


def test_a_graph_without_thresholds_does_not_count(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    only_float = {"openvino/fp32": bundle.manifest.thresholds["openvino/fp32"]}
    bundle = Bundle(bundle.path, bundle.manifest.model_copy(update={"thresholds": only_float}))
    assert bundle.graph("openvino", "fp32") == "model.onnx"
    with pytest.raises(UsageError):
        bundle.graph("openvino", "int8")


def test_files_are_checked_again_when_they_are_used(copy: Path) -> None:
    bundle = read_bundle(copy)
    data = (copy / "model.onnx").read_bytes()
    assert bundle.read("model.onnx") == data
    assert hashlib.sha256(data).hexdigest() == bundle.manifest.files["model.onnx"].sha256
    (copy / "model.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"model\.onnx is damaged: its SHA-256"):
        bundle.read("model.onnx")
    (copy / "model.onnx").write_bytes(data + b"x")
    with pytest.raises(ArtefactError, match=f"{len(data) + 1} bytes, the manifest says {len(data)}"):
        bundle.read("model.onnx")
    (copy / "model.onnx").unlink()
    with pytest.raises(ArtefactError, match="Cannot read"):
        bundle.read("model.onnx")
    (copy / "model.onnx").symlink_to(copy.parent / "elsewhere")
    with pytest.raises(ArtefactError, match="link"):
        bundle.read("model.onnx")
    (copy / "golden").rename(copy.parent / "golden")
    (copy / "golden").symlink_to(copy.parent / "golden")
    with pytest.raises(ArtefactError, match="link"):
        bundle.read("golden/050.png")


def test_golden_maps_are_read_by_engine_and_precision(tiny_bundle: Path) -> None:
    maps = read_bundle(tiny_bundle).golden_maps()
    assert sorted(maps) == ["onnxruntime/fp32", "onnxruntime/int8", "openvino/fp32", "openvino/int8"]
    assert maps["openvino/int8"].dtype == np.float32
    assert maps["openvino/int8"][:, 0, 0].tolist() == [50.0, 150.0, 220.0]


def test_golden_maps_of_a_real_bundle_fit_its_images(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    for key, maps in bundle.golden_maps().items():
        assert maps.shape == (len(bundle.manifest.golden), 16, 16)
        scores = [golden.scores[key] for golden in bundle.manifest.golden]
        assert maps.max(axis=(1, 2)).tolist() == pytest.approx(scores, rel=1e-5)
