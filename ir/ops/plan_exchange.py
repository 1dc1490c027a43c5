"""Plan level, exchange: what units of a cluster send each other.

A message has a `tag`; the n-th value of a pair of units is told apart by it. Both sides start their half and go on; the
data flow when both have, so a receiver's slot is never written before it is reserved. A collective is joined by every
unit of its group under the same tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ir.diagnostics import DiagnosticSink
from ir.op_def import attr, expect, operand, register_op, result
from ir.ops.plan_stream import StreamOp, held_bytes, split_place
from ir.stream_memory import StreamFault, Transfer
from ir.traits import ReadsMemory, WritesMemory
from ir.types import SLOT, TOKEN, Type

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


class ExchangeOp(StreamOp):
    """Base of the three: a slot that holds at least the bytes of the message."""

    least: ClassVar[dict[str, int]] = {"bytes": 0}

    def verify(self, diag: DiagnosticSink) -> None:
        super().verify(diag)
        size = held_bytes(self.operands[0])
        if size is not None and self.attributes["bytes"] > size:
            message = f"'{self.name}' of {self.attributes['bytes']} bytes with a slot of {size} bytes"
            diag.error(self.location, message)


@register_op
class SendOp(ExchangeOp):
    """Starts to send what a slot holds to another unit. The slot may be freed when the token was waited for.

    %t = plan.send %s {unit = "gpu[0]", to = "gpu[1]", over = "nvlink", bytes = 4096, tag = "stage.0"} : (slot) -> token
    """

    name = "plan.send"
    traits = (ReadsMemory,)
    unit = attr(str, "who sends")
    to = attr(str, "who receives")
    over = attr(str, "link or fabric")
    bytes = attr(int, "size")
    tag = attr(str, "which message of this pair of units")
    slot = operand("what is sent")
    token = result("the message under way")
    places: ClassVar[tuple[str, ...]] = ("unit", "to", "over")

    @staticmethod
    def infer_types(slot: Type, unit: str, to: str, **attributes: Any) -> Type:
        expect(slot == SLOT, f"expected a slot, got {slot}")
        expect(unit != to, f"{unit} sends to itself")
        return TOKEN

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        memory, slot = context.stream, int(values[0])
        channel = ("message", self.unit, self.to, self.tag)
        if channel in memory.sent:
            raise StreamFault(f"{self.unit} sends {self.tag!r} to {self.to} a second time")
        memory.sent[channel] = memory.value_of(slot, "sending")
        return (memory.start(Transfer((slot,), answered=channel)),)


@register_op
class RecvOp(ExchangeOp):
    """Starts to receive a message into a slot, which may be read when the token was waited for.

    %t = plan.recv %s {unit = "gpu[1]", source = "gpu[0]", over = "nvlink", bytes = 4096, tag = "stage.0"}
        : (slot) -> token
    """

    name = "plan.recv"
    traits = (WritesMemory,)
    unit = attr(str, "who receives")
    source = attr(str, "who sends")
    over = attr(str, "link or fabric")
    bytes = attr(int, "size")
    tag = attr(str, "which message of this pair of units")
    slot = operand("where to")
    token = result("the message under way")
    places: ClassVar[tuple[str, ...]] = ("unit", "source", "over")

    @staticmethod
    def infer_types(slot: Type, unit: str, source: str, **attributes: Any) -> Type:
        expect(slot == SLOT, f"expected a slot, got {slot}")
        expect(unit != source, f"{unit} receives from itself")
        return TOKEN

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        memory, slot = context.stream, int(values[0])
        channel = ("message", self.source, self.unit, self.tag)
        if channel in memory.received:
            raise StreamFault(f"{self.unit} receives {self.tag!r} from {self.source} a second time")
        memory.idle_slot(slot, "overwriting")
        memory.received.add(channel)
        return (memory.start(Transfer((slot,), slot, channel=channel)),)


@register_op
class CollectiveOp(ExchangeOp):
    """Joins a collective operation of a group of units on equal slots; each holds the result when its token is over.

    `bytes` is the size of the whole result on one unit.

    %t = plan.collective %s {unit = "gpu[0]", kind = "all_reduce", group = ["gpu[0]", "gpu[1]"], over = "nvlink",
        bytes = 4096, tag = "layers.0"} : (slot) -> token
    """

    name = "plan.collective"
    traits = (ReadsMemory, WritesMemory)
    unit = attr(str, "who joins")
    kind = attr(str, ", ".join(COLLECTIVES))
    group = attr(tuple, "all units that join")
    over = attr(str, "link or fabric")
    bytes = attr(int, "size")
    tag = attr(str, "which operation of this group")
    slot = operand("what is combined, and where the result comes to lie")
    token = result("the operation under way")
    places: ClassVar[tuple[str, ...]] = ("unit", "over")

    @staticmethod
    def infer_types(slot: Type, unit: str, kind: str, group: tuple[str, ...], **attributes: Any) -> Type:
        expect(slot == SLOT, f"expected a slot, got {slot}")
        expect(kind in COLLECTIVES, f"expected one of {', '.join(COLLECTIVES)}, got {kind!r}")
        expect(all(type(member) is str for member in group), "expected group to be names of units")
        expect(unit in group, f"{unit} is not of its group")
        expect(len(set(group)) == len(group), "expected each unit of the group once")
        return TOKEN

    def verify(self, diag: DiagnosticSink) -> None:
        super().verify(diag)
        for member in self.group:
            try:
                split_place(member)
            except ValueError as fault:
                diag.error(self.location, f"'{self.name}' group: {fault}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        memory, slot = context.stream, int(values[0])
        channel = ("collective", self.kind, self.tag, *self.group)
        values_of = memory.joined.setdefault(channel, {})
        if self.unit in values_of:
            raise StreamFault(f"{self.unit} joins {self.kind} {self.tag!r} a second time")
        values_of[self.unit] = memory.value_of(slot, self.kind)
        memory.idle_slot(slot, self.kind)
        return (memory.start(Transfer((slot,), slot, channel=channel)),)
