"""Every error names what happened and what to do next, and has the exit code of the design."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edge_anomaly_runtime import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.EdgeAnomalyError, 70),
        (errors.GateError, 1),
        (errors.UsageError, 2),
        (errors.ImageError, 2),
        (errors.MissingRequirementError, 3),
        (errors.ArtefactError, 4),
        (errors.SourceError, 5),
        (errors.OutputError, 70),
    ],
)
def test_each_error_has_its_exit_code(kind: type[errors.EdgeAnomalyError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, errors.EdgeAnomalyError)


def test_message_is_what_happened_and_then_the_next_step() -> None:
    error = errors.UsageError("Size is 3.", "Use 16 or more.")
    assert (error.what, error.hint) == ("Size is 3.", "Use 16 or more.")
    assert str(error) == "Size is 3.\nUse 16 or more."
    assert str(errors.UsageError("Size is 3.")) == "Size is 3."


def test_image_error_is_a_usage_error_with_path_and_reason() -> None:
    error = errors.ImageError(Path("a/b.png"), "the file is empty")
    assert isinstance(error, errors.UsageError)
    assert (error.path, error.reason) == ("a/b.png", "the file is empty")
    assert error.what == "Cannot use image a/b.png: the file is empty."
    assert error.hint


def test_output_error_names_path_and_cause() -> None:
    error = errors.OutputError(Path("out.eab"), OSError(errno.ENOSPC, "No space left on device"))
    assert error.path == "out.eab"
    assert error.what == "Cannot write out.eab: No space left on device."
    assert errors.OutputError("x", OSError("odd")).what == "Cannot write x: odd."


def test_missing_extra_gives_the_line_to_type() -> None:
    error = errors.missing_extra("--engine openvino", "openvino", "openvino")
    assert isinstance(error, errors.MissingRequirementError)
    assert "--engine openvino" in error.what
    assert error.hint == 'Run: pip install "edge-anomaly[openvino]"'


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("openvno", "Did you mean 'openvino'? Choose one of: auto, openvino."),
        ("zzz", "Choose one of: auto, openvino."),
    ],
)
def test_did_you_mean_names_the_nearest_choice_if_one_is_near(value: str, hint: str) -> None:
    error = errors.did_you_mean("engine", value, ["auto", "openvino"])
    assert error.what == f"Unknown engine {value!r}."
    assert error.hint == hint
