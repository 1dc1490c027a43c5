"""How long a decode step on a GPU takes whose weights partly pass through its memory, played by the simulator.

    predicted = predict_device(step, pieces, plan, target, context=512, hit=0.8)
    predicted.seconds, predicted.link_bytes, predicted.bound

The plan that `runtime.cuda.hybrid_weights` carries out is written as a streaming plan, wait for wait: dense pieces that
pass through take the places of the window in turn, the next one on its way while one is used; behind a router the host
is told of the tiles and answers, missing experts are copied, and only then computed. What pinned memory has no room for
comes from the drive first: dense pieces through the stages of `runtime.cuda.host_tier`, ahead of their use, experts
when they are asked for. Computation is what its launches read of weights and cache at the GPU's bandwidth, and their
dispatch: a captured run of launches is one, and one more for every `GRAPH_KERNELS` kernels in it. Steps of few
sequences are bound by that. Two steps are played, one behind the other: the second counts. Refuses targets without a
GPU and a link to it, and drives that nobody described.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
from runtime.cuda.host_plan import STAGES, HostPlan
from runtime.cuda.host_tier import READERS, REQUEST_BYTES
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.program import GpuLaunch, GpuProgram, GpuStep, KVArgument, WeightArgument
from runtime.manifest import PieceInfo

_SAMPLES = 8  # draws of missing experts
_TILE_BYTES = 16
# In a graph a kernel follows another in 0.5 us instead of the 4 us that a launch from the host is priced at: NVIDIA's
# "Getting Started with CUDA Graphs" has 3.4 us a kernel of 2.9 us.
GRAPH_KERNELS = 8


@dataclass(frozen=True)
class DevicePrediction:
    """Of a decode step: its seconds, bytes that come over the link and from the drive, what most of the critical path
    goes to; kernels and graphs that the host launches, and the seconds of the GPU that their dispatch takes."""

    seconds: float
    link_bytes: float
    bound: str
    read_bytes: float = 0.0
    launches: int = 0
    graphs: int = 0
    dispatch_seconds: float = 0.0


@dataclass(frozen=True)
class DeviceCase:
    """A step of `tokens` sequences, each behind `context` positions; `hit` is the share of experts in the slots of the
    device, `host_hit` that of the others in those of pinned memory. Without `host` all of these are there."""

    step: GpuStep
    pieces: Sequence[PieceInfo]
    plan: HbmPlan
    target: Target
    experts_per_token: int = 0
    context: int = 512
    tokens: int = 1
    hit: float = 1.0
    host: HostPlan | None = None
    host_hit: float = 1.0


def predict_device(case: DeviceCase) -> DevicePrediction:
    """The second of two steps, as simulated."""
    times: list[float] = []
    bound, before = "", (0.0, 0.0)
    for steps in (1, 2):
        writer = _Writer(case)
        simulator = Simulator(writer.run(steps), case.target)
        names = list(dict.fromkeys(writer.caches))
        if names:
            times.append(simulate_steps(simulator, from_misses(*_missing(case, writer, names))).mean)
            timeline = simulator.run(_usual(case, writer, names))
        else:
            timeline = simulator.run()
            times.append(timeline.seconds)
        bound, now = timeline.bound, (writer.streamed_bytes, writer.read_bytes)
        link, read = now[0] - before[0], now[1] - before[1]
        before = now
    for name in names:
        missing = writer.fetches[name] * (1 - case.hit) * writer.units[name]
        link += missing
        read += missing * (1 - case.host_hit) if name in writer.on_disk else 0.0
    per_step = writer.dispatches / 2 * (writer.gpu.launch_seconds or 0.0)
    return DevicePrediction(times[1] - times[0], link, bound, read, writer.single // 2, writer.graphs // 2, per_step)


def _missing(case: DeviceCase, writer: _Writer, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(experts that are missing in some draws, int [draws, caches], the caches): in the slots of the device, and, of
    these, in pinned memory."""
    columns, caches = [], []
    for number, name in enumerate(names):
        lacking = from_hit_rates([case.hit], writer.fetches[name], _SAMPLES, number)
        if name in writer.on_disk:
            drawn = np.random.default_rng(_SAMPLES + number).binomial(lacking, 1 - case.host_hit)
            columns.append(drawn)
            caches.append(_disk(name))
            lacking = lacking - drawn
        columns.append(lacking)
        caches.append(name)
    return np.concatenate(columns, axis=1), caches


