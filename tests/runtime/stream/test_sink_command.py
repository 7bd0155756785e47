"""The command hook: an argument list, a time limit, no secrets of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.sink import ItemLost
from edge_anomaly_runtime.stream.sink_command import CommandSink

from .scored_items import scored


def test_the_program_gets_its_arguments_as_they_are_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMERA_PASSWORD", "canary")
    out = tmp_path / "out"
    code = "import sys, os, json; json.dump([sys.argv[2:], sys.stdin.read(), dict(os.environ)], open(sys.argv[1], 'w'))"
    CommandSink([sys.executable, "-c", code, str(out), "$(touch x)", "; rm -rf /", "a b"]).write(scored(3, "NG"))
    arguments, record, environment = json.loads(out.read_text())
    assert arguments == ["$(touch x)", "; rm -rf /", "a b"]
    assert json.loads(record)["seq"] == 3
    assert "PATH" in environment
    assert "canary" not in environment.values()


def test_a_program_that_fails_loses_the_item() -> None:
    with pytest.raises(ItemLost, match="ended with code 3"):
        CommandSink([sys.executable, "-c", "raise SystemExit(3)"]).write(scored())


def test_a_program_that_does_not_read_its_input_is_fine() -> None:
    CommandSink(["true"]).write(scored())


def test_a_program_that_runs_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    sink = CommandSink(["sh", "-c", f"(sleep 1; touch {mark}) & sleep 30"], timeout_s=0.3)
    start = monotonic()
    with pytest.raises(ItemLost, match=r"did not end within 0\.3 s"):
        sink.write(scored())
    assert monotonic() - start < 3
    sleep(1.2)
    assert not mark.exists()


def test_only_bad_parts_start_it_unless_told_otherwise() -> None:
    assert [CommandSink(["true"]).wants(scored(0, verdict)) for verdict in ("OK", "NG")] == [False, True]
    assert CommandSink(["true"], when="all").wants(scored())


@pytest.mark.parametrize("arguments", [[], ["no-such-program-here"], ["/etc/passwd"], [""]])
def test_a_program_that_is_not_there_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="There is no program"):
        CommandSink(arguments)


def test_the_name_holds_no_argument() -> None:
    assert CommandSink(["true", "--token", "canary"]).name == "command:true"
