"""CPU counts from fake control groups; what the CPU can do from the real machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_anomaly_runtime import cpu


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test see an affinity mask of eight CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n"}, 2, id="v2: 1.5 CPUs are 2 threads"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 8, id="v2: no quota"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="v2: half a CPU is one thread"),
        pytest.param("0::/\n", {"cpu.max": "1600000 100000\n"}, 8, id="v2: quota above the mask"),
        pytest.param("0::/\n", {}, 8, id="v2: the root group has no file"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"},
            2,
            id="v2: the parent is tighter",
        ),
        pytest.param(
            "0::/a/b\n", {"a/cpu.max": "max 100000", "a/b/cpu.max": "300000 100000"}, 3, id="v2: the child is tighter"
        ),
        pytest.param("0::/a\n", {"a/cpu.max": "", "cpu.max": "400000 100000"}, 4, id="v2: an odd file is skipped"),
        pytest.param("0::/a\n", {"z/cpu.max": "100000 100000"}, 8, id="v2: a foreign group does not count"),
        pytest.param(
            "4:cpu,cpuacct:/docker/1\n1:name=systemd:/x\n",
            {"cpu/docker/1/cpu.cfs_quota_us": "250000\n", "cpu/docker/1/cpu.cfs_period_us": "100000\n"},
            3,
            id="v1",
        ),
        pytest.param(
            "4:cpu,cpuacct:/docker/1\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
            id="v1: inside a container the group is mounted as the root",
        ),
        pytest.param(
            "4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8, id="v1: no quota"
        ),
        pytest.param(
            "7:memory:/a\n4:cpu:/\n",
            {"a/cpu.max": "100000 100000", "cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"},
            8,
            id="v1: only the cpu controller counts",
        ),
    ],
)
def test_threads_are_the_mask_capped_by_the_quota(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    own = tmp_path / "membership"
    own.write_text(membership)
    assert cpu.usable_cpus(_tree(tmp_path / "cgroup", files), own) == expected


def test_without_a_membership_file_the_root_groups_count(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert cpu.usable_cpus(_tree(tmp_path / "v2", {"cpu.max": "200000 100000"}), absent) == 2
    v1 = {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}
    assert cpu.usable_cpus(_tree(tmp_path / "v1", v1), absent) == 3
    assert cpu.usable_cpus(tmp_path / "nothing", absent) == 8


def test_this_machine_grants_at_least_one_cpu() -> None:
    assert 1 <= cpu.usable_cpus() <= 8


def test_int8_instructions_are_sorted_names_among_the_cpu_flags() -> None:
    found = cpu.int8_instructions()
    assert found == sorted(found)
    assert set(found) <= {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"} & cpu.cpu_flags()


def test_the_cpu_has_a_name() -> None:
    assert cpu.cpu_name().strip()
