"""The model that scores a camera, and how another one takes its place while frames are scored."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np

from edge_anomaly_runtime.bundle import MANIFEST, read_bundle
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.errors import EdgeAnomalyError, GateError
from edge_anomaly_runtime.images import file_sha256
from edge_anomaly_runtime.progress import say
from edge_anomaly_runtime.scoring import Scorer, open_scorer
from edge_anomaly_runtime.selftest import run_selftest
from edge_anomaly_runtime.selftest_child import selftest_in_child
from edge_anomaly_runtime.store import (
    STATE,
    VERSIONS,
    commit_current,
    read_state,
    release_current,
    roll_back,
    start_current,
)

# How often a store is looked at for another version.
_LOOK_S = 1.0


@dataclass(frozen=True)
class EngineChoice:
    """How a bundle is to be run; see `open_scorer`."""

    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Model:
    """A loaded and self-tested bundle. name: 'NAME@sha256:' and the first digits of its manifest's hash."""

    scorer: Scorer
    name: str
    folder: Path

    @property
    def sha256(self) -> str:
        """The first 16 digits of the manifest's hash."""
        return self.name.rpartition(":")[2]


def engine_threads(cameras: int, cpus: int) -> int:
    """Return the threads of an engine: with cameras to decode and more than two CPUs, one is left to them."""
    return cpus - 1 if cameras and cpus > 2 else cpus


def load_model(folder: Path, choice: EngineChoice, *, trial: bool) -> Model:
    """Load a bundle, score its golden images and run it once more so that the first frame does not pay for warming up.

    trial: load it in a child process first, with limits on time and memory: an engine may crash or hang on a graph.

    Raises:
        GateError: a golden image does not come out as stored.
        ArtefactError, UsageError, MissingRequirementError: as `open_scorer` and `selftest_in_child`.
    """
    if trial:
        selftest_in_child(folder, engine=choice.engine, precision=choice.precision, threads=choice.threads)
    scorer = open_scorer(folder, engine=choice.engine, precision=choice.precision, threads=choice.threads)
    try:
        check_golden(scorer)
        spec = scorer.bundle.manifest.input.preprocess
        scorer.session.run(np.full((1, spec.height, spec.width, 3), 128, dtype=np.uint8))
    except BaseException:
        scorer.close()
        raise
    digest = file_sha256(folder / MANIFEST)[:16]
    return Model(scorer, f"{scorer.bundle.manifest.name}@sha256:{digest}", folder)


def check_golden(scorer: Scorer) -> None:
    """Score the golden images again.

    Raises:
        GateError: one does not come out as stored.
    """
    bad = [check.file for check in run_selftest(scorer) if not check.ok]
    if bad:
        raise GateError(
            f"{scorer.bundle.path}: {len(bad)} of its golden images do not give their stored scores ({bad[0]}).",
            "See: edge-anomaly selftest BUNDLE. If it ran before, suspect memory or an engine's update.",
        )


class ModelSlot:
    """Holds the model in use, of a bundle folder or of a store's active version, and loads the next one beside it.

    `model` and `take_next` belong to the scoring thread; the next model is loaded and tested in a thread of its own. A
    version that fails there never scores a frame: the one in use stays, and a store goes back to it.
    """

    def __init__(self, choice: EngineChoice, *, bundle: Path | None = None, store: Path | None = None) -> None:
        self._choice = choice
        self._bundle, self._store = bundle, store
        self._next: Model | None = None
        self._lock = threading.Lock()
        self._loader: threading.Thread | None = None
        self._again = False
        self._looked_at = monotonic()
        self._seen = self._store_mark()
        self.refused = 0
        self.model = self._load()

    def request_reload(self) -> None:
        """Load what is now in the folder or the store, unless it is what runs already."""
        with self._lock:
            if self._loader is not None and self._loader.is_alive():
                self._again = True
                return
            self._loader = threading.Thread(target=self._load_next, name="model loader", daemon=True)
            self._loader.start()

    def look(self) -> None:
        """Notice that another version of the store was activated; cheap, for every turn of the loop."""
        if self._store is None or monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = monotonic()
        mark = self._store_mark()
        if mark != self._seen:
            self._seen = mark
            self.request_reload()

    @property
    def is_loading(self) -> bool:
        """Whether another model is being loaded or waits to be taken."""
        with self._lock:
            return self._next is not None or (self._loader is not None and self._loader.is_alive())

    def take_next(self) -> Model | None:
        """Put the next model in use between two frames, if there is one; return the one that it replaces."""
        with self._lock:
            if self._next is None:
                return None
            before, self.model, self._next = self.model, self._next, None
        return before

    def commit(self) -> None:
        """The model has proved itself."""
        if self._store is not None:
            commit_current(self._store, self.model.folder.name)

    def close(self, *, in_order: bool) -> None:
        """Free the model; after an orderly end a version on probation may start again."""
        with self._lock:
            waiting, self._next = self._next, None
        if waiting is not None:
            waiting.scorer.close()
        if in_order and self._store is not None:
            release_current(self._store, self.model.folder.name)
        self.model.scorer.close()

    def _load(self) -> Model:
        if self._store is not None:
            # What is in a store has been tried in a child process when it was installed and activated.
            return load_model(start_current(self._store), self._choice, trial=False)
        assert self._bundle is not None
        return load_model(self._bundle, self._choice, trial=True)

    def _load_next(self) -> None:
        while True:
            self._try_next()
            with self._lock:
                if not self._again:
                    return
                self._again = False

    def _try_next(self) -> None:
        try:
            if not self._is_other():
                return
            model = self._load()
        except EdgeAnomalyError as error:
            self.refused += 1
            say(f"the new model is refused, {self.model.name} stays in use: {error.what}")
            self._back_to_what_runs()
            return
        with self._lock:
            replaced, self._next = self._next, model
        if replaced is not None:
            replaced.scorer.close()

    def _is_other(self) -> bool:
        folder = self._bundle if self._store is None else start_folder(self._store)
        if folder is None:
            return False
        read_bundle(folder)  # a folder that is just being written is refused here
        return file_sha256(folder / MANIFEST)[:16] != self.model.sha256 or self._next is not None

    def _back_to_what_runs(self) -> None:
        if self._store is None:
            return
        try:
            if start_folder(self._store) != self.model.folder:
                roll_back(self._store)
                self._seen = self._store_mark()
        except EdgeAnomalyError as error:
            say(f"the store could not be set back to {self.model.folder.name}: {error.what}")

    def _store_mark(self) -> tuple[int, int] | None:
        if self._store is None:
            return None
        try:
            status = (self._store / STATE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def start_folder(store: Path) -> Path | None:
    """Return the folder of a store's active version without counting a start."""
    state = read_state(store)
    return None if state.current is None else store / VERSIONS / state.current


def default_choice(engine: str, precision: str, threads: int | None, *, cameras: int) -> EngineChoice:
    """Return the engine's settings for so many live cameras."""
    return EngineChoice(engine, precision, threads or engine_threads(cameras, usable_cpus()))
