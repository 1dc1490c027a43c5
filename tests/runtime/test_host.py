"""Counting cores on described machines: SMT, hybrid CPUs, quotas of both control group versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.host import HostCores, available_cores, normalized_architecture, total_memory_bytes


def machine(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """(sys, proc) folders with these files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root / "sys", root / "proc"


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in pairs.items()}


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("files", "expected", "threads"),
    [
        ({}, HostCores(8, 8, None), 8),
        (siblings({n: f"{n % 4},{n % 4 + 4}" for n in range(8)}), HostCores(8, 4, None), 4),
        # two performance cores with two threads each, four efficiency cores
        (
            {"sys/devices/cpu_core/cpus": "0-3", **siblings({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})},
            HostCores(8, 2, None),
            2,
        ),
        ({"sys/devices/cpu_core/cpus": "nonsense,9-"}, HostCores(8, 8, None), 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, HostCores(8, 8, 2.5), 2),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/cpu.max": "600000 100000",
            },
            HostCores(8, 8, 3.0),
            3,
        ),
        # inside a container the group's path does not exist, the mount's root is ours
        ({"proc/self/cgroup": "0::/docker/1", "sys/fs/cgroup/cpu.max": "50000 100000"}, HostCores(8, 8, 0.5), 1),
        ({"proc/self/cgroup": "0::/../../x", "sys/fs/cgroup/cpu.max": "400000 100000"}, HostCores(8, 8, 4.0), 4),
        (
            {
                "proc/self/cgroup": "5:memory:/g\n4:cpu,cpuacct:/g",
                "sys/fs/cgroup/cpu/g/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/g/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            HostCores(8, 8, 2.0),
            2,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "garbage"}, HostCores(8, 8, None), 8),
    ],
)
def test_cores(tmp_path: Path, files: dict[str, str], expected: HostCores, threads: int) -> None:
    cores = available_cores(*machine(tmp_path, files))
    assert cores == expected
    assert cores.default_threads == threads


def test_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    roots = machine(tmp_path, siblings({n: f"{n % 4},{n % 4 + 4}" for n in range(8)}))
    assert available_cores(*roots).physical == 2


def test_this_machine() -> None:
    cores = available_cores()
    assert 1 <= cores.default_threads <= cores.physical <= cores.logical
    assert total_memory_bytes() > 1 << 28


def test_architecture_names() -> None:
    assert normalized_architecture("amd64-unknown-linux-gnu") == "x86_64"
    assert normalized_architecture("arm64-apple-darwin") == "aarch64"
    assert normalized_architecture("riscv64-unknown-linux-gnu") == "riscv64"
