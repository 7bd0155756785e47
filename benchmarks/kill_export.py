"""`kill -9` at random moments of `export`: what is left must be a whole bundle or none.

    python benchmarks/kill_export.py --kills 200

Each round forks a child that exports with --force over the bundle of the round before, and kills it at a moment drawn
evenly from the time that a whole export takes. After each kill the bundle must verify, and no temporary folder may
outlive the next export.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edge_anomaly.padim import PadimConfig
from edge_anomaly.sample_data import draw_sample_data
from edge_anomaly.train import train_detector
from edge_anomaly_export.exporting import export_run
from edge_anomaly_export.options import ExportOptions
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.errors import EdgeAnomalyError
from edge_anomaly_runtime.preprocess import Preprocess

OPTIONS = ExportOptions(("onnx", "openvino"), "int8", calibration_images=4, allow_drop=True, force=True)


def in_child(work: object, *arguments: object) -> int:
    """Fork, so that the parent never starts the thread pools that would not survive a fork, and return the pid."""
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            work(*arguments)  # type: ignore[operator]
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def make_run(scratch: Path) -> None:
    draw_sample_data(scratch / "data", train=20, test_good=2, per_defect=1, size=64)
    config = PadimConfig(backbone="efficientnet_lite0", dims=16)
    train_detector(str(scratch / "data"), scratch / "run", config=config, preprocess=Preprocess(64, 64))


def state_of(bundle: Path) -> str:
    if not bundle.exists():
        return "absent"
    try:
        read_bundle(bundle)
    except EdgeAnomalyError as error:
        return f"TORN: {error.what}"
    return "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.waitpid(in_child(make_run, scratch), 0)
        bundle = scratch / "part.eab"
        start = time.perf_counter()
        _, status = os.waitpid(in_child(export_run, scratch / "run", bundle, OPTIONS), 0)
        whole = time.perf_counter() - start
        if status != 0:
            sys.exit("the undisturbed export failed")
        counts: dict[str, int] = {"finished first": 0, "killed": 0}
        for _ in range(arguments.kills):
            pid = in_child(export_run, scratch / "run", bundle, OPTIONS)
            time.sleep(rng.uniform(0, whole))
            finished, _ = os.waitpid(pid, os.WNOHANG)
            if not finished:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            counts["finished first" if finished else "killed"] += 1
            state = state_of(bundle)
            counts[state] = counts.get(state, 0) + 1
        left = len(list(scratch.glob(".tmp-*")))
        os.waitpid(in_child(export_run, scratch / "run", bundle, OPTIONS), 0)
        after = len(list(scratch.glob(".tmp-*")))
    print(f"export takes {whole:.1f} s; {counts}; temporary folders {left}, after one more export {after}")
    sys.exit(any(state.startswith("TORN") for state in counts))


if __name__ == "__main__":
    main()
