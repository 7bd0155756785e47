"""From a URI to a running reader, and what is said when its back-end is not there."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream import source_test, sources, uri
from edge_anomaly_runtime.stream.sources import reader_for, source_maker
from edge_anomaly_runtime.stream.uri import parse_source


@pytest.mark.parametrize("module", [uri, sources, source_test])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    outcome = doctest.testmod(module)  # type: ignore[arg-type]

    assert outcome.attempted > 0 and outcome.failed == 0


def test_a_folder_becomes_a_reader_that_names_its_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), (90, 90, 90)).save(tmp_path / name)

    with reader_for(parse_source(str(tmp_path)), camera="line 1") as reader:
        frames = [reader.take(5.0), reader.take(5.0)]

    assert [Path(frame.path).name for frame in frames if frame is not None] == ["a.png", "b.png"]
    assert reader.camera == "line 1"


def test_identical_images_of_a_folder_are_not_a_frozen_camera(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (20, 20), (90, 90, 90)).save(tmp_path / f"{number:02}.png")

    with reader_for(parse_source(str(tmp_path))) as reader:
        invalid = [frame.invalid for frame in (reader.take(5.0) for _ in range(12)) if frame is not None]

    assert invalid == [""] * 12


def test_a_synthetic_camera_that_loses_its_connection_goes_on_with_new_pictures() -> None:
    source = parse_source("test://moving?fps=50&size=64x48&lost_at=5")
    with reader_for(source) as reader:
        times = [frame.pts for frame in (reader.take(1.0) for _ in range(12)) if frame is not None]
        assert reader.status().reconnects >= 1

    assert times == sorted(set(times), key=lambda pts: pts or 0.0)


@pytest.mark.parametrize("text", ["test://moving", "v4l2:///dev/video0", "csi://0"])
def test_hardware_decoding_is_for_network_cameras(text: str) -> None:
    with pytest.raises(UsageError, match="--decoder nvdec"):
        source_maker(parse_source(text), decoder="nvdec")


def test_without_pyav_the_extra_is_named_and_everything_else_works() -> None:
    code = """
import sys
sys.modules["av"] = None
from edge_anomaly_runtime.errors import MissingRequirementError
from edge_anomaly_runtime.stream.sources import reader_for
from edge_anomaly_runtime.stream.uri import parse_source
with reader_for(parse_source("test://moving?fps=0&count=1")) as reader:
    print(reader.take(5.0).seq)
try:
    reader_for(parse_source("rtsp://admin:Kan4rie-7@cam/live"))
except MissingRequirementError as error:
    print(error)
print(sorted({"torch", "cv2", "onnx"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "0"
    assert 'pip install "edge-anomaly[video]"' in done.stdout and done.stdout.splitlines()[-1] == "[]"
