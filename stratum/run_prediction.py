"""What a built model will take on this machine under a stream plan: each phase played as the runtime plays it.

    problem = problem_for(planned.solution.problem, manifest, stream)
    found = predict(problem, manifest, stream, hit=0.5)       # stream None: everything is in memory
    found.decode.seconds, found.decode.waited, found.decode.read_bytes, dict(found.decode.parts)["mlp"]

Arithmetic takes what the cost model says of each part, layer by layer. Between its parts a program waits for pieces of
the weights file, as its manifest says; the drive reads them in their order, as far ahead as the window takes, also into
the next step. Missing experts of a step are waited for together; when a prompt is so long that all will be used, those
of the next layer are read while this one computes, as far as the cache has room; of short steps as many as are guessed,
of which the share `right` is wanted and the rest read in vain. Where the KV cache has less memory than it needs, its
layers are read and written as `stratum.kv_prediction` tells, from the same drive. What the cache of experts holds is
decided by the runtime's own one. A step follows others like it, so what they left in window and cache is there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from hw_targets.target import ComputeUnit, Storage
from ir.diagnostics import DiagnosticError
from passes.place.machine import main_tier
from passes.place.option import RESIDENT, Option
from passes.place.options import options_of
from passes.place.placement import RIGHT_GUESSES
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts
from runtime.expert_cache import Entry, ExpertCache
from runtime.expert_guess import LEAST_SHARE, MOST_TOKENS
from runtime.manifest import Manifest, ProgramInfo
from runtime.stream_books import missing_in
from runtime.stream_plan import StreamPlan
from runtime.weight_streamer import ALL_EXPERTS_USED
from stratum.kv_prediction import KVQueue, kv_calls, kv_sizes
from stratum.stand_in_prediction import StandInUse
from stratum.stream_placement import parts_of_pieces

PAGE_BYTES = 4096
_WARM_STEPS = 2  # until the window and the cache are as they stay


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a decode step or of a prompt. `parts` is ((group, seconds of arithmetic), ...), `waited` the seconds
    that the arithmetic stands still for reads of `read_bytes`, at `read_rate`; `bound` what takes most of it."""

    seconds: float
    parts: tuple[tuple[str, float], ...]
    waited: float
    read_bytes: float
    bound: str
    read_rate: float = 0.0
    kv_read_bytes: float = 0.0  # of them, keys and values


@dataclass(frozen=True)
class RunTimes:
    """Both phases."""

    decode: PhaseTimes
    prefill: PhaseTimes


@dataclass(frozen=True, order=True)
class _Stage:
    """Arithmetic of `seconds`, for which the program waits at its wait number `wait` (-1: for nothing), and for keys
    and values of layer `kv` (-1: of none)."""

    group: str
    seconds: float
    wait: int = -1
    kv: int = -1


@dataclass
class _Disk:
    """A drive that does one thing after another. `at`: until when it is busy; `behind`, `ahead`: bytes of the stream of
    dense pieces that are done with, and that are read."""

    rate: float
    window: float
    at: float = 0.0
    done_with: float = 0.0
    read: float = 0.0
    bytes: float = 0.0

    def run_ahead(self, now: float) -> None:
        """The stream goes on until `now`, or until the window is full."""
        if now > self.at:
            more = min((now - self.at) * self.rate, max(0.0, self.done_with + self.window - self.read))
            self.read += more
            self.bytes += more
            self.at = now

    def stream_to(self, end: float, now: float) -> float:
        """When byte `end` of the stream is there."""
        self.run_ahead(now)
        if self.read >= end:
            return now
        self.at = max(self.at, now) + (end - self.read) / self.rate
        self.bytes += end - self.read
        self.read = end
        return self.at

    def fetch(self, nbytes: float, now: float, rate: float = 0.0) -> float:
        """When bytes that are asked for now are there; the stream waits meanwhile."""
        self.run_ahead(now)
        self.at = max(self.at, now) + nbytes / (rate or self.rate)
        self.bytes += nbytes
        return self.at


