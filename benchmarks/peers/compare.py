"""Our exports beside anomalib's: each project's model as it ships it, same backbone weights, same pictures, in turns.

    python benchmarks/peers/compare.py prepare WORK             # anomalib's environment (6 GB), training, exports
    python benchmarks/peers/compare.py graphs WORK              # p50 of the graphs alone, both through OpenVINO
    python benchmarks/peers/compare.py photos WORK              # from a 1080p JPEG file to a verdict, and a plain loop
    python benchmarks/peers/compare.py start WORK               # from a bare interpreter to the first verdict, memory
    python benchmarks/peers/compare.py accuracy WORK            # AUROC on solar cells

`prepare` goes on where it was cut off; `--case` takes single ones. Every figure is a ratio of one run: a round measures
one side's block of calls and then the other's, and the median of the rounds counts. Where no weights can be had
(ResNet-18) both sides get the same random ones: then it is speed that is compared, and no accuracy. The models are
not alike in all: anomalib's PaDiM takes three layers and here 100 channels, ours two layers and 64; on EfficientNet its
STPM compares three layers, ours two. anomalib is trained on all normal cells of the split, ours on four fifths of them,
the rest being for its limits; what learns by epochs learns for one, where only the speed is compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import openvino as ov
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks beside this folder

from common import OPEN, print_rows

from edge_anomaly_calibration.guard import GuardLimits
from edge_anomaly_runtime.bundle import read_bundle
from edge_anomaly_runtime.cpu import usable_cpus
from edge_anomaly_runtime.engine_openvino import openvino_core
from edge_anomaly_runtime.images import list_images
from edge_anomaly_runtime.progress import say, track
from edge_anomaly_runtime.scoring import open_scorer

PEER = ("anomalib[openvino]==2.7.0", "openvino==2026.4.1")
WORKER = Path(__file__).with_name("anomalib_worker.py")
LITE, LITE_OF_TIMM = "efficientnet_lite0", "tf_efficientnet_lite0"
PHOTO = (1920, 1080)


@dataclass(frozen=True)
class Case:
    model: str
    backbone: str
    size: int
    epochs: int = 1  # of anomalib's training


CASES = {
    "padim-lite0": Case("padim", LITE, 224),
    "patchcore-lite0": Case("patchcore", LITE, 224),
    "stpm-lite0": Case("stpm", LITE, 224, epochs=20),  # as many as ours
    "padim-resnet18": Case("padim", "resnet18", 256),
    "patchcore-resnet18": Case("patchcore", "resnet18", 256),
    "stpm-resnet18": Case("stpm", "resnet18", 256),
    # anomalib's FastFlow takes no EfficientNet.
    "fastflow-resnet18": Case("fastflow", "resnet18", 256),
}


# prepare


def prepare(work: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    python = work / "env" / "bin" / "python"
    if not (work / "env" / "done").exists():
        say(f"installing {' '.join(PEER)}")
        venv.create(work / "env", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
        (work / "env" / "done").touch()
    prepare_data(work)
    for name in names:
        case = CASES[name]
        build_ours(work, name, case)
        if not (work / name / "done.json").exists():
            say(f"anomalib: {name}")
            backbone = LITE_OF_TIMM if case.backbone == LITE else case.backbone
            given = ["--model", case.model, "--backbone", backbone, "--size", case.size, "--epochs", case.epochs]
            given += ["--data", work / "cells", "--weights", work / f"{case.backbone}.pth", "--out", work / name]
            with (work / f"{name}.log").open("w") as log:
                built = subprocess.run(
                    [python, WORKER, "build", *map(str, given)], stdout=subprocess.PIPE, stderr=log, text=True
                )
            if built.returncode:
                raise SystemExit(f"anomalib could not build {name}; see {work / name}.log")
            (work / name / "done.json").write_text(built.stdout)
        yield {"case": name, **json.loads((work / name / "done.json").read_text())}


def prepare_data(work: Path) -> None:
    """Write the cells as folders, the weights that both sides start from, and a photo."""
    import torch

    from edge_anomaly import backbones
    from edge_anomaly.data import GOOD, UNSURE, open_dataset

    if (work / "photo.jpg").exists():
        return
    data = open_dataset("elpv-mono")
    good = [item for item in data.test if item.label == GOOD]
    bad = [item for item in data.test if item.label not in (GOOD, UNSURE)]
    for folder, items in (("train/good", data.train), ("test/good", good), ("test/bad", bad)):
        (work / "cells" / folder).mkdir(parents=True, exist_ok=True)
        for item in items:
            shutil.copy(item.path, work / "cells" / folder)
    for name in (LITE, "resnet18"):
        weights = "default" if name == LITE else "random"
        torch.manual_seed(0)
        network = backbones._lite0_network() if name == LITE else backbones._torchvision_network(name)
        if weights == "default":
            backbones._load(network, backbones._state_dict(backbones.BACKBONES[name], weights), name, weights)
        torch.save(network.state_dict(), work / f"{name}.pth")
    picture = Image.open(data.train[0].path).convert("RGB").resize(PHOTO, Image.Resampling.BICUBIC)
    picture.save(work / "photo.jpg", quality=90)


def build_ours(work: Path, name: str, case: Case) -> None:
    from edge_anomaly.fastflow import FastflowConfig
    from edge_anomaly.padim import PadimConfig
    from edge_anomaly.patchcore import PatchcoreConfig
    from edge_anomaly.runs import load_run
    from edge_anomaly.stpm import StpmConfig
    from edge_anomaly.train import TrainOptions, train_detector
    from edge_anomaly_export.exporting import export_run
    from edge_anomaly_export.options import ExportOptions
    from edge_anomaly_runtime.preprocess import Preprocess

    run, bundle, spec = work / f"{name}-run", work / f"{name}.eab", Preprocess(case.size, case.size)
    if bundle.exists() and read_bundle(bundle).manifest.input.preprocess == spec:
        return
    is_random = case.backbone != LITE
    # Random weights: only as long as it takes to be accepted.
    short: dict[str, dict[str, Any]] = {"stpm": {"epochs": 3, "batch_size": 4}, "fastflow": {"epochs": 1}}
    more = short.get(case.model, {}) if is_random else {}
    config = {
        "padim": lambda: PadimConfig(case.backbone),
        "patchcore": lambda: PatchcoreConfig(case.backbone),
        "stpm": lambda: StpmConfig(case.backbone, **more),
        "fastflow": lambda: FastflowConfig(case.backbone, finetune="off", **more),
    }[case.model]()
    if not (run / "run.json").exists() or load_run(run).preprocess != spec:
        train_detector(
            "elpv-mono",
            run,
            config=config,
            preprocess=spec,
            weights=str(work / f"{case.backbone}.pth"),
            options=TrainOptions(force=True),
        )
    # With random weights no image is anomalous: the guard would float tensors for nothing.
    options = ExportOptions(("openvino",), "int8", limits=OPEN if is_random else GuardLimits(), force=True)
    export_run(run, bundle, options)


# graphs


def graphs(work: Path, names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Time our INT8 graph and anomalib's in f32, bf16 and int8_ptq; nothing around them is measured."""
    for name in names:
        calls = {"ours int8": caller(ours_compiled(work, name))}
        for label, (variant, precision) in PEER_VARIANTS.items():
            calls[label] = caller(theirs_compiled(work, name, variant, precision))
        samples = in_turns(calls, rounds)
        p50 = {label: median(values) for label, values in samples.items()}
        ratios = {
            label: median(slow / fast for slow, fast in zip(values, samples["ours int8"], strict=True))
            for label, values in samples.items()
        }
        sizes = {variant: size_of(xml_of(work, name, variant).parent) for variant in ("f32", "int8_ptq")}
        yield {
            "case": name,
            "p50_ms": p50,
            "times_faster": ratios,
            "fastest_of_anomalib": min(PEER_VARIANTS, key=p50.__getitem__),
            "rounds": samples,
            "mb": {"ours int8": size_of(work / f"{name}.eab" / "openvino"), **sizes},
        }


