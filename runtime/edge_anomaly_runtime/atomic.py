"""Results that appear whole or not at all: a temporary name, fsync, one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError, UsageError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_DENIED_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM}
_IN_THE_WAY_ERRORS = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY}
_MOUNT_ERRORS = {errno.EBUSY, errno.EXDEV}
_TMP_PREFIX = ".tmp-"

# Temporary folders that this process is writing right now.
_OWN: set[str] = set()


@contextlib.contextmanager
def new_folder(final: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `final` when the body ends without an exception.

    The folder is created beside `final`, every file is fsynced, and one rename (an atomic exchange where `final`
    exists and `force` is set) makes it visible. A killed process leaves at most a `.tmp-` folder, which the next
    call for the same name removes.

    Raises:
        UsageError: `final` exists and `force` is not set, or its parent cannot be written.
        OutputError: the disk is full or failed.
    """
    check_free(final, force=force)
    temporary = _make_temporary(final)
    try:
        with disk_errors(final):
            yield temporary
            _fsync_tree(temporary)
            check_free(final, force=force)
            with _denied_as_usage(final):
                _publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _OWN.discard(temporary.name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the body, waiting for whoever holds it, in other containers too.

    The kernel gives the lock of a killed process back. The file is removed at the end.

    Raises:
        UsageError: the lock file cannot be created there.
        OutputError: the disk is full or failed.
    """
    handle = _lock(path, wait=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def is_free(path: Path) -> bool:
    """Tell whether nobody holds the lock file `path`."""
    try:
        handle = _lock(path, wait=False)
    except BlockingIOError:
        return False
    path.unlink()
    os.close(handle)
    return True


def _lock(path: Path, *, wait: bool) -> int:
    import fcntl  # here, as Windows has none: only engines of TensorRT are locked

    while True:
        with disk_errors(path), _denied_as_usage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before has removed the file that was waited for: a third one may hold its successor.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; one that is there is fine.

    Raises:
        UsageError: it cannot be created there.
        OutputError: the disk is full or failed.
    """
    with disk_errors(path), _denied_as_usage(path):
        path.mkdir(parents=True, exist_ok=True)


def replace_file(final: Path, data: bytes) -> None:
    """Write `data` to `final` so that a reader sees the old content or the new one, never a part.

    Raises:
        UsageError: the folder cannot be written.
        OutputError: the disk is full or failed.
    """
    temporary = final.parent / f"{_TMP_PREFIX}{final.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with disk_errors(final):
            with _denied_as_usage(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, final)
            _fsync_folder(final.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_free(final: Path, *, force: bool) -> None:
    """Raise UsageError when `final` exists and may not be replaced."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise UsageError(f"{final} exists and is not a folder.", "Choose another name.")
    if final.exists() and not force:
        raise UsageError(f"{final} exists already.", "Pass --force to replace it, or choose another name.")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk inside the body into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise OutputError(path, error) from error
        raise


@contextlib.contextmanager
def _denied_as_usage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DENIED_ERRORS:
            raise UsageError(
                f"Cannot write to {path.parent}: {error.strerror}.", "Choose a folder that you may write to."
            ) from None
        if error.errno in _IN_THE_WAY_ERRORS:
            raise UsageError(
                f"Cannot create {path}: a file or folder is in the way ({error.filename}).", "Choose another name."
            ) from None
        if error.errno in _MOUNT_ERRORS:
            raise UsageError(
                f"Cannot replace {path}: it is a mount point.", "Choose a name inside it, for instance a new folder."
            ) from None
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"Cannot create {path}: the name is too long.", "Choose a shorter one.") from None
        raise


def _make_temporary(final: Path) -> Path:
    with disk_errors(final), _denied_as_usage(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        temporary = final.parent / f"{_TMP_PREFIX}{final.name}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
        _OWN.add(temporary.name)
    return temporary


def _remove_leftovers(final: Path) -> None:
    """Remove the temporary folders of earlier writers of this name that no longer run."""
    # The whole name: `part` must not take the folder of `part-2026`, which ends in a number of its own, for a leftover.
    pattern = re.compile(re.escape(f"{_TMP_PREFIX}{final.name}-") + r"([0-9]{1,9})-[0-9a-f]{8}(-old)?")
    for entry in final.parent.iterdir():
        found = pattern.fullmatch(entry.name)
        if found and entry.name not in _OWN and not _is_another_process(int(found[1])):
            shutil.rmtree(entry, ignore_errors=True)


def leftover_name(temporary: Path) -> str | None:
    """Return the name that a temporary folder of `new_folder` was to get; None where it is none of those."""
    found = re.fullmatch(re.escape(_TMP_PREFIX) + r"(.+)-[0-9]{1,9}-[0-9a-f]{8}(-old)?", temporary.name)
    return found[1] if found else None


def _is_another_process(pid: int) -> bool:
    """Tell whether a process with this number runs and is not this one: in a container everybody is number 1."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():
        _exchange(temporary, final)
        shutil.rmtree(temporary, ignore_errors=True)  # holds the old content now
    else:
        os.rename(temporary, final)
    _fsync_folder(final.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step where the kernel can (Linux renameat2), in two renames elsewhere."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange)
        if done == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    aside = first.with_name(first.name + "-old")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _fsync_folder(Path(root))


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
