"""What this process may use of the machine: cores, CPU features, memory.

Gives the number of physical cores the process may run on (scheduler affinity, hybrid performance cores and cgroup
CPU quota respected), the instruction features as LLVM names them, and the total memory. Reads `/sys`, `/proc` and
LLVM's host probe; where a file is missing (other systems, sandboxes) the answer falls back to the logical CPUs.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# What each x86-64 level asks for, in LLVM's names (x86-64 psABI, "Micro-Architecture Levels"), newest first.
_V2 = ("cx16", "sahf", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
X86_LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("x86-64-v4", _V4),
    ("x86-64-v3", _V3),
    ("x86-64-v2", _V2),
    ("x86-64", ()),
)
_ARCH_ALIASES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class HostCores:
    """The cores this process may use; `quota` is the cgroup limit in CPUs, None when there is none."""

    logical: int
    physical: int
    quota: float | None

    @property
    def default_threads(self) -> int:
        """One thread a physical core, never more than the quota pays for (a throttled thread stalls every barrier)."""
        if self.quota is None:
            return max(1, self.physical)
        return max(1, min(self.physical, int(self.quota)))


def available_cores(sys_root: Path = Path("/sys"), proc_root: Path = Path("/proc")) -> HostCores:
    """Counts the cores this process may run on. The roots are parameters so that tests can describe other machines."""
    if hasattr(os, "sched_getaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
    else:
        cpus = list(range(os.cpu_count() or 1))
    return HostCores(len(cpus), _count_physical(cpus, sys_root), _cgroup_quota(sys_root, proc_root))


def _count_physical(cpus: list[int], sys_root: Path) -> int:
    """Distinct physical cores among `cpus`; only the performance cores of a hybrid CPU, when any of them is allowed."""
    performance = _cpu_list(_read(sys_root / "devices/cpu_core/cpus"))
    usable = [cpu for cpu in cpus if cpu in performance] or cpus
    cores = set()
    for cpu in usable:
        topology = sys_root / f"devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "thread_siblings_list") or _read(topology / "core_cpus_list")
        cores.add(siblings or f"cpu{cpu}")
    return len(cores)


def _cgroup_quota(sys_root: Path, proc_root: Path) -> float | None:
    """The tightest CPU quota on the path from this process's control group to the root, versions 1 and 2."""
    quotas: list[float] = []
    for line in _read(proc_root / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            base = sys_root / "fs/cgroup"
        elif "cpu" in controllers.split(","):
            base = sys_root / "fs/cgroup" / "cpu"
        else:
            continue
        folder = base / group.lstrip("/")
        # Inside a container the path is the host's: then only the mount's own root describes us.
        for candidate in (folder, *folder.parents):
            quotas += _quota_of(candidate)
            if candidate == base:
                break
    return min(quotas) if quotas else None


def _quota_of(folder: Path) -> list[float]:
    """The quota one control group states, as a list of zero or one numbers."""
    fields = _read(folder / "cpu.max").split()
    if len(fields) != 2:
        fields = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    try:
        quota, period = int(fields[0]), int(fields[1])
    except ValueError:  # "max": no limit, or no such file
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` as a set of numbers; malformed parts are skipped."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def host_features() -> frozenset[str]:
    """LLVM names of the instruction features this CPU and operating system offer (`avx512bf16`, `fma`, ...)."""
    import llvmlite.binding as llvm  # heavy: only when an artifact is opened

    try:
        return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM cannot tell on this system: nothing can be promised
        return frozenset()


def host_architecture() -> str:
    """The architecture as LLVM triples spell it (`x86_64`, `aarch64`)."""
    machine = platform.machine().lower()
    return _ARCH_ALIASES.get(machine, machine)


def normalized_architecture(triple: str) -> str:
    """The architecture part of a triple, spelled like `host_architecture`."""
    arch = triple.partition("-")[0].lower()
    return _ARCH_ALIASES.get(arch, arch)


def best_portable_target(features: frozenset[str]) -> str:
    """The newest named target this host can run; `host` where no level is known for the architecture."""
    if host_architecture() == "x86_64":
        for level, needed in X86_LEVELS:
            if features.issuperset(needed):
                return level
    return "host"


def total_memory_bytes() -> int:
    """Physical memory of the machine in bytes; 0 when the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
