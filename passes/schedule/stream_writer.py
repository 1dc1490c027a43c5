"""Writes streaming plans op by op: what all emitters of this folder share."""

from __future__ import annotations

from collections.abc import Sequence

from hw_targets.cost_model import Work
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Value
from ir.ops.builtin import FuncOp, ReturnOp
from ir.ops.plan_exchange import CollectiveOp, RecvOp, SendOp
from ir.ops.plan_stream import ComputeOp, EvictOp, PrefetchOp, SegmentOp, SlotOp, StoreOp, WaitOp
from passes.schedule.stream_problem import Piece


class StreamWriter:
    """A plan in the making. Segments are written when first named, in the order of use."""

    def __init__(self, name: str) -> None:
        self.program = FuncOp.create(name, [])
        self.build = Builder.at_end(self.program.block)
        self.segments: dict[str, Value] = {}

    def finish(self) -> FuncOp:
        """The plan, ended."""
        self.build(ReturnOp())
        return self.program

    def segment(self, piece: Piece) -> Value:
        found = self.segments.get(piece.name)
        if found is None:
            op = SegmentOp(symbol=SymbolRef(piece.name), tier=piece.home, bytes=piece.nbytes)
            found = self.segments[piece.name] = self.build(op, f"at.{piece.name}")
        return found

    def slot(self, unit: str, tier: str, nbytes: int, name: str = "slot") -> Value:
        return self.build(SlotOp(unit=unit, tier=tier, bytes=nbytes), name)

    def fetch(
        self, unit: str, piece: Piece, slot: Value, cache: str = "", rank: int = 0, source: Value | None = None
    ) -> Value:
        """The token of a copy of `piece` into `slot`, from its home or from the slot `source` that holds it already."""
        op = PrefetchOp(
            self.segment(piece) if source is None else source,
            slot,
            unit=unit,
            over=piece.over,
            stream=piece.stream,
            block=piece.block,
            depth=piece.depth,
            pinned=piece.pinned,
            cache=cache,
            rank=rank,
        )
        return self.build(op, f"{piece.name}.loaded")

    def store(self, unit: str, slot: Value, piece: Piece) -> Value:
        """The token of a copy of `slot` to the home of `piece`."""
        op = StoreOp(
            slot, self.segment(piece), unit=unit, over=piece.over, stream=piece.stream, block=piece.block,
            depth=piece.depth, pinned=piece.pinned,
        )  # fmt: skip
        return self.build(op, f"{piece.name}.stored")

    def wait(self, unit: str, *tokens: Value) -> None:
        if tokens:
            self.build(WaitOp(*tokens, unit=unit))

    def compute(
        self,
        unit: str,
        name: str,
        work: Work,
        reads: Sequence[Value],
        writes: Sequence[Value] = (),
        *,
        cache: str = "",
        rank: int = 0,
        missing: bool = True,
    ) -> Value:
        """The token of a computation that reads `reads` and writes `writes`; with `cache` it may not take place."""
        op = ComputeOp(
            *reads,
            *writes,
            unit=unit,
            kernel=SymbolRef(name),
            work=round(work.flops),
            element=work.element,
            tiers=tuple(tier for tier, _ in work.traffic),
            moved=tuple(round(nbytes) for _, nbytes in work.traffic),
            launches=work.launches,
            rows=0 if work.rows is None else max(1, round(work.rows)),
            writes=tuple(range(len(reads), len(reads) + len(writes))),
            cache=cache,
            rank=rank,
            missing=missing,
        )
        return self.build(op, f"{name}.done")

    def evict(self, unit: str, *slots: Value) -> None:
        for slot in slots:
            self.build(EvictOp(slot, unit=unit))

    def send(self, unit: str, to: str, over: str, nbytes: int, tag: str, slot: Value) -> Value:
        return self.build(SendOp(slot, unit=unit, to=to, over=over, bytes=nbytes, tag=tag), "sent")

    def receive(self, unit: str, source: str, over: str, nbytes: int, tag: str, slot: Value) -> Value:
        return self.build(RecvOp(slot, unit=unit, source=source, over=over, bytes=nbytes, tag=tag), "received")

    def collective(
        self, unit: str, kind: str, group: tuple[str, ...], over: str, nbytes: int, tag: str, slot: Value
    ) -> Value:
        op = CollectiveOp(slot, unit=unit, kind=kind, group=group, over=over, bytes=nbytes, tag=tag)
        return self.build(op, "joined")
