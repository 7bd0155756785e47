from __future__ import annotations

import pytest

from edge_anomaly_runtime.bench.harness import Report
from edge_anomaly_runtime.bench.statistics import summary


@pytest.fixture
def report() -> Report:
    """A measurement of 700 images with made-up figures: 9 to 30 ms, the median 10 ms."""
    total = [9.0] * 300 + [10.0] * 350 + [12.0] * 40 + [30.0] * 10
    infer = [value - 2 for value in total]
    made: Report = {
        "schema": "edge-anomaly.bench/1",
        "name": "part/openvino-int8/single",
        "bundle": "part",
        "manifest_sha256": "ab" * 32,
        "engine": "openvino",
        "precision": "int8",
        "scenario": {"kind": "single", "rate": None, "streams": 1},
        "runs": 700,
        "processes": 1,
        "distinct_images": 8,
        "full_size_images": True,
        "latency_ms": {"total": summary(total), "infer": summary(infer)},
        "cpu_ms_per_image": 16.0,
        "images_per_second": 100.0,
        "scheduled": None,
        "missed": None,
        "start_s": {"first_score": None, "first_inference": 0.02, "verify": 0.1, "load": 0.4},
        "peak_rss_mb": 150.0,
        "warm_up": {"calls": 100, "seconds": 1.1, "is_settled": True},
        "reference_ms": {"before": 1.0, "after": 1.01},
        "executed": {"u8": 33, "f32": 4},
        "accuracy": {"auroc": 0.9617},
        "environment": {
            "cpu": "A <CPU> & more",
            "machine": "x86_64",
            "usable_cpus": 2,
            "host_cpus": 2,
            "threads": 2,
            "device": "CPU",
            "int8_instructions": ["avx512_vnni"],
            "power_mode": None,
            "governor": "performance",
            "load": 0.1,
            "float_precision": "f32",
        },
        "samples_ms": total,
        "started_s": [],
        "warnings": [],
    }
    return made
