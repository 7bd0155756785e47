"""Data sets: MVTec-style folders, a plain folder of normal images, and the solar cells of the package elpv-dataset."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_anomaly_runtime.errors import UsageError, missing_extra
from edge_anomaly_runtime.images import SUFFIXES, list_images

GOOD = "good"
DEFECT = "defect"
UNSURE = "unsure"  # labelled by people who were not sure: reported, but part of no figure

NAMED = {"elpv": "mono", "elpv-mono": "mono", "elpv-poly": "poly"}
_ELPV_TRAIN_SHARE = 0.6
_ELPV_LICENCE = "ELPV images: CC BY-NC-SA 4.0 (Deitsch et al. 2019), evaluation only"


@dataclass(frozen=True)
class Item:
    """One image with its label: `good`, `unsure`, or the kind of defect; a mask where there is one."""

    path: Path
    label: str = GOOD
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Normal images to learn from, labelled images to judge by (possibly none), and what must be said about them."""

    name: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    note: str = ""

    def summary(self) -> dict[str, object]:
        """Return the counts for a run's record."""
        return {
            "name": self.name,
            "train": len(self.train),
            "test": dict(Counter(item.label for item in self.test)),
            "note": self.note,
        }


def open_dataset(source: str, *, seed: int = 0) -> Dataset:
    """Return the data set that `source` names: a folder, or one of `elpv`, `elpv-mono`, `elpv-poly`.

    A folder with `train/good` is read in MVTec's layout (`test/<defect>`, `ground_truth/<defect>/<name>_mask.png`);
    any other folder holds normal images only. `seed` splits the named data sets, which have no split of their own.

    Raises:
        UsageError: there is no such folder, or no normal image in it.
    """
    if source in NAMED and not Path(source).is_dir():
        return open_elpv(NAMED[source], seed=seed)
    root = Path(source)
    if not root.is_dir():
        raise UsageError(
            f"There is no data folder {source}.",
            f"Give a folder with normal images, a folder with train/good, or one of: {', '.join(NAMED)}.",
        )
    if (root / "train").is_dir() or (root / "test").is_dir():
        return _open_mvtec(root)
    return Dataset(root.resolve().name, tuple(Item(path) for path in list_images([root])), ())


def _open_mvtec(root: Path) -> Dataset:
    good = root / "train" / GOOD
    train = [Item(path) for path in _images_in(good)]
    if not train:
        raise UsageError(
            f"There are no normal images in {good}.", f"Put them there; read are {', '.join(sorted(SUFFIXES))}."
        )
    test = [
        Item(path, folder.name, _mask_of(root, folder.name, path))
        for folder in sorted((root / "test").glob("*/"))
        for path in _images_in(folder)
    ]
    return Dataset(root.resolve().name, tuple(train), tuple(test))


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _mask_of(root: Path, label: str, image: Path) -> Path | None:
    folder = root / "ground_truth" / label
    candidates = (folder / f"{image.stem}_mask.png", folder / f"{image.stem}.png", folder / image.name)
    return next((path for path in candidates if path.exists()), None)


def open_elpv(cells: str, *, seed: int = 0) -> Dataset:
    """Return the solar cells of one kind, `mono` or `poly` (Buerhop-Lutz et al. 2018, Deitsch et al. 2019).

    60 % of the cells with defect probability 0 are the training set; the others and the cells with probability 1 are
    the test set; cells with 1/3 and 2/3 are `unsure`. The labels name no module, so a random split mixes cells of one
    module into both sides, which flatters every method.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise missing_extra("The data set elpv", "elpv-dataset", "elpv")
    folder = Path(spec.origin).parent / "data"
    normal: list[Item] = []
    others: list[Item] = []
    for path, probability, kind in _elpv_rows(folder / "labels.csv"):
        if kind != cells:
            continue
        if probability == 0:
            normal.append(Item(folder / path))
        else:
            others.append(Item(folder / path, DEFECT if probability == 1 else UNSURE))
    order = np.random.default_rng(seed).permutation(len(normal))
    cut = int(_ELPV_TRAIN_SHARE * len(normal))
    train = tuple(normal[index] for index in sorted(order[:cut]))
    held = tuple(normal[index] for index in sorted(order[cut:]))
    return Dataset(f"elpv-{cells}", train, (*held, *others), _ELPV_LICENCE)


def _elpv_rows(labels: Path) -> list[tuple[str, float, str]]:
    """Read lines such as `images/cell0001.png  1.0   mono`."""
    with open(labels) as file:
        rows = [line.split() for line in file if line.strip()]
    return [(path, round(float(probability), 2), kind) for path, probability, kind in rows]


def split_holdout(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split normal images by seed into those to fit on and those to set thresholds from, both in file order.

    Raises:
        UsageError: the share is not between 0 and 1, or one of the two parts would be empty.
    """
    if not 0 < share < 1:
        raise UsageError(f"--holdout {share:g} is not possible.", "Give a share between 0 and 1, for instance 0.2.")
    count = round(share * len(items))
    if count < 1 or count >= len(items):
        raise UsageError(
            f"{len(items)} normal images cannot be split: {count} would be held out to set the thresholds.",
            "Give more images: 20 at the least, 100 or more for thresholds that mean something.",
        )
    order = np.random.default_rng(seed).permutation(len(items))
    held = set(order[:count].tolist())
    fit = [item for index, item in enumerate(items) if index not in held]
    return fit, [items[index] for index in sorted(held)]
