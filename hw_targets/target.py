"""A hardware target: what code may use and what the machine can do, as frozen data.

Numbers that nobody stated or measured are None, never a guess; every stated one carries its `source`. Sizes are bytes,
rates bytes/s or FLOP/s (multiply and add count two; integer dot products count the same), times seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_targets import cpu_features


@dataclass(frozen=True)
class ComputeUnit:
    """Something that computes: the cores of a CPU, a GPU, a near-memory engine attached to `tier`.

    `peak` maps an element (`f32`, `bf16`, `f16`, `i8`) to FLOP/s of **one** core with that element's fastest
    instructions; `source` says where the figures come from.
    """

    name: str
    kind: str  # "cpu" | "gpu" | "near-memory"
    tier: str
    cores: int | None = None
    clock_hz: float | None = None
    peak: tuple[tuple[str, float], ...] = ()
    source: str = ""

    def peak_of(self, element: str, cores: int | None = None) -> float | None:
        """FLOP/s of `cores` cores (default: all) for `element`; None when it is not known."""
        per_core = dict(self.peak).get(element)
        count = cores if cores is not None else self.cores
        return None if per_core is None or count is None else per_core * count


@dataclass(frozen=True)
class Cache:
    """A cache of one core or shared by `shared_by` of them."""

    level: int
    kind: str  # "data" | "unified"
    nbytes: int
    line_bytes: int = 64
    shared_by: int = 1


@dataclass(frozen=True)
class MemoryTier:
    """A memory that tensors can live in. `reserve_bytes` is left to others and never planned with."""

    name: str
    capacity_bytes: int | None = None
    reserve_bytes: int = 0
    read_bandwidth: float | None = None
    write_bandwidth: float | None = None
    latency_seconds: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Link:
    """A connection between two tiers, in one direction."""

    name: str
    from_tier: str
    to_tier: str
    bandwidth: float | None = None
    latency_seconds: float | None = None
    source: str = ""


@dataclass(frozen=True)
class StoragePoint:
    """Read and write bandwidth with requests of `block_bytes`, `queue_depth` of them in flight."""

    block_bytes: int
    queue_depth: int
    read_bandwidth: float
    write_bandwidth: float | None = None


@dataclass(frozen=True)
class Storage:
    """A disk: its size and its measured points."""

    name: str
    capacity_bytes: int | None = None
    points: tuple[StoragePoint, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Target:
    """One machine, or one class of machines. `llvm_features` is closed under implication."""

    name: str
    description: str
    llvm_triple: str
    llvm_cpu: str
    llvm_features: frozenset[str]
    llvm_disabled: frozenset[str] = frozenset()
    units: tuple[ComputeUnit, ...] = ()
    caches: tuple[Cache, ...] = ()
    tiers: tuple[MemoryTier, ...] = ()
    links: tuple[Link, ...] = ()
    storage: tuple[Storage, ...] = ()
    power_watts: float | None = None
    origin: str = field(default="", compare=False)  # the file, or "detected"

    def has(self, feature: str) -> bool:
        """Whether code for this target may use a CPU feature, in LLVM's spelling."""
        return feature in self.llvm_features

    @property
    def arch(self) -> str:
        """`x86_64` or `aarch64`."""
        return self.llvm_triple.split("-", 1)[0]

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector register."""
        return cpu_features.vector_bits(self.llvm_features)

    @property
    def num_vector_registers(self) -> int:
        return cpu_features.num_vector_registers(self.llvm_features)

    def feature_string(self) -> str:
        """LLVM's form, `+avx2,+fma,-sse4a`, sorted: what the machine code is compiled with."""
        enabled = [f"+{name}" for name in sorted(self.llvm_features)]
        return ",".join([*enabled, *(f"-{name}" for name in sorted(self.llvm_disabled))])

    def required_features(self) -> tuple[str, ...]:
        """The features a CPU needs to run this target's code, sorted: what the artifact records and the loader checks.

        Features that only the operating system or an intrinsic nobody emits can reach are left out.
        """
        return tuple(sorted(self.llvm_features - cpu_features.NEVER_SELECTED))

    def cache_bytes(self, level: int) -> int | None:
        """Size of the data (or unified) cache of a level; None when not known."""
        return next((c.nbytes for c in self.caches if c.level == level), None)

    def unit(self, name: str = "") -> ComputeUnit | None:
        """The unit of this name; without a name the first one."""
        return next((u for u in self.units if not name or u.name == name), None)

    def tier(self, name: str = "") -> MemoryTier | None:
        """The tier of this name; without a name the first one."""
        return next((t for t in self.tiers if not name or t.name == name), None)

    def can_run(self, other: Target) -> bool:
        """Whether this machine runs code built for `other`."""
        return self.arch == other.arch and set(other.required_features()) <= self.llvm_features