def problem_for(problem: Problem, manifest: Manifest, stream: StreamPlan | None) -> Problem:
    """The problem with calls as long as the runtime makes them."""
    longest = max(program.max_tokens for program in manifest.programs)
    chunk = min(longest, stream.tokens_at_once(manifest)) if stream is not None else longest
    return dataclasses.replace(
        problem, session=dataclasses.replace(problem.session, chunk=chunk, micro_batches=1), pins=()
    )


def rows_rate(store: Storage, stream: StreamPlan, rows: float, rate: float) -> float:
    """Bytes a second of pages that are read for so many rows by all threads, `rate` at most."""
    return min((store.read_rate(PAGE_BYTES) or rate) * min(stream.threads, max(1.0, rows)), rate)


def predict(
    problem: Problem,
    manifest: Manifest,
    stream: StreamPlan | None,
    hit: float = 1.0,
    right: float = RIGHT_GUESSES,
    kv_bytes: int | None = None,
    stand_ins: StandInUse | None = None,
) -> RunTimes:
    """Times of both phases; `hit` is the share of a decode step's experts that are found in memory, `right` the share
    of guessed experts that their layer then wants, `kv_bytes` what the KV cache has in memory (None: enough),
    `stand_ins` what decode steps replace of missing experts: of a prompt's, few count little for all its tokens."""
    decode, prefill = (
        _Player(problem, manifest, stream, hit, right, kv_bytes, phase, stand_ins if phase else None).times()
        for phase in (True, False)
    )
    return RunTimes(decode, prefill)


