"""A progress bar for long work, on a terminal only, on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items` and show how many of `total` are done; silent in pipes, in CI and with EDGE_ANOMALY_NO_PROGRESS."""
    if not is_interactive():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=what, total=total, console=Console(stderr=True), transient=True)


def is_interactive() -> bool:
    """Tell whether a person watches standard error."""
    return sys.stderr.isatty() and not os.environ.get("CI") and not os.environ.get("EDGE_ANOMALY_NO_PROGRESS")


def say(text: str) -> None:
    """Print one line for the user on standard error; standard output is for data."""
    print(text, file=sys.stderr, flush=True)
