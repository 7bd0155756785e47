"""What `stream` promises under load and faults, measured; a missed limit ends with code 1.

    python benchmarks/stream.py age [part.eab]        frames are young when they are scored, however slow the scorer
    python benchmarks/stream.py faults [part.eab]     faults of an RTSP camera are told, and what comes back is true
    python benchmarks/stream.py memory [part.eab]     memory, files and threads over many frames; --leak has to fail
    python benchmarks/stream.py swap                  models are exchanged under load, bad ones refused
    python benchmarks/stream.py cameras part.eab      four RTSP cameras on one machine
    python benchmarks/stream.py overhead [part.eab]   what a frame costs besides decoding and inference
    python benchmarks/stream.py stop [part.eab]       SIGTERM at random moments

Each prints one JSON object: what was asked, what was measured, and whether it is "ok". `--quick` is a rehearsal of
seconds to a minute. Without a bundle the tests' tiny one is used, which costs next to nothing: then it is the stream
that is measured and not a model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, perf_counter, process_time, sleep
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the camera and the tiny bundle are those of the tests

from edge_anomaly_runtime import store
from edge_anomaly_runtime.atomic import replace_file
from edge_anomaly_runtime.bundle import MANIFEST, MANIFEST_DIGEST, digest_line
from edge_anomaly_runtime.cpu import cpu_name, usable_cpus
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.preprocess import Preprocess, preprocess
from edge_anomaly_runtime.scoring import Scorer, open_scorer
from edge_anomaly_runtime.stream.drift import PERCENTS
from edge_anomaly_runtime.stream.model import check_golden
from edge_anomaly_runtime.stream.reader import Reader
from edge_anomaly_runtime.stream.service import Stream
from edge_anomaly_runtime.stream.settings import StreamSettings, settings_from
from edge_anomaly_runtime.stream.source_test import TestPattern, TestSource
from tests.runtime.conftest import SIDE, write_tiny_bundle
from tests.runtime.stream.camera import Camera, Script, decoded

Pixels = npt.NDArray[np.uint8]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What every benchmark is given. scratch: an empty folder. quick: a rehearsal."""

    bundle: Path
    scratch: Path
    quick: bool
    engine: str
    precision: str
    threads: int | None


@dataclass(frozen=True)
class Report:
    """asked: parameters and limits. measured: figures. ok: every limit is kept."""

    asked: Row
    measured: Row
    ok: bool


# What several benchmarks share


@dataclass
class Running:
    """A stream that runs in a thread; `final` is its last status, once the thread has ended."""

    stream: Stream
    final: Row = field(default_factory=dict)
    has_ended: Callable[[], bool] = lambda: False

    @property
    def scored(self) -> int:
        """Frames scored so far, of all cameras."""
        return sum(camera.scored for camera in self.stream.cameras)


@contextlib.contextmanager
def running(settings: StreamSettings, before_scoring: Callable[[Pixels], None] | None = None) -> Iterator[Running]:
    """Run a stream; `before_scoring` is called with every picture, but with no golden one, in the scoring thread."""
    run = Running(Stream(settings))
    with contextlib.ExitStack() as stack:
        if before_scoring is not None:
            stack.enter_context(wrapped(Scorer, "score_image", before=before_scoring))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        end = pool.submit(run.stream.run)
        run.has_ended = end.done
        try:
            yield run
        finally:
            run.stream.stop()
            run.final = end.result(60)


