"""The bundles of a device: versions side by side, one of them in use, the one before it at hand.

    STORE/
      state.json       what is in use; the only truth
      versions/ID/     bundles, never changed once they are there
      trust/*.pem      public keys; with one there, bundles must be signed
      current          link for people, made from state.json
      lock

A version appears by one rename and comes into use by one other, so a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .atomic import disk_errors, make_folder, new_folder, replace_file
from .bundle import MANIFEST, MANIFEST_DIGEST, MANIFEST_SIGNATURE, Bundle, digest_line, read_bundle, read_signature
from .errors import ArtefactError, UsageError
from .progress import say
from .selftest_child import DEFAULT_MEMORY_MB, DEFAULT_SECONDS, selftest_in_child
from .signing import Policy, check_signature, read_trust

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SCHEMA = "edge-anomaly.store/1"
STATE, VERSIONS, TRUST, LOCK, CURRENT = "state.json", "versions", "trust", "lock", "current"

_KEEP = 2
_MAX_BYTES = 2 << 30
_LOCK_S = 180.0


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Version(_Model):
    """One installed bundle. `key_id`: who signed it, null where no signature was asked for."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    name: str
    seq: int
    precision: str
    manifest_sha256: str
    key_id: str | None = None


class StoreState(_Model):
    """The content of state.json.

    seq: the highest `seq` that was ever in use; lower ones need --allow-downgrade. probation: how often the current
    version was loaded without having proved itself yet, null once it has. versions: oldest first.
    """

    schema_: str = Field(SCHEMA, alias="schema")
    current: str | None = None
    previous: str | None = None
    probation: int | None = None
    seq: int = -1
    versions: tuple[Version, ...] = ()

    def version(self, version_id: str) -> Version | None:
        """Return the version with this id, None if it is not installed."""
        return next((version for version in self.versions if version.id == version_id), None)


@dataclass(frozen=True)
class Gate:
    """What a bundle must pass: signature policy, and the self-test on the engine that will run it.

    trust: folder of public keys, by default the store's own. seconds, memory_mb: limits of the self-test's process.
    """

    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    policy: Policy = "auto"
    trust: Path | None = None
    seconds: float = DEFAULT_SECONDS
    memory_mb: int = DEFAULT_MEMORY_MB


def install_bundle(root: Path, source: Path | str, *, gate: Gate | None = None) -> Version:
    """Copy a bundle into the store, check the copy, and return its version; what is in use stays in use.

    A bundle that is there already is checked again. Two versions besides those in use are kept, the oldest go.

    Raises:
        UsageError: `source` is no bundle folder, or the store cannot be written.
        ArtefactError: the bundle is damaged, not signed as the policy asks, or its engine crashes on it.
        GateError: the self-test fails.
        OutputError: the disk is full.
    """
    gate = gate or Gate()
    with _locked(root):
        state = _prepare(root)
        bundle = read_bundle(source)
        # Before anything is replaced; what counts is the check of the copy.
        check_signature(bundle, _keys(root, gate), policy=gate.policy)
        version_id = _id_of(bundle)
        final = root / VERSIONS / version_id
        _check_space(root, bundle)
        # `force`: a copy that is there may be damaged, or not be signed yet; its graphs are the same.
        with new_folder(final, force=True) as folder:
            _copy(bundle, folder)
        try:
            version = _checked(root, final, gate)
        except BaseException:
            if state.version(version_id) is None:
                _remove(final)
            raise
        others = tuple(other for other in state.versions if other.id != version_id)
        _write_state(root, _pruned(state.model_copy(update={"versions": (*others, version)})))
        return version


def activate_bundle(root: Path, wanted: str, *, gate: Gate | None = None, allow_downgrade: bool = False) -> Version:
    """Bring an installed version into use, on probation; the one in use becomes the previous one.

    wanted: its id, or the beginning of it.

    Raises:
        UsageError: there is no such version, or several.
        ArtefactError: its `seq` is lower than one that was in use before, or it fails the checks of `install_bundle`.
        GateError: the self-test fails.
    """
    read_state(root)  # a mistyped store must not be made
    with _locked(root):
        state = _prepare(root)
        version = _find(state, wanted)
        if version.id == state.current:
            return version
        if version.seq < state.seq and not allow_downgrade:
            raise ArtefactError(
                f"{version.id} has seq {version.seq}; {state.seq} was in use here already.",
                "An older bundle may bring back what was repaired. If you want it: --allow-downgrade",
            )
        checked = _checked(root, root / VERSIONS / version.id, gate or Gate())
        update = {
            "current": version.id,
            "previous": state.current,
            "probation": 0,
            "seq": max(state.seq, checked.seq),
        }
        _write_state(root, state.model_copy(update=update))
        return version


