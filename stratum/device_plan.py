"""A decode step on a GPU whose weights partly pass through its memory, written as a streaming plan.

    DeviceWriter(case).run(2)                     # two steps, one behind the other, for the simulator and the checker

Wait for wait what `runtime.cuda.hybrid_weights` does: dense pieces that pass through take the places of the window in
turn, the next one on its way while one is used; what pinned memory has no room for comes from the drive first, through
the stages of `runtime.cuda.host_tier`, ahead of its use. Experts are written by `stratum.device_experts`. Computation
is what its launches read of weights and cache at the GPU's bandwidth, and their dispatch: a captured run of launches is
one, and one more for every `GRAPH_KERNELS` kernels in it. Time of the host (a step that begins, experts that are
decided about, experts that it computes) is written in launches of its cores, `TICK_S` each: `DeviceCase.machine` is
the target with such cores. Refuses targets without a GPU and a link to it, and drives that nobody described.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from hw_targets.cost_model import Work
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter
from runtime.cuda.host_plan import STAGES
from runtime.cuda.host_tier import READERS, REQUEST_BYTES
from runtime.cuda.program import GpuLaunch, GpuProgram, KVArgument, WeightArgument
from stratum.device_case import TICK_S, DeviceCase
from stratum.device_experts import ExpertWriter

# In a graph a kernel follows another in 0.5 us instead of the 4 us that a launch from the host is priced at: NVIDIA's
# "Getting Started with CUDA Graphs" has 3.4 us a kernel of 2.9 us.
GRAPH_KERNELS = 8


def decode_program(case: DeviceCase) -> FuncOp:
    """The plan of two steps, to be checked and looked at, on `case.machine`."""
    return DeviceWriter(case).run(2)


class DeviceWriter:
    """Writes the steps of one case."""

    def __init__(self, case: DeviceCase) -> None:
        self.case, self.writer = case, StreamWriter("decode")
        self.gpu, self.cpu, self.link = case.gpu, case.cpu, case.link
        self.staged: tuple[int, ...] = case.host.staged if case.host is not None else ()
        cached: tuple[int, ...] = case.host.cached if case.host is not None else ()
        store = next((s for s in case.target.storage if s.tier == self.cpu.tier), None)
        if (self.staged or cached) and (store is None or not store.read_rate(REQUEST_BYTES)):
            raise DiagnosticError(
                f"target {case.target.name} has no drive beside {self.cpu.tier}, where weights would come from",
                expected="a [[storage]] with points", hint="allow more pinned memory",
            )  # fmt: skip
        self.store = store.name if store is not None else ""
        self.experts = ExpertWriter(case, self.writer, self.store, frozenset(cached))
        self.coming: deque[tuple[int, Value, Value]] = deque()  # staged pieces: their slots and reads
        self.sent: deque[tuple[Value, Value]] = deque()  # their slots and copies, the oldest first
        self.owner: dict[int, str] = {}  # by place: the unit that fills it
        self.readers: dict[int, list[Value]] = {}  # and what has read it since
        self.read_bytes = 0.0
        self.single = self.graphs = self.dispatches = 0
        self.streamed_bytes = 0.0
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
        ends = self._ends(program)
        last: Value | None = None
        dispatches = self.launched(program)
        if self.staged:
            self.read_ahead(-1)
        for _ in range(steps):
            self.used.clear()
            self.between(last)
            for launch, count in zip(program.launches, dispatches, strict=True):
                if id(launch) in ends:
                    self.experts.results_of(ends[id(launch)])
                for wait in launch.waits:
                    self.done(wait.done)
                    if wait.piece in case.plan.streamed:
                        self.bring(wait.piece)
                    elif self.lacks(wait.piece):
                        self.experts.bring(wait.piece)
                last = self.compute(launch, count)
        self.experts.finish()
        self.single, self.graphs = steps * self.single, steps * self.graphs
        for place in sorted(self.held):
            self.free(place)
        for slot, token in (*self.sent, *((slot, token) for _, slot, token in self.coming)):
            writer.wait(self.cpu.name, token)
            writer.evict(self.cpu.name, slot)
        return writer.finish()

    def between(self, last: Value | None) -> None:
        """The host has a step's logits and begins the next one."""
        writer, cpu, ticks = self.writer, self.cpu.name, round(self.case.between_s / TICK_S)
        if last is not None:
            writer.wait(cpu, last)
        writer.wait(self.gpu.name, writer.compute(cpu, "begin", Work(launches=ticks), []))

    def _ends(self, program: GpuProgram) -> dict[int, int]:
        """Launches, by id, that read what the CPU computed, and the piece of experts that it is of: the first behind
        the layer's second product, as `runtime.cuda.host_side` has it."""
        found, launches = dict[int, int](), program.launches
        for number, launch in enumerate(launches):
            for wait in launch.waits:
                if self.lacks(wait.piece) and self.case.computes(wait.piece) is not None:
                    of = (n for n in range(number + 1, len(launches)) if _reads(launches[n], wait.piece))
                    found[id(launches[next(of, number) + 1])] = wait.piece
        return found

    def launched(self, program: GpuProgram) -> list[int]:
        """What each launch costs of dispatch: in a graph the first one, and every `GRAPH_KERNELS`-th."""
        host_acts = bool(self.staged) or any(self.lacks(piece) for piece, _ in self.case.plan.slots)
        ends = self._ends(program)
        starts = [
            n for n, x in enumerate(program.launches) if n == 0 or (host_acts and (self.cuts(x) or id(x) in ends))
        ]
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

    def lacks(self, piece: int) -> bool:
        """Whether a piece is of experts that are not all in slots."""
        slots = dict(self.case.plan.slots)
        return piece in slots and slots[piece] < self.case.experts(piece)

    def compute(self, launch: GpuLaunch, dispatches: int) -> Value:
        """A launch: the weights that it reads and the cache, by the GPU's bandwidth."""
        assert self.here is not None
        nbytes, slots, places = 0.0, [], list[int]()
        for argument in launch.arguments:
            match argument:
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "rows":
                    nbytes += self.case.tokens * self.case.pieces[piece].unit
                case WeightArgument(_, size, piece) if self.case.pieces[piece].kind == "experts":
                    nbytes += size / self.case.experts(piece) * self.case.needed(piece)
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
        return done

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


def _reads(launch: GpuLaunch, piece: int) -> bool:
    """Whether a launch has weights of a piece."""
    return any(isinstance(a, WeightArgument) and a.piece == piece for a in launch.arguments)
