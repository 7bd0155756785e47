"""Verdicts at the thresholds, and INVALID for whatever cannot be judged."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import edge_anomaly_runtime
from edge_anomaly_runtime import Scorer, open_scorer
from edge_anomaly_runtime.bundle import Bundle, Threshold, Thresholds, read_bundle
from edge_anomaly_runtime.errors import ArtefactError, UsageError
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.scoring import verdict_of
from edge_anomaly_runtime.session import CPU_ENGINES, SessionInfo

Pixels = npt.NDArray[np.uint8]
TINY = Preprocess(16, 16)


class FixedSession:
    """Gives the same outputs for every image and keeps what it was given."""

    info = SessionInfo("fake", "1", "none", "f32", 1)

    def __init__(self, score: float = 50.0, anomaly_map: npt.ArrayLike = 50.0) -> None:
        self.score = score
        self.anomaly_map = np.broadcast_to(np.asarray(anomaly_map, dtype=np.float32), (4, 4))
        self.seen: list[Pixels] = []
        self.closed = False

    def run(self, images: Pixels) -> dict[str, npt.NDArray[np.float32]]:
        self.seen.append(images)
        return {"score": np.array([self.score], np.float32), "anomaly_map": self.anomaly_map[np.newaxis].copy()}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def red_scorer(tiny_bundle: Path) -> Iterator[Scorer]:
    """The tiny bundle on a real engine: warn above 100, fail above 200."""
    with open_scorer(tiny_bundle, engine="onnxruntime", precision="fp32") as scorer:
        yield scorer


def _scorer(bundle: Bundle, session: FixedSession) -> Scorer:
    return Scorer(bundle, session, engine="openvino", precision="int8")


def _with_input(bundle: Bundle, *, preprocess: Preprocess = TINY, brightness: tuple[float, float]) -> Bundle:
    contract = bundle.manifest.input.model_copy(update={"preprocess": preprocess, "brightness": brightness})
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"input": contract}))


def _flat(*colour: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (colour * 3)[:3])


# Verdicts


@pytest.mark.parametrize(
    ("red", "verdict"), [(50, "OK"), (100, "OK"), (101, "WARN"), (200, "WARN"), (201, "NG"), (255, "NG")]
)
def test_verdicts_at_the_thresholds(red_scorer: Scorer, red: int, verdict: str) -> None:
    result = red_scorer.score_image(_flat(red, 60, 60))
    assert result.verdict == verdict
    assert result.score == red
    assert (result.warn, result.threshold) == (100.0, 200.0)
    assert result.reason == ""
    assert result.anomaly_map is not None
    assert result.anomaly_map.tolist() == [[red] * 4] * 4
    assert sorted(result.ms) == ["infer", "resize"]


def test_equal_thresholds_give_no_warning() -> None:
    limit = Threshold(value=13.5, alpha=0.01, method="maximum", n=12, order=12, upper95=0.22)
    limits = Thresholds(warn=limit, fail=limit, pixel=limit, scores={})
    above = math.nextafter(13.5, math.inf)
    assert [verdict_of(score, limits) for score in (-1.0, 13.5, above)] == ["OK", "OK", "NG"]


def test_thresholds_belong_to_the_engine_and_precision(tiny: Bundle) -> None:
    strict = tiny.manifest.thresholds["openvino/int8"].model_dump()
    strict["fail"]["value"] = 40.0
    thresholds = {**tiny.manifest.thresholds, "openvino/int8": Thresholds.model_validate(strict)}
    bundle = dataclasses.replace(tiny, manifest=tiny.manifest.model_copy(update={"thresholds": thresholds}))
    verdicts = [
        Scorer(bundle, FixedSession(50.0), engine="openvino", precision=precision).score_image(_flat(90)).verdict
        for precision in ("fp32", "int8")
    ]
    assert verdicts == ["OK", "NG"]


# What cannot be judged


@pytest.mark.parametrize(
    ("grey", "reason"),
    [
        pytest.param(0, "black (mean grey level 0.0)", id="black"),
        pytest.param(4, "black (mean grey level 4.0)", id="nearly black"),
        pytest.param(5, "", id="dark"),
        pytest.param(250, "", id="bright"),
        pytest.param(251, "white (mean grey level 251.0)", id="nearly white"),
        pytest.param(255, "white (mean grey level 255.0)", id="white"),
    ],
)
def test_black_and_white_pictures_are_invalid_without_asking_the_model(tiny: Bundle, grey: int, reason: str) -> None:
    session = FixedSession()
    result = _scorer(tiny, session).score_image(_flat(grey))
    if not reason:
        assert (result.verdict, result.score, len(session.seen)) == ("OK", 50.0, 1)
        return
    assert result.verdict == "INVALID"
    assert reason in result.reason
    assert result.score is None
    assert result.anomaly_map is None
    assert (result.warn, result.threshold) == (100.0, 200.0)
    assert session.seen == []


@pytest.mark.parametrize(
    ("brightness", "grey", "verdict"),
    [
        pytest.param((2.0, 9.0), 2, "OK", id="dark field: its own normal level"),
        pytest.param((2.0, 9.0), 1, "OK", id="dark field: half the darkest"),
        pytest.param((2.0, 9.0), 0, "INVALID", id="dark field: lens cap"),
        pytest.param((200.0, 253.0), 253, "OK", id="bright field: its own normal level"),
        pytest.param((200.0, 253.0), 255, "INVALID", id="bright field: overexposed"),
        pytest.param((80.0, 120.0), 4, "INVALID", id="ordinary light: black"),
    ],
)
def test_normal_images_that_are_dark_or_bright_themselves_move_the_limits(
    tiny: Bundle, brightness: tuple[float, float], grey: int, verdict: str
) -> None:
    scorer = _scorer(_with_input(tiny, brightness=brightness), FixedSession())
    assert scorer.score_image(_flat(grey)).verdict == verdict


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (400, 40)])
def test_the_bars_of_a_letterbox_do_not_hide_a_white_picture_nor_make_a_black_one(
    tiny: Bundle, size: tuple[int, int]
) -> None:
    spec = Preprocess(16, 16, "letterbox")
    normal = float(preprocess(_flat(40, size=size), spec).mean())  # as training measures it, with the bars
    bundle = _with_input(tiny, preprocess=spec, brightness=(normal, normal))
    verdicts = [_scorer(bundle, FixedSession()).score_image(_flat(grey, size=size)).verdict for grey in (255, 40, 0)]
    assert verdicts == ["INVALID", "OK", "INVALID"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_invalid_and_never_ok(tiny: Bundle, value: float) -> None:
    one_bad_cell = np.zeros((4, 4), np.float32)
    one_bad_cell[3, 0] = value
    for session in (FixedSession(score=value), FixedSession(anomaly_map=one_bad_cell)):
        result = _scorer(tiny, session).score_image(_flat(90))
        assert result.verdict == "INVALID"
        assert result.reason == "the model's output is not finite"
        assert result.score is None
        assert result.anomaly_map is None


@pytest.mark.parametrize(
    ("array", "named"),
    [
        pytest.param(np.zeros((8, 8, 3), np.float32), "float32 [8, 8, 3]", id="float"),
        pytest.param(np.full((8, 8, 3), 99, np.uint16), "uint16 [8, 8, 3]", id="16 bits"),
        pytest.param(np.full((8, 8), 99, np.uint8), "uint8 [8, 8]", id="grey"),
        pytest.param(np.full((8, 8, 4), 99, np.uint8), "uint8 [8, 8, 4]", id="RGBA"),
        pytest.param(np.full((3, 8, 8), 99, np.uint8), "uint8 [3, 8, 8]", id="channels first"),
        pytest.param(np.full((1, 8, 8, 3), 99, np.uint8), "uint8 [1, 8, 8, 3]", id="a batch"),
    ],
)
def test_arrays_of_the_wrong_type_or_shape_are_invalid(tiny: Bundle, array: Any, named: str) -> None:
    session = FixedSession()
    result = _scorer(tiny, session).score_image(array)
    assert result.verdict == "INVALID"
    assert named in result.reason
    assert session.seen == []


def test_an_array_without_pixels_is_invalid(tiny: Bundle) -> None:
    for shape in ((0, 4, 3), (4, 0, 3)):
        assert _scorer(tiny, FixedSession()).score_image(np.zeros(shape, np.uint8)).verdict == "INVALID"


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_that_are_not_rgb_never_reach_the_model(tiny: Bundle, mode: str) -> None:
    session = FixedSession()
    result = _scorer(tiny, session).score_image(Image.new(mode, (20, 20), 99))
    assert result.verdict == "INVALID"
    assert mode in result.reason
    assert session.seen == []


def test_unreadable_files_are_invalid_and_no_exception(tiny: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"rubbish")
    scorer = _scorer(tiny, FixedSession())
    for name, reason in {"bad.png": "not one of the formats", "absent.png": "there is no such file"}.items():
        result = scorer.score_file(tmp_path / name)
        assert result.verdict == "INVALID"
        assert reason in result.reason
        assert result.path == str(tmp_path / name)
        assert result.score is None


# Ways in


def test_the_model_gets_the_preprocessed_picture_as_a_batch_of_one(tiny: Bundle) -> None:
    session = FixedSession()
    image = np.random.default_rng(0).integers(50, 200, (40, 30, 3), dtype=np.uint8)
    _scorer(tiny, session).score_image(image)
    _scorer(tiny, session).score_image(Image.fromarray(image))
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    for seen in session.seen:
        assert seen.dtype == np.uint8
        assert seen.shape == (1, 16, 16, 3)
        assert np.array_equal(seen[0], expected)
    assert len(session.seen) == 2


def test_a_file_an_image_and_an_array_get_the_same_score(red_scorer: Scorer, tmp_path: Path) -> None:
    image = _flat(131, 60, 60, size=(70, 50))
    image.save(tmp_path / "x.png")
    result = red_scorer.score_file(tmp_path / "x.png")
    assert (result.verdict, result.score, result.path) == ("WARN", 131.0, str(tmp_path / "x.png"))
    assert sorted(result.ms) == ["decode", "infer", "resize"]
    assert all(0 <= ms < 10_000 for ms in result.ms.values())
    assert red_scorer.score_file(str(tmp_path / "x.png")).score == 131.0
    assert red_scorer.score_image(image).score == 131.0
    assert red_scorer.score_image(np.asarray(image)).score == 131.0
    assert red_scorer.score_pixels(np.asarray(image.resize((16, 16)))).score == 131.0


def test_leaving_the_context_closes_the_session_even_after_an_error(tiny: Bundle) -> None:
    session = FixedSession()
    with _scorer(tiny, session):
        assert not session.closed
    assert session.closed
    session = FixedSession()
    with pytest.raises(RuntimeError), _scorer(tiny, session):
        raise RuntimeError
    assert session.closed


def test_open_scorer_refuses_what_is_missing_or_damaged(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_scorer(tmp_path / "absent.eab")
    (tmp_path / "empty.eab").mkdir()
    with pytest.raises(ArtefactError):
        open_scorer(tmp_path / "empty.eab")
    with pytest.raises(UsageError, match="Unknown engine"):
        open_scorer(tiny_bundle, engine="tensorflow")


def test_open_scorer_says_what_it_chose(tiny_bundle: Path) -> None:
    with open_scorer(tiny_bundle, engine="onnxruntime", precision="int8", threads=1) as scorer:
        assert (scorer.engine, scorer.precision) == ("onnxruntime", "int8")
        assert scorer.session.info.threads == 1
        assert scorer.reasons == ("precision int8: asked for",)
        assert scorer.thresholds == scorer.bundle.manifest.thresholds["onnxruntime/int8"]


def test_the_five_lines_of_the_package_docstring_run(
    bundle_folder: Path, sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line[4:] for line in str(edge_anomaly_runtime.__doc__).splitlines() if line[:4] in (">>> ", "... ")]
    assert len(lines) == 4
    shutil.copytree(bundle_folder, tmp_path / "part.eab")
    Image.open(sample_folder / "test/good/000.png").convert("RGB").save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec("\n".join(lines) + "\n", {})
    score, verdict = printed.getvalue().split()
    assert float(score) > 0
    assert verdict in ("OK", "WARN", "NG")


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_defective_parts_score_higher_than_good_ones(bundle_folder: Path, sample_folder: Path, engine: str) -> None:
    good = sorted((sample_folder / "test/good").glob("*.png"))
    holes = sorted((sample_folder / "test/hole").glob("*.png"))
    with open_scorer(bundle_folder, engine=engine) as scorer:
        scores = {path: scorer.score_file(path).score or 0.0 for path in (*good, *holes)}
    assert np.median([scores[path] for path in holes]) > 1.2 * np.median([scores[path] for path in good])


def test_the_package_has_three_names() -> None:
    assert sorted(edge_anomaly_runtime.__all__) == ["Result", "Scorer", "open_scorer"]
    with pytest.raises(AttributeError, match="'nothing'"):
        edge_anomaly_runtime.nothing  # noqa: B018
