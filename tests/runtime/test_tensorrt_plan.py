"""The attempts of a build, and the calls of a build on NVIDIA's own module where TensorRT for RTX is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_anomaly_runtime.tensorrt_plan import attempts

from .conftest import quantised_graph


@pytest.mark.parametrize(
    ("workspace", "level", "has_levels", "expected"),
    [
        (1024, 3, True, [(1024, 3), (512, 3), (512, 2), (512, 1)]),
        (1024, 0, True, [(1024, 0), (512, 0)]),
        (1, 1, True, [(1, 1), (1, 1)]),
        (1024, 3, False, [(1024, None), (512, None)]),
    ],
)
def test_attempts(workspace: int, level: int, has_levels: bool, expected: list[tuple[int, int | None]]) -> None:
    assert attempts(workspace, level, has_levels=has_levels) == expected


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_nvidias_own_module_takes_the_calls_of_a_build(tmp_path: Path) -> None:
    """It builds without a GPU, for version 11's way of typing. In a process of its own, which a crash may end."""
    for name, batch in (("fixed", 1), ("free", None)):
        (tmp_path / f"{name}.onnx").write_bytes(quantised_graph(batch))
    (tmp_path / "text.onnx").write_bytes(b"no graph")
    code = """
import json, sys
from pathlib import Path
import tensorrt_rtx
from edge_anomaly_runtime.errors import ArtefactError
from edge_anomaly_runtime.tensorrt_plan import PlanOptions, build_plan

folder = Path(sys.argv[1])
options = PlanOptions(True, "int8", "head/", (1, 16, 16, 3), workspace_mib=256, optimization_level=3)
found = {}
for name in ("fixed", "free", "text"):
    try:
        plan = build_plan(tensorrt_rtx, (folder / f"{name}.onnx").read_bytes(), options, folder / "kernels.timing")
        found[name] = len(plan.data) > 1000
    except ArtefactError as error:
        found[name] = error.what
print(json.dumps(found))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["fixed"], found["free"]) == (True, True)
    assert "Failed to parse the ONNX model" in found["text"]
    assert (tmp_path / "kernels.timing").stat().st_size > 32
