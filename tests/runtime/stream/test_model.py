"""The model in use and how it is exchanged: on real bundles and a real engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_anomaly_runtime import store
from edge_anomaly_runtime.errors import ArtefactError, GateError, UsageError
from edge_anomaly_runtime.store import Gate
from edge_anomaly_runtime.stream.model import EngineChoice, ModelSlot, engine_threads, load_model

from .scored_items import wait_until

CPU = EngineChoice("onnxruntime", "fp32", 1)
MakeBundle = Callable[..., Path]

GATE = Gate(engine="onnxruntime", precision="fp32", threads=1)


@pytest.fixture
def root(make_bundle: MakeBundle, tmp_path: Path) -> Path:
    """A store with version 1 in use and proved, and version 2 installed."""
    folder = tmp_path / "store"
    for seq in (1, 2):
        store.install_bundle(folder, make_bundle(seq), gate=GATE)
    activate(folder, 1)
    store.commit_current(folder, version(folder, 1))
    return folder


@pytest.fixture
def slot(root: Path) -> Iterator[ModelSlot]:
    with_store = ModelSlot(CPU, store=root)
    yield with_store
    with_store.close(in_order=True)


def version(folder: Path, seq: int) -> str:
    return next(one.id for one in store.read_state(folder).versions if one.seq == seq)


def activate(folder: Path, seq: int) -> None:
    store.activate_bundle(folder, version(folder, seq), gate=GATE)


def seq_of(slot: ModelSlot) -> int:
    return slot.model.scorer.bundle.manifest.seq


def settle(slot: ModelSlot) -> None:
    """Look at the store until nothing is loading any more."""
    slot._looked_at = float("-inf")
    slot.look()
    wait_until(lambda: slot._next is not None or not slot.is_loading, 30)


@pytest.mark.parametrize(("cameras", "cpus", "threads"), [(0, 8, 8), (4, 8, 7), (4, 2, 2), (1, 1, 1)])
def test_one_cpu_is_left_to_the_cameras_where_there_are_more_than_two(cameras: int, cpus: int, threads: int) -> None:
    assert engine_threads(cameras, cpus) == threads


def test_a_model_is_named_by_its_manifest(tiny_bundle: Path) -> None:
    model = load_model(tiny_bundle, CPU, trial=False)
    digest = (tiny_bundle / "manifest.sha256").read_text()[:16]
    assert model.name == f"tiny@sha256:{digest}"
    assert model.sha256 == digest
    model.scorer.close()


def test_a_bundle_whose_golden_images_do_not_come_out_is_refused(make_bundle: MakeBundle) -> None:
    with pytest.raises(GateError, match="golden"):
        load_model(make_bundle(1, golden=55.0), CPU, trial=False)


def test_a_first_load_happens_in_a_child(make_bundle: MakeBundle) -> None:
    """The child's own words come back: it was there."""
    with pytest.raises(GateError):
        load_model(make_bundle(1, golden=55.0), CPU, trial=True)


def test_the_active_version_of_a_store_is_loaded(slot: ModelSlot) -> None:
    assert seq_of(slot) == 1


def test_an_activated_version_takes_over_between_two_frames(slot: ModelSlot, root: Path) -> None:
    activate(root, 2)
    settle(slot)
    assert seq_of(slot) == 1, "until the scoring thread takes it"
    replaced = slot.take_next()
    assert replaced is not None and replaced.scorer.bundle.manifest.seq == 1
    assert seq_of(slot) == 2
    assert slot.take_next() is None
    replaced.scorer.close()
    assert slot.model.scorer.score_image(np.full((16, 16, 3), 80, dtype=np.uint8)).score == pytest.approx(80)


def test_a_version_that_was_damaged_after_its_activation_never_runs(slot: ModelSlot, root: Path) -> None:
    activate(root, 2)
    (root / "versions" / version(root, 2) / "model.onnx").write_bytes(b"cut")
    settle(slot)
    assert slot.take_next() is None
    assert (seq_of(slot), slot.refused) == (1, 1)
    assert store.read_state(root).current == version(root, 1), "the store goes back to what runs"


def test_a_version_proves_itself(slot: ModelSlot, root: Path) -> None:
    activate(root, 2)
    settle(slot)
    assert slot.take_next() is not None
    assert store.read_state(root).probation == 1
    slot.commit()
    assert store.read_state(root).probation is None


def test_after_an_orderly_end_a_version_on_probation_starts_again(root: Path) -> None:
    activate(root, 2)
    ModelSlot(CPU, store=root).close(in_order=True)
    again = ModelSlot(CPU, store=root)
    assert seq_of(again) == 2
    again.close(in_order=False)  # as after a crash
    third = ModelSlot(CPU, store=root)
    assert seq_of(third) == 1
    third.close(in_order=True)


def test_a_bundle_folder_is_read_again_on_request_and_only_if_it_is_another(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "part.eab"
    shutil.copytree(make_bundle(1), folder)
    slot = ModelSlot(CPU, bundle=folder)
    slot.request_reload()
    wait_until(lambda: not slot.is_loading, 30)
    assert slot.take_next() is None
    shutil.rmtree(folder)
    shutil.copytree(make_bundle(2), folder)
    slot.request_reload()
    wait_until(lambda: slot._next is not None, 30)
    replaced = slot.take_next()
    assert replaced is not None
    replaced.scorer.close()
    assert seq_of(slot) == 2
    slot.close(in_order=True)


def test_a_half_written_folder_is_not_taken(make_bundle: MakeBundle, tmp_path: Path) -> None:
    folder = tmp_path / "part.eab"
    shutil.copytree(make_bundle(1), folder)
    slot = ModelSlot(CPU, bundle=folder)
    (folder / "manifest.json").write_text("{")
    slot.request_reload()
    wait_until(lambda: not slot.is_loading, 30)
    assert slot.refused == 1
    assert slot.take_next() is None
    slot.close(in_order=True)


def test_a_store_without_an_active_version_and_a_missing_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ModelSlot(CPU, store=tmp_path / "store")
    with pytest.raises((UsageError, ArtefactError)):
        ModelSlot(CPU, bundle=tmp_path / "part.eab")
