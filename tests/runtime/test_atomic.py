"""Results appear whole or not at all: after exceptions, on full disks, and under SIGKILL."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_anomaly_runtime.atomic import (
    check_free,
    disk_errors,
    is_free,
    leftover_name,
    locked,
    make_folder,
    new_folder,
    replace_file,
)
from edge_anomaly_runtime.errors import OutputError, UsageError


def _files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _write(final: Path, text: str, *, force: bool = False) -> None:
    with new_folder(final, force=force) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(text)
        (folder / "a.txt").write_text(text)


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def _child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


# new_folder


def test_folder_appears_whole_at_the_end_and_not_before(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "down" / "final"
    with new_folder(final) as folder:
        (folder / "a.txt").write_text("one")
        assert folder.parent == final.parent
        assert not final.exists()
    assert _files(tmp_path) == {"deep/down/final/a.txt": "one"}


def test_files_and_folders_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a name must not stand for files of zeros."""
    synced: list[tuple[int, bool]] = []
    final = tmp_path / "final"
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, final.exists())))
    _write(final, "new")
    inside = [path.stat().st_ino for path in (final / "a.txt", final / "sub/b.txt", final / "sub", final)]
    assert {(inode, False) for inode in inside} <= set(synced)
    assert synced[-1] == (tmp_path.stat().st_ino, True)
    synced.clear()
    replace_file(tmp_path / "x.png", b"data")
    assert [inode for inode, _ in synced] == [(tmp_path / "x.png").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "final") as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_exception_under_force_leaves_the_old_folder(tmp_path: Path) -> None:
    _write(tmp_path / "final", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "final", force=True) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert _files(tmp_path) == {"final/a.txt": "old", "final/sub/b.txt": "old"}


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    _write(tmp_path / "final", "old")
    with pytest.raises(UsageError, match="final exists already") as caught, new_folder(tmp_path / "final"):
        pytest.fail("the body must not run")
    assert "--force" in caught.value.hint
    assert set(_files(tmp_path).values()) == {"old"}


def test_force_replaces_all_of_the_old_content(tmp_path: Path) -> None:
    _write(tmp_path / "final", "old")
    (tmp_path / "final" / "only-in-the-old-one.txt").write_text("old")
    _write(tmp_path / "final", "new", force=True)
    assert _files(tmp_path) == {"final/a.txt": "new", "final/sub/b.txt": "new"}


def test_force_without_an_old_folder_is_fine(tmp_path: Path) -> None:
    _write(tmp_path / "final", "new", force=True)
    assert _files(tmp_path) == {"final/a.txt": "new", "final/sub/b.txt": "new"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_in_the_way_is_refused_and_kept(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(UsageError, match=f"{name} exists and is not a folder"), new_folder(tmp_path / name):
            pytest.fail("the body must not run")
        with pytest.raises(UsageError):
            check_free(tmp_path / name, force=force)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_another_process_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "final") as folder:
        (folder / "a.txt").write_text("late")
        _write(tmp_path / "final", "early")
    assert _files(tmp_path) == {"final/a.txt": "early", "final/sub/b.txt": "early"}


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead, alive = f".tmp-final-{_dead_pid()}-0123abcd", f".tmp-final-{os.getppid()}-0123abcd"
    for name in (dead, alive, ".tmp-other-1-0123abcd", ".tmp-final-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.txt").write_text("half")
    _write(tmp_path / "final", "new")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {alive, ".tmp-other-1-0123abcd", ".tmp-final-notes", "final"}


@pytest.mark.parametrize("other", ["final-2026", "final-20261121233714", "final-7-old"])
def test_a_living_writer_of_a_longer_name_is_left_alone(tmp_path: Path, other: str) -> None:
    with new_folder(tmp_path / other) as folder:
        (folder / "a.txt").write_text("long")
        _write(tmp_path / "final", "short")
        assert (folder / "a.txt").read_text() == "long"
    assert _files(tmp_path / other) == {"a.txt": "long"}


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    with new_folder(tmp_path / "final", force=True) as first:
        (first / "a.txt").write_text("first")
        _write(tmp_path / "final", "second", force=True)
        assert _files(tmp_path / "final") == {"a.txt": "second", "sub/b.txt": "second"}
    assert _files(tmp_path) == {"final/a.txt": "first"}


def test_the_folder_is_there_at_every_moment_of_a_replacement(tmp_path: Path) -> None:
    final = tmp_path / "final"
    _write(final, "0")
    seen_enough = threading.Event()

    def replace_for_ever() -> None:
        for generation in itertools.count():
            _write(final, str(generation), force=True)
            if generation >= 30 and seen_enough.is_set():
                return

    writer = threading.Thread(target=replace_for_ever)
    writer.start()
    absent = sum(not (final / "a.txt").exists() for _ in range(5000))
    seen_enough.set()
    writer.join()
    assert int((final / "a.txt").read_text()) >= 30
    assert absent == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange two folders in one step")
def test_a_replacement_is_one_step_and_not_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "final", "old")
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail(f"renamed {names}"))
    _write(tmp_path / "final", "new", force=True)
    assert _files(tmp_path) == {"final/a.txt": "new", "final/sub/b.txt": "new"}


