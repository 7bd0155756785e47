"""Flags and the TOML file, and that a mistake is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.settings import settings_from

GOOD = """\
# line 1
bundle = "part.eab"
engine = "openvino"
max_age = 0.3

[[camera]]
source = "rtsp://${CAM_PW}@10.0.0.5/live"
name = "left"
roi = [0.1, 0.1, 0.9, 0.9]

[[camera]]
source = "test://moving"
bundle = "other.eab"
confirm = "2/3"

[[sink]]
to = "jsonl:out.jsonl"
required = true
"""
FLAGS: dict[str, Any] = {"bundle": Path("part.eab"), "cameras": [{"source": "test://moving"}]}


def written(folder: Path, text: str) -> Path:
    file = folder / "line1.toml"
    file.write_text(text)
    return file


def refused(folder: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        settings_from(written(folder, text), {})
    return caught.value


def test_a_file_gives_cameras_sinks_and_limits(tmp_path: Path) -> None:
    settings = settings_from(written(tmp_path, GOOD), {})
    assert settings.bundle == tmp_path / "part.eab"  # relative to the file, not to where the service was started
    assert [camera.name for camera in settings.cameras] == ["left", ""]
    assert settings.cameras[0].roi == (0.1, 0.1, 0.9, 0.9)
    assert settings.cameras[1].bundle == tmp_path / "other.eab"
    assert (settings.sinks[0].to, settings.sinks[0].required) == ("jsonl:out.jsonl", True)
    assert (settings.engine, settings.max_age, settings.timeout) == ("openvino", 0.3, 5.0)


def test_a_flag_wins_over_the_file_and_one_that_was_not_given_does_not(tmp_path: Path) -> None:
    flags = {"engine": "onnxruntime", "max_age": None, "cameras": [{"source": "test://still"}]}
    settings = settings_from(written(tmp_path, GOOD), flags)
    assert (settings.engine, settings.max_age) == ("onnxruntime", 0.3)
    assert [camera.source for camera in settings.cameras] == ["test://still"]


def test_flags_alone_are_enough() -> None:
    assert settings_from(None, FLAGS).cameras[0].source == "test://moving"


@pytest.mark.parametrize(
    ("change", "line", "named"),
    [
        (("max_age = 0.3", "max_age = -1"), 4, "max_age = -1"),
        (("max_age = 0.3", 'max_age = "soon"'), 4, "max_age = 'soon'"),
        (("max_age = 0.3", "max_age = nan"), 4, "max_age"),
        (('confirm = "2/3"', 'confirm = "3/2"'), 14, "3/2"),
        (('confirm = "2/3"', 'frames = "newest"'), 14, "newest"),
        (("0.9, 0.9]", "0.9]"), 9, "roi"),
        (("0.9, 0.9]", "0.9, 1.9]"), 9, "not inside the picture"),
        (("required = true", 'required = "perhaps"'), 18, "required"),
        (("required = true", "require = true"), 18, "unknown key require"),
        (('name = "left"', 'name = "left side"'), 8, "name"),
        (("engine =", "motor ="), 3, "unknown key motor"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], line: int, named: str) -> None:
    assert change[0] in GOOD
    error = refused(tmp_path, GOOD.replace(*change, 1))
    assert f"line1.toml:{line}: " in error.what
    assert named in error.what
    assert error.hint


def test_an_unknown_key_of_a_camera_names_the_known_ones(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace('confirm = "2/3"', 'debounce = "2/3"'))
    assert "line1.toml:14: unknown key debounce" in error.what
    assert "confirm" in error.hint and "selftest_hours" not in error.hint


def test_the_plural_of_a_table_is_refused(tmp_path: Path) -> None:
    assert "[[camera]]" in refused(tmp_path, "cameras = []").hint


def test_text_that_is_not_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    assert "line 2" in refused(tmp_path, 'bundle = "a"\nengine = = 3\n').what


def test_a_binary_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    with pytest.raises(UsageError, match="No such file"):
        settings_from(file, {})
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        settings_from(file, {})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"cameras": FLAGS["cameras"]}, "a bundle or a store"),
        ({**FLAGS, "store": Path("store")}, "one of the two"),
        ({"bundle": Path("part.eab")}, "no camera"),
        ({**FLAGS, "frames": "sometimes"}, "sometimes"),
        ({**FLAGS, "threads": 0}, "threads = 0"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_from(None, flags)
    assert named in caught.value.what


def test_no_password_of_the_file_is_repeated(tmp_path: Path) -> None:
    secret = "hunter2"
    for text in (
        GOOD.replace('"rtsp://${CAM_PW}@10.0.0.5/live"', f'["rtsp://user:{secret}@10.0.0.5/live"]'),
        GOOD.replace("max_age = 0.3", f'max_age = "rtsp://user:{secret}@10.0.0.5/live"'),
        GOOD.replace("max_age = 0.3", f"max_age = rtsp://user:{secret}@10.0.0.5/live"),
    ):
        assert secret not in str(refused(tmp_path, text))
