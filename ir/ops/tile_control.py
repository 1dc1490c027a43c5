"""Tile level: loops, branches, threads.

A kernel is a `func.func` whose arguments are buffers and sizes; it is run by every thread of the team at once (SPMD).
`tile.thread_id` tells the threads apart; `tile.barrier` orders what they wrote before against what they read after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.core import Region
from ir.diagnostics import DiagnosticSink
from ir.formats import I1
from ir.op_def import InferenceError, Op, expect, operand, region, register_op, result
from ir.ops.tile_types import element_of
from ir.tile_memory_model import KernelFault
from ir.traits import HasRecursiveEffects, Pure, Synchronizes, Terminator, WritesMemory
from ir.types import INDEX, ScalarType, Type


@register_op
class YieldOp(Op):
    """Ends the body of `tile.for` and `tile.if`: the values carried on.

    tile.yield %x : (f32) -> ()
    """

    name = "tile.yield"
    traits = (Terminator, Pure)
    values = operand("carried values", variadic=True)

    @staticmethod
    def infer_types(*values: Type) -> tuple[Type, ...]:
        return ()

    @staticmethod
    def reference(*values: Any) -> tuple[()]:
        return ()


def _yielded(body: Region) -> list[Type] | None:
    """The types of what a body yields; None when it does not end in `tile.yield`."""
    end = body.block.terminator
    return [v.type for v in end.operands] if isinstance(end, YieldOp) else None


def _types(types: list[Type]) -> str:
    return "(" + ", ".join(str(t) for t in types) + ")"


def _shown(types: list[Type] | None) -> str:
    return "no tile.yield" if types is None else _types(types)


@register_op
class ForOp(Op):
    """Counts from `lower` up to below `upper` by `step`, carrying values from one iteration to the next.

    The body's arguments are the counter and the carried values; `tile.yield` passes them on; the results are the last
    ones (the initial ones when there is no iteration).

    %s = tile.for %lo, %hi, %one, %zero ({ ^(%i: index, %acc: f32):
      tile.yield %acc : (f32) -> ()
    }) : (index, index, index, f32) -> f32
    """

    name = "tile.for"
    traits = (HasRecursiveEffects,)
    lower = operand("first value of the counter")
    upper = operand("the counter stays below it")
    step = operand("above 0")
    initial = operand("carried values at the start", variadic=True)
    body = region("one iteration")
    out = result("carried values at the end", variadic=True)

    @staticmethod
    def infer_types(lower: Type, upper: Type, step: Type, *initial: Type) -> tuple[Type, ...]:
        expect(lower == upper == step == INDEX, f"expected bounds of type index, got {lower}, {upper}, {step}")
        for carried in initial:
            element_of(carried)
        return initial

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        lower, upper, step, *carried = values
        if step < 1:
            raise KernelFault(f"'tile.for' expected a step above 0, got {step}")
        for i in range(int(lower), int(upper), int(step)):
            carried = context.run_region(self.body, [np.int64(i), *carried])
        return tuple(carried)

    def verify(self, diag: DiagnosticSink) -> None:
        have = [a.type for a in self.body.block.arguments]
        want = [INDEX, *(v.type for v in self.initial)]
        if have != want:
            diag.error(self.location, f"'tile.for' expected body arguments {_types(want)}, got {_types(have)}")
        if _yielded(self.body) != want[1:]:
            got = _shown(_yielded(self.body))
            diag.error(self.location, f"'tile.for' expected its body to yield {_types(want[1:])}, got {got}")


@register_op
class IfOp(Op):
    """Runs the first body when the condition holds, else the second; both yield the results.

    tile.if %c ({ ^():
      tile.yield : () -> ()
    }, { ^():
      tile.yield : () -> ()
    }) : (i1) -> ()
    """

    name = "tile.if"
    traits = (HasRecursiveEffects,)
    condition = operand("i1")
    then = region("when it holds")
    otherwise = region("when not")
    out = result("what the bodies yield", variadic=True)

    @classmethod
    def inferred_types(cls, operand_types: Any, attributes: Any, regions: Any = ()) -> tuple[Type, ...]:
        (condition,) = operand_types
        expect(condition == ScalarType(I1), f"expected an i1 condition, got {condition}")
        if len(regions) != 2:
            raise InferenceError(f"expected two bodies, got {len(regions)}")
        yielded = _yielded(regions[0]) or ()
        for type in yielded:
            element_of(type)
        return tuple(yielded)

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return tuple(context.run_region(self.then if values[0] else self.otherwise, ()))

    def verify(self, diag: DiagnosticSink) -> None:
        if any(r.block.arguments for r in self.regions):
            diag.error(self.location, "'tile.if' expected bodies without arguments")
        first, second = map(_yielded, self.regions)
        if first is None or first != second:
            diag.error(
                self.location, f"'tile.if' expected bodies that yield alike, got {_shown(first)} and {_shown(second)}"
            )


@register_op
class ThreadIdOp(Op):
    """The number of this thread in the team, from 0.

    %t = tile.thread_id : () -> index
    """

    name = "tile.thread_id"
    traits = (Pure,)
    out = result("index")

    @staticmethod
    def infer_types() -> Type:
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.int64(context.thread),)


@register_op
class NumThreadsOp(Op):
    """How many threads the team has.

    %n = tile.num_threads : () -> index
    """

    name = "tile.num_threads"
    traits = (Pure,)
    out = result("index")

    @staticmethod
    def infer_types() -> Type:
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.int64(context.team.threads),)


@register_op
class TicketOp(Op):
    """A number that no other thread gets: how many tickets the team has taken since its last barrier.

    Threads that are done sooner take more of the work that is left. Which thread gets which number is not said, so what
    is done with one must not depend on the thread.

    %n = tile.ticket : () -> index
    """

    name = "tile.ticket"
    traits = (WritesMemory,)
    out = result("index")

    @staticmethod
    def infer_types() -> Type:
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.int64(context.team.take_ticket()),)


@register_op
class BarrierOp(Op):
    """Waits until every thread of the team is here; what was written before is seen by all after.

    tile.barrier : () -> ()
    """

    name = "tile.barrier"
    traits = (Synchronizes,)

    @staticmethod
    def infer_types() -> tuple[Type, ...]:
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.wait(self)
        return ()
