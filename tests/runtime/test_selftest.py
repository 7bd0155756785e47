"""The golden images notice a wrong engine, wrong weights and wrong colours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_anomaly_runtime.bundle import Bundle, read_bundle
from edge_anomaly_runtime.scoring import Scorer, open_scorer
from edge_anomaly_runtime.selftest import GoldenCheck, run_selftest
from edge_anomaly_runtime.session import CPU_ENGINES, Session, SessionInfo

Pixels = npt.NDArray[np.uint8]
Outputs = dict[str, npt.NDArray[np.float32]]


class ChangedSession:
    """A real session with something wrong before or after it."""

    def __init__(
        self,
        session: Session,
        *,
        images: Callable[[Pixels], Pixels] = lambda images: images,
        outputs: Callable[[Outputs], Outputs] = lambda outputs: outputs,
    ) -> None:
        self._session, self._images, self._outputs = session, images, outputs

    @property
    def info(self) -> SessionInfo:
        return self._session.info

    def run(self, images: Pixels) -> Outputs:
        return self._outputs(self._session.run(self._images(images)))

    def close(self) -> None:
        self._session.close()


def _scaled(factor: float) -> Callable[[Outputs], Outputs]:
    return lambda outputs: {name: (value * factor).astype(np.float32) for name, value in outputs.items()}


def _checks(
    folder: Path,
    engine: str = "onnxruntime",
    precision: str = "fp32",
    *,
    images: Callable[[Pixels], Pixels] = lambda images: images,
    outputs: Callable[[Outputs], Outputs] = lambda outputs: outputs,
    bundle: Bundle | None = None,
) -> list[GoldenCheck]:
    with open_scorer(folder, engine=engine, precision=precision) as real:
        session = ChangedSession(real.session, images=images, outputs=outputs)
        return run_selftest(Scorer(bundle or real.bundle, session, engine=engine, precision=precision))


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_real_bundle_passes_on_every_engine(bundle_folder: Path, engine: str, precision: str) -> None:
    checks = _checks(bundle_folder, engine, precision)
    assert len(checks) == len(read_bundle(bundle_folder).manifest.golden) >= 5
    assert all(check.ok for check in checks)
    tolerance = {"fp32": 1e-3, "int8": 5e-2}[precision]
    assert max(_number(check.score_difference) for check in checks) <= tolerance
    assert [check.verdict for check in checks] == [check.expected_verdict for check in checks]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_ten_per_cent_off_fails_every_image(bundle_folder: Path, precision: str, factor: float) -> None:
    checks = _checks(bundle_folder, precision=precision, outputs=_scaled(factor))
    assert not any(check.ok for check in checks)
    assert min(_number(check.score_difference) for check in checks) > 0.09


def _number(difference: float | None) -> float:
    assert difference is not None
    return difference


def test_half_a_per_cent_off_fails_fp32_and_passes_int8(bundle_folder: Path) -> None:
    assert not any(check.ok for check in _checks(bundle_folder, precision="fp32", outputs=_scaled(1.005)))
    assert all(check.ok for check in _checks(bundle_folder, precision="int8", outputs=_scaled(1.005)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_swapped_colours_fail(bundle_folder: Path, precision: str) -> None:
    checks = _checks(bundle_folder, precision=precision, images=lambda images: images[..., ::-1].copy())
    assert not any(check.ok for check in checks)


def test_a_picture_upside_down_fails(bundle_folder: Path) -> None:
    checks = _checks(bundle_folder, images=lambda images: images[:, ::-1].copy())
    assert not any(check.ok for check in checks)


def test_a_wrong_map_fails_though_the_score_is_right(bundle_folder: Path) -> None:
    def turned(outputs: Outputs) -> Outputs:
        return {**outputs, "anomaly_map": outputs["anomaly_map"][:, ::-1]}

    for check in _checks(bundle_folder, outputs=turned):
        assert _number(check.score_difference) <= 1e-3
        assert _number(check.map_difference) > 1e-3
        assert not check.ok


def test_a_wrong_score_fails_though_the_map_is_right(bundle_folder: Path) -> None:
    for check in _checks(bundle_folder, outputs=lambda outputs: {**outputs, "score": outputs["score"] * 1.01}):
        assert check.map_difference == pytest.approx(0, abs=1e-3)
        assert check.score_difference == pytest.approx(0.01, abs=1e-3)
        assert not check.ok


def test_outputs_that_are_not_finite_fail_and_can_still_be_written_as_json(tiny_bundle: Path) -> None:
    checks = _checks(tiny_bundle, outputs=_scaled(float("nan")))
    assert [check.verdict for check in checks] == ["INVALID"] * 3
    assert [check.score for check in checks] == [None] * 3
    assert not any(check.ok for check in checks)
    json.dumps([dataclasses.asdict(check) for check in checks], allow_nan=False)


def test_the_report_names_file_expected_and_found(tiny_bundle: Path) -> None:
    check = _checks(tiny_bundle, outputs=_scaled(1.02))[1]
    assert check.file == "golden/150.png"
    assert check.expected == 150.0
    assert check.score == pytest.approx(153.0)
    assert check.score_difference == pytest.approx(0.02)
    assert check.map_difference == pytest.approx(0.02)
    assert (check.verdict, check.expected_verdict) == ("WARN", "WARN")
    assert not check.ok


class OneGolden(Bundle):
    """The tiny bundle with one golden image, of red level 150."""

    def golden_maps(self) -> dict[str, npt.NDArray[np.float32]]:
        return {"onnxruntime/int8": np.full((1, 4, 4), 150, np.float32)}


@pytest.mark.parametrize(
    ("verdict", "tolerance", "ok"),
    [
        pytest.param("WARN", 0.05, True, id="the same verdict"),
        pytest.param("NG", 0.05, False, id="another verdict; the next threshold is 33 % away"),
        pytest.param("NG", 0.4, True, id="another verdict, but a threshold lies within the tolerance"),
    ],
)
def test_another_verdict_fails_unless_the_score_lies_at_a_threshold(
    tiny_bundle: Path, verdict: str, tolerance: float, ok: bool
) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    golden = manifest.golden[1].model_copy(update={"verdicts": {"onnxruntime/int8": verdict}})
    update = {"golden": (golden,), "golden_tolerance": {"int8": tolerance}}
    bundle = OneGolden(tiny_bundle, manifest.model_copy(update=update))
    (check,) = _checks(tiny_bundle, precision="int8", bundle=bundle)
    assert (check.score, check.verdict, check.expected_verdict) == (150.0, "WARN", verdict)
    assert check.ok is ok
