"""What a measurement was made on, whether it may be compared with another, and what makes it doubtful."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from edge_anomaly_runtime.cpu import cpu_flags, cpu_name, cpu_quota, int8_instructions, usable_cpus
from edge_anomaly_runtime.jetson import l4t_release, power_mode
from edge_anomaly_runtime.scoring import Scorer

BUSY = "the machine was busy"
_SYS = Path("/sys")
_LOAD_WARNING = 0.5
_CLOCK_WARNING = 1.05
# What makes two measurements comparable; versions may differ, that is what one compares.
_SAME = ("cpu", "machine", "usable_cpus", "threads", "device", "int8_instructions", "power_mode")


def environment(scorer: Scorer) -> dict[str, Any]:
    """Return what the latency depends on besides the bundle; values that the system does not tell are None."""
    info = scorer.session.info
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "usable_cpus": usable_cpus(),
        "cpu_quota": cpu_quota(),
        "flags": sorted(flag for flag in cpu_flags() if flag.startswith(("avx", "amx", "sse4", "asimd", "sve"))),
        "int8_instructions": int8_instructions(),
        "governor": _first_line(_SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "temperatures_c": temperatures(),
        "load": load_average(),
        "host_cpus": os.cpu_count(),
        "power_mode": power_mode(),
        "l4t": l4t_release(),
        "threads": info.threads,
        "engine_version": info.version,
        "device": info.device,
        "float_precision": info.float_precision,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Say what the environments of two reports do not have in common, of what makes them comparable."""
    pairs = [(name, first["environment"].get(name), second["environment"].get(name)) for name in _SAME]
    return [f"{name}: {one} and {other}" for name, one, other in pairs if one != other]


def load_average() -> float | None:
    """Return how many processes wanted a CPU of the host during the last minute; None where that is not known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def temperatures(root: Path = _SYS) -> dict[str, float]:
    """Return the thermal zones' temperatures in degrees Celsius, by name; empty where there are none."""
    found = {}
    for zone in sorted(root.glob("class/thermal/thermal_zone*")):
        try:
            found[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1000
        except (OSError, ValueError):
            continue
    return found


def reference_ms() -> float:
    """Return the time of a fixed piece of work: it changes only when the CPU's clock, or who shares it, does."""
    times = []
    for _ in range(15):
        start = perf_counter()
        sum(range(50_000))
        times.append((perf_counter() - start) * 1e3)
    return min(times)


def peak_rss_mb() -> float | None:
    """Return the largest resident memory of this process so far, in MB (10^6 bytes); None on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # ru_maxrss would count what the parent had when it forked this process
        status = Path("/proc/self/status").read_text().splitlines()
        return next((round(int(line.split()[1]) * 1024 / 1e6, 1) for line in status if line.startswith("VmHWM")), None)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6, 1)


def warnings_of(report: dict[str, Any]) -> list[str]:
    """Say in words what makes the report's figures doubtful."""
    around, found = report["environment"], []
    if around["load"] is not None and around["load"] > _LOAD_WARNING * (around["host_cpus"] or 1):
        found.append(f"{BUSY}: a load of {around['load']:g} before the measurement")
    if around["governor"] not in (None, "performance"):
        found.append(f"the CPU's governor is {around['governor']!r}, not 'performance': its clock may vary")
    is_half_meant = report["precision"] == "fp16" or report["engine"].startswith("tensorrt")
    if around["float_precision"] != "f32" and not is_half_meant:
        found.append(f"float layers ran in {around['float_precision']}, not in f32")
    if report["precision"] == "int8" and around["device"].startswith("CPU") and not around["int8_instructions"]:
        found.append("this CPU has no INT8 dot-product instructions: INT8 does not pay here")
    if around["threads"] > around["usable_cpus"]:
        found.append(f"{around['threads']} threads share {around['usable_cpus']} CPUs")
    drift = report["reference_ms"]["after"] / report["reference_ms"]["before"]
    if not 1 / _CLOCK_WARNING < drift < _CLOCK_WARNING:
        found.append(f"the CPU's speed changed by {drift - 1:+.0%} during the measurement")
    if not report["warm_up"]["is_settled"]:
        found.append(f"calls were still getting faster after a warm-up of {report['warm_up']['seconds']:.0f} s")
    if report["missed"]:
        found.append(f"{report['missed']} of {report['scheduled']} frames were missed: the rate cannot be held")
    if not report["full_size_images"]:
        found.append("the golden images have the model's size: decode and resize are not a camera's; give --images")
    return found


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None