@contextlib.contextmanager
def wrapped(
    owner: type, name: str, *, before: Callable[..., None] | None = None, after: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Have a method call `before` with its arguments and `after` with its result."""
    original = getattr(owner, name)

    def wrapper(self: Any, *arguments: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = original(self, *arguments)
        if after is not None:
            after(result)
        return result

    with replaced(owner, name, wrapper):
        yield


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def settings_of(setup: Setup, out: Path, *sources: str, **more: Any) -> StreamSettings:
    flags = {
        "bundle": setup.bundle,
        "engine": setup.engine,
        "precision": setup.precision,
        "threads": setup.threads,
        "cameras": [{"source": source} for source in sources],
        "sinks": [{"to": f"jsonl:{out}"}],
        **more,
    }
    return settings_from(None, flags)


def frames_of(out: Path) -> list[Row]:
    """Return the records of frames; events have no frame."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [row for row in rows if "event" not in row]


def is_balanced(camera: Row) -> bool:
    """Tell whether a camera's final counts account for every captured frame."""
    return bool(camera["captured"] == camera["scored"] + sum(camera["drops"].values()))


def are_numbered(rows: Sequence[Row]) -> bool:
    """Tell whether one camera's frames come in order and each one once."""
    numbers = [row["seq"] for row in rows]
    return numbers == sorted(set(numbers))


def came_true(condition: Callable[[], bool], seconds: float) -> float | None:
    """Wait for a condition; return how long that took, None if it did not come true."""
    start = monotonic()
    while not condition():
        if monotonic() - start > seconds:
            return None
        sleep(0.01)
    return monotonic() - start


def spread(values: Sequence[float]) -> Row:
    """Return the median, the 95th percentile and the maximum."""
    if not values:
        return {"p50": None, "p95": None, "max": None}
    return {
        "p50": round(float(np.percentile(values, 50)), 3),
        "p95": round(float(np.percentile(values, 95)), 3),
        "max": round(max(values), 3),
    }


class Senders:
    """RTSP cameras in a process of their own, so that they share no interpreter lock with what is measured."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(scripts, other), daemon=True)
        self.addresses: list[str] = []

    def __enter__(self) -> Senders:
        self._process.start()
        self.addresses = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join(5)
        self._process.kill()

    def order(self, what: str = "look", script: Script | None = None) -> Row:
        """Order plug, unplug, mute, unmute, become (a script) or look of the first camera; return what it knows."""
        self._pipe.send((what, script))
        answer: Row = self._pipe.recv()
        return answer


def serve(scripts: Sequence[Script], pipe: Connection) -> None:
    with contextlib.ExitStack() as stack:
        cameras = [stack.enter_context(Camera(script)) for script in scripts]
        pipe.send([camera.address for camera in cameras])
        first = cameras[0]
        while (order := pipe.recv()) is not None:
            what, script = order
            if what == "plug":
                first.plug()
            elif what == "unplug":
                first.unplug()
            elif what == "become":
                first.script = script
            elif what in ("mute", "unmute"):
                first.is_mute = what == "mute"
            pipe.send(
                {
                    "at": monotonic(),
                    "faulty_since": first.faulty_since,
                    "connections": first.connections,
                    "plays": first.plays,
                    "cpu_s": process_time(),
                }
            )


# age


def age(setup: Setup, arguments: argparse.Namespace) -> Report:
    """The age of a frame when its score is there, which includes scoring; a reader without a mailbox falls behind."""
    seconds = arguments.seconds or (8 if setup.quick else 60)
    fps, scorer_fps, limit_ms = 25, 5, 500
    out = setup.scratch / "out.jsonl"
    with Senders([Script(fps=fps, noise=1.0)]) as senders:
        settings = settings_of(setup, out, f"rtsp://{senders.addresses[0]}/live")
        with running(settings, lambda _: sleep(1 / scorer_fps)) as run:
            sleep(seconds)
    (camera,) = run.final["cameras"]
    rows = frames_of(out)
    ages = spread([row["age_ms"] for row in rows])
    ok = (
        camera["scored"] > 0.6 * seconds * scorer_fps
        and ages["p95"] < limit_ms
        and is_balanced(camera)
        and are_numbered(rows)
    )
    measured = {"age_ms": ages, "is_balanced": is_balanced(camera), "each_once": are_numbered(rows)}
    return Report(
        {"fps": fps, "scorer_fps": scorer_fps, "seconds": seconds, "limit_p95_ms": limit_ms},
        measured | {name: camera[name] for name in ("captured", "scored", "drops")},
        ok,
    )


# faults


@dataclass(frozen=True)
class Fault:
    """What befalls a camera.

    told: the state in which the stream has to say so, or 'damaged' or 'resized'. script: what the camera sends at
    first. mute: it goes on, but none of its pictures arrives. gone: it does not listen. later: what connections get
    that are made meanwhile. absent: it was so from the start. back_s: limit from its end to the next scored frame.
    """

    told: str
    script: Script
    mute: bool = False
    gone: bool = False
    later: Script | None = None
    absent: bool = False
    back_s: float = 5.0


_FPS, _GOOD_FRAMES, _GOOD_S = 25, 75, 3.0
_TOLD_S = 6.0
# A camera that refuses is asked once a minute, by design: more would be hammering.
_REFUSED_BACK_S = 65.0
_LOGIN = "line1:right"


def faults_of(outage: float) -> dict[str, Fault]:
    good = Script(fps=_FPS, noise=1.0)
    broken = replace(good, at=_GOOD_FRAMES)
    spell = replace(broken, until=_GOOD_FRAMES + round(outage * _FPS), share=0.05)
    silent = replace(good, fault="stall", at=0)
    return {
        "stall": Fault("stalled", good, mute=True),
        "hang": Fault("stalled", replace(broken, fault="stall"), later=silent),
        "cut": Fault("lost", replace(broken, fault="cut"), gone=True),
        "reset": Fault("lost", replace(broken, fault="reset"), gone=True),
        # Flipped bits that still parse are a picture like any other to every decoder.
        "garble": Fault("damaged", replace(spell, fault="garble")),
        "loss": Fault("damaged", replace(spell, fault="loss")),
        "resize": Fault("resized", replace(spell, fault="resize")),
        "absent": Fault("lost", good, gone=True, absent=True),
        "login": Fault("unauthorised", replace(good, login="line1:changed"), absent=True, back_s=_REFUSED_BACK_S),
    }


def faults(setup: Setup, arguments: argparse.Namespace) -> Report:
    """Each fault begins after three good seconds and lasts `outage` seconds; then the camera is as before.

    Every picture that is scored is compared, bit by bit, with what an undisturbed decoder makes of the camera's stream:
    one that is not among them is invented, one that comes twice on one connection is repeated.
    """
    outage = arguments.outage or (7.0 if setup.quick else 12.0)
    known = faults_of(outage)
    chosen = arguments.fault or [name for name in known if not (setup.quick and name == "login")]
    rows = []
    for name in chosen:
        folder = setup.scratch / name
        folder.mkdir()
        rows.append({"fault": name, **fault_row(setup, known[name], folder / "out.jsonl", outage)})
    limits = {"told_s": _TOLD_S, "back_s": {name: known[name].back_s for name in chosen}}
    return Report({"outage_s": outage, "limits": limits}, {"faults": rows}, all(row["ok"] for row in rows))


def fault_row(setup: Setup, fault: Fault, out: Path, outage: float) -> Row:
    seen: list[tuple[float, bytes]] = []

    def note(pixels: Pixels) -> None:
        seen.append((monotonic(), _digest(pixels)))

    with Senders([fault.script]) as senders:
        if fault.absent and fault.gone:
            senders.order("unplug")
        login = f"{_LOGIN}@" if fault.script.login else ""
        settings = settings_of(setup, out, f"rtsp://{login}{senders.addresses[0]}/live")
        with running(settings, note) as run:
            began = monotonic() if fault.absent else _start_of(fault, senders)
            told_s = _told_after(run, fault.told, began)
            sleep(max(0.0, began + outage - monotonic()))
            asked = senders.order()["connections"]
            returned = _end_of(fault, senders, began + outage)
            came_true(lambda: bool(seen) and seen[-1][0] > returned, fault.back_s + 5)
            sleep(1.5)
            reader = run.stream.cameras[0].reader.status()
    back_s = next((at - returned for at, _ in seen if at > returned), None)
    found = _compared([digest for _, digest in seen], fault.script, seconds=2 * outage + fault.back_s + 20)
    (camera,), rows = run.final["cameras"], [json.loads(line) for line in out.read_text().splitlines()]
    measured = {
        "told_s": _rounded(told_s),
        "back_s": _rounded(back_s),
        **found,
        "scored_while_faulty": sum(began + 0.2 < at < returned for at, _ in seen),
        "reconnects": reader.reconnects,
        "resizes": reader.resizes,
        "connections_before_the_end": asked,
        "events": [row["event"] for row in rows if "event" in row],
        **{name: camera[name] for name in ("captured", "scored", "drops")},
        "is_balanced": is_balanced(camera),
        "each_once": are_numbered(frames_of(out)),
    }
    is_true = found["invented"] == 0 and found["repeated"] <= reader.reconnects
    is_in_time = told_s is not None and told_s <= _TOLD_S and back_s is not None and back_s <= fault.back_s
    return measured | {"ok": is_true and is_in_time and measured["is_balanced"] and measured["each_once"]}


def _start_of(fault: Fault, senders: Senders) -> float:
    """Wait for the beginning of the fault, or make it; return when that was."""
    if fault.mute:
        came_true(lambda: senders.order()["plays"] > 0, 30)
        sleep(_GOOD_S)
        return float(senders.order("mute")["at"])
    if came_true(lambda: senders.order()["faulty_since"] is not None, 30) is None:
        raise SystemExit("the camera was never asked for pictures")
    if fault.gone:
        senders.order("unplug")
    if fault.later is not None:
        senders.order("become", fault.later)
    return float(senders.order()["faulty_since"])


def _end_of(fault: Fault, senders: Senders, planned: float) -> float:
    """Make the camera whole; return since when it is."""
    if fault.told in ("damaged", "resized"):  # ends by itself, with a certain frame
        return planned
    if fault.mute:
        return float(senders.order("unmute")["at"])
    login = _LOGIN if fault.script.login else ""
    senders.order("become", replace(fault.script, fault="none", login=login))
    return float(senders.order("plug" if fault.gone else "look")["at"])


def _told_after(run: Running, told: str, began: float) -> float | None:
    """Wait until the stream says what is wrong; return how long that took from the beginning of the fault."""
    camera = run.stream.cameras[0]

    def is_told() -> bool:
        reader = camera.reader.status()
        if told == "damaged":
            return reader.cause.startswith("damaged")
        if told == "resized":
            return reader.resizes > 0
        # The event to the sinks sets the verdict, so this is when they know.
        status = camera.status()
        return bool(status["state"] == told and status["verdict"] == "INVALID")

    return None if came_true(is_told, _TOLD_S + 5) is None else monotonic() - began


def _compared(digests: Sequence[bytes], script: Script, seconds: float) -> Row:
    """Count pictures that the camera never sent, and steps that do not go forward: those begin a connection anew."""
    keeps = script.fault == "resize"
    clean = decoded(script if keeps else replace(script, fault="none"), round(seconds * script.fps))
    places: dict[bytes, list[int]] = {}
    for index, picture in enumerate(clean):
        places.setdefault(_digest(picture), []).append(index)
    last, repeated, invented = -1, 0, 0
    for digest in digests:
        if digest not in places:
            invented += 1
            continue
        later = [index for index in places[digest] if index > last]
        repeated += not later
        last = later[0] if later else places[digest][0]
    return {"invented": invented, "repeated": repeated}


def _digest(pixels: Pixels) -> bytes:
    return blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16).digest()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


# memory


def memory(setup: Setup, arguments: argparse.Namespace) -> Report:
    """Resident memory every 500 frames, and its slope over the second half; with `--leak` 1 KiB is kept per frame."""
    frames = arguments.frames or (8_000 if setup.quick else 40_000)
    every, hour = 500, 36_000  # 10 frames a second
    # Over so few frames the allocator's own ups and downs are more than the limit.
    limit_mb = 20.0 if setup.quick else 1.0
    samples: list[tuple[int, float, int, int]] = []
    kept: list[bytes] = []
    count = 0

    def look(_: Pixels) -> None:
        nonlocal count
        count += 1
        if arguments.leak:
            kept.append(os.urandom(1024))
        if count % every == 0:
            samples.append((count, resident_mb(), open_files(), native_threads()))

    settings = settings_of(setup, setup.scratch / "out.jsonl", "test://moving?fps=0", stop_after=frames)
    start = monotonic()
    with running(settings, look) as run:
        while not run.has_ended():
            sleep(0.1)
    late = samples[len(samples) // 2 :]
    slope = float(np.polyfit([sample[0] for sample in late], [sample[1] for sample in late], 1)[0])
    files, threads = ({sample[column] for sample in late} for column in (2, 3))
    measured = {
        "frames": count,
        "seconds": round(monotonic() - start, 1),
        "resident_mb": {
            "first": round(samples[0][1], 2),
            "half": round(late[0][1], 2),
            "last": round(late[-1][1], 2),
            "highest": round(max(sample[1] for sample in samples), 2),
        },
        "slope_mb_per_hour": round(slope * hour, 3),
        "open_files": sorted(files),
        "threads": sorted(threads),
        "is_balanced": is_balanced(run.final["cameras"][0]),
    }
    ok = slope * hour < limit_mb and len(files) == len(threads) == 1 and is_balanced(run.final["cameras"][0])
    asked = {"frames": frames, "every": every, "frames_per_hour": hour, "limit_mb_per_hour": limit_mb}
    return Report(asked | {"leak": arguments.leak}, measured, ok)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # the one that reads the folder


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


# swap


_GAINS = (1.0, 0.5, 0.8, 1.2)
_PATTERN = TestPattern(fps=50, noise=0.0)
# After so many pictures the box is where it was.
_PERIOD = 56

AT_INSTALL = ("damaged file", "missing file", "manifest cut off", "wrong golden scores")
AT_ACTIVATION = ("older seq", "damaged in the store")
BEHIND_THE_GATE = ("damaged after activation", "wrong golden scores after activation")


@dataclass
class Swaps:
    """A store and the stream that follows it; `gains` maps the names of the good models to what they multiply by."""

    root: Path
    scratch: Path
    run: Running
    gate: store.Gate
    gains: dict[str, float] = field(default_factory=dict)
    seq: int = 0

    def bundle(self, *, seq: int | None = None) -> Path:
        """Write the next good bundle."""
        self.seq += 1
        gain = _GAINS[self.seq % len(_GAINS)]
        folder = self.scratch / f"{self.seq}.eab"
        return write_tiny_bundle(folder, seq=self.seq if seq is None else seq, name=f"gain-{gain}", gain=gain)

    def take_in(self, *, seq: int | None = None) -> store.Version:
        return store.install_bundle(self.root, self.bundle(seq=seq), gate=self.gate)

    def expect(self, version: store.Version) -> None:
        """A model of this version may score from now on."""
        self.gains[f"{version.name}@sha256:{version.manifest_sha256[:16]}"] = float(version.name.partition("-")[2])

    def activate(self, version: store.Version) -> bool:
        """Bring a version into use; tell whether the stream scores with it."""
        self.expect(version)
        store.activate_bundle(self.root, version.id, gate=self.gate)
        digest = version.manifest_sha256[:16]
        taken = came_true(lambda: digest in self.run.stream.status()["model"], 60)
        scored = self.run.scored
        return taken is not None and came_true(lambda: self.run.scored >= scored + 5, 30) is not None

    def try_bad(self, kind: str) -> bool:
        """Offer a bad bundle; tell whether it was refused and the model in use stays."""
        before = store.read_state(self.root).current
        try:
            if kind in AT_INSTALL:
                store.install_bundle(self.root, spoiled(self.bundle(), kind), gate=self.gate)
            elif kind in AT_ACTIVATION:
                version = self.take_in(seq=0 if kind == "older seq" else None)
                if kind == "damaged in the store":
                    spoiled(self.root / store.VERSIONS / version.id, "damaged file")
                store.activate_bundle(self.root, version.id, gate=self.gate)
            else:
                return self._is_refused_by_the_stream(kind)
        except EdgeAnomalyError:
            return store.read_state(self.root).current == before
        return False

    def _is_refused_by_the_stream(self, kind: str) -> bool:
        """Put a bad version into use past the store's checks, as after a fault of the disk."""
        version = self.take_in()
        spoiled(self.root / store.VERSIONS / version.id, kind.removesuffix(" after activation"))
        state = store.read_state(self.root)
        forced = state.model_copy(update={"current": version.id, "previous": state.current, "probation": 0})
        replace_file(self.root / store.STATE, forced.model_dump_json(by_alias=True).encode())
        back = came_true(lambda: store.read_state(self.root).current == state.current, 60)
        return back is not None and version.manifest_sha256[:16] not in self.run.stream.status()["model"]


def spoiled(folder: Path, kind: str) -> Path:
    """Spoil a bundle in one way, where it lies."""
    if kind in ("damaged", "damaged file"):
        data = bytearray((folder / "model.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "model.onnx").write_bytes(data)
    elif kind == "missing file":
        (folder / "golden/maps.npz").unlink()
    elif kind == "manifest cut off":
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-100])
    else:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        scores = manifest["golden"][0]["scores"]
        manifest["golden"][0]["scores"] = {key: 1.2 * value for key, value in scores.items()}
        data = bytearray(json.dumps(manifest).encode())
        (folder / MANIFEST).write_bytes(data)
        (folder / MANIFEST_DIGEST).write_bytes(digest_line(bytes(data)))
    return folder


def swap(setup: Setup, arguments: argparse.Namespace) -> Report:
    """Versions of a store are activated one after the other while frames are scored, bad ones among them.

    Each good model multiplies by another factor, so every score tells which model made it.
    """
    swaps = arguments.swaps or (16 if setup.quick else 100)
    kinds = [*AT_INSTALL, *AT_ACTIVATION, *BEHIND_THE_GATE]
    bad_at = dict(zip(np.linspace(2, swaps - 1, len(kinds)).astype(int).tolist(), kinds, strict=True))
    out, root = setup.scratch / "out.jsonl", setup.scratch / "store"
    gate = store.Gate(engine=setup.engine, precision=setup.precision, threads=setup.threads)
    activated, refused, took_s, lost = 0, [], [], []
    with in_process_gate() if setup.quick or arguments.in_process_gate else contextlib.nullcontext():
        first = store.install_bundle(
            root, write_tiny_bundle(setup.scratch / "0.eab", seq=0, name="gain-1.0"), gate=gate
        )
        store.activate_bundle(root, first.id, gate=gate)
        settings = settings_of(
            setup, out, f"test://moving?fps={_PATTERN.fps:g}&noise=0", bundle=None, store=root, probation=3
        )
        with running(settings) as run:
            swapping = Swaps(root, setup.scratch, run, gate)
            swapping.expect(first)
            for number in range(swaps):
                before, start = run.stream.cameras[0].drops(), monotonic()
                if number in bad_at:
                    refused += [bad_at[number]] * swapping.try_bad(bad_at[number])
                    continue
                activated += swapping.activate(swapping.take_in())
                took_s.append(monotonic() - start)
                lost.append(sum(run.stream.cameras[0].drops().values()) - sum(before.values()))
    (camera,) = run.final["cameras"]
    rows = frames_of(out)
    wrong = [row for row in rows if not is_from(row, swapping.gains)]
    measured = {
        "activated": activated,
        "refused": refused,
        "wrong_rows": len(wrong),
        "models_seen": len({row["model"] for row in rows}),
        "frames_lost_at_exchange": spread([float(gap) for gap in gaps_between_models(rows)]),
        "frames_lost_from_install_to_use": spread([float(count) for count in lost]),
        "seconds_from_install_to_use": spread(took_s),
        **{name: camera[name] for name in ("captured", "scored", "drops")},
        "is_balanced": is_balanced(camera),
        "each_once": are_numbered(rows),
    }
    ok = (
        activated == swaps - len(kinds)
        and len(refused) == len(kinds)
        and not wrong
        and measured["models_seen"] == activated + 1
        and is_balanced(camera)
        and are_numbered(rows)
    )
    return Report({"swaps": swaps, "bad": kinds, "fps": _PATTERN.fps}, measured, ok)


def is_from(row: Row, gains: dict[str, float]) -> bool:
    """Tell whether a frame was scored by a good model, and with the score that this model has to give."""
    gain = gains.get(row["model"])
    expected = brightest_reds()[row["seq"] % _PERIOD]
    return gain is not None and math.isclose(row["score"] or 0.0, gain * expected, rel_tol=1e-4)


@lru_cache
def brightest_reds() -> tuple[float, ...]:
    """Return the tiny bundle's scores of the test source's pictures, worked out without an engine."""
    source = TestSource(replace(_PATTERN, fps=0.0))
    found = []
    for _ in range(_PERIOD):
        picture = source.read(0.0)
        assert picture is not None
        red = preprocess(picture.pixels, Preprocess(SIDE, SIDE))[..., 0].astype(np.float64)
        found.append(float(red.reshape(SIDE // 4, 4, SIDE // 4, 4).mean((1, 3)).max()))
    return tuple(found)


def gaps_between_models(rows: Sequence[Row]) -> list[int]:
    """Return how many frames are missing between the last one of a model and the first one of the next."""
    return [new["seq"] - old["seq"] - 1 for old, new in pairwise(rows) if new["model"] != old["model"]]


@contextlib.contextmanager
def in_process_gate() -> Iterator[None]:
    """Check bundles in this process instead of a child, which takes a second each."""

    def check(path: Path, *, engine: str, precision: str, threads: int | None, **_: object) -> Row:
        with open_scorer(path, engine=engine, precision=precision, threads=threads) as scorer:
            check_golden(scorer)
        return {}

    with replaced(store, "selftest_in_child", check):
        yield


# cameras


def cameras(setup: Setup, arguments: argparse.Namespace) -> Report:
    """RTSP cameras, their senders in another process: frames per second, processor time, age, and what takes it.

    stage_shares: wall time of a stage, of all processors' time; `infer` may use several of them at once.
    """
    seconds = arguments.seconds or (10 if setup.quick else 60)
    number, fps, limit_share = arguments.cameras, arguments.fps, 0.8
    out = setup.scratch / "out.jsonl"
    # Coded beforehand: senders that work would be measured, too.
    scripts = [Script(fps=fps, width=640, height=480, noise=1.0, seed=seed, loop=5 * fps) for seed in range(number)]
    with Senders(scripts) as senders:
        sources = [{"source": f"rtsp://{address}/live", "name": f"c{i}"} for i, address in enumerate(senders.addresses)]
        with running(settings_of(setup, out, cameras=sources)) as run:
            if came_true(lambda: all(camera.scored > fps for camera in run.stream.cameras), 60) is None:
                raise SystemExit("not every camera came up")
            start, cpu_s, sender_s, before = monotonic(), process_time(), senders.order()["cpu_s"], run.stream.status()
            sleep(seconds)
            wall_s, cpu_s = monotonic() - start, process_time() - cpu_s
            sender_s, after = senders.order()["cpu_s"] - sender_s, run.stream.status()
    rates = {
        name: [
            (late[name] - early[name]) / wall_s for early, late in zip(before["cameras"], after["cameras"], strict=True)
        ]
        for name in ("captured", "scored")
    }
    rows = frames_of(out)[sum(camera["scored"] for camera in before["cameras"]) :]
    cores = wall_s * usable_cpus()
    shares = {
        stage: sum(row["ms"].get(stage) or 0.0 for row in rows) / 1e3 / cores
        for stage in ("decode", "resize", "infer", "post")
    }
    # Frames that were dropped have been decoded as well.
    shares["decode"] *= sum(rates["captured"]) / max(sum(rates["scored"]), 1e-9)
    share, least = cpu_s / cores, 0.97 * fps  # a frame or two may be on its way at either end
    is_reached = min(rates["scored"]) >= least and share < limit_share
    measured = {
        "scored_fps": [round(rate, 2) for rate in rates["scored"]],
        "captured_fps": [round(rate, 2) for rate in rates["captured"]],
        "drops": [camera["drops"] for camera in run.final["cameras"]],
        "cpu_share": round(share, 3),
        "sender_cpu_share": round(sender_s / cores, 3),
        "stage_shares": {stage: round(value, 3) for stage, value in shares.items()},
        "age_ms": spread([row["age_ms"] for row in rows]),
        "ms": {stage: spread([row["ms"].get(stage) or 0.0 for row in rows])["p50"] for stage in shares},
        "bottleneck": None if is_reached else bottleneck(shares, share, limit_share),
        "is_balanced": all(is_balanced(camera) for camera in run.final["cameras"]),
    }
    asked = {"cameras": number, "fps": fps, "size": "640x480", "seconds": seconds}
    limits = {"limit_fps": least, "limit_cpu_share": limit_share}
    return Report(asked | limits, measured, is_reached and measured["is_balanced"])


def bottleneck(shares: dict[str, float], share: float, limit_share: float) -> str:
    """Name what keeps the cameras from their rate: the stage that takes the most time, unless processors were idle."""
    stage = max(shares, key=lambda name: shares[name])
    taken = f"the stream took {share:.0%} of the processors, {stage} most of it"
    return taken if share >= limit_share else f"other processes or waiting: {taken}"


# overhead


def overhead(setup: Setup, arguments: argparse.Namespace) -> Report:
    """Wall time that one frame costs besides decoding (here: drawing), inference and resizing.

    loop: in the scoring thread, from the moment it was handed a frame until it asks for the next one, less `resize` and
    `infer` of the frame's record: verdict, record, metrics, drift, the hand-over to the sink, housekeeping. reader: in
    the camera's thread, from the moment the source returned a picture until it is asked for the next one: the health
    check, numbering, the mailbox. Not counted: the sink's thread, and waiting for a frame. Both threads share one
    interpreter with each other and the sink, whose waits for it are within the figures.
    """
    frames = arguments.frames or (300 if setup.quick else 2_000)
    fps, limit_ms = 50, 1.0
    out = setup.scratch / "out.jsonl"
    loop, reader = Gaps(), Gaps()
    source = f"test://moving?fps={fps}&size={arguments.size}&noise=0"  # noise takes long to draw
    with (
        wrapped(Reader, "take", before=loop.ended, after=loop.began),
        wrapped(TestSource, "read", before=reader.ended, after=reader.began),
        running(settings_of(setup, out, source, stop_after=frames)) as run,
    ):
        came_true(run.has_ended, 60 + 10 * frames / fps)
    rows = frames_of(out)
    stages = {name: [row["ms"][name] for row in rows] for name in ("decode", "resize", "infer", "post")}
    pairs = zip(loop.ms, stages["resize"], stages["infer"], strict=False)
    own = [whole - resize - infer for whole, resize, infer in pairs]
    warm = len(own) // 10
    total = float(np.median(own[warm:]) + np.median(reader.ms[warm:]))
    measured = {
        "frames": len(rows),
        "overhead_p50_ms": round(total, 3),
        "loop_ms": spread(own[warm:]),
        "reader_ms": spread(reader.ms[warm:]),
        "stages_ms": {name: spread(values[warm:]) for name, values in stages.items()},
        "counted": " ".join((overhead.__doc__ or "").split()),
    }
    asked = {"frames": frames, "fps": fps, "size": arguments.size, "limit_p50_ms": limit_ms}
    return Report(asked, measured, len(rows) == frames and total < limit_ms)


class Gaps:
    """Times from the return of a call that had a result to the next call."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self._since: float | None = None

    def began(self, result: object) -> None:
        self._since = None if result is None else perf_counter()

    def ended(self, *_: object) -> None:
        if self._since is not None:
            self.ms.append((perf_counter() - self._since) * 1e3)
        self._since = None


# stop


_STOP_S = 5.0


def stop(setup: Setup, arguments: argparse.Namespace) -> Report:
    """SIGTERM at random moments of a running stream, and of one that is still starting.

    A running one has to end with code 0, every record of its file whole and as many as it says it scored. One that is
    still starting may end by the signal; no child may outlive it.
    """
    number = arguments.signals or (3 if setup.quick else 50)
    starting = 2 if setup.quick else 10
    chance = np.random.default_rng(arguments.seed)
    trials = [stop_trial(setup, setup.scratch / f"{n}.jsonl", float(chance.uniform(0, 2))) for n in range(number)]
    start_s = float(np.median([trial["start_s"] for trial in trials]))
    early = [
        stop_trial(setup, setup.scratch / f"early-{n}.jsonl", float(chance.uniform(0.1, start_s)), early=True)
        for n in range(starting)
    ]
    bad = [trial for trial in trials if not trial["ok"]] + [trial for trial in early if not trial["ok"]]
    measured = {
        "ended_in_s": spread([trial["ended_in_s"] for trial in trials]),
        "codes": sorted({trial["code"] for trial in trials}),
        "records": sum(trial["records"] for trial in trials),
        "while_starting": {
            "codes": sorted({trial["code"] for trial in early}),
            "ended_in_s": spread([trial["ended_in_s"] for trial in early]),
            "left_behind": sum(trial["left_behind"] for trial in early),
        },
        "bad": bad[:5],
    }
    return Report({"signals": number, "while_starting": starting, "limit_s": _STOP_S}, measured, not bad)


def stop_trial(setup: Setup, out: Path, delay: float, *, early: bool = False) -> Row:
    command = [sys.executable, "-m", "edge_anomaly_runtime", "stream", str(setup.bundle)]
    command += ["--source", "test://moving?fps=50", "--sink", f"jsonl:{out}", "--json"]
    command += ["--engine", setup.engine, "--precision", setup.precision]
    mark = secrets.token_hex(8)
    began = monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "STOP_TRIAL": mark}
    )
    assert process.stderr is not None
    if not early:
        next((line for line in process.stderr if line.startswith("scoring ")), None)
    start_s = monotonic() - began
    sleep(delay)
    sent = monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        answer, _ = process.communicate(timeout=4 * _STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        answer, _ = process.communicate()
    ended_in_s = monotonic() - sent
    sleep(0.2)
    left = processes_with(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    records = whole_records(out)
    is_whole = records is not None and (early or records == scored_of(answer))
    code = process.returncode
    ok = (
        ended_in_s <= _STOP_S
        and is_whole
        and not left
        and code in ((0, 128 + signal.SIGTERM, -signal.SIGTERM) if early else (0,))
    )
    return {
        "ok": ok,
        "early": early,
        "delay_s": round(delay, 3),
        "start_s": start_s,
        "code": code,
        "ended_in_s": round(ended_in_s, 2),
        "records": records or 0,
        "is_whole": is_whole,
        "left_behind": len(left),
    }


def whole_records(out: Path) -> int | None:
    """Return how many records a file has, None if one of them is torn or out of order."""
    text = out.read_text() if out.exists() else ""
    try:
        rows = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return None
    return len(rows) if (not text or text.endswith("\n")) and are_numbered(rows) else None


def scored_of(answer: str) -> int | None:
    """Return the frames that a stream says it scored and wrote, None if it says nothing."""
    try:
        status = json.loads(answer)
    except ValueError:
        return None
    scored, written = int(status["cameras"][0]["scored"]), int(status["sinks"][0]["written"])
    return scored if scored == written else None


def processes_with(mark: str) -> list[int]:
    """Return the processes whose environment holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


BENCHMARKS: dict[str, Callable[[Setup, argparse.Namespace], Report]] = {
    "age": age,
    "faults": faults,
    "memory": memory,
    "swap": swap,
    "cameras": cameras,
    "overhead": overhead,
    "stop": stop,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    of = {name: verbs.add_parser(name, help=(work.__doc__ or "").splitlines()[0]) for name, work in BENCHMARKS.items()}
    for name, verb in of.items():
        verb.add_argument("--quick", action="store_true", help="a rehearsal")
        verb.add_argument("--engine", default="auto")
        verb.add_argument("--precision", default="auto")
        verb.add_argument("--threads", type=int)
        if name != "swap":
            verb.add_argument("bundle", type=Path, nargs=None if name == "cameras" else "?")
    for name in ("age", "cameras"):
        of[name].add_argument("--seconds", type=float)
    for name in ("memory", "overhead"):
        of[name].add_argument("--frames", type=int)
    of["faults"].add_argument("--outage", type=float, help="seconds that each fault lasts")
    of["faults"].add_argument("--fault", action="append", choices=list(faults_of(1.0)), help="repeatable; default: all")
    of["memory"].add_argument("--leak", action="store_true", help="keep 1 KiB per frame: has to fail")
    of["swap"].add_argument("--swaps", type=int)
    of["swap"].add_argument("--in-process-gate", action="store_true", help="no child process per check")
    of["cameras"].add_argument("--cameras", type=int, default=4)
    of["cameras"].add_argument("--fps", type=int, default=10)
    of["overhead"].add_argument("--size", default="640x480")
    of["stop"].add_argument("--signals", type=int)
    of["stop"].add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# The red of the test source's pictures, so that drift is watched.
_NORMAL = {"n": 100.0, "mean": 150.0, "std": 30.0}
_NORMAL |= {f"q{percent}": 150.0 + 0.6 * (percent - 50) for percent in PERCENTS}


def main() -> None:
    arguments = parsed()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        given = getattr(arguments, "bundle", None)
        setup = Setup(
            given or write_tiny_bundle(scratch / "tiny.eab", normal=_NORMAL),
            scratch,
            arguments.quick,
            # The tiny bundle's work is nothing; ONNX Runtime starts sooner.
            "onnxruntime" if given is None and arguments.engine == "auto" else arguments.engine,
            "fp32" if given is None and arguments.precision == "auto" else arguments.precision,
            1 if given is None and arguments.threads is None else arguments.threads,
        )
        report = BENCHMARKS[arguments.what](setup, arguments)
    machine = {"cpu": cpu_name(), "cpus": usable_cpus(), "load": round(os.getloadavg()[0], 1)}
    asked = {"bundle": "tiny" if given is None else str(given), "engine": setup.engine, "quick": setup.quick}
    line = {"benchmark": arguments.what, "asked": asked | report.asked, "measured": report.measured, "machine": machine}
    print(json.dumps(line | {"ok": report.ok}, indent=1, default=str))
    sys.exit(not report.ok)


if __name__ == "__main__":
    main()