class NoExchange:
    """A C library that lacks renameat2, or whose file system cannot exchange."""

    def __init__(self, error: int | None) -> None:
        if error is not None:
            self.renameat2 = lambda *arguments: ctypes.set_errno(error) or -1


@pytest.mark.parametrize("error", [None, errno.EINVAL, errno.ENOSYS])
def test_without_an_atomic_exchange_the_folder_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    _write(tmp_path / "final", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **keywords: NoExchange(error))
    _write(tmp_path / "final", "new", force=True)
    assert _files(tmp_path) == {"final/a.txt": "new", "final/sub/b.txt": "new"}


# Places that cannot be written


@pytest.mark.parametrize("parent", ["file", "file/below"])
def test_a_file_as_parent_is_a_usage_error_that_names_it(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("mine")
    final = tmp_path / parent / "final"
    with pytest.raises(UsageError, match=f"{tmp_path}/file"), new_folder(final):
        pytest.fail("the body must not run")
    with pytest.raises(UsageError, match=f"{tmp_path}/file"):
        replace_file(final, b"data")
    assert _files(tmp_path) == {"file": "mine"}


def test_a_name_that_is_too_long_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError), new_folder(tmp_path / ("x" * 250)):
        pytest.fail("the body must not run")
    with pytest.raises(UsageError):
        replace_file(tmp_path / ("x" * 250), b"data")
    assert list(tmp_path.iterdir()) == []


_MOUNT = """
import subprocess, sys
from pathlib import Path
from edge_anomaly_runtime.atomic import new_folder, replace_file
from edge_anomaly_runtime.errors import EdgeAnomalyError

folder, options, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", f"remount,bind,{options}", folder], check=True)
for write in (lambda: new_folder(folder / name, force=True).__enter__(), lambda: replace_file(folder / name, b"x")):
    try:
        write()
        print("written")
    except EdgeAnomalyError as error:
        print(type(error).__name__, error.what)
"""


