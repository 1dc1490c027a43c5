"""A hardware target: what code may use and what the machine can do, as frozen data.

Numbers that nobody stated or measured are None, never a guess; every stated one carries its `source`. Sizes are bytes,
rates bytes/s or FLOP/s (multiply and add count two; integer dot products count the same), times seconds, power watts,
energy joules.

A target describes **one node**: its units, tiers, links and storage, each with a `count` of equal copies. Copy i of a
unit works on copy i of its tier when the tier has as many copies, else all share the one tier; links and storage
likewise. `nodes` nodes are alike; `fabrics` join copies of a tier, within a node or across nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_targets import cpu_features
from hw_targets.memory import Fabric, Link, MemoryTier, Storage, StoragePoint, Switch

__all__ = [
    "Cache",
    "ComputeUnit",
    "Fabric",
    "Link",
    "MemoryTier",
    "Price",
    "Storage",
    "StoragePoint",
    "Switch",
    "Target",
]


@dataclass(frozen=True)
class ComputeUnit:
    """Something that computes: the cores of a CPU, a GPU, a near-memory engine attached to `tier`.

    `peak` maps an element (`f32`, `bf16`, `f16`, `i8`, ...) to FLOP/s of **one** core with that element's fastest dense
    instructions; a GPU or a near-memory engine counts as one core unless its file says otherwise. `efficiency` maps
    an element to the share of that peak that large products reach, `bandwidth_efficiency` is the share of its tier's
    read bandwidth that kernels reach. `few_rows_efficiency` maps an element to the share of the peak in products of a
    few rows, such as a decode step of several sequences (absent: as large ones). `launch_seconds` is paid for each
    kernel that the host starts on the unit, `barrier_seconds` for each time that its cores wait for each other.
    """

    name: str
    kind: str  # "cpu" | "gpu" | "near-memory"
    tier: str
    cores: int | None = None
    clock_hz: float | None = None
    peak: tuple[tuple[str, float], ...] = ()
    source: str = ""
    efficiency: tuple[tuple[str, float], ...] = ()
    bandwidth_efficiency: float | None = None
    few_rows_efficiency: tuple[tuple[str, float], ...] = ()
    launch_seconds: float | None = None
    barrier_seconds: float | None = None
    power_watts: float | None = None  # of one copy, at work
    idle_watts: float | None = None
    arch: str = ""  # of a GPU: "sm_90", "gfx942"
    multiprocessors: int | None = None  # of a GPU, of one copy
    count: int = 1

    def peak_of(self, element: str, cores: int | None = None) -> float | None:
        """FLOP/s of `cores` cores (default: all of one copy) for `element`; None when it is not known."""
        per_core = dict(self.peak).get(element)
        count = cores if cores is not None else self.cores
        return None if per_core is None or count is None else per_core * count

    def efficiency_of(self, element: str) -> float:
        """The share of the peak that large products of this element reach; 1.0 when nothing is stated."""
        return dict(self.efficiency).get(element, 1.0)

    def achieved_of(self, element: str, cores: int | None = None) -> float | None:
        """`peak_of` times `efficiency_of`."""
        peak = self.peak_of(element, cores)
        return None if peak is None else peak * self.efficiency_of(element)


@dataclass(frozen=True)
class Cache:
    """A cache of one core or shared by `shared_by` of them."""

    level: int
    kind: str  # "data" | "unified"
    nbytes: int
    line_bytes: int = 64
    shared_by: int = 1


@dataclass(frozen=True)
class Price:
    """What the whole machine (all nodes) costs, in `currency`: for one hour, or once."""

    hour: float | None = None
    purchase: float | None = None
    currency: str = "USD"
    source: str = ""


@dataclass(frozen=True)
class Target:
    """One machine, one class of machines, or `nodes` equal nodes. `llvm_features` is closed under implication."""

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
    power_watts: float | None = None  # of one node at work, everything in it
    origin: str = field(default="", compare=False)  # the file, or "detected"
    switches: tuple[Switch, ...] = ()
    fabrics: tuple[Fabric, ...] = ()
    nodes: int = 1
    idle_watts: float | None = None
    price: Price | None = None
    source: str = ""  # of the figures that belong to no table: power

    def has(self, feature: str) -> bool:
        """Whether code for this target may use a CPU feature, in LLVM's spelling."""
        return feature in self.llvm_features

    @property
    def arch(self) -> str:
        """`x86_64` or `aarch64`."""
        return self.llvm_triple.split("-", 1)[0]

    @property
    def is_machine(self) -> bool:
        """Whether a machine is described, with sizes or speeds, and not only an instruction set."""
        return any(t.capacity_bytes is not None or t.read_bandwidth is not None for t in self.tiers)

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

    def store(self, name: str = "") -> Storage | None:
        """The storage of this name; without a name the first one."""
        return next((s for s in self.storage if not name or s.name == name), None)

    def switch(self, name: str) -> Switch | None:
        """The switch of this name."""
        return next((s for s in self.switches if s.name == name), None)

    def link_between(self, first: str, second: str) -> Link | None:
        """The first link that joins two tiers, whichever way round it is written."""
        ends = {first, second}
        return next((x for x in self.links if {x.from_tier, x.to_tier} == ends), None)

    def fabric(self, tier: str, scope: str = "node") -> Fabric | None:
        """The fabric among copies of a tier, within a node or (`cluster`) across nodes."""
        return next((f for f in self.fabrics if f.tier == tier and f.scope == scope), None)

    def can_run(self, other: Target) -> bool:
        """Whether this machine runs code built for `other`."""
        return self.arch == other.arch and set(other.required_features()) <= self.llvm_features
