"""Keys and values of some layers in the host's memory, and attention to them there, within the steps of a GPU.

    plan = plan_host_kv(artifact, layers, slots, max_context)      # sizes; None for no layers
    host = HostKV(device, stream, artifact, plan)

Of such a layer the GPU makes the joint projection of queries, keys and values; its rows are copied down, the CPU
normalises, turns and packs them into the cache of its own form and attends (`runtime.cuda.host_attention`), and the
rows that come out are copied up to where the next launch reads them. The GPU waits meanwhile, but for copies of weights
that come by themselves. Prompts go the same way, a step's tokens at once.

The numbers are those of a CPU's build: as exact as the GPU's, not the same to the last bit. The memory is plain, taken
page by page as positions are written, and counted whole. Raises RuntimeDiagnostic; HostCacheTooSmall beyond a budget.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.artifact import Artifact
from runtime.cuda.device import Device
from runtime.cuda.host_attention import AttentionLayer, AttentionProgram, open_attention
from runtime.cuda.host_plan import PinnedMemoryTooSmall
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import ArenaArgument, GpuLaunch, GpuProgram, GpuStep, InputArgument, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import KVCache
from runtime.manifest import KVInfo
from runtime.manifest_fields import REBUILD_HINT

_NUMBER_BYTES = 4
_FIXED = 5  # arguments of the first launch before the gains: qkv, cos, sin, positions, slots


class HostCacheTooSmall(PinnedMemoryTooSmall):
    """The keys and values that are to lie in the host's memory have no room; `lacking` bytes more would do."""

    def __init__(self, budget: int, needed: int) -> None:
        RuntimeDiagnostic.__init__(
            self,
            f"{max(0, budget)} bytes of host memory are too few for the keys and values that the GPU has no room for",
            expected=f"at least {needed} bytes",
            hint="allow more memory, more device memory, or a shorter context (--ctx)",
        )
        self.lacking = needed - budget


@dataclass
class HostKvReport:
    """What happened since a session was opened."""

    layers: int
    of_layers: int
    cache_bytes: int  # for all positions of all slots
    host_threads: int = 0
    steps: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    seconds: float = 0.0  # of the CPU, computing
    wait_s: float = 0.0  # of the CPU, for the GPU and the copies down

    @property
    def link_bytes(self) -> int:
        return self.down_bytes + self.up_bytes

    def summary(self) -> str:
        """One line for the end of a run."""
        steps = max(1, self.steps)
        return (
            f"KV cache: {self.layers} of {self.of_layers} layers in host memory ({self.cache_bytes / 2**20:.0f} MiB), "
            f"attention to them by the CPU ({self.host_threads} threads): {self.seconds / steps * 1e3:.2f} ms and "
            f"{self.link_bytes / steps / 1e6:.2f} MB over the link a step; the last bits are the CPU's"
        )


@dataclass(frozen=True)
class HostKvPlan:
    """Layers whose keys and values lie in the host's memory; bytes of the cache, and of rows that are copied."""

    program: AttentionProgram
    layers: dict[int, AttentionLayer]
    info: KVInfo
    slots: int
    max_context: int
    cache_bytes: int
    row_bytes: tuple[int, int, int, int]  # pinned: projections, cosines, sines, outputs; of a step of the most tokens
    query_bytes: int

    @property
    def pinned_bytes(self) -> int:
        return sum(self.row_bytes)

    @property
    def plain_bytes(self) -> int:
        """Not pinned: the cache and room for queries."""
        return self.cache_bytes + self.query_bytes