PEER_VARIANTS = {"f32": ("f32", "f32"), "bf16": ("f32", "bf16"), "int8_ptq": ("int8_ptq", "f32")}


def xml_of(work: Path, name: str, variant: str) -> Path:
    return work / json.loads((work / name / "done.json").read_text())[variant]


def ours_compiled(work: Path, name: str) -> ov.CompiledModel:
    bundle = read_bundle(work / f"{name}.eab")
    return compiled(bundle.read("openvino/model.xml"), bundle.read("openvino/model.bin"), "f32")


def theirs_compiled(work: Path, name: str, variant: str, precision: str) -> ov.CompiledModel:
    xml = xml_of(work, name, variant)
    return compiled(xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), precision)


def compiled(xml: bytes, weights: bytes, precision: str) -> ov.CompiledModel:
    """Return a graph compiled alike for both sides: for latency, on all CPUs."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": usable_cpus(),
    }
    return openvino_core().compile_model(openvino_core().read_model(xml, weights), "CPU", settings)


def caller(model: ov.CompiledModel) -> Callable[[], None]:
    """Return one call of a graph on fixed pixels, without copies."""
    request = model.create_infer_request()
    port = model.inputs[0]
    pixels = np.random.default_rng(0).integers(0, 256, tuple(port.shape), dtype=np.uint8)
    is_float = port.element_type.to_dtype() != np.uint8
    request.get_input_tensor().data[:] = pixels / np.float32(255) if is_float else pixels

    def call() -> None:
        request.start_async()
        request.wait()

    return call


def in_turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the p50 of every call per round: blocks of about a second in turns, each after a warm-up."""
    blocks = {}
    for label, call in calls.items():
        times(call, 5)
        blocks[label] = max(5, min(300, round(1000 / median(times(call, 5)))))
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for _ in track(range(rounds), "rounds", rounds):
        for label, call in calls.items():
            times(call, max(2, blocks[label] // 10))
            samples[label].append(median(times(call, blocks[label])))
    return samples


def times(call: Callable[[], None], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        start = perf_counter()
        call()
        samples.append((perf_counter() - start) * 1e3)
    return samples


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# photos


def photos(work: Path, names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Time everything from a 1080p JPEG file to a verdict: ours, anomalib's inferencer, and a plain loop of ours."""
    photo = work / "photo.jpg"
    for name in names:
        with (
            open_scorer(work / f"{name}.eab", engine="openvino") as scorer,
            serving(work, name, "photo", {}) as default,
            serving(work, name, "photo", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}) as f32,
        ):
            loop = plain_loop(work, name, photo)
            rows: dict[str, list[float]] = {"ours": [], "plain loop": [], "anomalib": [], "anomalib f32": []}
            cpu: dict[str, list[float]] = {"ours": [], "plain loop": []}
            rest = []
            for _ in track(range(rounds), "rounds", rounds):
                for label, call in (("ours", lambda: scorer.score_file(photo)), ("plain loop", loop)):
                    times(call, 3)
                    start = process_time()
                    rows[label].append(median(times(call, 30)))
                    cpu[label].append((process_time() - start) / 30 * 1e3)
                for _ in range(30):
                    start_s = perf_counter()
                    result = scorer.score_file(photo)
                    rest.append((perf_counter() - start_s) * 1e3 - sum(result.ms.values()))
                for label, ask in (("anomalib", default), ("anomalib f32", f32)):
                    rows[label].append(median(ask(13)[3:]))
        yield {
            "case": name,
            "p50_ms": {label: median(values) for label, values in rows.items()},
            "cpu_ms": {label: median(values) for label, values in cpu.items()},
            "times_faster": {
                label: median(a / b for a, b in zip(values, rows["ours"], strict=True))
                for label, values in rows.items()
            },
            "ours_beside_its_stages_ms": median(rest),
            "rounds": rows,
        }


def plain_loop(work: Path, name: str, photo: Path) -> Callable[[], None]:
    """Return what a careful engineer would write by hand for the same graph, for this one machine."""
    request = ours_compiled(work, name).create_infer_request()
    size = CASES[name].size

    def call() -> None:
        with Image.open(photo) as picture:
            picture.draft("RGB", (2 * size, 2 * size))
            small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
        request.infer({0: np.asarray(small)[np.newaxis]}, share_inputs=True)
        assert np.isfinite(request.get_tensor("score").data[0])

    return call


@contextmanager
def serving(work: Path, name: str, variant: str, config: dict[str, Any]) -> Iterator[Callable[[int], list[float]]]:
    """Start anomalib's inferencer in its own environment and give a function that returns so many of its latencies."""
    command = [work / "env/bin/python", WORKER, "serve", "--model", xml_of(work, name, variant).resolve()]
    command += ["--image", (work / "photo.jpg").resolve(), "--config", json.dumps(config)]
    # It writes a cache folder to where it is started.
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=work / name,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        if not stdout.readline():
            raise SystemExit(f"anomalib's inferencer does not start on {name}; run anomalib_worker.py serve by hand.")

        def ask(count: int) -> list[float]:
            stdin.write(f"{count}\n")
            stdin.flush()
            return list(json.loads(stdout.readline())["ms"])

        yield ask
        stdin.close()


# start


_FIRST = """
import json, sys
from pathlib import Path
from time import perf_counter
start = perf_counter()
from edge_anomaly_runtime.scoring import open_scorer
imported = perf_counter()
scorer = open_scorer(sys.argv[1], engine="openvino")
loaded = perf_counter()
scorer.score_file(sys.argv[2])
end = perf_counter()
status = Path("/proc/self/status").read_text().splitlines()
rss = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
print(json.dumps(dict(import_s=imported - start, load_s=loaded - imported, first_s=end - loaded, rss_mib=rss)))
"""


def start(work: Path, names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure fresh processes: whole time by our clock, its parts by theirs, and the peak of resident memory."""
    for name in names:
        photo = (work / "photo.jpg").resolve()
        model = xml_of(work, name, "photo").resolve()
        commands = {
            "ours": [sys.executable, "-c", _FIRST, work / f"{name}.eab", photo],
            "anomalib": [work / "env/bin/python", WORKER, "first-score", "--model", model, "--image", photo],
        }
        rows: dict[str, list[dict[str, float]]] = {label: [] for label in commands}
        for _ in track(range(rounds), "rounds", rounds):
            for label, command in commands.items():
                began = perf_counter()
                cwd = work if label == "ours" else work / name
                done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=cwd)
                rows[label].append({"whole_s": perf_counter() - began, **json.loads(done.stdout)})
        yield {
            "case": name,
            **{
                label: {key: median(row[key] for row in measured) for key in measured[0]}
                for label, measured in rows.items()
            },
        }


# accuracy


def accuracy(work: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Return the image AUROC of our INT8 bundle and of anomalib's graphs on the same cells."""
    from edge_anomaly_calibration.guard import auroc

    for name in names:
        if CASES[name].backbone != LITE:
            continue
        paths = {kind: list_images([str(work / "cells" / "test" / kind)]) for kind in ("good", "bad")}
        defective = np.array([kind == "bad" for kind, items in paths.items() for _ in items])
        every = [path for items in paths.values() for path in items]
        row: dict[str, Any] = {"case": name, "cells": len(every)}
        with open_scorer(work / f"{name}.eab", engine="openvino") as scorer:
            row["ours int8"] = auroc(np.array([scorer.score_file(path).score for path in every], float), defective)
        for label, (variant, precision) in PEER_VARIANTS.items():
            scores = peer_scores(work, name, variant, precision, every)
            # Its graph brings scores to 0 to 1 and cuts what is outside: ties there would cost it AUROC.
            row[label], row[f"{label} cut"] = auroc(scores, defective), int(((scores <= 0) | (scores >= 1)).sum())
        yield row


def peer_scores(work: Path, name: str, variant: str, precision: str, paths: list[Path]) -> Any:
    size = CASES[name].size
    request = theirs_compiled(work, name, variant, precision).create_infer_request()
    scores = []
    for path in paths:
        # As its training saw them: resized with antialiasing, bytes divided by 255.
        picture = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[np.newaxis] / 255
        request.infer({0: np.ascontiguousarray(pixels)})
        scores.append(float(request.get_tensor("pred_score").data.reshape(-1)[0]))
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "graphs", "photos", "start", "accuracy"])
    parser.add_argument("work", type=Path, help="a folder for environment, models and data")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one object per line to this file")
    arguments = parser.parse_args()
    work, names = arguments.work.resolve(), arguments.case or list(CASES)
    work.mkdir(parents=True, exist_ok=True)
    rows = {
        "prepare": lambda: prepare(work, names),
        "graphs": lambda: graphs(work, names, arguments.rounds),
        "photos": lambda: photos(work, names, arguments.rounds),
        "start": lambda: start(work, names, arguments.rounds),
        "accuracy": lambda: accuracy(work, names),
    }[arguments.what]()
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
