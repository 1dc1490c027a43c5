"""A time that no run of a streaming plan can beat: the most loaded resource, or the longest chain of ops.

    plan_bound(program, target)        # Bound(seconds=..., resource="ssd read", chain=False)

Closed form, without events: each resource is as fast as it ever gets (a drive as its best point), each op as fast as it
is alone, and whatever does not wait for something else runs beside it. `hw_targets.simulator` is never below this.
"""

from __future__ import annotations

from dataclasses import dataclass

from hw_targets.plan_demands import Prices
from hw_targets.plan_tasks import COMPUTE, MEET, TRANSFER, WAIT, Program, compile_plan
from hw_targets.target import Target
from ir.ops.builtin import FuncOp


@dataclass(frozen=True)
class Bound:
    """`seconds`, and the resource or unit whose work they are; `chain` when it is ops that wait for each other."""

    seconds: float
    resource: str
    chain: bool


def plan_bound(program: FuncOp, target: Target, prices: Prices | None = None) -> Bound:
    """The bound of a plan in which every expert of a cache is missing."""
    return bound_of(compile_plan(program, target, prices))


def bound_of(tasks: Program) -> Bound:
    """The same of a plan that was read already."""
    work = _work(tasks)
    resource = max(work, key=lambda name: (work[name], name), default="nothing")
    chain = _chain(tasks)
    if chain > work.get(resource, 0.0):
        return Bound(chain, "chain of ops", True)
    return Bound(work.get(resource, 0.0), resource, False)


def _work(tasks: Program) -> dict[str, float]:
    """Seconds of work by unit and resource."""
    work: dict[str, float] = {}
    met: set[int] = set()
    for task, demand in tasks.demands.items():
        if not tasks.takes_place(task, {}):
            continue
        if tasks.kinds[task] == MEET:
            if tasks.meetings[task] in met:
                continue  # counted with the first member
            met.add(tasks.meetings[task])
        if tasks.kinds[task] == COMPUTE:
            unit = tasks.units[tasks.unit_of[task]]
            work[unit] = work.get(unit, 0.0) + demand.seconds
        for resource, seconds in demand.uses:
            work[resource.name] = work.get(resource.name, 0.0) + seconds
        if demand.drive is not None:
            use = demand.drive
            best = use.storage.write_rate() if use.write else use.storage.read_rate()
            name = use.resource.name
            work[name] = work.get(name, 0.0) + (use.nbytes / (best * use.copies) if best else 0.0)
    return work


def _chain(tasks: Program) -> float:
    """The longest chain, every op as fast as alone. The order of the text is one in which nothing waits for later."""
    unit_time = [0.0] * len(tasks.units)
    queue_time: dict[int, float] = {}
    done: dict[int, float] = {}
    begun: dict[int, list[float]] = {}
    members: dict[int, list[int]] = {}
    for task, kind in enumerate(tasks.kinds):
        unit = tasks.unit_of[task]
        if kind == COMPUTE:
            unit_time[unit] += tasks.demands[task].seconds if tasks.takes_place(task, {}) else 0.0
            done[task] = unit_time[unit]
        elif kind == WAIT:
            unit_time[unit] = max([unit_time[unit], *(done.get(t, 0.0) for t in tasks.tokens[task])])
        elif kind == TRANSFER:
            demand, queue = tasks.demands[task], tasks.queues[task]
            queue_time[queue] = max(unit_time[unit], queue_time.get(queue, 0.0)) + demand.alone
            done[task] = queue_time[queue] + demand.tail
        elif kind == MEET:
            meeting = tasks.meetings[task]
            begun.setdefault(meeting, []).append(unit_time[unit])
            members.setdefault(meeting, []).append(task)
            for member in members[meeting]:
                done[member] = max(begun[meeting]) + tasks.demands[task].seconds
    return max([0.0, *unit_time, *done.values()])
