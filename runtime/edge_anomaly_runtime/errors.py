"""The exceptions of all four packages, and the exit code that each one ends a command with.

EdgeAnomalyError                70  something went wrong that the user could not have avoided
├── GateError                    1  a gate was not met: parity, accuracy, self-test
├── UsageError                   2  wrong arguments, configuration or data
│   └── ImageError               2  one image file cannot be used
├── MissingRequirementError      3  an extra, a driver or a file from a hub is not there
├── ArtefactError                4  a bundle or run is damaged, incomplete or too new
├── SourceError                  5  a camera or other source is unavailable
└── OutputError                 70  the disk is full or failed while a result was written
"""

from __future__ import annotations

from pathlib import Path


class EdgeAnomalyError(Exception):
    """Base of every error that the user is meant to read: what happened, with the value, and what to do next."""

    exit_code = 70

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint


class GateError(EdgeAnomalyError):
    """A limit that was asked for was not met."""

    exit_code = 1


class UsageError(EdgeAnomalyError):
    """The arguments, the configuration or the data cannot be used as given."""

    exit_code = 2


class ImageError(UsageError):
    """One image file cannot be used; `path` names it and `reason` says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"Cannot use image {path}: {reason}.", "Replace the file or remove it from the folder.")
        self.path = str(path)
        self.reason = reason


class MissingRequirementError(EdgeAnomalyError):
    """A package, a driver or a download that the chosen option needs is not there."""

    exit_code = 3


class ArtefactError(EdgeAnomalyError):
    """A bundle or a run folder is refused: damaged, incomplete, or written by a newer version."""

    exit_code = 4


class SourceError(EdgeAnomalyError):
    """A camera or another source of images is unavailable."""

    exit_code = 5


class OutputError(EdgeAnomalyError):
    """Writing a result failed half-way (full disk, I/O error); `path` names the result."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        super().__init__(
            f"Cannot write {path}: {error.strerror or error}.",
            "Free some space or choose another folder; nothing half-written was left behind.",
        )
        self.path = str(path)


def missing_extra(option: str, package: str, extra: str) -> MissingRequirementError:
    """Return the error for an option whose package is not installed."""
    return MissingRequirementError(
        f"{option} needs the package {package}, which is not installed.",
        f'Run: pip install "edge-anomaly[{extra}]"',
    )


def did_you_mean(kind: str, value: str, choices: list[str]) -> UsageError:
    """Return the error for a value that is none of `choices`, with the nearest one named."""
    import difflib

    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return UsageError(f"Unknown {kind} {value!r}.", f"{hint}Choose one of: {', '.join(choices)}.")