def plan_host_kv(artifact: Artifact, layers: Sequence[int], slots: int, max_context: int) -> HostKvPlan | None:
    """Sizes for `layers`; None for none. Raises RuntimeDiagnostic for layers without code for CPUs."""
    if not layers:
        return None
    assert artifact.gpu is not None
    program = AttentionProgram.of(artifact)
    chosen = program.chosen(layers, artifact)
    info = program.kv_info(len(chosen))
    tokens = max(p.max_tokens for p in artifact.gpu.programs)
    most = {name: max(getattr(layer, name) for layer in chosen.values())
            for name in ("columns", "angles", "queries", "out_bytes")}  # fmt: skip
    rows = [tokens * most[name] * _NUMBER_BYTES for name in ("columns", "angles", "angles")]
    cache = KVCache.bytes_for(info, max_context, slots)
    return HostKvPlan(
        program, chosen, info, slots, max_context, cache,
        (rows[0], rows[1], rows[2], tokens * most["out_bytes"]), tokens * most["queries"] * _NUMBER_BYTES,
    )  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """One layer of a program: its number among those here, what is copied from and to where in the arena."""

    number: int
    layer: AttentionLayer
    function: str
    last: int
    qkv: ArenaArgument
    cos: ArenaArgument
    sin: ArenaArgument
    out: ArenaArgument
    gains: tuple[int, int]
    table: int  # the launch that made the cosines


