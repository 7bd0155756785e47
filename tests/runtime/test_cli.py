"""The device's commands as scripts see them: standard output, standard error, exit codes, signals."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime import cli
from edge_anomaly_runtime.bundle import MANIFEST, MANIFEST_DIGEST, Threshold, digest_line, manifest_bytes, read_bundle

from .conftest import Run
from .stream.recorded import bundle_with_scores, normal_scores, stream_records, write_lines

COMMANDS = [
    *("score", "stream", "drift", "selftest", "bench run", "bench compare", "doctor", "bundle info", "bundle verify"),
    *("bundle sign", "bundle install", "bundle activate", "bundle rollback", "bundle list"),
    *("engine build", "engine info", "engine list", "engine clean"),
]


def _module(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start `python -m edge_anomaly_runtime` as a process of its own."""
    command = [sys.executable, "-m", "edge_anomaly_runtime", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        **options,
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One picture of each verdict, for the tiny bundle; two of them have the same name."""
    for name, red in {"a/part.png": 50, "b/part.png": 150, "c.png": 220}.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (red, 60, 60)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def _rows(out: str) -> list[dict[str, Any]]:
    assert out.endswith("\n")
    return [json.loads(line) for line in out.splitlines()]


# score


def test_score_prints_one_json_object_per_image_and_nothing_else(run: Run, tiny_bundle: Path, photos: Path) -> None:
    code, out, err = run("score", tiny_bundle, photos)
    assert code == 0
    rows = _rows(out)
    assert [(row["path"], row["score"], row["verdict"]) for row in rows] == [
        (str(photos / "a/part.png"), 50.0, "OK"),
        (str(photos / "b/part.png"), 150.0, "WARN"),
        (str(photos / "c.png"), 220.0, "NG"),
    ]
    for row in rows:
        assert list(row) == ["schema", "path", "score", "verdict", "threshold", "warn", "ms"]
        assert row["schema"] == "edge-anomaly.score/1"
        assert (row["warn"], row["threshold"]) == (100.0, 200.0)
        assert sorted(row["ms"]) == ["decode", "infer", "resize"]
    first, last = err.splitlines()
    assert re.match(r"(openvino|onnxruntime) (int8|fp32), \d+ threads \(not tensorrt: .*; engine ", first)
    assert last == "1 OK, 1 WARN, 1 NG, 0 INVALID"


class Recorder(io.StringIO):
    """Standard output that remembers how many lines it held at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: set[int] = set()

    def flush(self) -> None:
        self.flushed.add(self.getvalue().count("\n"))


def test_each_row_is_written_as_soon_as_it_is_known(
    run: Run, tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    assert run("score", tiny_bundle, photos)[0] == 0
    assert {1, 2, 3} <= recorder.flushed


def test_score_with_a_real_bundle(run: Run, bundle_folder: Path, sample_folder: Path) -> None:
    code, out, _ = run("score", bundle_folder, sample_folder / "test/good", sample_folder / "test/hole")
    rows = _rows(out)
    assert code == 0
    assert len(rows) == 20
    assert {row["verdict"] for row in rows} <= {"OK", "WARN", "NG"}
    assert all(row["verdict"] == ("NG" if row["score"] > row["threshold"] else "OK") for row in rows)


@pytest.mark.parametrize(
    ("name", "verdict", "codes"),
    [
        ("a", "OK", {"ng": 0, "warn": 0}),
        ("b", "WARN", {"ng": 0, "warn": 1}),
        ("c.png", "NG", {"ng": 1, "warn": 1}),
    ],
)
def test_fail_on_ends_with_code_1(
    run: Run, tiny_bundle: Path, photos: Path, name: str, verdict: str, codes: dict[str, int]
) -> None:
    for level, expected in codes.items():
        code, out, err = run("score", tiny_bundle, photos / name, "--fail-on", level)
        assert [row["verdict"] for row in _rows(out)] == [verdict]
        assert code == expected
        assert "Error" not in err


def test_fail_on_needs_every_image_to_be_judged(run: Run, tiny_bundle: Path, photos: Path) -> None:
    (photos / "a/bad.png").write_bytes(b"rubbish")
    assert run("score", tiny_bundle, photos / "a")[0] == 0
    assert run("score", tiny_bundle, photos / "a", "--fail-on", "ng")[0] == 1


def test_fail_on_something_else_is_a_usage_error(run: Run, tiny_bundle: Path, photos: Path) -> None:
    code, out, err = run("score", tiny_bundle, photos, "--fail-on", "nG")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["Error: Unknown --fail-on 'nG'.", "Did you mean 'ng'? Choose one of: ng, warn."]


@pytest.fixture
def bad_among_good(photos: Path) -> Path:
    """An empty file, a black picture and a text file among the three good pictures."""
    (photos / "a/empty.png").touch()
    (photos / "b/text.png").write_text("not a picture")
    Image.new("RGB", (40, 30)).save(photos / "d.png")
    return photos


def test_unreadable_files_among_good_ones_are_rows_too(run: Run, tiny_bundle: Path, bad_among_good: Path) -> None:
    code, out, err = run("score", tiny_bundle, bad_among_good)
    assert code == 0
    rows = {Path(row["path"]).relative_to(bad_among_good).as_posix(): row for row in _rows(out)}
    assert [row["verdict"] for row in rows.values()] == ["INVALID", "OK", "WARN", "INVALID", "NG", "INVALID"]
    assert rows["a/empty.png"]["reason"] == "the file is empty"
    assert rows["b/text.png"]["reason"].startswith("it is not one of the formats PNG, JPEG")
    assert rows["d.png"]["reason"] == "the picture is black (mean grey level 0.0)"
    assert rows["a/empty.png"]["score"] is None
    assert "reason" not in rows["c.png"]
    assert err.splitlines()[-1] == "1 OK, 1 WARN, 1 NG, 3 INVALID"


def test_strict_stops_at_the_first_unreadable_file(run: Run, tiny_bundle: Path, bad_among_good: Path) -> None:
    (bad_among_good / "a/empty.png").rename(bad_among_good / "a/z.png")
    code, out, err = run("score", tiny_bundle, bad_among_good, "--strict")
    assert code == 2
    assert [row["score"] for row in _rows(out)] == [50.0]
    assert err.splitlines()[1] == f"Error: Cannot judge {bad_among_good}/a/z.png: the file is empty."


def test_no_readable_file_at_all_is_a_usage_error(run: Run, tiny_bundle: Path, bad_among_good: Path) -> None:
    code, out, err = run("score", tiny_bundle, bad_among_good / "a/empty.png", bad_among_good / "d.png")
    assert code == 2
    assert [row["verdict"] for row in _rows(out)] == ["INVALID", "INVALID"]
    assert "Error: None of the 2 images could be judged." in err


def test_file_names_with_odd_characters_stay_one_line(run: Run, tiny_bundle: Path, photos: Path) -> None:
    names = ["new\nline.png", 'quo"te.png', "ümläut.png", os.fsdecode(b"\xff.png")]
    for name in names:
        shutil.copy(photos / "c.png", photos / "a" / name)
    code, out, _ = run("score", tiny_bundle, photos / "a")
    assert code == 0
    assert sorted(Path(row["path"]).name for row in _rows(out)) == sorted([*names, "part.png"])


# Overlays


def test_overlay_writes_a_picture_per_image_and_keeps_namesakes_apart(
    run: Run, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    out_folder = tmp_path / "new" / "overlays"
    code, out, _ = run("score", tiny_bundle, photos, "--overlay", out_folder)
    assert code == 0
    assert len(_rows(out)) == 3
    pictures = {path.name: np.asarray(Image.open(path)) for path in out_folder.iterdir()}
    assert sorted(pictures) == ["c.png", "part-2.png", "part.png"]
    assert {picture.shape for picture in pictures.values()} == {(30, 40, 3)}
    # Pixel threshold 60. Red 50 is 0.83 of it: 30 % yellow; red 150 and 220 are over twice of it: 70 % dark red.
    colours = {"part.png": [111.5, 108, 54], "part-2.png": [150, 18, 32], "c.png": [171, 18, 32]}
    for name, colour in colours.items():
        assert pictures[name][15, 20].tolist() == pytest.approx(colour, abs=0.6)


def test_overlay_leaves_out_what_could_not_be_judged_and_replaces_older_pictures(
    run: Run, tiny_bundle: Path, bad_among_good: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/c.png").write_bytes(b"old")
    assert run("score", tiny_bundle, bad_among_good, "--overlay", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c.png", "part-2.png", "part.png"]
    assert Image.open(tmp_path / "out/c.png").size == (40, 30)


def test_an_image_that_is_given_twice_has_its_overlay_under_its_own_name(
    run: Run, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    code, out, _ = run("score", tiny_bundle, photos / "c.png", photos / "c.png", "--overlay", tmp_path / "out")
    assert (code, len(_rows(out))) == (0, 2)
    assert "c.png" in [path.name for path in (tmp_path / "out").iterdir()]


def test_overlay_onto_a_file_is_a_usage_error(run: Run, tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    code, _, err = run("score", tiny_bundle, photos, "--overlay", tmp_path / "taken")
    assert code == 2
    assert "Error: Cannot create" in err
    assert str(tmp_path / "taken") in err
    assert (tmp_path / "taken").read_text() == "mine"


def test_overlay_on_a_full_disk_ends_with_code_70_and_leaves_no_part(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    limit = (20_000, 20_000)
    child = _module(
        "score", tiny_bundle, photos / "noise.png", "--engine", "onnxruntime", "--overlay", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    _, err = child.communicate(timeout=60)
    assert child.returncode == 70
    assert f"Error: Cannot write {tmp_path}/out/noise.png: File too large." in err.decode()
    assert list((tmp_path / "out").iterdir()) == []


# Errors


def test_a_missing_bundle_ends_with_code_2(run: Run, photos: Path, tmp_path: Path) -> None:
    for command in (["score", tmp_path / "absent.eab", photos], ["selftest", tmp_path / "absent.eab"]):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert err.splitlines() == [
            f"Error: There is no bundle {tmp_path}/absent.eab.",
            "Make one with: edge-anomaly export RUN --out NAME.eab",
        ]


@pytest.mark.parametrize("command", ["score", "selftest", "bench", "bundle info", "bundle verify"])
def test_a_damaged_bundle_ends_with_code_4_and_names_the_file(
    run: Run, tiny_bundle: Path, photos: Path, tmp_path: Path, command: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.eab"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx").write_bytes(data)
    code, out, err = run(*command.split(), copy, *([photos] if command == "score" else []))
    assert (code, out) == (4, "")
    assert f"Error: {copy}/model.onnx is damaged: its SHA-256 is not the one in the manifest." in err
    assert len(err.splitlines()) == 2


def test_a_newer_bundle_ends_with_code_4(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.eab"))
    data = (copy / MANIFEST).read_bytes().replace(b"bundle/1", b"bundle/2")
    (copy / MANIFEST).write_bytes(data)
    (copy / MANIFEST_DIGEST).write_bytes(digest_line(data))
    code, _, err = run("bundle", "verify", copy)
    assert code == 4
    assert "'edge-anomaly.bundle/2'" in err


@pytest.mark.parametrize("command", ["score", "selftest", "bench"])
def test_an_unknown_engine_ends_with_code_2_and_a_guess(
    run: Run, tiny_bundle: Path, photos: Path, command: str
) -> None:
    code, out, err = run(command, tiny_bundle, *([photos] if command == "score" else []), "--engine", "openvno")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "Error: Unknown engine 'openvno'.",
        "Did you mean 'openvino'? Choose one of: auto, tensorrt, openvino, onnxruntime, onnxruntime-tensorrt.",
    ]


def test_a_missing_engine_ends_with_code_3_and_the_line_to_type(
    run: Run, tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, out, err = run("score", tiny_bundle, photos, "--engine", "openvino")
    assert (code, out) == (3, "")
    assert err.splitlines()[-1] == 'Run: pip install "edge-anomaly[openvino]"'
    assert run("score", tiny_bundle, photos)[0] == 0, "auto takes the other one"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["scor"], "No such command 'scor'"),
        (["score"], "Missing argument 'BUNDLE'"),
        (["doctor", "--nothing"], "No such option"),
        (["bench", "x.eab", "--runs", "many"], "--runs"),
        (["bundle", "verfy"], "No such command 'verfy'"),
    ],
)
def test_mistyped_commands_end_with_code_2(run: Run, arguments: list[str], named: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert named in err


def test_images_that_are_not_there_end_with_code_2_before_the_bundle_is_read(run: Run, tmp_path: Path) -> None:
    code, _, err = run("score", tmp_path / "absent.eab", tmp_path / "absent.png")
    assert code == 2
    assert "absent.png" in err


@pytest.mark.parametrize("arguments", [["--debug", "bundle", "verify"], ["bundle", "verify", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    place = len(arguments) if arguments[-1] == "verify" else 2
    code, out, err = run(*arguments[:place], tmp_path / "absent.eab", *arguments[place:])
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert "Error: There is no bundle" in err


def test_debug_may_be_set_by_the_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in run("bundle", "verify", tmp_path / "absent.eab")[2]
    monkeypatch.setenv("EDGE_ANOMALY_DEBUG", "1")
    assert "Traceback" in run("bundle", "verify", tmp_path / "absent.eab")[2]


def test_an_interrupt_ends_with_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def app() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.run(app)  # type: ignore[arg-type]
    assert caught.value.code == 130
    assert capsys.readouterr().err == ""


def test_an_unforeseen_error_ends_with_code_70_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def app() -> None:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(SystemExit) as caught:
        cli.run(app)  # type: ignore[arg-type]
    assert caught.value.code == 70
    assert capsys.readouterr().err.splitlines() == [
        "Error: Internal error: ZeroDivisionError: division by zero",
        "Run again with --debug for the traceback.",
    ]


# The other commands


def test_selftest_passes_on_a_real_bundle(run: Run, bundle_folder: Path) -> None:
    code, out, err = run("selftest", bundle_folder, "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["schema"], report["ok"]) == ("edge-anomaly.selftest/1", True)
    assert len(report["images"]) >= 5
    assert all(image["ok"] for image in report["images"])
    assert "selftest passed" in err


def test_selftest_fails_with_code_1_when_the_results_are_others(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.eab"))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["golden"][0]["scores"] = dict.fromkeys(manifest["golden"][0]["scores"], 60.0)
    data = json.dumps(manifest).encode()
    (copy / MANIFEST).write_bytes(data)
    (copy / MANIFEST_DIGEST).write_bytes(digest_line(data))
    code, out, err = run("selftest", copy, "--json")
    assert code == 1
    report = json.loads(out)
    assert report["ok"] is False
    assert [image["ok"] for image in report["images"]] == [False, True, True]
    assert "FAIL golden/050.png" in err
    assert "Error: 1 of 3 golden images differ" in err


def test_doctor_prints_json_or_lines(run: Run) -> None:
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["schema"] == "edge-anomaly.doctor/1"
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^openvino +20\d\d\.", out, re.MULTILINE)


def test_bundle_info_prints_the_manifest_or_a_summary(run: Run, bundle_folder: Path) -> None:
    manifest = read_bundle(bundle_folder).manifest
    code, out, _ = run("bundle", "info", bundle_folder, "--json")
    assert code == 0
    assert out.encode() == manifest_bytes(manifest)
    code, out, _ = run("bundle", "info", bundle_folder)
    assert code == 0
    for words in (manifest.name, "padim", "openvino/int8", "parity", f"files   {len(manifest.files)}"):
        assert words in out


def test_bundle_verify(run: Run, bundle_folder: Path) -> None:
    code, out, err = run("bundle", "verify", bundle_folder, "--json")
    count = len(read_bundle(bundle_folder).manifest.files)
    assert code == 0
    assert json.loads(out) == {"schema": "edge-anomaly.verify/1", "ok": True, "files": count, "signed_by": None}
    assert err == f"{bundle_folder}: {count} files match the manifest\n"


def test_thresholds_are_told_in_counts() -> None:
    limit = Threshold(value=12.3456, alpha=0.01, method="conformal", n=300, order=298, upper95=0.0211)
    assert cli.describe_threshold("fail", limit) == (
        "fail > 12.35: about 10 of 1000 good parts (95 % bound 22; conformal, n = 300)"
    )


# drift


@pytest.fixture
def scored_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with the distribution of its normal scores."""
    return bundle_with_scores(tiny_bundle, tmp_path / "scored.eab")


def test_drift_prints_a_table_and_says_what_it_left_out(run: Run, scored_bundle: Path, tmp_path: Path) -> None:
    records = stream_records(scored_bundle, [*normal_scores(2000), None])
    code, out, err = run("drift", write_lines(tmp_path / "out.jsonl", records), "--bundle", scored_bundle)
    assert (code, err) == (0, "left out: 1 without a score\n")
    lines = out.splitlines()
    assert lines[0] == "c0: 2000 scores, compared with 100 normal images of openvino/int8"
    assert [line.split()[0] for line in lines[2:]] == ["1-1000", "1001-2000", "c0:"]
    assert lines[-1] == "c0: ok."


def test_drift_that_is_found_ends_with_code_1_when_asked_to(run: Run, scored_bundle: Path, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", stream_records(scored_bundle, normal_scores(2000)))
    bad = write_lines(tmp_path / "bad.jsonl", stream_records(scored_bundle, normal_scores(2000, shift=2), camera="c1"))
    assert run("drift", good, bad, "--bundle", scored_bundle)[0] == 0
    assert run("drift", good, "--bundle", scored_bundle, "--fail-on-drift")[0] == 0
    code, out, err = run("drift", good, bad, "--bundle", scored_bundle, "--fail-on-drift")
    assert code == 1
    assert "c1: drifting. Scores are higher than at calibration" in out
    assert err.splitlines()[0] == "Error: The scores of 1 of 2 cameras have drifted: 'c1'."
    assert run("drift", good, bad, "--bundle", scored_bundle, "--fail-on-drift", "--camera", "c0")[0] == 0


def test_drift_as_json_is_one_object(run: Run, scored_bundle: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", stream_records(scored_bundle, normal_scores(300, shift=2)))
    code, out, _ = run("drift", path, "--bundle", scored_bundle, "--json", "--window", "100", "--fail-on-drift")
    assert code == 1
    report = json.loads(out)
    assert (report["schema"], report["ok"]) == ("edge-anomaly.drift/1", False)
    assert [window["last"] for window in report["cameras"][0]["windows"]] == [100, 200, 300]
    assert report["cameras"][0]["latest"]["state"] == "drifting"


def test_drift_of_another_schema_ends_with_code_4(run: Run, scored_bundle: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", [{"schema": "edge-anomaly.stream/2"}])
    code, out, err = run("drift", path, "--bundle", scored_bundle)
    assert (code, out) == (4, "")
    assert err.startswith(f"Error: {path}, line 1 has schema 'edge-anomaly.stream/2'; drift reads")


def test_drift_with_nothing_to_compare_ends_with_code_2(run: Run, scored_bundle: Path, tmp_path: Path) -> None:
    for arguments, named in (
        ([tmp_path / "absent.jsonl", "--bundle", scored_bundle], "Cannot read"),
        ([write_lines(tmp_path / "empty.jsonl", []), "--bundle", scored_bundle], "No record can be compared"),
        ([tmp_path / "absent.jsonl", "--bundle", tmp_path / "absent.eab"], "There is no bundle"),
        ([tmp_path / "absent.jsonl"], "Missing option '--bundle'"),
    ):
        code, out, err = run("drift", *arguments)
        assert (code, out) == (2, "")
        assert named in err


def test_drift_of_what_score_has_printed(run: Run, bundle_folder: Path, sample_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("score", bundle_folder, sample_folder / "train/good", sample_folder / "test/good")
    assert code == 0
    (tmp_path / "scores.jsonl").write_text(out)
    code, out, err = run("drift", tmp_path / "scores.jsonl", "--bundle", bundle_folder)
    assert (code, err) == (0, "")
    assert out.startswith("images: 76 scores, compared with ")


# Help, version, environment


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_very_command(run: Run, command: str) -> None:
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Example: edge-anomaly {command}" in out
    assert run(*command.split(), "-h")[1] == out


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command.split()[0]} ", out, re.MULTILINE)
    assert "Exit codes: 0 ok" in out


def test_version(run: Run) -> None:
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert out == importlib.metadata.version("edge-anomaly") + "\n"


def test_options_may_come_from_the_environment_and_the_flag_wins(
    run: Run, tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_ANOMALY_SCORE_ENGINE", "banana")
    code, _, err = run("score", tiny_bundle, photos)
    assert code == 2
    assert "Unknown engine 'banana'" in err
    assert run("score", tiny_bundle, photos, "--engine", "onnxruntime")[0] == 0


def test_a_version_in_the_environment_disturbs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE_ANOMALY_VERSION is what a Dockerfile would call it."""
    for value in ("0.1.0", "1"):
        monkeypatch.setenv("EDGE_ANOMALY_VERSION", value)
        code, out, _ = run("doctor", "--json")
        assert code == 0
        assert json.loads(out)["schema"] == "edge-anomaly.doctor/1"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import edge_anomaly_runtime.cli\n"
        "print([name for name in ('numpy', 'PIL', 'pydantic', 'torch', 'openvino', 'onnxruntime') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# Processes: pipes and signals


def _many(photos: Path, count: int = 3000) -> list[Path]:
    return [photos / "a/part.png", photos / "b/part.png", photos / "c.png"] * (count // 3)


def test_the_module_is_a_command(tiny_bundle: Path, photos: Path) -> None:
    child = _module("score", tiny_bundle, photos, "--fail-on", "ng", "--engine", "onnxruntime")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert [row["verdict"] for row in _rows(out.decode())] == ["OK", "WARN", "NG"]
    assert b"1 OK, 1 WARN, 1 NG, 0 INVALID" in err


def test_a_reader_that_has_seen_enough_is_no_error(tiny_bundle: Path, photos: Path) -> None:
    """`edge-anomaly score ... | head -1`; code 1 would say that a gate was not met."""
    child = _module("score", tiny_bundle, *_many(photos), "--engine", "onnxruntime")
    assert child.stdout is not None and child.stderr is not None
    assert json.loads(child.stdout.readline())["verdict"] == "OK"
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(timeout=60) == 0
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert "Error" not in err


def test_a_reader_that_has_gone_before_the_first_line_is_no_error_either() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "edge_anomaly_runtime", "doctor", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (child.returncode, child.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_results_that_cannot_be_written_end_with_code_70() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "edge_anomaly_runtime", "doctor", "--json"]
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert child.returncode == 70
    assert b"No space left on device" in child.stderr
    assert b"Traceback" not in child.stderr
    assert b"Exception ignored" not in child.stderr


def _signalled(number: signal.Signals, tiny_bundle: Path, photos: Path) -> tuple[int, str, str]:
    """Send a signal after the first line; return exit code and output."""
    # A test run in the background ignores SIGINT, and a child inherits that.
    child = _module(
        "score", tiny_bundle, *_many(photos), "--engine", "onnxruntime",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout is not None
    first = child.stdout.readline()
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    return child.returncode, (first + out).decode(), err.decode()


def test_sigterm_finishes_the_image_in_hand_and_ends_with_code_0(tiny_bundle: Path, photos: Path) -> None:
    code, out, err = _signalled(signal.SIGTERM, tiny_bundle, photos)
    assert code == 0
    rows = _rows(out)
    assert 1 <= len(rows) < 3000
    assert all(row["schema"] == "edge-anomaly.score/1" for row in rows)
    counted = sum(int(number) for number in re.findall(r"(\d+) (?:OK|WARN|NG|INVALID)", err))
    assert counted == len(rows)
    assert "Traceback" not in err


def test_sigint_ends_with_code_130_and_whole_lines(tiny_bundle: Path, photos: Path) -> None:
    code, out, err = _signalled(signal.SIGINT, tiny_bundle, photos)
    assert code == 130
    assert 1 <= len(_rows(out)) < 3000
    assert "Traceback" not in err
