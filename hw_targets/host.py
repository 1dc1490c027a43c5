"""What this machine says of itself: LLVM's name and features of the CPU, caches from /sys, memory from the system.

Nothing is measured. Cores are those this process may use, memory is what its control group allows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path

from hw_targets import cpu_features
from hw_targets.target import Cache

_CACHE_DIRECTORY = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def host_isa() -> tuple[str, str, frozenset[str], frozenset[str]]:
    """(triple, CPU name, features present, features that the CPU's name may suggest but this machine lacks)."""
    import llvmlite.binding as llvm  # 0.1 s: only when asked

    features = llvm.get_host_cpu_features()
    present = frozenset(name for name, on in features.items() if on)
    absent = frozenset(name for name, on in features.items() if not on)
    triple = llvm.get_default_triple()
    if triple.split("-", 1)[0] in ("aarch64", "arm64"):
        present = cpu_features.closure(present | {"neon"})
    return triple, llvm.get_host_cpu_name(), present, absent - cpu_features.closure(present)


def usable_cores() -> int:
    """CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory(cgroup: Path = _CGROUP) -> int | None:
    """Bytes of memory: the machine's, or the control group's limit where that is lower."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        total = 0
    limits = [total] if total > 0 else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((cgroup / name).read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's marketing name, as far as the system knows it."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def caches(directory: Path = _CACHE_DIRECTORY) -> tuple[Cache, ...]:
    """Data and unified caches that the first CPU sees, innermost first; empty where the system does not say."""
    found = []
    for index in sorted(directory.glob("index*")):
        try:
            kind = (index / "type").read_text().strip().lower()
            if kind not in ("data", "unified"):
                continue
            level = int((index / "level").read_text())
            nbytes = _kibibytes((index / "size").read_text())
            line = int((index / "coherency_line_size").read_text())
            shared = _count_cpus((index / "shared_cpu_list").read_text())
        except (OSError, ValueError):
            continue  # a virtual machine may hide some of the files
        found.append(Cache(level, kind, nbytes, line, shared))
    return tuple(sorted(found, key=lambda c: c.level))


def _kibibytes(text: str) -> int:
    text = text.strip()
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * scale


def _count_cpus(text: str) -> int:
    """`0-3,8` -> 5."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count
