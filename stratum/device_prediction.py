"""How long a decode step on a GPU takes whose weights partly pass through its memory, played by the simulator.

    predicted = predict_device(step, pieces, plan, target, context=512, hit=0.8)
    predicted.seconds, predicted.link_bytes, predicted.bound

The plan that `runtime.cuda.hybrid_weights` carries out is written as a streaming plan, wait for wait: dense pieces that
pass through take the places of the window in turn, the next one on its way while one is used; behind a router the host
is told of the tiles and answers, missing experts are copied, and only then computed. Computation is what its launches
read of weights and cache at the GPU's bandwidth, and their dispatch; steps of few sequences are bound by that. Two
steps are played, one behind the other: the second counts. Refuses targets without a GPU and a link to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hw_targets.cost_model import Work
from hw_targets.expert_outcomes import LATE, from_hit_rates, from_misses, simulate_steps
from hw_targets.simulator import Simulator
from hw_targets.target import Target
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from passes.place.routing_model import distinct_experts
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.program import GpuLaunch, GpuProgram, GpuStep, KVArgument, WeightArgument
from runtime.manifest import PieceInfo

_SAMPLES = 8  # draws of missing experts
_TILE_BYTES = 16


@dataclass(frozen=True)
class DevicePrediction:
    """Of a decode step: its seconds, bytes that come over the link, what most of the critical path goes to."""

    seconds: float
    link_bytes: float
    bound: str


@dataclass(frozen=True)
class DeviceCase:
    """A step of `tokens` sequences, each behind `context` positions; `hit` is the share of experts in the slots."""

    step: GpuStep
    pieces: Sequence[PieceInfo]
    plan: HbmPlan
    target: Target
    experts_per_token: int = 0
    context: int = 512
    tokens: int = 1
    hit: float = 1.0


def predict_device(case: DeviceCase) -> DevicePrediction:
    """The second of two steps, as simulated."""
    times, link = [], 0.0
    bound = ""
    for steps in (1, 2):
        writer = _Writer(case)
        program = writer.run(steps)
        simulator = Simulator(program, case.target)
        names = list(dict.fromkeys(writer.caches))
        if names:
            most = writer.fetches
            drawn = [from_hit_rates([case.hit], most[name], _SAMPLES, i) for i, name in enumerate(names)]
            times.append(simulate_steps(simulator, from_misses(np.concatenate(drawn, axis=1), names)).mean)
            missing = {f"{name}.{LATE}": round(most[name] * (1 - case.hit)) for name in names}
            timeline = simulator.run(missing)
        else:
            timeline = simulator.run()
            times.append(timeline.seconds)
        bound, link = timeline.bound, writer.streamed_bytes - link
    experts = sum(writer.fetches[n] * (1 - case.hit) * writer.units[n] for n in dict.fromkeys(writer.caches))
    return DevicePrediction(times[1] - times[0], link + experts, bound)


def decode_program(case: DeviceCase) -> FuncOp:
    """The plan of two steps, to be checked and looked at."""
    return _Writer(case).run(2)


class _Writer:
    """Writes the steps of one case."""

    def __init__(self, case: DeviceCase) -> None:
        self.case, self.writer = case, StreamWriter("decode")
        gpu = next((u for u in case.target.units if u.kind == "gpu"), None)
        cpu = next((u for u in case.target.units if u.kind == "cpu"), None)
        link = case.target.link_between(cpu.tier, gpu.tier) if gpu and cpu else None
        if gpu is None or cpu is None or link is None:
            raise DiagnosticError(
                f"target {case.target.name} has no GPU with a link to the host's memory",
                expected="such as h100-sxm, gh200, rtx-4090",
            )
        self.gpu, self.cpu, self.link = gpu, cpu, link.name
        self.caches: list[str] = []
        self.fetches: dict[str, int] = {}
        self.units: dict[str, int] = {}
        self.streamed_bytes = 0.0
        self.messages = 0
        self.held: dict[int, Value] = {}  # by place of the window: its slot
        self.tokens: dict[int, Value] = {}
        self.there: dict[int, int] = {}  # by place: the piece
        self.used: set[int] = set()
        self.here: Value | None = None

    def run(self, steps: int) -> FuncOp:
        case, writer = self.case, self.writer
        kept = case.plan.device_bytes - len(case.plan.window_offsets) * case.plan.window_bytes
        self.here = writer.segment(Piece("resident", kept, self.gpu.tier))
        program = case.step.program(case.tokens)
        for _ in range(steps):
            self.used.clear()
            for launch in program.launches:
                for wait in launch.waits:
                    self.done(wait.done)
                    if wait.piece in case.plan.streamed:
                        self.bring(wait.piece)
                    elif self.lacks(wait.piece):
                        self.experts_of(wait.piece)
                self.compute(program, launch)
        for place in sorted(self.held):
            self.free(place)
        return writer.finish()

    def experts(self, piece: int) -> int:
        return self.case.pieces[piece].bytes // self.case.pieces[piece].unit

    def lacks(self, piece: int) -> bool:
        """Whether a piece is of experts that are not all in slots."""
        slots = dict(self.case.plan.slots)
        return piece in slots and slots[piece] < self.experts(piece)

    def compute(self, program: GpuProgram, launch: GpuLaunch) -> None:
        """A launch: the weights that it reads and the cache, by the GPU's bandwidth."""
        assert self.here is not None
        nbytes, slots = 0.0, []
        for argument in launch.arguments:
            match argument:
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "rows":
                    nbytes += self.case.tokens * self.case.pieces[piece].unit
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "experts":
                    nbytes += size / self.experts(piece) * self.needed(piece)
                case WeightArgument(_, size, piece):
                    nbytes += size
                    slots += [self.held[p] for p, there in self.there.items() if there == piece and p in self.held]
                case KVArgument(_, plane) if not any(i in launch.writes for i in (launch.arguments.index(argument),)):
                    found = self.case.step.kv.planes[plane]
                    positions = min(self.case.context, found.positions or self.case.context)
                    nbytes += self.case.tokens * found.heads * found.bytes * positions
        work = Work(0.0, "bf16", ((self.gpu.tier, nbytes),), launches=1)
        reads = list(dict.fromkeys([self.here, *slots]))
        self.writer.compute(self.gpu.name, launch.origin or launch.kernel, work, reads)

    def needed(self, piece: int) -> float:
        count, top_k = self.experts(piece), max(1, self.case.experts_per_token)
        return min(distinct_experts(count, top_k, self.case.tokens), top_k * self.case.tokens)

    # -- dense pieces

    def place(self, piece: int) -> int:
        return self.case.plan.streamed.index(piece) % len(self.case.plan.window_offsets)

    def bring(self, piece: int) -> None:
        """As `HybridWeights._await`."""
        streamed = self.case.plan.streamed
        self.fill(piece)
        place = self.place(piece)
        if place in self.tokens:
            self.writer.wait(self.gpu.name, self.tokens.pop(place))
        self.used.add(place)
        following = streamed[(streamed.index(piece) + 1) % len(streamed)]
        if self.place(following) not in self.used:
            self.fill(following)

    def fill(self, piece: int) -> None:
        place, info = self.place(piece), self.case.pieces[piece]
        if self.there.get(place) == piece:
            return
        self.free(place)
        slot = self.writer.slot(self.gpu.name, self.gpu.tier, info.bytes, f"place.{place}")
        source = Piece(f"piece.{piece}", info.bytes, self.cpu.tier, self.link)
        self.held[place], self.there[place] = slot, piece
        self.tokens[place] = self.writer.fetch(self.gpu.name, source, slot)
        self.streamed_bytes += info.bytes

    def free(self, place: int) -> None:
        if place in self.tokens:
            self.writer.wait(self.gpu.name, self.tokens.pop(place))
        if place in self.held:
            self.writer.evict(self.gpu.name, self.held.pop(place))
            del self.there[place]

    def done(self, pieces: Sequence[int]) -> None:
        for place, piece in list(self.there.items()):
            if piece in pieces:
                self.used.discard(place)

    # -- experts

    def experts_of(self, piece: int) -> None:
        """The host is told of the tiles; missing experts come, then the tiles by slots go back."""
        info, writer = self.case.pieces[piece], self.writer
        name = f"piece.{piece}"
        most = min(math.ceil(self.needed(piece) - 1e-9), dict(self.case.plan.slots)[piece])
        self.caches.append(name)
        self.fetches[name], self.units[name] = most, info.unit
        nbytes = max(1, self.case.tokens * max(1, self.case.experts_per_token) * _TILE_BYTES)
        self.message(self.gpu.name, self.cpu.name, self.gpu.tier, self.cpu.tier, nbytes)
        coming = []
        for rank in range(most, 0, -1):
            slot = writer.slot(self.gpu.name, self.gpu.tier, info.unit, f"{name}.missing")
            source = Piece(f"{name}.{rank}", info.unit, self.cpu.tier, self.link, "experts")
            coming.append((slot, writer.fetch(self.gpu.name, source, slot, f"{name}.{LATE}", rank)))
        writer.wait(self.gpu.name, *(token for _, token in coming))
        writer.evict(self.gpu.name, *(slot for slot, _ in coming))  # it is the cache's now
        self.message(self.cpu.name, self.gpu.name, self.cpu.tier, self.gpu.tier, nbytes)

    def message(self, source: str, goal: str, from_tier: str, to_tier: str, nbytes: int) -> None:
        """A small one that the other side waits for."""
        writer, tag = self.writer, f"tiles.{self.messages}"
        self.messages += 1
        away, back = writer.slot(source, from_tier, nbytes, "tiles"), writer.slot(goal, to_tier, nbytes, "tiles")
        writer.compute(source, "tiles", Work(), [], [away])
        sent = writer.send(source, goal, self.link, nbytes, tag, away)
        writer.wait(goal, writer.receive(goal, source, self.link, nbytes, tag, back))
        writer.wait(source, sent)
        writer.evict(source, away)
        writer.evict(goal, back)
