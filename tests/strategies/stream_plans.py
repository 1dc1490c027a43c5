"""Streaming plans that are sound, drawn at random, as lists of steps that a test may break before they become IR.

A step is (op, name of its result, names of its operands, attributes). Every wait is needed, every byte is used: leaving
one out or moving it is always a fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Value
from ir.op_def import OPS
from ir.ops.builtin import FuncOp, ReturnOp


@dataclass
class Step:
    op: str
    result: str = ""
    operands: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


def realise(steps: list[Step]) -> FuncOp:
    """The function of these steps. A step that reads a name before it is made is an error of the test."""
    program = FuncOp.create("plan", [])
    build = Builder.at_end(program.block)
    values: dict[str, Value] = {}
    for step in steps:
        op = OPS[f"plan.{step.op}"](*[values[name] for name in step.operands], **step.attributes)
        made = build(op, step.result)
        if step.result:
            values[step.result] = made
    build(ReturnOp())
    return program


@dataclass
class PlanOfSteps:
    """`capacities` are exactly what the plan needs."""

    steps: list[Step]
    capacities: dict[str, int]


class _Writer:
    """Writes the part of one unit: layers streamed from disk through slots of its tier, some stored back."""

    def __init__(self, unit: str, tier: str, sizes: list[int], depth: int, stores: list[bool]) -> None:
        self.unit, self.tier, self.sizes, self.depth, self.stores = unit, tier, sizes, depth, stores
        self.steps: list[Step] = []

    def add(self, op: str, result: str, *operands: str, **attributes: Any) -> None:
        self.steps.append(
            Step(op, f"{result}.{self.unit[-2]}" if result else "", operands, attributes | {"unit": self.unit})
        )

    def name(self, stem: str, i: int) -> str:
        return f"{stem}{i}.{self.unit[-2]}"

    def start(self, i: int) -> None:
        if i < len(self.sizes):
            self.add("slot", f"s{i}", tier=self.tier, bytes=self.sizes[i])
            self.add("prefetch", f"t{i}", self.name("w", i), self.name("s", i), over="ssd")

    def write(self) -> list[Step]:
        for i, size in enumerate(self.sizes):
            symbol = SymbolRef(f"{self.unit[-2]}.{i}")
            self.steps.append(Step("segment", self.name("w", i), (), {"symbol": symbol, "tier": "disk", "bytes": size}))
        for i in range(self.depth):
            self.start(i)
        for i in range(len(self.sizes)):
            self.start(i + self.depth)
            self.add("wait", "", self.name("t", i))
            writes = (0,) if self.stores[i] else ()
            self.add(
                "compute", f"c{i}", self.name("s", i), kernel=SymbolRef("layer"), work=self.sizes[i], writes=writes
            )
            if self.stores[i]:
                self.add("store", f"b{i}", self.name("s", i), self.name("w", i), over="ssd")
                self.add("wait", "", self.name("b", i))
            self.add("evict", "", self.name("s", i))
        return self.steps


@st.composite
def stream_plans(draw: st.DrawFn, units: int = 2) -> PlanOfSteps:
    """A plan of one to `units` units that stream from a disk and pass a message on at their ends."""
    count = draw(st.integers(1, units))
    parts: list[list[Step]] = []
    capacities: dict[str, int] = {"disk": 0}
    for u in range(count):
        sizes = draw(st.lists(st.integers(1, 1 << 16), min_size=1, max_size=4))
        stores = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
        depth = draw(st.integers(0, len(sizes)))
        tier = f"hbm[{u}]"
        parts.append(_Writer(f"gpu[{u}]", tier, sizes, depth, stores).write())
        windows = [sum(sizes[i : i + depth + 1]) for i in range(len(sizes))]
        capacities[tier] = max(windows)
        capacities["disk"] += sum(sizes)
    steps = _interleave(draw, parts)
    if count > 1:
        nbytes = draw(st.integers(1, 1 << 12))
        steps += _message(nbytes)
        for tier in ("hbm[0]", "hbm[1]"):
            capacities[tier] = max(capacities[tier], nbytes)
    return PlanOfSteps(steps, capacities)


def _interleave(draw: st.DrawFn, parts: list[list[Step]]) -> list[Step]:
    steps: list[Step] = []
    rest = [list(part) for part in parts]
    while any(rest):
        some = draw(st.sampled_from([part for part in rest if part]))
        taken = draw(st.integers(1, len(some)))
        steps += some[:taken]
        del some[:taken]
    return steps


def _message(nbytes: int) -> list[Step]:
    """gpu[0] computes something and sends it; gpu[1] computes on it; both add up what they have."""
    zero, one = {"unit": "gpu[0]"}, {"unit": "gpu[1]"}
    message = {"over": "nvlink", "bytes": nbytes, "tag": "m"}
    group = {"group": ("gpu[0]", "gpu[1]"), "over": "nvlink", "bytes": nbytes, "tag": "r", "kind": "all_reduce"}
    kernel = {"kernel": SymbolRef("k")}
    return [
        Step("slot", "ma", (), zero | {"tier": "hbm[0]", "bytes": nbytes}),
        Step("slot", "mb", (), one | {"tier": "hbm[1]", "bytes": nbytes}),
        Step("compute", "mx", ("ma",), zero | kernel | {"writes": (0,)}),
        Step("send", "ms", ("ma",), zero | message | {"to": "gpu[1]"}),
        Step("recv", "mr", ("mb",), one | message | {"source": "gpu[0]"}),
        Step("wait", "", ("ms",), zero),
        Step("wait", "", ("mr",), one),
        Step("compute", "my", ("mb",), one | kernel),
        Step("collective", "mc", ("ma",), zero | group),
        Step("collective", "md", ("mb",), one | group),
        Step("wait", "", ("mc",), zero),
        Step("wait", "", ("md",), one),
        Step("compute", "mz", ("ma",), zero | kernel),
        Step("evict", "", ("ma",), zero),
        Step("evict", "", ("mb",), one),
    ]
