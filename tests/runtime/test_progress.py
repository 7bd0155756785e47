"""Progress is for people at a terminal, on standard error only."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from edge_anomaly_runtime.progress import is_interactive, say, track


class Terminal(io.StringIO):
    """Standard error with a person in front of it."""

    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # Not a fixture: pytest puts its own standard error back between set-up and test.
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("EDGE_ANOMALY_NO_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_track_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "counting", 3)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_track_shows_a_bar_on_a_terminal_and_nothing_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _terminal(monkeypatch)
    assert list(track(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert "counting" in terminal.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("variable", ["CI", "EDGE_ANOMALY_NO_PROGRESS"])
def test_either_variable_turns_progress_off(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    terminal = _terminal(monkeypatch)
    assert is_interactive()
    monkeypatch.setenv(variable, "1")
    assert not is_interactive()
    assert list(track([1], "counting", 1)) == [1]
    assert terminal.getvalue() == ""


def test_track_is_lazy() -> None:
    def endless() -> Iterator[int]:
        yield 1
        raise AssertionError("read ahead")

    assert next(track(endless(), "counting", 2)) == 1


def test_say_writes_one_line_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")
