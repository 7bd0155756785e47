"""The store of a device: whole versions, one in use, one step back, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_anomaly_runtime import bundle as eab
from edge_anomaly_runtime import cli, store
from edge_anomaly_runtime.errors import ArtefactError, EdgeAnomalyError, GateError, OutputError, UsageError
from edge_anomaly_runtime.selftest_child import selftest_in_child
from edge_anomaly_runtime.store import Gate

from .conftest import MakeBundle


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Pass every self-test at once; the list holds what was tested."""
    tested: list[Path] = []

    def passed(path: Path, **_: object) -> dict[str, Any]:
        tested.append(path)
        return {}

    monkeypatch.setattr(store, "selftest_in_child", passed)
    return tested


def ids(root: Path) -> list[str]:
    return [version.id for version in store.read_state(root).versions]


# Installing, activating, going back


def test_install_checks_on_a_real_engine_and_leaves_alone_what_is_in_use(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    first = store.install_bundle(root, make_bundle(1), gate=Gate(engine="onnxruntime", threads=1))
    state = store.read_state(root)
    assert (state.current, state.seq, [version.seq for version in state.versions]) == (None, -1, [1])
    assert first.id.startswith("part-1-")
    assert eab.read_bundle(root / "versions" / first.id).manifest.seq == 1
    with pytest.raises(UsageError, match="No bundle is in use"):
        store.start_current(root)


def test_activate_moves_on_and_rollback_moves_one_step_back(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    one, two = (store.install_bundle(root, make_bundle(seq)) for seq in (1, 2))
    store.activate_bundle(root, one.id)
    store.activate_bundle(root, "part-2")
    state = store.read_state(root)
    assert (state.current, state.previous, state.probation, state.seq) == (two.id, one.id, 0, 2)
    assert (root / "current").resolve() == (root / "versions" / two.id).resolve()
    assert untested == [root / "versions" / version.id for version in (one, two, one, two)]
    assert store.roll_back(root).id == one.id
    state = store.read_state(root)
    assert (state.current, state.previous, state.probation, state.seq) == (one.id, None, None, 2)
    assert os.readlink(root / "current") == f"versions/{one.id}"
    with pytest.raises(UsageError, match="no previous bundle"):
        store.roll_back(root)


def test_activating_what_is_active_changes_nothing(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    one = store.install_bundle(tmp_path / "s", make_bundle(1))
    for _ in range(2):
        store.activate_bundle(tmp_path / "s", one.id)
    assert store.read_state(tmp_path / "s").previous is None


def test_a_lower_seq_is_refused_for_ever_unless_it_is_allowed(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    one, two, three = (store.install_bundle(root, make_bundle(seq)) for seq in (1, 2, 3))
    store.activate_bundle(root, three.id)
    with pytest.raises(ArtefactError, match="has seq 2; 3 was in use") as caught:
        store.activate_bundle(root, two.id)
    assert "--allow-downgrade" in caught.value.hint
    store.activate_bundle(root, two.id, allow_downgrade=True)
    with pytest.raises(ArtefactError, match="has seq 1; 3 was in use"):
        store.activate_bundle(root, one.id)
    assert store.read_state(root).current == two.id


def test_two_old_versions_are_kept_besides_those_in_use(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    for seq in (1, 2):
        store.activate_bundle(root, store.install_bundle(root, make_bundle(seq)).id)
    for seq in range(3, 8):
        store.install_bundle(root, make_bundle(seq))
    assert [version.seq for version in store.read_state(root).versions] == [1, 2, 5, 6, 7]
    assert sorted(entry.name for entry in (root / "versions").iterdir()) == sorted(ids(root))


def test_installing_again_repairs_a_damaged_version(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root, source = tmp_path / "store", make_bundle(1)
    version = store.install_bundle(root, source)
    (root / "versions" / version.id / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match=r"model\.onnx is damaged"):
        store.activate_bundle(root, version.id)
    assert store.install_bundle(root, source).id == version.id
    store.activate_bundle(root, version.id)
    assert ids(root) == [version.id]


def test_a_version_that_was_replaced_as_a_whole_is_refused(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    """Every hash in the folder is right; only the name of the folder tells."""
    root = tmp_path / "store"
    version = store.install_bundle(root, make_bundle(1))
    shutil.rmtree(root / "versions" / version.id)
    shutil.copytree(make_bundle(9), root / "versions" / version.id)
    with pytest.raises(ArtefactError, match="holds another bundle, part-9"):
        store.activate_bundle(root, version.id)


# What is refused


def test_a_bundle_that_fails_its_selftest_is_not_installed(make_bundle: MakeBundle, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with pytest.raises(GateError, match="1 of 3 golden images differ"):
        store.install_bundle(root, make_bundle(1, golden=60.0), gate=Gate(engine="onnxruntime", threads=1))
    assert ids(root) == []
    assert list((root / "versions").iterdir()) == []


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "..", ".", "", "a\nb", "-rf", "x" * 300, "naïve ☃"])
def test_names_in_a_manifest_cannot_leave_the_store(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path], name: str
) -> None:
    root = tmp_path / "deep" / "store"
    version = store.install_bundle(root, make_bundle(1, name=name))
    assert (root / "versions" / version.id / eab.MANIFEST).is_file()
    assert sorted(entry.name for entry in root.iterdir()) == ["lock", "state.json", "versions"]
    store.activate_bundle(root, version.id)
    assert store.start_current(root) == root / "versions" / version.id


@pytest.mark.parametrize("wanted", ["", "..", "../..", "/etc", "versions", "part-1/../.."])
def test_ids_are_looked_up_and_never_used_as_paths(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path], wanted: str
) -> None:
    store.install_bundle(tmp_path / "s", make_bundle(1))
    with pytest.raises(UsageError, match="No installed bundle begins with"):
        store.activate_bundle(tmp_path / "s", wanted)


@pytest.mark.parametrize("kind", ["symbolic link", "fifo", "extra file", "traversal"])
def test_hostile_bundles_are_refused_before_anything_is_copied(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path], kind: str
) -> None:
    source = make_bundle(1)
    if kind == "symbolic link":
        (source / "model.onnx").rename(tmp_path / "model.onnx")
        (source / "model.onnx").symlink_to(tmp_path / "model.onnx")
    elif kind == "fifo":
        (source / "model.onnx").unlink()
        os.mkfifo(source / "model.onnx")
    elif kind == "extra file":
        (source / "golden/run.sh").write_text("#!/bin/sh")
    else:
        manifest = json.loads((source / eab.MANIFEST).read_text())
        manifest["files"]["../evil"] = manifest["files"]["model.onnx"]
        data = json.dumps(manifest).encode()
        (source / eab.MANIFEST).write_bytes(data)
        (source / eab.MANIFEST_DIGEST).write_bytes(eab.digest_line(data))
    with pytest.raises(ArtefactError):
        store.install_bundle(tmp_path / "store", source)
    assert list((tmp_path / "store/versions").iterdir()) == []
    assert untested == []


def test_hostile_stores_are_refused(make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]) -> None:
    (tmp_path / "elsewhere").mkdir()
    linked, locked, lost = (tmp_path / name for name in ("linked", "locked", "lost"))
    for root in (linked, locked):
        root.mkdir()
    (linked / "versions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="is not a plain folder"):
        store.install_bundle(linked, make_bundle(1))
    (locked / "lock").symlink_to(tmp_path / "elsewhere" / "target")
    with pytest.raises(UsageError, match="Cannot lock"):
        store.install_bundle(locked, make_bundle(1))
    store.install_bundle(lost, make_bundle(1))
    (lost / "state.json").unlink()
    with pytest.raises(ArtefactError, match=r"state\.json is missing, but there are versions"):
        store.install_bundle(lost, make_bundle(2))
    assert len(list((lost / "versions").iterdir())) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{",
        '{"schema":"edge-anomaly.store/2"}',
        '{"schema":"edge-anomaly.store/1","current":"../../x"}',
    ],
)
def test_a_damaged_state_is_an_artefact_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"state\.json cannot be read"):
        store.start_current(tmp_path)


def test_a_mistyped_store_is_not_made(tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.activate_bundle(tmp_path / "typo", "part"),
        lambda: store.roll_back(tmp_path / "typo"),
        lambda: store.start_current(tmp_path / "typo"),
        lambda: store.read_state(tmp_path / "typo"),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="There is no bundle store"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_trusted_key_makes_signatures_required(make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]) -> None:
    pytest.importorskip("cryptography")
    from edge_anomaly_runtime.signing import sign_bundle

    from .test_signing import write_keys

    root, source = tmp_path / "store", make_bundle(1)
    unsigned = store.install_bundle(root, source)
    assert unsigned.key_id is None
    private, _ = write_keys(tmp_path)
    shutil.copytree(tmp_path / "trust", root / "trust")
    with pytest.raises(ArtefactError, match="a signature is required"):
        store.install_bundle(root, make_bundle(2))
    with pytest.raises(ArtefactError, match="a signature is required"):
        store.activate_bundle(root, unsigned.id)
    key_id = sign_bundle(source, private)
    assert store.install_bundle(root, source).key_id == key_id
    store.activate_bundle(root, unsigned.id)
    (root / "versions" / unsigned.id / eab.MANIFEST_SIGNATURE).unlink()
    with pytest.raises(ArtefactError, match="a signature is required"):
        store.install_bundle(root, root / "versions" / unsigned.id)
    assert store.activate_bundle(
        root, store.install_bundle(root, make_bundle(3), gate=Gate(policy="off")).id, gate=Gate(policy="off")
    )


def test_a_full_disk_leaves_the_store_as_it_was(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    store.activate_bundle(root, store.install_bundle(root, make_bundle(1)).id)
    before = (root / "state.json").read_bytes()
    real = os.fsync

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        store.install_bundle(root, make_bundle(2))
    assert (root / "state.json").read_bytes() == before
    assert [entry.name for entry in (root / "versions").iterdir()] == ids(root)


# Probation


def test_a_crash_on_probation_brings_the_previous_version_back(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    one, two = (store.install_bundle(root, make_bundle(seq)) for seq in (1, 2))
    store.activate_bundle(root, one.id)
    assert store.start_current(root).name == one.id
    store.commit_current(root, one.id)
    assert store.start_current(root).name == one.id, "proved itself: may be loaded any number of times"
    store.activate_bundle(root, two.id)
    assert store.start_current(root).name == two.id
    assert store.start_current(root).name == one.id, "the load before this one was never committed: it has crashed"
    assert f"{two.id} ended while it was on probation: back to {one.id}" in capsys.readouterr().err


def test_an_orderly_stop_on_probation_is_no_crash(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    one, two = (store.install_bundle(root, make_bundle(seq)) for seq in (1, 2))
    store.activate_bundle(root, one.id)
    store.activate_bundle(root, two.id)
    for _ in range(3):
        assert store.start_current(root).name == two.id
        store.release_current(root, two.id)
    store.commit_current(root, one.id)
    assert store.read_state(root).probation == 0, "another version's word does not count"
    store.start_current(root)
    store.commit_current(root, two.id)
    assert store.read_state(root).probation is None


def test_without_a_sound_previous_version_the_one_in_use_stays(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    one, two = (store.install_bundle(root, make_bundle(seq)) for seq in (1, 2))
    store.activate_bundle(root, one.id)
    for _ in range(2):
        assert store.start_current(root).name == one.id
    store.activate_bundle(root, two.id)
    (root / "versions" / one.id / "model.onnx").unlink()
    for _ in range(3):
        assert store.start_current(root).name == two.id


# Kills

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from edge_anomaly_runtime import store
from edge_anomaly_runtime.bundle import read_bundle

root, sources, rounds = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:-1]], int(sys.argv[-1])
store.selftest_in_child = lambda path, **_: {}
store.activate_bundle(root, store.install_bundle(root, sources[0]).id)
rng, torn, midway = random.Random(0), [], 0
for number in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            version = store.install_bundle(root, sources[number % len(sources)])
            store.activate_bundle(root, version.id, allow_downgrade=True)
            number += 1
    time.sleep(rng.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    midway += any((root / "versions").glob(".tmp-*"))
    try:
        state = store.read_state(root)
        for version in state.versions:
            if version.id in (state.current, state.previous):
                assert read_bundle(root / "versions" / version.id).manifest.seq == version.seq
        assert state.current is not None
    except Exception as error:
        torn.append(repr(error))
store.install_bundle(root, sources[0])
left = [entry.name for entry in (*root.glob(".tmp-*"), *(root / "versions").glob(".tmp-*"))]
print(json.dumps({"torn": torn, "midway": midway, "left": left}))
"""


def test_50_kills_leave_whole_versions_and_the_next_install_cleans_up(make_bundle: MakeBundle, tmp_path: Path) -> None:
    sources = [make_bundle(seq) for seq in (1, 2, 3)]
    arguments = [str(path) for path in (tmp_path / "store", *sources)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments, "50"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["torn"] == []
    assert report["left"] == []
    assert report["midway"] >= 5, "the kills must land while something is being written"


def test_leftovers_are_removed_and_known_versions_are_not(
    make_bundle: MakeBundle, tmp_path: Path, untested: list[Path]
) -> None:
    root = tmp_path / "store"
    version = store.install_bundle(root, make_bundle(1))
    for leftover in ("versions/.tmp-part-1-abc-77-00112233", "versions/half"):
        (root / leftover).mkdir()
        (root / leftover / "model.onnx").touch()
    (root / ".tmp-state.json-77-00112233").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    (root / "versions/link").symlink_to(tmp_path / "mine")
    store.install_bundle(root, make_bundle(2))
    assert sorted(entry.name for entry in (root / "versions").iterdir()) == sorted(ids(root))
    assert version.id in ids(root)
    assert not list(root.glob(".tmp-*"))
    assert (tmp_path / "mine/file").exists()


# The child process


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        ("kill -SEGV $$", ArtefactError, "died of SIGSEGV"),
        ("sleep 60", ArtefactError, r"did not end within 0\.5 s"),
        ("echo 'Error: No engine.\nInstall one.' >&2; exit 3", EdgeAnomalyError, r"^No engine\.\nInstall one\.$"),
        ("exit 9", ArtefactError, "ended with code 9"),
    ],
)
def test_an_engine_that_crashes_or_hangs_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[EdgeAnomalyError], text: str
) -> None:
    engine = tmp_path / "python"
    engine.write_text(f"#!/bin/sh\n{script}\n")
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    with pytest.raises(error, match=text):
        selftest_in_child(tmp_path / "part.eab", seconds=0.5 if "sleep" in script else 20)


def test_an_engine_that_eats_the_memory_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hungry = tmp_path / "python"
    hungry.write_text(f"#!{sys.executable}\nimport time\nx = bytearray(300_000_000)\ntime.sleep(30)\n")
    hungry.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hungry))
    with pytest.raises(ArtefactError, match=r"took \d+ MB, more than 200"):
        selftest_in_child(tmp_path / "part.eab", memory_mb=200)


# The command line


def test_the_commands_from_install_to_rollback(
    make_bundle: MakeBundle,
    tmp_path: Path,
    untested: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-anomaly", "bundle", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.run(cli.app)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    root = tmp_path / "store"
    code, out, err = run("install", make_bundle(1), "--store", root, "--activate", "--json")
    first = json.loads(out)
    assert (code, first["active"], first["seq"], err) == (0, True, 1, f"active: {first['id']}\n")
    code, _, err = run("install", make_bundle(2), "--store", root)
    assert (code, err.startswith("installed: part-2-")) == (0, True)
    assert run("activate", "part-2", "--store", root)[0] == 0
    code, out, err = run("list", "--store", root)
    assert [line.split("  ")[1:] for line in out.splitlines()] == [
        ["int8", "not signed", "previous"],
        ["int8", "not signed", "active, on probation"],
    ]
    assert "2 bundles in" in err
    assert json.loads(run("list", "--store", root, "--json")[1])["schema"] == "edge-anomaly.store/1"
    assert run("rollback", "--store", root)[0] == 0
    assert run("activate", "part-9", "--store", root)[0] == 2
    assert run("install", make_bundle(3), "--store", root, "--policy", "maybe")[0] == 2
    code, _, err = run("install", make_bundle(0), "--store", root, "--activate")
    assert (code, "seq 0; 2 was in use" in err) == (4, True)
