"""What this machine's CPU can do, and how much of it the process may use."""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LEVELS_WITHOUT_INT8 = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}
_INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


def usable_cpus(cgroup: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of threads that make sense here: the affinity mask, capped by the container's CPU quota.

    Engines ignore the quota of a container and start a thread per core of the host, which slows them down.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cpu_quota(cgroup, membership)
    return mask if quota is None else max(1, min(mask, math.ceil(quota)))


def cpu_quota(cgroup: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the smallest CPU quota of this process's control groups, in CPUs, or None where there is none."""
    quotas = [quota for folder in _own_groups(cgroup, membership) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _own_groups(cgroup: Path, membership: Path) -> list[Path]:
    """List the folders of this process's groups up to the root, version 2 and the cpu controller of version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return [cgroup, cgroup / "cpu"]
    folders = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroup / "cpu" if controllers else cgroup
        own = root / path.strip("/")
        folders += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as the kernel names them; empty where /proc/cpuinfo is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        flag
        for line in lines
        if line.lower().startswith(("flags", "features"))
        for flag in line.split(":", 1)[1].split()
    )


def int8_instructions() -> list[str]:
    """Return which INT8 dot-product instructions the CPU has; without one, INT8 kernels saturate and scores are wrong.

    ONEDNN_MAX_CPU_ISA, which tells OpenVINO to use older instructions only, counts as such a CPU.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _LEVELS_WITHOUT_INT8:
        return []
    return sorted(_INT8_FLAGS & cpu_flags())


def cpu_name() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
