"""The tables of a target file as msgspec structures; `hw_targets.schema` says what each field means.

Unknown fields are refused here, with their path; quantities are still text or numbers.
"""

from __future__ import annotations

import msgspec

Quantity = str | int | float
Source = str | dict[str, str]


class Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Base of the tables of a target file: an unknown field is an error."""


class LlvmTable(Table, frozen=True):
    triple: str
    cpu: str
    features: list[str] = []
    disabled: list[str] = []


class UnitTable(Table, frozen=True):
    name: str
    tier: str
    kind: str = "cpu"
    count: int = 1
    arch: str = ""
    cores: int | None = None
    multiprocessors: int | None = None
    clock: Quantity | None = None
    peak: dict[str, Quantity] = {}
    efficiency: float | dict[str, float] | None = None
    bandwidth_efficiency: float | None = None
    few_rows_efficiency: dict[str, float] = {}
    launch: Quantity | None = None
    barrier: Quantity | None = None
    power: Quantity | None = None
    idle: Quantity | None = None
    source: Source = ""


class CacheTable(Table, frozen=True):
    level: int
    size: Quantity
    kind: str = "unified"
    line: int = 64
    shared_by: int = 1


class ThreadsTable(Table, frozen=True):
    threads: int
    read: Quantity


class TierTable(Table, frozen=True):
    name: str
    count: int = 1
    capacity: Quantity | None = None
    reserve: Quantity = 0
    read: Quantity | None = None
    write: Quantity | None = None
    latency: Quantity | None = None
    read_by_threads: list[ThreadsTable] = []
    page_fault: Quantity | None = None
    power: Quantity | None = None
    idle: Quantity | None = None
    energy: Quantity | None = None
    source: Source = ""


class LinkTable(Table, frozen=True, rename={"from_tier": "from", "to_tier": "to"}):
    name: str
    from_tier: str
    to_tier: str
    count: int = 1
    bandwidth: Quantity | None = None
    back: Quantity | None = None
    latency: Quantity | None = None
    duplex: bool = True
    switch: str = ""
    efficiency: float | None = None
    pageable: Quantity | None = None
    pinned: bool = True
    power: Quantity | None = None
    energy: Quantity | None = None
    source: Source = ""


class SwitchTable(Table, frozen=True):
    name: str
    count: int = 1
    bandwidth: Quantity | None = None
    source: Source = ""


class FabricTable(Table, frozen=True):
    name: str
    tier: str
    scope: str = "node"
    topology: str = "switch"
    bandwidth: Quantity | None = None
    latency: Quantity | None = None
    efficiency: float | None = None
    energy: Quantity | None = None
    source: Source = ""


class PointTable(Table, frozen=True):
    block: Quantity
    depth: int
    read: Quantity
    write: Quantity | None = None
    access: str = "any"


class StorageTable(Table, frozen=True):
    name: str
    count: int = 1
    capacity: Quantity | None = None
    points: list[PointTable] = []
    tier: str = ""
    switch: str = ""
    latency: Quantity | None = None
    burst: Quantity | None = None
    burst_bytes: Quantity | None = None
    power: Quantity | None = None
    idle: Quantity | None = None
    energy: Quantity | None = None
    source: Source = ""


class PriceTable(Table, frozen=True):
    hour: float | None = None
    purchase: float | None = None
    currency: str = "USD"
    source: str = ""


class TargetFile(Table, frozen=True):
    name: str
    llvm: LlvmTable
    description: str = ""
    nodes: int = 1
    power: Quantity | None = None
    idle: Quantity | None = None
    source: Source = ""
    price: PriceTable | None = None
    unit: list[UnitTable] = []
    cache: list[CacheTable] = []
    tier: list[TierTable] = []
    link: list[LinkTable] = []
    switch: list[SwitchTable] = []
    fabric: list[FabricTable] = []
    storage: list[StorageTable] = []
