"""A Jetson's release and power mode, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_anomaly_runtime import jetson

RELEASE = "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13 2024\n"


def test_the_release_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "release").write_text(RELEASE)
    assert jetson.l4t_release(tmp_path / "release") == "36.4.0"
    (tmp_path / "release").write_text("something else")
    assert jetson.l4t_release(tmp_path / "release") is None
    assert jetson.l4t_release(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("text", "mode"),
    [("NV Power Mode: MAXN\n0\n", "MAXN"), ("NV Fan Mode:quiet\nNV Power Mode: 15W\n1\n", "15W"), ("NVPM ERROR", None)],
)
def test_the_power_mode_is_a_name(text: str, mode: str | None) -> None:
    assert jetson.parse_power_mode(text) == mode


def test_nvpmodel_is_asked_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(jetson, "_NVPMODEL_FOLDER", str(tmp_path))
    assert jetson.power_mode() is None
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 2\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    assert jetson.power_mode() == "MAXN_SUPER"