def roll_back(root: Path) -> Version:
    """Bring the previous version back into use; there is one step back, not several.

    Raises:
        UsageError: there is no previous version.
        ArtefactError: it is damaged.
    """
    read_state(root)
    with _locked(root):
        return _rolled_back(root, _prepare(root))


def read_state(root: Path) -> StoreState:
    """Return the state of a store, without waiting for one who is changing it.

    Raises:
        UsageError: there is no store.
        ArtefactError: state.json is not one.
    """
    file = root / STATE
    try:
        raw = json.loads(file.read_bytes())
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA!r}")
        state = StoreState.model_validate(raw)
        for used in (state.current, state.previous):
            if used is not None and state.version(used) is None:
                raise ValueError(f"{used!r} is not one of its versions")
        return state
    except FileNotFoundError:
        raise UsageError(
            f"There is no bundle store {root}.", "Make one with: edge-anomaly bundle install NAME.eab --store DIR"
        ) from None
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        raise ArtefactError(f"{file} cannot be read: {error}", "Install into a new store.") from None


def start_current(root: Path) -> Path:
    """Return the folder of the version in use, for a service that is about to load it.

    A version on probation that was loaded once before, and was neither committed nor released since, has crashed: the
    previous one comes back into use. Call `commit_current` once it has scored enough frames, `release_current` when the
    service is stopped in order before that.

    Raises:
        UsageError: nothing is in use.
        ArtefactError: the store is damaged.
    """
    state = read_state(root)
    if state.probation is not None:
        with _locked(root):
            state = _loaded_on_probation(root, read_state(root))
    if state.current is None:
        raise UsageError(
            f"No bundle is in use in {root}.", f"Choose one with: edge-anomaly bundle activate ID --store {root}"
        )
    return root / VERSIONS / state.current


def _loaded_on_probation(root: Path, state: StoreState) -> StoreState:
    """Count a load on probation, or go back to the previous version if the load before this one ended in a crash."""
    if state.probation == 0:
        _write_state(root, state.model_copy(update={"probation": 1}))
    elif state.probation is not None and state.previous is not None:
        try:
            version = _rolled_back(root, state)
            say(f"{state.current} ended while it was on probation: back to {version.id}")
        except ArtefactError as error:
            say(f"{state.current} ended while it was on probation, and the one before it is refused: {error.what}")
    return read_state(root)


def commit_current(root: Path, version_id: str) -> None:
    """End the probation of a version that has proved itself, if it is still the one in use."""
    _set_probation(root, version_id, None)


def release_current(root: Path, version_id: str) -> None:
    """Count the coming load of a version on probation as its first again: its service was stopped, it did not crash."""
    _set_probation(root, version_id, 0)


def _set_probation(root: Path, version_id: str, value: int | None) -> None:
    if read_state(root).probation is None:
        return
    with _locked(root):
        state = read_state(root)
        if state.current == version_id and state.probation is not None:
            _write_state(root, state.model_copy(update={"probation": value}))


def _rolled_back(root: Path, state: StoreState) -> Version:
    version = None if state.previous is None else state.version(state.previous)
    if version is None:
        raise UsageError(f"There is no previous bundle in {root}.", "See: edge-anomaly bundle list --store DIR")
    # The engine ran it before; the bytes may have suffered since.
    _check_id(read_bundle(root / VERSIONS / version.id), version.id)
    update = {"current": version.id, "previous": None, "probation": None}
    _write_state(root, state.model_copy(update=update))
    return version


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the store's lock: one process at a time changes it."""
    make_folder(root)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        handle = os.open(root / LOCK, flags, 0o644)
    except OSError as error:
        raise UsageError(f"Cannot lock {root}: {error.strerror}.", "Choose a folder that you may write to.") from None
    try:
        end = monotonic() + _LOCK_S
        while not _is_taken(handle):
            if monotonic() > end:
                raise UsageError(f"Another process has been changing {root} for {_LOCK_S:g} s.", "Try again later.")
            sleep(0.05)
        yield
    finally:
        os.close(handle)


