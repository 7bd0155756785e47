"""What the runtime weighs: peak memory from import to first score, time of `--help`, modules of the lean install.

python benchmarks/footprint.py --bundle part.eab
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

FIRST_SCORE = """
import sys
from time import perf_counter
start = perf_counter()
from edge_anomaly_runtime import open_scorer
with open_scorer(sys.argv[1], engine=sys.argv[2]) as scorer:
    result = scorer.score_file(sys.argv[3])
# ru_maxrss would count the memory of the process that forked this one as well.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(f"{perf_counter() - start:.2f} s, peak RSS {peak / 1024:.0f} MiB, score {result.score:.3f}")
"""

HEAVY = """
import sys
import edge_anomaly.cli
heavy = [name for name in ("torch", "onnx", "onnxruntime", "cv2", "openvino", "numpy", "PIL") if name in sys.modules]
print("imported by the command line:", heavy or "none of torch, onnx, onnxruntime, cv2, openvino, numpy, PIL")
"""


def make_bundle(scratch: Path) -> Path:
    from edge_anomaly.padim import PadimConfig
    from edge_anomaly.sample_data import draw_sample_data
    from edge_anomaly.train import train_detector
    from edge_anomaly_export.exporting import export_run
    from edge_anomaly_export.options import ExportOptions
    from edge_anomaly_runtime.preprocess import Preprocess

    draw_sample_data(scratch / "data", train=60, test_good=10, per_defect=2)
    config = PadimConfig(backbone="efficientnet_lite0")
    train_detector(str(scratch / "data"), scratch / "run", config=config, preprocess=Preprocess(224, 224))
    options = ExportOptions(("openvino",), "int8", calibration_images=32, allow_drop=True)
    export_run(scratch / "run", scratch / "part.eab", options)
    return scratch / "part.eab"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or make_bundle(Path(scratch))
        image = bundle / "golden" / "000.png"
        for engine in ("openvino", "onnxruntime"):
            command = [sys.executable, "-c", FIRST_SCORE, str(bundle), engine, str(image)]
            print(f"{engine:12} import to first score: {subprocess.check_output(command, text=True).strip()}")
        print(subprocess.check_output([sys.executable, "-c", HEAVY], text=True).strip())
        times = []
        for _ in range(8):
            start = perf_counter()
            subprocess.run([sys.executable, "-m", "edge_anomaly", "--help"], check=True, capture_output=True)
            times.append(perf_counter() - start)
        print(f"edge-anomaly --help: median {statistics.median(times[1:]):.2f} s, best {min(times):.2f} s (warm)")


if __name__ == "__main__":
    main()
