"""A streaming plan read into arrays for the simulator: tasks, the program of each unit, queues, meetings.

A task is an op of the plan, known by its number; its demand says what it takes of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hw_targets.fair_share import Resource
from hw_targets.plan_demands import Demand, Demands, Prices
from hw_targets.target import Target
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.ops import plan_exchange as exchange
from ir.ops import plan_stream as stream
from ir.ops.builtin import FuncOp

OTHER, SLOT, EVICT, WAIT, COMPUTE, TRANSFER, MEET = range(7)


@dataclass
class Program:
    """`kinds[task]` is one of the numbers above. What only some kinds have is in a dictionary by task."""

    def takes_place(self, task: int, missing: Mapping[str, int]) -> bool:
        """Whether a task is done when so many experts are missing, by cache; all are in a cache that is not named."""
        cache, rank, lacking = self.caches.get(task, ("", 0, True))
        return not cache or (missing.get(cache, rank) >= rank) == lacking

    ops: list[Op] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    programs: list[list[int]] = field(default_factory=list)  # tasks of each unit, in order
    unit_of: dict[int, int] = field(default_factory=dict)
    demands: dict[int, Demand] = field(default_factory=dict)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of a wait: the tasks waited for
    memory: dict[int, tuple[str, int]] = field(default_factory=dict)  # tier, bytes taken (negative: given back)
    caches: dict[int, tuple[str, int, bool]] = field(default_factory=dict)  # cache, rank, whether so many are missing
    queues: dict[int, int] = field(default_factory=dict)
    meetings: dict[int, int] = field(default_factory=dict)
    meeting_size: list[int] = field(default_factory=list)
    labels: dict[int, tuple[str, str]] = field(default_factory=dict)  # name, track
    at_home: dict[str, int] = field(default_factory=dict)
    resources: dict[str, Resource] = field(default_factory=dict)


def compile_plan(program: FuncOp, target: Target, prices: Prices | None = None) -> Program:
    """The tasks of a plan. Raises DiagnosticError for what the target lacks and for ops of another level."""
    reader = _Reader(Demands(target, prices))
    for op in program.block.ops:
        reader.read(op)
    reader.read_messages()
    reader.made.resources = reader.demands.resources
    return reader.made


class _Reader:
    def __init__(self, demands: Demands) -> None:
        self.demands = demands
        self.made = Program()
        self.units: dict[str, int] = {}
        self.queues: dict[tuple[str, ...], int] = {}
        self.meetings: dict[tuple[str, ...], int] = {}
        self.task_of: dict[Op, int] = {}
        self.tier_of: dict[Value, str] = {}
        self.sends: dict[int, tuple[int, exchange.SendOp, str]] = {}  # meeting -> (task, op, tier)
        self.recvs: dict[int, tuple[int, str]] = {}

    def read(self, op: Op) -> None:
        made = self.made
        if isinstance(op, stream.SegmentOp):
            self.tier_of[op.out] = op.tier
            made.at_home[op.tier] = made.at_home.get(op.tier, 0) + op.bytes
            return
        if not isinstance(op, stream.StreamOp):
            if op.operands or op.results:
                raise DiagnosticError(f"'{op.name}' is no op of a streaming plan")
            return
        task = self.task_of[op] = len(made.ops)
        made.ops.append(op)
        unit = self.unit(op.attributes["unit"])
        made.programs[unit].append(task)
        made.unit_of[task] = unit
        made.kinds.append(self.kind(op, task))

    def unit(self, name: str) -> int:
        if name not in self.units:
            self.units[name] = len(self.made.units)
            self.made.units.append(name)
            self.made.programs.append([])
        return self.units[name]

    def kind(self, op: stream.StreamOp, task: int) -> int:
        made = self.made
        match op:
            case stream.SlotOp():
                self.tier_of[op.out] = op.tier
                made.memory[task] = (op.tier, op.bytes)
                return SLOT
            case stream.EvictOp():
                nbytes = stream.held_bytes(op.slot)
                made.memory[task] = (self.tier_of[op.slot], -(nbytes or 0))
                return EVICT
            case stream.WaitOp():
                made.tokens[task] = tuple(self.task_of[t.owner] for t in op.tokens if isinstance(t.owner, Op))
                return WAIT
            case stream.ComputeOp():
                made.demands[task] = self.demands.compute(op)
                made.labels[task] = (op.kernel.name, op.unit)
                if op.cache:
                    made.caches[task] = (op.cache, op.rank, op.missing)
                return COMPUTE
            case stream.TransferOp():
                self.transfer(op, task)
                return TRANSFER
            case exchange.SendOp():
                meeting = self.meeting(task, ("message", op.unit, op.to, op.tag), 2)
                self.sends[meeting] = (task, op, self.tier_of[op.slot])
                made.labels[task] = (f"send {op.tag}", f"{op.over} from {op.unit}")
                return MEET
            case exchange.RecvOp():
                meeting = self.meeting(task, ("message", op.source, op.unit, op.tag), 2)
                self.recvs[meeting] = (task, self.tier_of[op.slot])
                made.labels[task] = (f"receive {op.tag}", f"{op.over} to {op.unit}")
                return MEET
            case exchange.CollectiveOp():
                self.meeting(task, ("collective", *op.group, op.tag), len(op.group))
                made.demands[task] = self.demands.collective(op)
                made.labels[task] = (f"{op.kind} {op.tag}", f"{op.over} of {op.unit}")
                return MEET
        raise AssertionError(f"{op.name} is not known to the simulator")

    def transfer(self, op: stream.TransferOp, task: int) -> None:
        made, a, store = self.made, op.attributes, isinstance(op, stream.StoreOp)
        source, slot = (op.operands[1], op.operands[0]) if store else (op.operands[0], op.operands[1])
        home = source.defining_op()
        name = home.symbol.name if isinstance(home, stream.SegmentOp) else source.name_hint
        nbytes = stream.held_bytes(source) or 0
        made.demands[task] = self.demands.transfer(op, self.tier_of[source], self.tier_of[slot], nbytes)
        way = "store" if store else "load"
        key = (a["unit"], a["over"], way, a["stream"])
        made.queues[task] = self.queues.setdefault(key, len(self.queues))
        track = f"{a['over']} {way}" + (f" {a['stream']}" if a["stream"] else "")
        made.labels[task] = (f"{way} {name}", track)
        if a.get("cache"):
            made.caches[task] = (a["cache"], a["rank"], True)

    def meeting(self, task: int, key: tuple[str, ...], size: int) -> int:
        made = self.made
        if key not in self.meetings:
            self.meetings[key] = len(made.meeting_size)
            made.meeting_size.append(size)
        made.meetings[task] = self.meetings[key]
        return self.meetings[key]

    def read_messages(self) -> None:
        """The demands of messages, for which both ends must be known."""
        for meeting, (task, op, source) in self.sends.items():
            other = self.recvs.get(meeting)
            if other is None:
                raise DiagnosticError(f"message {op.tag!r} from {op.unit} to {op.to} is never received")
            demand = self.demands.message(op, source, other[1])
            self.made.demands[task] = self.made.demands[other[0]] = demand
        for meeting, (task, _) in self.recvs.items():
            if meeting not in self.sends:
                op = self.made.ops[task]
                raise DiagnosticError(f"{op.attributes['unit']} receives {op.attributes['tag']!r}, which nobody sends")
