"""JSON lines on standard output or in a file that rotates; a line is whole or it is not there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from time import monotonic

from edge_anomaly_runtime.errors import UsageError

from .frame import Scored
from .record import record_line
from .sink import When, is_wanted

# NG records reach the disk, not only the kernel, within this time; every record on its own would wear an SD card out.
_SYNC_EVERY_S = 1.0

_PIECE = 64 * 1024


class StdoutSink:
    """Standard output, one flushed line per item."""

    needs_pixels = False

    def __init__(self, *, when: When = "all", descriptor: int = 1) -> None:
        self.name = "stdout"
        self._when = when
        self._descriptor = descriptor
        self._is_torn = False

    def wants(self, item: Scored) -> bool:
        return is_wanted(self._when, item)

    def open(self) -> None: ...

    def write(self, item: Scored) -> None:
        line = record_line(item)
        # After a full disk or a closed pipe the next line must not continue a torn one.
        rest = memoryview(b"\n" + line if self._is_torn else line)
        while rest:
            written = os.write(self._descriptor, rest)
            rest = rest[written:]
            self._is_torn = bool(rest)

    def close(self) -> None: ...


class JsonlSink:
    """A file with one line per item, `out.jsonl`; full ones are kept as `out.000001.jsonl` and so on, the newest last.

    max_bytes: size at which the next file begins. max_age_s: the same for its age since this process opened it.
    keep: how many full files stay. One write per line; what a crash or a full disk left of a line is cut off before
    the next one. `cut` counts such lines.

    Raises:
        UsageError: the file is there and holds something else.
    """

    needs_pixels = False

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 100_000_000,
        max_age_s: float = 86_400.0,
        keep: int = 10,
        when: When = "all",
    ) -> None:
        self.name = f"jsonl:{path.name}"
        self.cut = 0
        self._path = path
        self._max_bytes, self._max_age_s, self._keep, self._when = max_bytes, max_age_s, keep, when
        self._full_name = re.compile(re.escape(path.stem) + r"\.([0-9]{6,})" + re.escape(path.suffix))
        self._file: int | None = None
        self._size = 0
        self._opened_at = self._synced_at = 0.0
        self._is_dirty = False
        _check_is_ours(path)

    def wants(self, item: Scored) -> bool:
        return is_wanted(self._when, item)

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UsageError(f"{self._path} is not a plain file.", "Choose a name for a file.")
            _lock(file, self._path)
            self._size = self._cut_torn_line(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._opened_at = self._synced_at = monotonic()

    def write(self, item: Scored) -> None:
        line = record_line(item)
        if self._size and (self._size + len(line) > self._max_bytes or monotonic() - self._opened_at > self._max_age_s):
            self._rotate()
        if self._file is None:
            raise OSError(errno.EBADF, "the file is not open")
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self._sync(item)

    def close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self._is_dirty:
                os.fsync(file)
                self._is_dirty = False
        finally:
            os.close(file)

    def _sync(self, item: Scored) -> None:
        self._is_dirty = self._is_dirty or item.record.get("verdict") == "NG"
        if self._file is not None and self._is_dirty and monotonic() - self._synced_at >= _SYNC_EVERY_S:
            os.fsync(self._file)
            self._is_dirty, self._synced_at = False, monotonic()

    def _rotate(self) -> None:
        """Begin a new file. Numbers, not times, name the full ones: a clock may jump back."""
        self.close()
        full = self._full_files()
        number = full[-1][0] + 1 if full else 1
        os.rename(self._path, self._path.with_name(f"{self._path.stem}.{number:06}{self._path.suffix}"))
        for _, old in full[: max(0, len(full) + 1 - self._keep)]:
            with suppress(FileNotFoundError):
                old.unlink()
        self.open()

    def _full_files(self) -> list[tuple[int, Path]]:
        found = ((self._full_name.fullmatch(entry.name), entry) for entry in self._path.parent.iterdir())
        return sorted((int(match[1]), entry) for match, entry in found if match)

    def _cut_torn_line(self, file: int) -> int:
        """Cut the file after its last newline and return its size."""
        size = os.fstat(file).st_size
        end = size
        while end > 0:
            start = max(0, end - _PIECE)
            at = os.pread(file, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end != size:
            os.ftruncate(file, end)
            self.cut += 1
        return end


def _check_is_ours(path: Path) -> None:
    """Refuse a file that does not begin like JSON lines: repairing would cut it."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Give the name of a file, such as jsonl:out.jsonl.")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(1)
        if start not in (b"", b"{", b"\0"):
            raise UsageError(f"{path} is there and holds no JSON lines.", "Choose another name.")


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"Another process writes to {path}.", "Give each stream a file of its own.") from None