@dataclass
class _Player:
    """One phase of one model."""

    problem: Problem
    manifest: Manifest
    stream: StreamPlan | None
    hit: float
    right: float
    kv_bytes: int | None
    decode: bool
    stand_ins: StandInUse | None = None
    now: float = 0.0
    waited: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)  # seconds of arithmetic by what bounds them

    def __post_init__(self) -> None:
        self.unit: ComputeUnit = self.problem.machine.units[0]
        self.store: Storage | None = self.problem.machine.target.store()
        session = self.problem.session
        self.rows = float(session.batch) if self.decode else session.prompt / session.passes
        self.program = self._program()
        self.pieces = self.manifest.weights.pieces
        self.resident = (
            frozenset(self.stream.resident) if self.stream is not None else frozenset(range(len(self.pieces)))
        )
        self.experts = [n for n, piece in enumerate(self.pieces) if piece.kind == "experts"]
        self.arrives: dict[Entry, float] = {}
        self.cache: ExpertCache | None = None
        rate = window = 0.0
        if self.stream is not None or self.kv_bytes is not None:
            if self.store is None or not self.store.read_rate():
                raise DiagnosticError("nobody measured the drive", hint="'compile-model targets calibrate --disk' does")
            rate = self.store.read_rate() or 0.0
        if self.stream is not None and self.store is not None:
            rate, window = self.store.read_rate(self.stream.request_bytes) or 0.0, float(self.stream.window_bytes)
            units = [self.pieces[n].sizes for n in self.experts]
            if units:
                self.cache = ExpertCache(
                    units, self.stream.expert_bytes, policy=self.stream.policy, scope=self.stream.scope,
                    pinned=self.stream.pinned,
                )  # fmt: skip
        self.disk = _Disk(rate, window)
        self.guessed = 0.0, 0.0  # wanted bytes read for the next layer on a guess, and when they are there
        self.place = 0.0  # of the stream of dense pieces: where the program is
        sizes = kv_sizes(self.problem, self.manifest, self.kv_bytes)
        self.kv_queue = KVQueue(sizes, self._fetch_kv, self._write_kv) if sizes is not None else None
        self.kv_calls = kv_calls(self.problem, decode=self.decode)
        self.kv_read = 0.0
        self.stages = self._stages()

    def times(self) -> PhaseTimes:
        """A phase that follows others like it."""
        calls = 1 if self.decode else self.problem.session.passes
        streams = self.stream is not None or self.kv_bytes is not None
        for _ in range(_WARM_STEPS if streams else 0):
            self._play(calls)
        start, read = self.now, self.disk.bytes
        self.waited, self.parts, self.kv_read = 0.0, {}, 0.0
        self._play(calls)
        seconds, nbytes = self.now - start, self.disk.bytes - read
        slowest = max(self.resources, key=lambda name: self.resources[name], default="nothing")
        bound = f"{self.store.name} read" if self.store is not None and self.waited > 0.1 * seconds else slowest
        return PhaseTimes(seconds, tuple(self.parts.items()), self.waited, nbytes, bound, self.disk.rate, self.kv_read)

    def _play(self, calls: int) -> None:
        for call in range(calls):
            self._rows()
            if self.kv_queue is not None:
                self.kv_queue.begin(self.kv_calls[call])
            for stage in self.stages:
                if stage.group == "head" and call < calls - 1:
                    continue
                if stage.kv >= 0 and self.kv_queue is not None:
                    self._until(self.kv_queue.wait(stage.kv))
                if stage.wait >= 0 and self.stream is not None:
                    self._wait(stage.wait)
                self.now += stage.seconds
                self.parts[stage.group] = self.parts.get(stage.group, 0.0) + stage.seconds
            self.disk.run_ahead(self.now)
            self.disk.done_with = self.place
            if self.kv_queue is not None:
                self.kv_queue.end()

    # -- keys and values

    def _fetch_kv(self, nbytes: float) -> float:
        self.kv_read += nbytes
        return self.disk.fetch(nbytes, self.now)

    def _write_kv(self, nbytes: float) -> None:
        """By the thread that waits."""
        assert self.store is not None
        self._until(self.disk.fetch(nbytes, self.now, self.store.write_rate() or self.disk.rate))
        self.disk.bytes -= nbytes  # no read

    def _until(self, then: float) -> None:
        self.waited += max(0.0, then - self.now)
        self.now = max(self.now, then)

    def _rows(self) -> None:
        """Rows of a table that does not stay: pages, one from each row, read by all threads."""
        tables = [p for n, p in enumerate(self.pieces) if p.kind == "rows" and n not in self.resident]
        if self.stream is None or self.store is None or not tables:
            return
        small = rows_rate(self.store, self.stream, self.rows, self.disk.rate)
        nbytes = sum(self.rows * math.ceil(table.unit / PAGE_BYTES) * PAGE_BYTES for table in tables)
        self._until(self.disk.fetch(nbytes, self.now, small))

    def _wait(self, number: int) -> None:
        wait = self.program.awaits[number]
        piece = self.pieces[wait.piece]
        if piece.kind == "experts":
            self._experts(self.experts.index(wait.piece))
        elif wait.piece not in self.resident:
            self.disk.run_ahead(self.now)
            self.disk.done_with = self.place
            self.place += piece.bytes
            self._until(self.disk.stream_to(self.place, self.now))

    # -- experts

    def _experts(self, layer: int) -> None:
        piece = self.pieces[self.experts[layer]]
        count, top_k = piece.count, self.manifest.experts_per_token
        chosen = self.rows * top_k
        if chosen < ALL_EXPERTS_USED * count:
            missing_bytes = (
                min(distinct_experts(count, top_k, self.rows), chosen) * (1.0 - self.hit) * (piece.bytes / count)
            )
            if self.stand_ins is not None:
                missing_bytes *= self.stand_ins.read
            guessed, guessed_there = self.guessed
            there = self.disk.fetch(max(0.0, missing_bytes - guessed), self.now)
            # The next layer's likeliest are read behind what this one waits for.
            more = min(missing_bytes, self._guesses(layer) * (piece.bytes / count))
            self.guessed = self.right * more, self.disk.fetch(more, self.now) if more else 0.0
            self._until(max(there, guessed_there))
            return
        assert self.cache is not None
        _, missing = self.cache.lookup(layer, list(range(count)))
        self._forget(self.cache.admit(layer, missing))
        for expert in missing:
            self.arrives[layer, expert] = self.disk.fetch(piece.place(expert)[1], self.now)
        self._until(max((self.arrives.get((layer, expert), 0.0) for expert in range(count)), default=0.0))
        if layer + 1 < len(self.experts):
            self._ahead(layer + 1)

    def _guesses(self, layer: int) -> int:
        """Experts of the layer behind that are read on a guess: where the artifact says how routers work."""
        told = sum(wait.router is not None for wait in self.program.awaits) == len(self.experts)
        possible = self.stream is not None and told and layer + 1 < len(self.experts) and self.rows <= MOST_TOKENS
        possible = possible and self.right >= LEAST_SHARE  # the runtime keeps count, and leaves it
        return self.stream.guesses if self.stream is not None and possible else 0

    def _ahead(self, layer: int) -> None:
        """As `runtime.stream_books` reads the next layer's experts."""
        assert self.cache is not None and self.stream is not None
        info, before = self.pieces[self.experts[layer]], self.pieces[self.experts[layer - 1]]
        shared = self.stream.scope == "global"
        capacity = self.cache.capacity_bytes // (1 if shared else len(self.experts))
        missing = missing_in(info, layer, self.cache, capacity - (before.bytes if shared else 0))
        self._forget(self.cache.admit(layer, missing))
        for expert in missing:
            self.arrives[layer, expert] = self.disk.fetch(info.place(expert)[1], self.now)

    def _forget(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.arrives.pop(entry, None)

    # -- what is computed

    def _program(self) -> ProgramInfo:
        return next((p for p in self.manifest.programs if p.max_tokens >= self.rows), self.manifest.programs[-1])

    def _stages(self) -> tuple[_Stage, ...]:
        """The program's waits in their order, each with its share of its part's arithmetic; parts that wait for
        nothing of their own go with the piece that holds them."""
        kept = self._seconds()
        owner = parts_of_pieces(self.manifest)
        bytes_of: dict[tuple[str, int], int] = {}
        for wait in self.program.awaits:
            bytes_of[owner[wait.piece]] = bytes_of.get(owner[wait.piece], 0) + self.pieces[wait.piece].bytes
        rest = sorted(
            (_place(group, layer), _Stage(group, seconds, kv=layer if group == "attention" else -1))
            for (group, layer), seconds in kept.items()
            if (group, layer) not in bytes_of
        )
        found: list[_Stage] = []
        attended = set()
        for number, wait in enumerate(self.program.awaits):
            group, layer = part = owner[wait.piece]
            while rest and rest[0][0] < _place(group, layer):  # as the program has them: layer by layer
                found.append(rest.pop(0)[1])
            share = self.pieces[wait.piece].bytes / bytes_of[part]
            first = group == "attention" and layer not in attended
            attended |= {layer} if first else set()
            found.append(_Stage(group, kept.get(part, 0.0) * share, number, layer if first else -1))
        return (*found, *(stage for _, stage in rest))

    def _seconds(self) -> dict[tuple[str, int], float]:
        """Seconds of arithmetic of every part of every layer in one call, everything being in memory."""
        home = main_tier(self.problem.machine.target)
        found: dict[tuple[str, int], float] = {}
        for part in self.problem.parts():
            option = next((o for o in options_of(self.problem, part) if _in_memory(o, home)), None)
            if option is None:
                raise DiagnosticError(f"target {self.problem.machine.target.name} cannot keep {part.name} in {home}")
            cost = option.decode if self.decode else option.prefill
            calls = 1 if self.decode or part.group == "head" else self.problem.session.passes
            less = self.stand_ins.computed if self.stand_ins is not None and part.experts else 1.0
            for resource, seconds in cost.path.items():
                self.resources[resource] = self.resources.get(resource, 0.0) + seconds * part.count
            for layer in part.layers or (-1,):
                found[part.group, layer] = cost.waited / calls * less
        return {part: seconds for part, seconds in found.items() if seconds}


def _place(group: str, layer: int) -> tuple[float, int]:
    """Where a part comes in a program."""
    return (math.inf if group == "head" else layer), ("embedding", "attention", "mlp", "experts", "head").index(group)


def _in_memory(option: Option, home: str) -> bool:
    return (option.mode, option.home, option.kv_home or home) == (RESIDENT, home, home)
