"""A classifier's run folder, read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_anomaly.runs import RECORD
from edge_anomaly.train_classifier import load_classifier
from edge_anomaly_runtime.errors import ArtefactError
from edge_anomaly_runtime.preprocess import Preprocess


@pytest.fixture
def run(classifier_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier_run, tmp_path / "run"))


def test_a_run_keeps_how_its_pictures_were_resized(run: Path) -> None:
    found, _ = load_classifier(run)
    side = found.config.image_size
    assert found.preprocess == Preprocess(side, side)


def test_a_run_without_a_record_of_it_was_made_with_version_1(run: Path) -> None:
    record = json.loads((run / RECORD).read_text())
    del record["preprocess"]
    (run / RECORD).write_text(json.dumps(record))
    assert load_classifier(run)[0].preprocess.version == 1


def test_a_damaged_record_is_refused(run: Path) -> None:
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({**record, "preprocess": {"height": 32}}))
    with pytest.raises(ArtefactError, match="is damaged"):
        load_classifier(run)