def _is_taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prepare(root: Path) -> StoreState:
    """Make the folders, remove what killed processes left, and return the state."""
    versions = root / VERSIONS
    if versions.is_symlink() or (versions.exists() and not versions.is_dir()):
        raise ArtefactError(f"{versions} is not a plain folder.", "Install into a new store.")
    if not versions.exists():
        # In this order: versions without a state would mean that somebody has removed it, and with it `seq`.
        if not (root / STATE).exists():
            _write_state(root, StoreState())
        make_folder(versions)
    elif not (root / STATE).exists():
        raise ArtefactError(f"{root / STATE} is missing, but there are versions.", "Install into a new store.")
    state = read_state(root)
    known = {version.id for version in state.versions}
    with disk_errors(root):
        for entry in versions.iterdir():
            if entry.name not in known:
                _remove(entry)
        for entry in root.glob(".tmp-*"):
            _remove(entry)
    _point_at_current(root, state)
    return state


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _write_state(root: Path, state: StoreState) -> None:
    replace_file(root / STATE, state.model_dump_json(by_alias=True, indent=1).encode() + b"\n")
    known = {version.id for version in state.versions}
    if (root / VERSIONS).is_dir():
        for entry in (root / VERSIONS).iterdir():
            if entry.name not in known:
                _remove(entry)
        _point_at_current(root, state)


def _point_at_current(root: Path, state: StoreState) -> None:
    """Make the link that people look at; nothing of ours reads it."""
    link, target = root / CURRENT, None if state.current is None else f"{VERSIONS}/{state.current}"
    if (os.readlink(link) if link.is_symlink() else None) == target:
        return
    with contextlib.suppress(OSError):
        if target is None:
            link.unlink(missing_ok=True)
            return
        temporary = root / f".tmp-{CURRENT}-{secrets.token_hex(4)}"
        temporary.symlink_to(target)
        os.replace(temporary, link)


def _id_of(bundle: Bundle) -> str:
    """Return NAME-SEQ-DIGITS; the name is made harmless, the digits are of the manifest's hash."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", bundle.manifest.name).lstrip("._-")[:64] or "bundle"
    return f"{name}-{bundle.manifest.seq}-{hashlib.sha256(bundle.manifest_raw).hexdigest()[:12]}"


def _check_space(root: Path, bundle: Bundle) -> None:
    size = sum(entry.size for entry in bundle.manifest.files.values())
    if size > _MAX_BYTES:
        raise ArtefactError(f"{bundle.path} holds {size} bytes, more than {_MAX_BYTES}.", "Export it again.")
    free = shutil.disk_usage(root).free
    if size > free:
        raise UsageError(
            f"{bundle.path} needs {size / 1e6:.0f} MB, {root} has {free / 1e6:.0f} MB left.", "Free some space."
        )


def _copy(bundle: Bundle, folder: Path) -> None:
    """Write the bytes that were checked, not whatever the source's names stand for by now; the manifest comes last."""
    for name in bundle.manifest.files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bundle.read(name))
    if (signature := read_signature(bundle.path)) is not None:
        (folder / MANIFEST_SIGNATURE).write_bytes(signature)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(bundle.manifest_raw))
    (folder / MANIFEST).write_bytes(bundle.manifest_raw)


def _checked(root: Path, final: Path, gate: Gate) -> Version:
    """Check a version where it lies: hashes, signature, then the self-test in a child process."""
    bundle = read_bundle(final)
    _check_id(bundle, final.name)
    key_id = check_signature(bundle, _keys(root, gate), policy=gate.policy)
    selftest_in_child(
        final,
        engine=gate.engine,
        precision=gate.precision,
        threads=gate.threads,
        seconds=gate.seconds,
        memory_mb=gate.memory_mb,
    )
    manifest = bundle.manifest
    return Version(
        id=final.name,
        name=manifest.name,
        seq=manifest.seq,
        precision=manifest.precision,
        manifest_sha256=hashlib.sha256(bundle.manifest_raw).hexdigest(),
        key_id=key_id,
    )


def _keys(root: Path, gate: Gate) -> dict[str, Ed25519PublicKey]:
    return read_trust(gate.trust or root / TRUST)


def _check_id(bundle: Bundle, version_id: str) -> None:
    """The id carries the manifest's hash, so a version that somebody replaced as a whole is found too."""
    if _id_of(bundle) != version_id:
        raise ArtefactError(f"{bundle.path} holds another bundle, {_id_of(bundle)}.", "Install it again.")


def _find(state: StoreState, wanted: str) -> Version:
    exact = state.version(wanted)
    found = [exact] if exact else [version for version in state.versions if wanted and version.id.startswith(wanted)]
    if len(found) != 1:
        what = f"{len(found)} installed bundles begin with" if found else "No installed bundle begins with"
        there = ", ".join(version.id for version in state.versions) or "nothing"
        raise UsageError(f"{what} {wanted!r}.", f"Installed: {there}.")
    return found[0]


def _pruned(state: StoreState) -> StoreState:
    """Keep what is in use, the one before it, the newest, and two others."""
    used = {state.current, state.previous}
    others = [version for version in state.versions[:-1] if version.id not in used]
    gone = {version.id for version in others[: max(0, len(others) - _KEEP)]}
    return state.model_copy(update={"versions": tuple(v for v in state.versions if v.id not in gone)})