class HostKV:
    """The cache of a plan, and the CPU's part of steps given to `stream`. Whoever makes it closes it."""

    def __init__(
        self, device: Device, stream: object, artifact: Artifact, plan: HostKvPlan, threads: int | None = None
    ) -> None:
        assert artifact.gpu is not None
        step = artifact.gpu
        self.plan, self._device, self._stream = plan, device, stream
        self.report = HostKvReport(len(plan.layers), step.kv.layers, plan.cache_bytes)
        self._gains: dict[WeightArgument, np.ndarray] = {}
        self._read_gains(artifact, step)
        self._work = {program.name: self._of_program(program, step, artifact) for program in step.programs}
        self._skipped = {
            name: {n for first, work in works.items() for n in range(first, work.last + 1)}
            for name, works in self._work.items()
        }
        self._arena = 0
        self._angles: int | None = None  # the launch of this step whose cosines and sines are here
        self._pinned: list[int] = []
        self._cache: KVCache | None = None
        self._queries = np.empty(max(1, plan.query_bytes), np.uint8)
        self._code = open_attention(artifact, plan.program, list(plan.layers.values()), threads)
        self.report.host_threads = self._code.threads
        try:
            self._cache = KVCache(plan.info, plan.max_context, plan.slots)
            for nbytes, what in zip(plan.row_bytes, ("queries, keys and values", "cosines", "sines", "attention"),
                                    strict=True):  # fmt: skip
                with uninterrupted():
                    self._pinned.append(device.allocate_pinned(nbytes, f"rows of {what} for the CPU"))
        except BaseException:
            self.close()
            raise

    # -- what the manifest says, checked

    def _read_gains(self, artifact: Artifact, step: GpuStep) -> None:
        """Gains of norms, out of the weights file: each is a row of numbers."""
        descriptor = artifact.open_weights()
        try:
            for program in step.programs:
                for layer in self.plan.layers.values():
                    launch = program.launches[layer.places[program.name].first]
                    for argument in launch.arguments[_FIXED:]:
                        if isinstance(argument, WeightArgument) and argument not in self._gains:
                            data = os.pread(
                                descriptor, min(argument.bytes, layer.columns * _NUMBER_BYTES), argument.offset
                            )
                            self._gains[argument] = np.frombuffer(data, np.uint8).copy()
        finally:
            os.close(descriptor)

    def _of_program(self, program: GpuProgram, step: GpuStep, artifact: Artifact) -> dict[int, _Work]:
        """By first launch."""
        works: dict[int, _Work] = {}
        taken: set[int] = set()
        for number, (index, layer) in enumerate(self.plan.layers.items()):
            place = layer.places[program.name]
            first, last = program.launches[place.first], program.launches[place.last]
            rows = [layer.columns * _NUMBER_BYTES, *[layer.angles * _NUMBER_BYTES] * 2, layer.out_bytes]
            places = [
                argument
                for argument, row in zip((*first.arguments[:3], last.arguments[last.writes[0]]), rows, strict=True)
                if isinstance(argument, ArenaArgument) and argument.bytes >= program.max_tokens * row
            ] if len(first.arguments) > _FIXED and last.writes else []  # fmt: skip
            gains = [a for a in first.arguments[_FIXED:] if isinstance(a, WeightArgument)]
            numbers = set(range(place.first, place.last + 1))
            if len(places) != len(rows) or len(gains) not in (0, 2) or taken & numbers or not _asks_as_expected(first):
                raise RuntimeDiagnostic(
                    f"attention of layer {index} has code for the CPU, which does not fit its launches",
                    where=str(artifact.path), expected="rows of a joint projection to rows of results",
                    hint=REBUILD_HINT,
                )  # fmt: skip
            taken |= numbers
            a, b = (int(self._gains[g].ctypes.data) for g in gains) if gains else (0, 0)
            qkv, cos, sin, out = places
            table = max((n for n in range(place.first) if _writes(program.launches[n], cos)), default=-1)
            works[place.first] = _Work(
                number, layer, place.function, place.last, qkv, cos, sin, out, (a, b), table
            )  # fmt: skip
        return works

    # -- within a step

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device."""
        self._arena = arena

    def skips(self, program: GpuProgram, number: int) -> bool:
        """Whether the CPU does the work of a launch."""
        return number in self._skipped[program.name]

    def cuts(self, program: GpuProgram, number: int) -> bool:
        """Whether the host has work before a launch, or before the one in front of it that is left out."""
        skipped = self._skipped[program.name]
        return number in self._work[program.name] or (number - 1 in skipped and number not in skipped)

    def begin(self) -> None:
        """A step begins."""
        self._angles = None
        self.report.steps += 1

    def before(self, program: GpuProgram, number: int, sizes: Mapping[str, int], positions: int, slots: int) -> None:
        """Where a layer's launches begin: the CPU's part, behind what the stream has been given. `positions` and
        `slots` are the addresses of the step's arrays on the host."""
        work = self._work[program.name].get(number)
        if work is None:
            return
        assert self._cache is not None
        device, layer, tokens, report = self._device, work.layer, sizes["tokens"], self.report
        qkv, cos, sin, out = self._pinned
        started = time.perf_counter()
        wanted = [(qkv, work.qkv, layer.columns * _NUMBER_BYTES)]
        if self._angles != work.table:
            wanted += [(cos, work.cos, layer.angles * _NUMBER_BYTES), (sin, work.sin, layer.angles * _NUMBER_BYTES)]
        for target, source, row in wanted:
            device.copy_out(target, self._arena + source.offset, tokens * row, self._stream)
            report.down_bytes += tokens * row
        device.synchronize(self._stream)
        self._angles = work.table
        there = time.perf_counter()
        cache = self._cache.address + work.number * (self._cache.reserved_bytes // len(self.plan.layers))
        self._code.run(
            work.function,
            [qkv, cos, sin, cache, positions, slots, *work.gains, int(self._queries.ctypes.data), out, tokens,
             self._cache.capacity],
        )  # fmt: skip
        done = time.perf_counter()
        device.copy_in(self._arena + work.out.offset, out, tokens * layer.out_bytes, self._stream)
        report.up_bytes += tokens * layer.out_bytes
        report.wait_s += there - started
        report.seconds += done - there

    # -- the cache

    def committed_bytes(self) -> int:
        """Of the cache, resident now."""
        return self._cache.committed_bytes() if self._cache is not None else 0

    def release(self, slot: int) -> int:
        """Gives the memory of a slot back; the bytes of its whole pages."""
        return self._cache.release(slot) if self._cache is not None else 0

    def close(self) -> None:
        """Ends the threads, gives all memory back; no copy may be under way."""
        self._code.close()
        if not self._device.lost:
            with uninterrupted():
                while self._pinned:
                    self._device.free_pinned(self._pinned.pop())
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def _asks_as_expected(launch: GpuLaunch) -> bool:
    """Whether positions and slots are those of the step."""
    return [a.which for a in launch.arguments[3:_FIXED] if isinstance(a, InputArgument)] == ["positions", "slots"]


def _writes(launch: GpuLaunch, place: ArenaArgument) -> bool:
    """Whether a launch writes the bytes of a place."""
    written = [launch.arguments[i] for i in launch.writes]
    return any(isinstance(a, ArenaArgument) and a.offset <= place.offset < a.offset + a.bytes for a in written)
