"""Plan level, streaming: data that move between the memories of a machine while units compute.

A plan for a phase (one decode step, one chunk of a prompt) is a function without arguments. Segments and slots are the
data and the places for them; every other op belongs to a `unit`, which takes its ops one after another in the order of
the text. Computations, waits and evictions take the unit's time; transfers are only started by it and go on beside it.
A token stands for what was started; `plan.wait` is the only way to know that it is over. Units are of the target
(`gpu`, or `gpu[3]` where it has several), and so are tiers, links, storage and fabrics. What a plan means is said by
`ir.stream_interpreter`. Plans are checked and simulated; the runtime carries out the decisions that made them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from ir.attributes import SymbolRef
from ir.core import Value
from ir.diagnostics import DiagnosticSink
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.stream_memory import Transfer, digest
from ir.traits import ReadsMemory, Synchronizes, WritesMemory
from ir.types import SEGMENT, SLOT, TOKEN, Type

_PLACE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[(0|[1-9][0-9]{0,6})\])?")


@functools.lru_cache(maxsize=4096)
def split_place(text: str) -> tuple[str, int]:
    """`gpu[3]` -> ("gpu", 3), `gpu` -> ("gpu", 0): which of the target's units, tiers or links, and which copy of it.

    Raises ValueError for text that is no place.
    """
    found = _PLACE.fullmatch(text)
    if found is None:
        raise ValueError(f"expected a name like gpu or gpu[3], got {text!r}")
    return found[1], int(found[2] or 0)


class StreamOp(Op):
    """Base of the ops of streaming: names of places are checked, and so are smallest values."""

    least: ClassVar[dict[str, int]] = {}  # attribute -> smallest value it may have
    places: ClassVar[tuple[str, ...]] = ("unit",)  # attributes that name a unit, tier, link or storage

    def verify(self, diag: DiagnosticSink) -> None:
        for name, smallest in self.least.items():
            if self.attributes[name] < smallest:
                message = f"'{self.name}' expected {name} >= {smallest}, got {self.attributes[name]}"
                diag.error(self.location, message)
        for name in self.places:
            try:
                split_place(self.attributes[name])
            except ValueError as fault:
                diag.error(self.location, f"'{self.name}' {name}: {fault}")


def held_bytes(handle: Value) -> int | None:
    """Bytes of the segment or slot that a value stands for; None when its definition is not seen."""
    op = handle.defining_op()
    return op.attributes["bytes"] if isinstance(op, SegmentOp | SlotOp) else None


@register_op
class SegmentOp(StreamOp):
    """Data with a name, at home in a tier or storage, where they take up their bytes for the whole of the plan.

    %w = plan.segment {symbol = @layers.0.mlp, tier = "disk", bytes = 8192} : () -> segment
    """

    name = "plan.segment"
    traits = (WritesMemory,)
    symbol = attr(SymbolRef, "what")
    tier = attr(str, "memory or storage where it is at home")
    bytes = attr(int, "size")
    out = result("segment")
    least: ClassVar[dict[str, int]] = {"bytes": 0}
    places: ClassVar[tuple[str, ...]] = ("tier",)

    @staticmethod
    def infer_types(symbol: SymbolRef, tier: str, bytes: int) -> Type:
        return SEGMENT

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.stream.segment(self.symbol.name, self.tier, self.bytes),)


@register_op
class SlotOp(StreamOp):
    """Reserves bytes of a tier, until the same unit evicts them.

    %s = plan.slot {unit = "gpu", tier = "hbm", bytes = 8192} : () -> slot
    """

    name = "plan.slot"
    traits = (WritesMemory,)
    unit = attr(str, "who reserves")
    tier = attr(str, "of which memory")
    bytes = attr(int, "size")
    out = result("slot")
    least: ClassVar[dict[str, int]] = {"bytes": 0}
    places: ClassVar[tuple[str, ...]] = ("unit", "tier")

    @staticmethod
    def infer_types(unit: str, tier: str, bytes: int) -> Type:
        return SLOT

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.stream.slot(self.unit, self.tier, self.bytes),)


class TransferOp(StreamOp):
    """Base of prefetch and store: from the first operand to the second, over a link or storage."""

    least: ClassVar[dict[str, int]] = {"block": 0, "depth": 1}
    places: ClassVar[tuple[str, ...]] = ("unit", "over")

    def verify(self, diag: DiagnosticSink) -> None:
        super().verify(diag)
        source, goal = map(held_bytes, self.operands)
        if source is not None and goal is not None and isinstance(self, PrefetchOp) and source > goal:
            diag.error(self.location, f"'{self.name}' of {source} bytes with a slot of {goal} bytes")
        if source is not None and goal is not None and isinstance(self, StoreOp) and goal > source:
            diag.error(self.location, f"'{self.name}' of {goal} bytes with a slot of {source} bytes")


@register_op
class PrefetchOp(TransferOp):
    """Starts to copy a segment into a slot, over a link or storage. The slot may be read when the token was waited for.

    Over two links data are copied twice: the second copy is one from the slot that the first has filled.
    Transfers of one unit over one link are served in order if they have the same `stream`, else they share it.
    With `cache` the segment is the `rank`-th one that an expert cache may lack: the copy takes place only when at least
    `rank` of those asked for are missing, and plans are checked for the worst case, in which all are.

    %t = plan.prefetch %w, %s {unit = "gpu", over = "pcie"} : (segment, slot) -> token
    """

    name = "plan.prefetch"
    traits = (ReadsMemory, WritesMemory)
    unit = attr(str, "who starts it")
    over = attr(str, "link or storage")
    stream = attr(str, "queue of this unit and link", default="")
    block = attr(int, "bytes of one request to storage, 0 for the whole", default=0)
    depth = attr(int, "requests in flight at once", default=1)
    pinned = attr(bool, "whether the memory is pinned (links), read without the page cache (storage)", default=True)
    cache = attr(str, 'the expert cache that may hold it already, "" for none', default="")
    rank = attr(int, "how many must be missing for the copy to take place", default=0)
    segment = operand("what is copied, or the slot that holds it")
    slot = operand("where to")
    token = result("the copy under way")

    @staticmethod
    def infer_types(segment: Type, slot: Type, cache: str, rank: int, **attributes: Any) -> Type:
        expect(segment in (SEGMENT, SLOT), f"expected a segment or slot, got {segment}")
        expect(slot == SLOT, f"expected a slot, got {slot}")
        expect((rank >= 1) if cache else rank == 0, f"expected rank >= 1 with a cache and 0 without, got {rank}")
        return TOKEN

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        segment, slot = map(int, values)
        context.stream.idle_slot(slot, "overwriting")
        value = context.stream.value_of(segment, "prefetch")
        return (context.stream.start(Transfer((slot, segment), slot, value)),)


@register_op
class StoreOp(TransferOp):
    """Starts to copy what a slot holds to a segment's home: new keys and values, activations that leave a device.

    %t = plan.store %s, %w {unit = "gpu", over = "pcie"} : (slot, segment) -> token
    """

    name = "plan.store"
    traits = (ReadsMemory, WritesMemory)
    unit = attr(str, "who starts it")
    over = attr(str, "link or storage")
    stream = attr(str, "queue of this unit and link", default="")
    block = attr(int, "bytes of one request to storage, 0 for the whole", default=0)
    depth = attr(int, "requests in flight at once", default=1)
    pinned = attr(bool, "whether the memory is pinned", default=True)
    slot = operand("what is copied")
    segment = operand("where to")
    token = result("the copy under way")

    @staticmethod
    def infer_types(slot: Type, segment: Type, **attributes: Any) -> Type:
        expect(slot == SLOT, f"expected a slot, got {slot}")
        expect(segment == SEGMENT, f"expected a segment, got {segment}")
        return TOKEN

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        slot, segment = map(int, values)
        value = context.stream.value_of(slot, "store")
        return (context.stream.start(Transfer((slot,), value=value, segment=segment)),)


@register_op
class WaitOp(StreamOp):
    """The unit goes on when all the tokens are over.

    plan.wait %t {unit = "gpu"} : (token) -> ()
    """

    name = "plan.wait"
    traits = (Synchronizes,)
    unit = attr(str, "who waits")
    tokens = operand("what for", variadic=True)

    @staticmethod
    def infer_types(*tokens: Type, unit: str) -> tuple[Type, ...]:
        for token in tokens:
            expect(token == TOKEN, f"expected tokens, got {token}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        for token in values:
            context.stream.wait(token)
        return ()


@register_op
class ComputeOp(StreamOp):
    """Priced work of a unit: a kernel or a run of them. It reads its operands; those numbered in `writes` it writes.

    `work` counts floating-point operations on numbers of `element`; `moved[i]` are the bytes touched in `tiers[i]`.
    With `cache` it is the work on the `rank`-th expert that an expert cache may lack, which one of two units does: it
    takes place when at least `rank` are missing, or with `missing = false` when fewer are. A plan means what it does
    when all are missing; it is checked for both.

    %t = plan.compute %s {unit = "gpu", kernel = @mlp, work = 2000, element = "f16", tiers = ["hbm"], moved = [8192],
        writes = []} : (slot) -> token
    """

    name = "plan.compute"
    traits = (ReadsMemory, WritesMemory)
    unit = attr(str, "who computes")
    kernel = attr(SymbolRef, "what")
    work = attr(int, "floating-point operations; a multiply-add counts two", default=0)
    element = attr(str, "of which numbers", default="f32")
    tiers = attr(tuple, "memories touched", default=())
    moved = attr(tuple, "bytes touched in each", default=())
    launches = attr(int, "kernels that are started", default=1)
    rows = attr(int, "tokens that each matrix meets; 0: many", default=0)
    writes = attr(tuple, "numbers of the operands that are written", default=())
    cache = attr(str, 'the expert cache that decides whether it takes place, "" for always', default="")
    rank = attr(int, "how many must be missing for that", default=0)
    missing = attr(bool, "whether so many must be missing, or fewer", default=True)
    data = operand("slots and segments, read unless they are only written", variadic=True)
    token = result("the work under way")
    least: ClassVar[dict[str, int]] = {"work": 0, "launches": 0, "rows": 0}

    @staticmethod
    def infer_types(
        *data: Type,
        tiers: tuple[str, ...],
        moved: tuple[int, ...],
        writes: tuple[int, ...],
        cache: str,
        rank: int,
        **_: Any,
    ) -> Type:
        for value in data:
            expect(value in (SEGMENT, SLOT), f"expected slots and segments, got {value}")
        expect(len(tiers) == len(moved), f"expected as many tiers as bytes moved, got {len(tiers)} and {len(moved)}")
        expect(all(type(n) is int and n >= 0 for n in moved), "expected moved to be numbers of 0 or more")
        expect(all(type(t) is str for t in tiers), "expected tiers to be names")
        expect(len(set(tiers)) == len(tiers), "expected each tier once")
        for i in writes:
            expect(type(i) is int and 0 <= i < len(data), f"operand {i} in writes is not one of {len(data)}")
        expect((rank >= 1) if cache else rank == 0, f"expected rank >= 1 with a cache and 0 without, got {rank}")
        return TOKEN

    def flops(self, sizes: dict[str, int]) -> int:
        return self.work

    def bytes_moved(self, sizes: dict[str, int]) -> int:
        return sum(self.moved)

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        memory, read = context.stream, []
        if self.cache and not self.missing:
            return (memory.done(),)  # all are missing: another unit has this one
        for i, handle in enumerate(values):
            if i in self.writes and int(handle) in memory.slots:
                slot = memory.idle_slot(handle, "writing")
                read.append(slot.value)
            else:
                read.append(memory.value_of(handle, f"use by {self.kernel}"))
        memory.computed.append((self.unit, self.kernel.name, tuple(read)))
        made = digest(self.kernel.name, read)
        for i in self.writes:
            holder = memory.slots.get(int(values[i])) or memory.segments[int(values[i])]
            holder.value = f"{made}.{i}"
        return (memory.done(),)


@register_op
class EvictOp(StreamOp):
    """Frees a slot. Nothing may use it then, and no transfer that touches it may be under way.

    plan.evict %s {unit = "gpu"} : (slot) -> ()
    """

    name = "plan.evict"
    traits = (WritesMemory,)
    unit = attr(str, "who frees it: who reserved it")
    slot = operand("what is freed")

    @staticmethod
    def infer_types(slot: Type, unit: str) -> tuple[Type, ...]:
        expect(slot == SLOT, f"expected a slot, got {slot}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.stream.evict(int(values[0]), self.unit)
        return ()
