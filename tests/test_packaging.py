"""What is installed on a device: the wheel's content, and what an import of the runtime pulls in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "cv2", "openvino", "tensorrt", "nncf")

BLOCK_HEAVY = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""

_NEED_AN_ENGINE = (
    "__main__",
    "engine_onnxruntime",
    "engine_onnxruntime_tensorrt",
    "engine_openvino",
    "openvino_lean",
)
RUNTIME_MODULES = sorted(
    path.stem
    for path in (ROOT / "runtime/edge_anomaly_runtime").glob("*.py")
    if path.stem
    not in ("__main__", "engine_onnxruntime", "engine_onnxruntime_tensorrt", "engine_openvino", "openvino_lean")
)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import os; os.chdir({str(ROOT)!r}); from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_four_packages_with_types_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    packages = {"edge_anomaly", "edge_anomaly_runtime", "edge_anomaly_calibration", "edge_anomaly_export"}
    assert tops == packages
    assert all(f"{package}/py.typed" in names for package in packages)
    assert not [name for name in names if "/test" in name or name.endswith((".onnx", ".png", ".pth"))]
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 1_500_000


def test_wheel_holds_the_live_page(wheel: Path) -> None:
    folder = "edge_anomaly_runtime/stream/web"

    archive = zipfile.ZipFile(wheel)
    assert {name for name in archive.namelist() if name.startswith(folder)} == {
        f"{folder}/{name}" for name in ("index.html", "page.css", "page.js")
    }
    assert all(
        archive.read(f"{folder}/{path.name}") == path.read_bytes() for path in (ROOT / "runtime" / folder).iterdir()
    )


def test_wheel_asks_a_device_for_no_heavy_package(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()

    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0].split("<")[0] for line in base) == [
        "numpy",
        "pillow",
        "pydantic",
        "rich",
        "tomli",  # for Python 3.10 only
        "typer",
    ]
    assert "Requires-Python: >=3.10" in metadata


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_runtime_modules_import_without_heavy_packages(module: str) -> None:
    done = run_python(f"{BLOCK_HEAVY}\nimport edge_anomaly_runtime.{module}")

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["train", "export", "evaluate", "sample-data", "demo", "score", "bench", "doctor"])
def test_lean_install_shows_every_verb(verb: str) -> None:
    done = run_python(
        f"{BLOCK_HEAVY}\nimport sys; sys.argv = ['x', '--help']\nfrom edge_anomaly.cli import main; main()"
    )

    assert done.returncode == 0
    assert verb in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["train", "padim", "--data", ".", "--out", "run"], "train"),
        (["export", "run"], "export"),
        (["evaluate", "part.eab", "--data", "."], "train"),
        (["demo"], "all"),
    ],
)
def test_workstation_verb_on_a_lean_install_ends_with_3_and_the_line_to_type(command: list[str], extra: str) -> None:
    """`find_spec` finds nothing of what is blocked, as on a device."""
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {HEAVY!r} else real(name, package)
{BLOCK_HEAVY}
sys.argv = ["edge-anomaly", *{command!r}]
from edge_anomaly.cli import main
main()
"""
    done = run_python(code)

    assert done.returncode == 3, done.stderr
    assert f'pip install "edge-anomaly[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_that_takes_time() -> None:
    code = """
import json, sys
import edge_anomaly.cli
print(json.dumps(sorted(sys.modules)))
"""
    modules = json.loads(run_python(code).stdout)

    assert not set(modules) & {*HEAVY, "numpy", "PIL", "scipy", "sklearn", "matplotlib"}


def test_scoring_on_openvino_imports_no_workstation_package(bundle_folder: Path) -> None:
    code = f"""
import json, sys
from edge_anomaly_runtime import open_scorer
with open_scorer({str(bundle_folder)!r}, engine="openvino") as scorer:
    scorer.score_file({str(bundle_folder / "golden/000.png")!r})
print(json.dumps(sorted(sys.modules)))
"""
    done = run_python(code)
    modules = json.loads(done.stdout)

    assert "openvino" in modules
    assert not set(modules) & {"torch", "torchvision", "timm", "onnx", "onnxruntime", "cv2"}


def test_runtime_lint_refuses_torch(tmp_path: Path) -> None:
    """The nested ruff.toml is in force: without `extend` it would silently replace the parent's rules."""
    probe = ROOT / "runtime/edge_anomaly_runtime/_probe.py"
    code = "import torch\n"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", str(probe), "-"],
        input=code,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )

    assert "TID251" in done.stdout
    assert "the device never has torch" in done.stdout
