"""Event-driven simulation of a streaming plan on the units, links, drives and memories of a target.

    timeline = simulate(program, target)              # of the plan-level ops in ir.ops.plan_stream
    timeline.seconds, timeline.bound, timeline.peak_bytes

Each unit takes its ops in the order of the text. A computation keeps it busy: first the dispatch, then a flow over the
memory tiers it touches, at the speed that the price of its work allows. A transfer is queued behind the earlier ones of
the same unit, link, direction and stream; different queues share links, drives and tiers fairly
(`hw_targets.fair_share`). A drive is as fast as the requests in flight on it allow. A message flows when both sides
have begun, a collective when all have.

A prefetch or computation with a `cache` takes place when at least `rank` of the experts asked for are missing (a
computation maybe when fewer are): `missing` says by cache how many are; one that is not named misses all. Time only
depends on plan, target and `missing`. Memory is counted, not enforced: `passes.schedule.check_stream` proves that a
plan fits.

Raises DiagnosticError for places and rates the target lacks, and for plans whose units wait for each other for ever.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping

from hw_targets.fair_share import Flow, Resource, share
from hw_targets.plan_demands import DriveUse, Prices
from hw_targets.plan_tasks import COMPUTE, EVICT, MEET, SLOT, TRANSFER, WAIT, Program, compile_plan
from hw_targets.target import Target
from hw_targets.timeline import OpTime, Timeline
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp

_LEAD, _FLOW, _TAIL = 0, 1, 2


def simulate(
    program: FuncOp, target: Target, prices: Prices | None = None, *, missing: Mapping[str, int] | None = None
) -> Timeline:
    """The timeline of one run of `program`; see the module docstring."""
    return Simulator(program, target, prices).run(missing)


class Simulator:
    """A plan read once, to be run many times, with other cache misses each."""

    def __init__(self, program: FuncOp, target: Target, prices: Prices | None = None) -> None:
        self.program = compile_plan(program, target, prices)

    def run(self, missing: Mapping[str, int] | None = None) -> Timeline:
        """The timeline when as many experts are missing as `missing` says, by cache."""
        return _Run(self.program, missing or {}).timeline()

    def seconds(self, missing: Mapping[str, int] | None = None) -> float:
        """Only how long that takes."""
        run = _Run(self.program, missing or {})
        run.play()
        return run.seconds


class _Run:
    def __init__(self, program: Program, missing: Mapping[str, int]) -> None:
        self.program = program
        self.missing = missing
        count = len(program.kinds)
        self.now = 0.0
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.sequence = 0
        self.done = [False] * count
        self.start = [0.0] * count
        self.flow_end = [0.0] * count
        self.end = [0.0] * count
        self.cause = [-1] * count  # the task whose end (or place in the queue) let this one start
        self.flows: dict[int, Flow] = {}
        self.limits: dict[int, dict[str, float]] = {}
        self.waiting: dict[int, list[int]] = {}
        self.next_op = [0] * len(program.units)
        self.unit_cause = [-1] * len(program.units)
        self.ready = deque(range(len(program.units)))
        self.queues: dict[int, deque[tuple[int, int]]] = {}  # transfers that wait for their turn; absent: idle
        self.joined: dict[int, list[int]] = {}
        self.drives: dict[Resource, dict[Flow, DriveUse]] = {}
        self.drive_depth: dict[Resource, int] = {}
        self.base_uses: dict[int, tuple[tuple[Resource, float], ...]] = {}
        self.memory: dict[str, list[tuple[float, int]]] = {p: [(0.0, n)] for p, n in program.at_home.items()}
        self.unit_busy = [0.0] * len(program.units)
        for resource in program.resources.values():
            resource.active.clear()
            resource.used = 0.0

    def timeline(self) -> Timeline:
        """Plays the plan to its end, and says what there was."""
        self.play()
        return self.result()

    @property
    def seconds(self) -> float:
        """When the last op ended."""
        return max(self.end, default=0.0)

    def play(self) -> None:
        """Plays the plan to its end."""
        while True:
            while self.ready:
                self.advance(self.ready.popleft())
            if not self.heap:
                break
            at, _, kind, task, version = heapq.heappop(self.heap)
            if kind == _FLOW:
                flow = self.flows.get(task)
                if flow is None or flow.version != version:
                    continue
            self.now = at
            if kind == _LEAD:
                self.begin_flow(task)
            elif kind == _FLOW:
                self.end_flow(task)
            else:
                self.finish(task)
        self.check_ended()

    def push(self, at: float, kind: int, task: int, version: int = 0) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (at, self.sequence, kind, task, version))

    # -- units -------------------------------------------------------------------------------------------------------

    def advance(self, unit: int) -> None:
        """Takes the ops of a unit until it has to wait."""
        program = self.program
        kinds, tasks = program.kinds, program.programs[unit]
        while self.next_op[unit] < len(tasks):
            task = tasks[self.next_op[unit]]
            kind = kinds[task]
            if kind == COMPUTE and program.takes_place(task, self.missing):
                self.cause[task] = self.unit_cause[unit]
                self.begin(task)
                return  # goes on when it is finished
            if kind == COMPUTE:
                self.skip(task)
            if kind == WAIT:
                pending = next((t for t in program.tokens[task] if not self.done[t]), None)
                if pending is not None:
                    self.waiting.setdefault(pending, []).append(unit)
                    return
            elif kind == TRANSFER:
                self.issue(task, unit)
            elif kind == MEET:
                self.join(task, unit)
            elif kind in (SLOT, EVICT):
                place, nbytes = program.memory[task]
                changes = self.memory.setdefault(place, [(0.0, 0)])
                changes.append((self.now, changes[-1][1] + nbytes))
            self.next_op[unit] += 1

    def issue(self, task: int, unit: int) -> None:
        """Starts a transfer, or puts it behind the others of its queue."""
        self.cause[task] = self.unit_cause[unit]
        if not self.program.takes_place(task, self.missing):
            self.skip(task)
            return
        queue = self.program.queues[task]
        if queue in self.queues:
            self.queues[queue].append((task, self.unit_cause[unit]))
        else:
            self.queues[queue] = deque()
            self.begin(task)

    def skip(self, task: int) -> None:
        """What does not take place is over at once."""
        self.start[task] = self.flow_end[task] = self.end[task] = self.now
        self.done[task] = True
        for unit in self.waiting.pop(task, ()):
            self.unit_cause[unit] = task
            self.ready.append(unit)

    def join(self, task: int, unit: int) -> None:
        """One side of a message, or one member of a collective, has begun."""
        meeting = self.program.meetings[task]
        members = self.joined.setdefault(meeting, [])
        members.append(task)
        if len(members) == self.program.meeting_size[meeting]:
            for member in members:
                self.start[member] = self.now
                self.cause[member] = self.unit_cause[unit]
            self.begin(task)

    # -- tasks -------------------------------------------------------------------------------------------------------

    def begin(self, task: int) -> None:
        self.start[task] = self.now
        demand = self.program.demands[task]
        if demand.lead > 0.0:
            self.push(self.now + demand.lead, _LEAD, task)
        else:
            self.begin_flow(task)

    def begin_flow(self, task: int) -> None:
        demand = self.program.demands[task]
        if demand.alone <= 0.0:
            self.limits[task] = {}
            self.flow_ended(task)
            return
        flow = Flow(task, demand.label, demand.alone, demand.weight, demand.uses, updated=self.now)
        self.flows[task] = flow
        touched = [resource for resource, _ in demand.uses]
        if demand.drive is not None:
            resource = demand.drive.resource
            self.base_uses[task] = demand.uses
            self.drives.setdefault(resource, {})[flow] = demand.drive
            touched.append(resource)
        for resource in touched:
            resource.active[flow] = None
        self.reshare(touched, flow)

    def end_flow(self, task: int) -> None:
        flow = self.flows.pop(task)
        self.settle(flow)
        self.limits[task] = flow.limits
        touched = [resource for resource, _ in flow.uses]
        for resource in touched:
            resource.active.pop(flow, None)
            self.drives.get(resource, {}).pop(flow, None)
        self.reshare(touched)
        self.flow_ended(task)

    def flow_ended(self, task: int) -> None:
        self.flow_end[task] = self.now
        queue = self.program.queues.get(task)
        if queue is not None:
            if self.queues[queue]:
                following, _ = self.queues[queue].popleft()
                self.cause[following] = task
                self.begin(following)
            else:
                del self.queues[queue]
        tail = self.program.demands[task].tail
        if tail > 0.0:
            self.push(self.now + tail, _TAIL, task)
        else:
            self.finish(task)

    def finish(self, task: int) -> None:
        program = self.program
        meeting = program.meetings.get(task)
        members = self.joined[meeting] if meeting is not None else [task]
        for member in members:
            self.end[member] = self.now
            self.flow_end[member] = self.flow_end[task]
            self.limits[member] = self.limits[task]
            self.done[member] = True
        if program.kinds[task] == COMPUTE:
            unit = program.unit_of[task]
            self.unit_busy[unit] += self.now - self.start[task]
            self.unit_cause[unit] = task
            self.next_op[unit] += 1
            self.ready.append(unit)
        for member in members:
            for unit in self.waiting.pop(member, ()):
                self.unit_cause[unit] = member
                self.ready.append(unit)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def settle(self, flow: Flow) -> None:
        """Counts what a flow has done since its rate was last set."""
        elapsed = self.now - flow.updated
        flow.updated = self.now
        if elapsed <= 0.0:
            return
        part = min(flow.remaining, flow.rate * elapsed)
        flow.remaining -= part
        for resource, seconds in flow.uses:
            resource.used += part * seconds
        flow.limits[flow.limit] = flow.limits.get(flow.limit, 0.0) + elapsed

    def reshare(self, touched: list[Resource], first: Flow | None = None) -> None:
        """Sets the rates of all flows that share something, directly or not, with those of `touched`."""
        flows: dict[Flow, None] = {} if first is None else {first: None}
        seen: dict[Resource, None] = {}
        todo = list(touched)
        while todo:
            resource = todo.pop()
            if resource in seen:
                continue
            seen[resource] = None
            for flow in resource.active:
                if flow not in flows:
                    flows[flow] = None
                    todo += [r for r, _ in flow.uses]
                    drive = self.program.demands[flow.task].drive
                    if drive is not None:
                        todo.append(drive.resource)
        if not flows:
            return
        for flow in flows:
            self.settle(flow)
        for resource in seen:
            if resource in self.drives:
                self.set_depth(resource)
        ordered = sorted(flows, key=lambda f: f.task)
        for flow, (rate, limit) in zip(ordered, share(ordered), strict=True):
            if rate != flow.rate or flow.version == 0:
                flow.rate = rate
                flow.version += 1
                self.push(self.now + flow.remaining / rate, _FLOW, flow.task, flow.version)
            flow.limit = limit

    def set_depth(self, resource: Resource) -> None:
        """The time that each flow takes of a drive, with all the requests that are in flight now."""
        users = self.drives[resource]
        depth = sum(use.depth for use in users.values())
        for flow, use in users.items():
            flow.uses = (*self.base_uses[flow.task], (resource, use.seconds(depth)))

    # -- the end -----------------------------------------------------------------------------------------------------

    def check_ended(self) -> None:
        """Raises DiagnosticError when a unit is still waiting."""
        for unit, name in enumerate(self.program.units):
            tasks = self.program.programs[unit]
            if self.next_op[unit] < len(tasks):
                op = self.program.ops[tasks[self.next_op[unit]]]
                raise DiagnosticError(
                    f"{name} waits for ever at '{op.name}', op {tasks[self.next_op[unit]]} of the plan",
                    hint="passes.schedule.check_stream names the message or token that never comes",
                )

    def result(self) -> Timeline:
        program = self.program
        timed = [t for t, kind in enumerate(program.kinds) if kind in (COMPUTE, TRANSFER, MEET) and self.done[t]]
        ops = []
        for task in timed:
            name, track = program.labels[task]
            limits = self.limits.get(task)
            if limits is None:
                continue  # it did not take place
            limit = max(limits, key=limits.__getitem__) if limits else program.demands[task].label
            ops.append(OpTime(name, track, self.start[task], self.end[task], limit))
        busy = {name: r.used for name, r in program.resources.items() if r.used > 0.0}
        busy |= {name: s for name, s in zip(program.units, self.unit_busy, strict=True) if s > 0.0}
        memory = {place: tuple(changes) for place, changes in self.memory.items()}
        return Timeline(self.seconds, tuple(ops), busy, self.critical_path(timed), memory)

    def critical_path(self, timed: list[int]) -> dict[str, float]:
        """Seconds by what limited them, along the chain of causes that ends last."""
        spent: dict[str, float] = {}
        task = max(timed, key=lambda t: (self.end[t], -t), default=-1)
        until = self.end[task] if task >= 0 else 0.0
        while task >= 0:
            demand = self.program.demands[task]
            parts = dict(self.limits.get(task, {}))
            if demand.lead > 0.0:
                parts["dispatch"] = parts.get("dispatch", 0.0) + demand.lead
            if demand.tail > 0.0 and until >= self.end[task]:  # the next of a queue does not wait for the latency
                parts[f"{demand.label} latency"] = demand.tail
            for name, seconds in parts.items():
                spent[name] = spent.get(name, 0.0) + seconds
            until = self.start[task]
            task = self.cause[task]
        return dict(sorted(spent.items(), key=lambda item: (-item[1], item[0])))
