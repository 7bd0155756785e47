"""The workstation's commands as a user types them: exit codes, messages, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from edge_anomaly.cli import main


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported torch already; `run_process` is the real thing."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = Path.cwd()
    os.chdir(cwd or before)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["edge-anomaly", *arguments]),
            mock.patch.dict(os.environ, environment),
            pytest.raises(SystemExit) as ending,
        ):
            main()
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, int(ending.value.code or 0), out.getvalue(), err.getvalue())


def run_process(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_anomaly", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=900,  # the demo takes two minutes, more on a busy machine
    )


def images_in(folder: Path, count: int, *, readable: bool = True) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index:03}.png"
        if readable:
            pixels = np.random.default_rng(index).integers(80, 120, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(b"\x89PNG but no picture")
    return folder


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


TRAIN = ("train", "padim", "--backbone", "efficientnet_lite0", "--size", "32", "--dims", "8")


@pytest.mark.parametrize(
    ("count", "readable", "text"),
    [
        (-1, True, "no data folder"),
        (0, True, "No image files"),
        (30, False, "None of the 24 images could be read"),
        (1, True, "1 normal"),
    ],
    ids=["missing", "empty", "only unreadable", "one image"],
)
def test_unusable_data_ends_with_2_and_leaves_nothing(tmp_path: Path, count: int, readable: bool, text: str) -> None:
    data = tmp_path / "data"
    if count >= 0:
        images_in(data, count, readable=readable)
    done = run(*TRAIN, "--data", str(data), "--out", str(tmp_path / "run"))

    assert_refused(done, 2, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["data"] if count >= 0 else [])


def test_mvtec_folder_without_good_images_ends_with_2(tmp_path: Path) -> None:
    images_in(tmp_path / "data/test/hole", 3)
    (tmp_path / "data/train/good").mkdir(parents=True)

    assert_refused(run(*TRAIN, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")), 2, "train/good")


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("train", "padimm", "--data", ".", "--out", "r"), "'padim'"),
        (("train", "padim", "--data", ".", "--out", "r", "--backbone", "resnet_18"), "'resnet18'"),
        (("export", "run", "--target", "openvin"), "'openvino'"),
        (("export", "run", "--precision", "int9"), "'int8'"),
    ],
)
def test_unknown_names_end_with_2_and_the_nearest(arguments: tuple[str, ...], near: str, tmp_path: Path) -> None:
    assert_refused(run(*arguments, cwd=tmp_path), 2, f"Did you mean {near}")


def test_unreachable_weights_end_with_3_and_both_ways_out(tmp_path: Path) -> None:
    data = images_in(tmp_path / "data", 30)
    # A proxy that refuses: the download fails at once, wherever the test runs.
    proxy = "http://127.0.0.1:9"
    done = run(
        *("train", "padim", "--data", str(data), "--out", str(tmp_path / "run"), "--backbone", "resnet18"),
        https_proxy=proxy,
        HTTPS_PROXY=proxy,
        no_proxy="",
        NO_PROXY="",
        TORCH_HOME=str(tmp_path),
    )

    assert_refused(done, 3, "resnet18", "--weights PATH", "--backbone efficientnet_lite0")
    assert not (tmp_path / "run").exists()


def test_roi_that_is_no_roi_ends_with_2(tmp_path: Path) -> None:
    for roi in ("0,0,1", "a,b,c,d", "0.5,0,0.2,1"):
        done = run(*TRAIN, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--roi", roi)
        assert_refused(done, 2, "0.1,0.1,0.9,0.9")


@pytest.mark.parametrize(("blocks", "text"), [("many", "'many' is not a number"), ("0", "0 blocks")])
def test_a_student_without_blocks_ends_with_2(blocks: str, text: str, tmp_path: Path) -> None:
    done = run("train", "stpm", "--data", "sample", "--out", str(tmp_path / "run"), "--student-blocks", blocks)
    assert_refused(done, 2, text)


def test_export_without_training_images_ends_with_2(tmp_path: Path) -> None:
    data = images_in(tmp_path / "data", 30)
    assert run(*TRAIN, "--data", str(data), "--out", str(tmp_path / "run")).returncode == 0
    run_record = json.loads((tmp_path / "run/run.json").read_text())
    for path in run_record["fit"]:
        Path(path).unlink()

    done = run("export", str(tmp_path / "run"), "--precision", "int8", "--out", str(tmp_path / "part.eab"))

    assert_refused(done, 2, "int8 needs calibration images", "--precision fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_existing_output_ends_with_2_for_every_writer(tmp_path: Path, run_folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for command in (
        ("sample-data", str(out)),
        (*TRAIN, "--data", "elpv-mono", "--out", str(out)),
        ("export", str(run_folder), "--out", str(out)),
        ("demo", "--out", str(out)),
    ):
        assert_refused(run(*command), 2, str(out), "--force")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_ends_with_2(tmp_path: Path, run_folder: Path) -> None:
    """A file where a folder should be: refused for root as well, unlike missing permissions."""
    (tmp_path / "file").write_text("")
    for command in (("sample-data",), (*TRAIN, "--data", "elpv-mono", "--out"), ("export", str(run_folder), "--out")):
        assert_refused(run(*command, str(tmp_path / "file/out")), 2, str(tmp_path / "file"))


def test_unfinished_run_ends_with_4(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    assert_refused(run("export", str(tmp_path / "run"), "--out", str(tmp_path / "x.eab")), 4, "not a finished run")


def test_export_takes_the_newest_run_by_default_and_says_when_there_is_none(tmp_path: Path) -> None:
    assert_refused(run("export", cwd=tmp_path), 2, "no finished run")


def test_evaluate_prints_figures_and_json(bundle_folder: Path, sample_folder: Path) -> None:
    command = ("evaluate", str(bundle_folder), "--data", str(sample_folder), "--engine", "onnxruntime")
    table, parsed = run_process(*command), run(*command, "--json")

    figures = json.loads(parsed.stdout)
    assert figures["schema"] == "edge-anomaly.evaluation/1"
    assert figures["scored_by"] == "onnxruntime int8"
    assert f"image AUROC      {figures['image']['auroc']:.4f}" in table.stdout
    assert "missing_part" in table.stdout


def test_environment_sets_options(tmp_path: Path) -> None:
    done = run("sample-data", str(tmp_path / "x"), "--size", "64", EDGE_ANOMALY_SAMPLE_DATA_TRAIN_IMAGES="2")

    assert done.returncode == 0
    assert len(list((tmp_path / "x/train/good").iterdir())) == 2


def test_json_goes_to_stdout_and_words_to_stderr(tmp_path: Path) -> None:
    done = run(
        *("sample-data", str(tmp_path / "x"), "--train", "1", "--test-good", "0", "--per-defect", "0"),
        *("--size", "64", "--json"),
    )

    assert json.loads(done.stdout)["counts"]["train/good"] == 1
    assert "1 images" in done.stderr


@pytest.mark.slow
def test_demo_runs_through_and_keeps_its_promises(tmp_path: Path) -> None:
    done = run_process("demo", "--out", str(tmp_path / "demo"), "--json")

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    fp32, int8 = (summary["figures"][f"openvino/{precision}"] for precision in ("fp32", "int8"))
    assert fp32["image"]["auroc"] > 0.95
    assert int8["image"]["auroc"] > fp32["image"]["auroc"] - 0.005
    assert int8["pixel"]["auroc"] > 0.95
    assert int8["pixel"]["aupro"] > 0.85
    page = (tmp_path / "demo/index.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert len(list((tmp_path / "demo/overlays").iterdir())) >= 8


@pytest.mark.parametrize("verb", ["train", "export", "sample-data"])
def test_full_disk_ends_with_70_names_the_path_and_leaves_nothing(tmp_path: Path, run_folder: Path, verb: str) -> None:
    """A limit on the size of a file stands in for a full disk: the write fails half-way in the same place."""
    out = tmp_path / "out"
    data = images_in(tmp_path / "data", 30)
    arguments = {
        "train": [*TRAIN, "--data", str(data), "--out", str(out)],
        "export": ["export", str(run_folder), "--precision", "fp32", "--target", "onnx", "--out", str(out)],
        "sample-data": ["sample-data", str(out), "--train", "1"],
    }[verb]
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = ["edge-anomaly", *{arguments!r}]
from edge_anomaly.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)

    assert_refused(done, 70, f"Cannot write {out}", "nothing half-written")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
