from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edge_anomaly.data import DEFECT, GOOD, UNSURE, Item, open_dataset, split_holdout
from edge_anomaly_runtime.errors import UsageError


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path)
    return path


def test_mvtec_folder_gives_train_test_and_masks(tmp_path: Path) -> None:
    root = tmp_path / "bottle"
    write_image(root / "train/good/000.png")
    write_image(root / "test/good/000.png")
    write_image(root / "test/broken/000.png")
    mask = write_image(root / "ground_truth/broken/000_mask.png")

    dataset = open_dataset(str(root))

    assert dataset.name == "bottle"
    assert dataset.train == (Item(root / "train/good/000.png"),)
    assert dataset.test == (
        Item(root / "test/broken/000.png", "broken", mask),
        Item(root / "test/good/000.png", GOOD, None),
    )
    assert dataset.summary()["test"] == {"broken": 1, "good": 1}


def test_plain_folder_holds_normal_images_only(tmp_path: Path) -> None:
    write_image(tmp_path / "b.jpg")
    write_image(tmp_path / "more/a.png")
    (tmp_path / "notes.txt").write_text("no image")

    dataset = open_dataset(str(tmp_path))

    assert [item.path.name for item in dataset.train] == ["b.jpg", "a.png"]
    assert dataset.test == ()


@pytest.mark.parametrize("kind", ["missing", "empty", "no normal images"])
def test_folder_without_normal_images_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    if kind != "missing":
        root.mkdir()
    if kind == "no normal images":
        write_image(root / "test/broken/000.png")
    with pytest.raises(UsageError, match="data"):
        open_dataset(str(root))


def test_elpv_counts_are_the_published_ones() -> None:
    mono, poly = open_dataset("elpv-mono"), open_dataset("elpv-poly")

    assert (len(mono.train), len(poly.train)) == (352, 552)  # 60 % of 588 and 920
    assert mono.summary()["test"] == {GOOD: 236, DEFECT: 313, UNSURE: 117 + 56}
    assert poly.summary()["test"] == {GOOD: 368, DEFECT: 402, UNSURE: 178 + 50}
    assert "CC BY-NC-SA" in mono.note


def test_elpv_split_depends_on_the_seed_and_never_overlaps() -> None:
    first, again, other = (open_dataset("elpv-mono", seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert first.train != other.train
    assert not {item.path for item in first.train} & {item.path for item in first.test}


def test_holdout_is_disjoint_complete_seeded_and_of_the_right_size() -> None:
    items = [Item(Path(f"{index}.png")) for index in range(50)]

    fit, held = split_holdout(items, 0.2, seed=3)

    assert (len(fit), len(held)) == (40, 10)
    assert sorted([*fit, *held], key=lambda item: int(item.path.stem)) == items
    assert (fit, held) == split_holdout(items, 0.2, seed=3)
    assert held != split_holdout(items, 0.2, seed=4)[1]


@pytest.mark.parametrize(("count", "share"), [(1, 0.2), (2, 0.2), (10, 0.0), (10, 1.0), (10, -0.5), (10, 0.99)])
def test_impossible_holdout_is_refused_with_its_numbers(count: int, share: float) -> None:
    items = [Item(Path(f"{index}.png")) for index in range(count)]
    with pytest.raises(UsageError, match=rf"{count}|{share:g}"):
        split_holdout(items, share, seed=0)