def _in_mount_namespace(code: str, *arguments: object) -> str:
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", code, *map(str, arguments)]
    if os.geteuid() == 0:
        command.remove("--map-root-user")
    try:
        subprocess.run([*command[: command.index(sys.executable)], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine allows no mount namespace")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_read_only_file_system_is_a_usage_error_that_names_the_folder(tmp_path: Path) -> None:
    lines = _in_mount_namespace(_MOUNT, tmp_path, "ro", "final").splitlines()
    expected = f"UsageError Cannot write to {tmp_path}: Read-only file system."
    assert lines == [expected, expected]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_usage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"), new_folder(tmp_path / "final"):
        pytest.fail("the body must not run")


_MOUNT_POINT = """
import subprocess, sys
from pathlib import Path
from edge_anomaly_runtime.atomic import new_folder
from edge_anomaly_runtime.errors import EdgeAnomalyError

final = Path(sys.argv[1])
final.mkdir()
subprocess.run(["mount", "--bind", final, final], check=True)
try:
    with new_folder(final, force=True) as folder:
        (folder / "a.txt").write_text("new")
except EdgeAnomalyError as error:
    print(type(error).__name__)
"""


def test_a_mount_point_cannot_be_replaced_and_that_is_a_usage_error(tmp_path: Path) -> None:
    """What `docker run -v $PWD/out:/out` and `--out /out --force` come to."""
    assert _in_mount_namespace(_MOUNT_POINT, tmp_path / "out").splitlines() == ["UsageError"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Full disks

_FULL_DISK = """
import resource, sys
from pathlib import Path
from edge_anomaly_runtime.atomic import new_folder, replace_file
from edge_anomaly_runtime.cli import run

final, kind = Path(sys.argv[1]), sys.argv[2]

def app():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    if kind == "file":
        replace_file(final, bytes(1_000_000))
    with new_folder(final, force=True) as folder:
        (folder / "a.bin").write_bytes(bytes(90_000))
        (folder / "b.bin").write_bytes(bytes(1_000_000))

run(app)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_full_disk_ends_with_code_70_names_the_result_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    done = _child(_FULL_DISK, tmp_path / "final", kind)
    assert done.returncode == 70
    assert done.stdout == ""
    assert f"Error: Cannot write {tmp_path}/final: File too large." in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    _write(tmp_path / "final", "old")
    assert _child(_FULL_DISK, tmp_path / "final", "folder").returncode == 70
    assert _files(tmp_path) == {"final/a.txt": "old", "final/sub/b.txt": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_failing_disks_become_output_errors(number: int) -> None:
    with pytest.raises(OutputError, match=r"Cannot write out\.eab") as caught, disk_errors(Path("out.eab")):
        raise OSError(number, os.strerror(number))
    assert caught.value.path == "out.eab"


def test_other_errors_pass_through() -> None:
    with pytest.raises(FileNotFoundError), disk_errors(Path("out.eab")):
        raise FileNotFoundError(errno.ENOENT, "no such file")


# SIGKILL at random moments

# Forks a writer, kills it within the time of two and a half writes, looks at the folder; prints how many were torn and
# how many left a temporary folder. `atomic`: new_folder; `naive`: the same files written in place.
_KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from edge_anomaly_runtime.atomic import new_folder

final, how, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
NAMES = ["a", "b", "sub/c", "sub/d"]

def fill(folder, generation):
    (folder / "sub").mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(generation.encode() * 20_000)

def write(generation):
    if how == "atomic":
        with new_folder(final, force=True) as folder:
            fill(folder, generation)
    else:
        fill(final, generation)

def write_for_ever(seed):
    count = 0
    while True:
        write(f"{seed:04}-{count:04};")
        count += 1

def is_whole():
    try:
        contents = [(final / name).read_bytes() for name in NAMES]
    except OSError:
        return False
    return all(content == contents[0] for content in contents) and len(contents[0]) == 20_000 * 10

random.seed(0)
final.mkdir()
durations = []
for count in range(5):
    start = time.perf_counter()
    write(f"0000-{count:04};")
    durations.append(time.perf_counter() - start)
torn = leftovers = 0
for seed in range(1, kills + 1):
    pid = os.fork()
    if pid == 0:
        write_for_ever(seed)
    time.sleep(random.uniform(0.1, 2.5) * sorted(durations)[2])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    torn += not is_whole()
    leftovers += any(entry.name.startswith(".tmp-") for entry in final.parent.iterdir())
writer = int(final.joinpath("a").read_bytes()[:4] or 0)
print(json.dumps({"torn": torn, "leftovers": leftovers, "writer": writer}))
"""


def _kill_writers(final: Path, how: str, kills: int) -> dict[str, int]:
    done = _child(_KILLER, final, how, kills)
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout)
    return report


def test_a_killed_writer_never_leaves_a_torn_folder(tmp_path: Path) -> None:
    # How far a writer gets before its kill depends on the machine's load: more rounds until both kinds were seen.
    for _ in range(6):
        report = _kill_writers(tmp_path / "final", "atomic", 50)
        assert report["torn"] == 0
        if report["leftovers"] and report["writer"]:
            break
    # Without these two the test would prove nothing: kills landed inside a write, and writes did get through.
    assert report["leftovers"] > 0
    assert report["writer"] > 0
    _write(tmp_path / "final", "last", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["final"], "leftovers of the killed writers are removed"


def test_writing_in_place_is_torn_by_the_same_kills(tmp_path: Path) -> None:
    assert _kill_writers(tmp_path / "final", "naive", 30)["torn"] > 0


# replace_file


def test_replace_file_makes_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.png"
    replace_file(target, b"one")
    replace_file(target, b"two")
    assert _files(tmp_path) == {"new/x.png": "two"}


def test_replace_file_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "x.txt").symlink_to(tmp_path / "mine.txt")
    replace_file(tmp_path / "x.txt", b"new")
    assert _files(tmp_path) == {"mine.txt": "mine", "x.txt": "new"}
    assert not (tmp_path / "x.txt").is_symlink()


def test_replace_file_onto_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UsageError, match=r"x\.png"):
        replace_file(tmp_path / "x.png", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_make_folder_creates_parents_and_says_what_is_in_the_way(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="file"):
        make_folder(tmp_path / "file/below")


# Locks


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new/part.lock"
    with locked(path):
        assert not is_free(path)
    assert not path.exists()
    assert is_free(path)
    assert not path.exists()


def test_who_waits_does_not_get_the_file_that_was_removed(tmp_path: Path) -> None:
    """All at once: without the second look two would hold locks on two files of the same name."""
    path, inside, most = tmp_path / "part.lock", [0], [0]

    def work(_: int) -> None:
        with locked(path):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == [1]
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "part.lock"
    code = "import os, pathlib, sys; from edge_anomaly_runtime.atomic import locked\n"
    _child(code + "with locked(pathlib.Path(sys.argv[1])): os._exit(1)", path)
    assert path.exists()
    assert is_free(path)


def test_a_lock_where_nothing_can_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="in the way"), locked(tmp_path / "file/part.lock"):
        pass


@pytest.mark.parametrize(
    ("name", "final"),
    [
        (".tmp-part-12-0123abcd", "part"),
        (".tmp-part-2026-12-0123abcd", "part-2026"),
        (".tmp-part-12-0123abcd-old", "part"),
        ("part-12-0123abcd", None),
        (".tmp-mine", None),
    ],
)
def test_a_temporary_folder_tells_what_it_was_to_become(tmp_path: Path, name: str, final: str | None) -> None:
    assert leftover_name(tmp_path / name) == final
