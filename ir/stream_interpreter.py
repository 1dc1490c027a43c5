"""The meaning of streaming plans: what every slot holds while the ops run one by one, in the order of the text.

`interpret_stream(program, capacities)` runs the plan-level ops of `ir.ops.plan_stream` and `ir.ops.plan_exchange` on a
model of the memories (`ir.stream_memory`) that knows what every slot holds. Two plans compute the same when their
traces are equal, whatever they keep where.

Gives a `StreamTrace`. Raises StreamFault where a plan uses data that have not arrived, takes more of a tier than there
is, frees a slot twice, frees or overwrites one in flight, or waits for what nobody sends. One order of events is tried,
that of the text; `passes.schedule.check_stream` proves a plan for every order that its waits allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ir.interpreter import Environment
from ir.ops.builtin import FuncOp
from ir.stream_memory import StreamMemory


@dataclass(frozen=True)
class StreamTrace:
    """`computed`: (unit, kernel, values read) of every computation in order; `peak_bytes` by tier."""

    computed: tuple[tuple[str, str, tuple[str, ...]], ...]
    peak_bytes: dict[str, int]


class StreamEnvironment(Environment):
    """What the ops of streaming ask for: `stream`, the memories."""

    def __init__(self, stream: StreamMemory) -> None:
        super().__init__({}, {})
        self.stream = stream


def interpret_stream(program: FuncOp, capacities: Mapping[str, int | None] | None = None) -> StreamTrace:
    """Runs a plan in the order of its text; see the module docstring."""
    memory = StreamMemory(capacities)
    StreamEnvironment(memory).run_block(program.block, ())
    memory.finish()
    return StreamTrace(tuple(memory.computed), dict(memory.peak))