def _usual(case: DeviceCase, writer: _Writer, names: Sequence[str]) -> dict[str, int]:
    """The same without chance."""
    found = {}
    for name in names:
        lacking = round(writer.fetches[name] * (1 - case.hit))
        read = round(lacking * (1 - case.host_hit)) if name in writer.on_disk else 0
        found |= {f"{name}.{LATE}": lacking - read}
        if name in writer.on_disk:
            found |= {f"{_disk(name)}.{LATE}": read}
    return found


def _disk(name: str) -> str:
    """The cache that says which experts of another one are read from the drive."""
    return f"{name}.disk"


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
        self.staged: tuple[int, ...] = case.host.staged if case.host is not None else ()
        cached: tuple[int, ...] = case.host.cached if case.host is not None else ()
        store = next((s for s in case.target.storage if s.tier == cpu.tier), None)
        if (self.staged or cached) and (store is None or not store.read_rate(REQUEST_BYTES)):
            raise DiagnosticError(
                f"target {case.target.name} has no drive beside {cpu.tier}, where weights would come from",
                expected="a [[storage]] with points", hint="allow more pinned memory",
            )  # fmt: skip
        self.store = store.name if store is not None else ""
        self.on_disk = {f"piece.{piece}" for piece in cached}
        self.coming: deque[tuple[int, Value, Value]] = deque()  # staged pieces: their slots and reads
        self.sent: deque[tuple[Value, Value]] = deque()  # their slots and copies, the oldest first
        self.owner: dict[int, str] = {}  # by place: the unit that fills it
        self.readers: dict[int, list[Value]] = {}  # and what has read it since
        self.read_bytes = 0.0
        self.single = self.graphs = self.dispatches = 0
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
        dispatches = self.launched(program)
        if self.staged:
            self.read_ahead(-1)
        for _ in range(steps):
            self.used.clear()
            for launch, count in zip(program.launches, dispatches, strict=True):
                for wait in launch.waits:
                    self.done(wait.done)
                    if wait.piece in case.plan.streamed:
                        self.bring(wait.piece)
                    elif self.lacks(wait.piece):
                        self.experts_of(wait.piece)
                self.compute(launch, count)
        self.single, self.graphs = steps * self.single, steps * self.graphs
        for place in sorted(self.held):
            self.free(place)
        for slot, token in (*self.sent, *((slot, token) for _, slot, token in self.coming)):
            writer.wait(self.cpu.name, token)
            writer.evict(self.cpu.name, slot)
        return writer.finish()

    def launched(self, program: GpuProgram) -> list[int]:
        """What each launch costs of dispatch: in a graph the first one, and every `GRAPH_KERNELS`-th."""
        host_acts = bool(self.staged) or any(self.lacks(piece) for piece, _ in self.case.plan.slots)
        starts = [n for n, x in enumerate(program.launches) if n == 0 or (host_acts and self.cuts(x))]
        found: list[int] = []
        for start, stop in pairwise([*starts, len(program.launches)]):
            count = stop - start
            self.single += count == 1 and host_acts
            self.graphs += count > 1 or not host_acts
            found += [int(n == 0) for n in range(count)]
            for n in range(GRAPH_KERNELS, count, GRAPH_KERNELS):
                found[start + n] = 1
        return found

    def cuts(self, launch: GpuLaunch) -> bool:
        """As `HybridWeights.cuts`."""
        passing = self.case.plan.streamed
        return any(
            self.lacks(wait.piece) or wait.piece in passing or any(piece in passing for piece in wait.done)
            for wait in launch.waits
        )

    def experts(self, piece: int) -> int:
        return self.case.pieces[piece].bytes // self.case.pieces[piece].unit

    def lacks(self, piece: int) -> bool:
        """Whether a piece is of experts that are not all in slots."""
        slots = dict(self.case.plan.slots)
        return piece in slots and slots[piece] < self.experts(piece)

    def compute(self, launch: GpuLaunch, dispatches: int) -> None:
        """A launch: the weights that it reads and the cache, by the GPU's bandwidth."""
        assert self.here is not None
        nbytes, slots, places = 0.0, [], list[int]()
        for argument in launch.arguments:
            match argument:
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "rows":
                    nbytes += self.case.tokens * self.case.pieces[piece].unit
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "experts":
                    nbytes += size / self.experts(piece) * self.needed(piece)
                case WeightArgument(_, size, piece):
                    nbytes += size
                    places += [p for p, there in self.there.items() if there == piece and p in self.held]
                    slots = [self.held[p] for p in places]
                case KVArgument(_, plane) if not any(i in launch.writes for i in (launch.arguments.index(argument),)):
                    found = self.case.step.kv.planes[plane]
                    positions = min(self.case.context, found.positions or self.case.context)
                    nbytes += self.case.tokens * found.heads * found.bytes * positions
        self.dispatches += dispatches
        work = Work(0.0, "bf16", ((self.gpu.tier, nbytes),), launches=dispatches)
        reads = list(dict.fromkeys([self.here, *slots]))
        done = self.writer.compute(self.gpu.name, launch.origin or launch.kernel, work, reads)
        for place in places:
            self.readers[place].append(done)

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
        staged = piece in self.staged
        unit = self.owner[place] = self.cpu.name if staged else self.gpu.name
        slot = self.writer.slot(unit, self.gpu.tier, info.bytes, f"place.{place}")
        self.held[place], self.there[place], self.readers[place] = slot, piece, []
        self.streamed_bytes += info.bytes
        if not staged:
            source = Piece(f"piece.{piece}", info.bytes, self.cpu.tier, self.link)
            self.tokens[place] = self.writer.fetch(unit, source, slot)
            return
        number, stage, read = self.coming.popleft()
        assert number == piece
        self.writer.wait(unit, read)  # the host gives the copy when the read is over
        self.tokens[place] = self.writer.fetch(unit, Piece(f"piece.{piece}", info.bytes, self.store, self.link), slot,
                                               source=stage)  # fmt: skip
        self.sent.append((stage, self.tokens[place]))
        self.read_ahead(piece)

    def read_ahead(self, after: int) -> None:
        """As `HostTier._read_ahead`."""
        writer, staged = self.writer, self.staged
        while len(self.coming) < STAGES - 1:
            if len(self.sent) > 1:
                stage, copied = self.sent.popleft()
                writer.wait(self.cpu.name, copied)
                writer.evict(self.cpu.name, stage)
            last = self.coming[-1][0] if self.coming else after
            piece = staged[(staged.index(last) + 1) % len(staged)] if last >= 0 else staged[0]
            nbytes = self.case.pieces[piece].bytes
            slot = writer.slot(self.cpu.name, self.cpu.tier, nbytes, "stage")
            source = Piece(f"piece.{piece}", nbytes, self.store, self.store, block=REQUEST_BYTES, depth=READERS)
            self.coming.append((piece, slot, writer.fetch(self.cpu.name, source, slot)))
            self.read_bytes += nbytes

    def free(self, place: int) -> None:
        if place not in self.held:
            return
        unit = self.owner[place]
        self.writer.wait(unit, *([self.tokens.pop(place)] if place in self.tokens else []))
        if unit != self.gpu.name:
            self.writer.wait(unit, *self.readers[place])
        self.writer.evict(unit, self.held.pop(place))
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
        if name in self.on_disk:
            self.read_experts(name, info.unit, most)
        writer.wait(self.gpu.name, *(token for _, token in coming))
        writer.evict(self.gpu.name, *(slot for slot, _ in coming))  # it is the cache's now
        self.message(self.cpu.name, self.gpu.name, self.cpu.tier, self.gpu.tier, nbytes)

    def read_experts(self, name: str, unit: int, most: int) -> None:
        """Those that are not in pinned memory: all reads begin, each is copied when it is there."""
        writer, host, cache = self.writer, self.cpu.name, f"{_disk(name)}.{LATE}"
        reads, copies = [], []
        for rank in range(most, 0, -1):
            slot = writer.slot(host, self.cpu.tier, unit, f"{name}.read")
            source = Piece(f"{_disk(name)}.{rank}", unit, self.store, self.store, "experts", REQUEST_BYTES, READERS)
            reads.append((slot, writer.fetch(host, source, slot, cache, rank), rank))
        for stage, token, rank in reads:
            writer.wait(host, token)
            slot = writer.slot(host, self.gpu.tier, unit, f"{name}.missing")
            source = Piece(f"{_disk(name)}.{rank}", unit, self.store, self.link, "experts")
            copies.append((slot, writer.fetch(host, source, slot, cache, rank, stage)))
        writer.wait(host, *(token for _, token in copies))
        writer.evict(host, *(slot for slot, _ in copies), *(stage for stage, _, _ in reads))

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
