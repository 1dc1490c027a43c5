"""Runs the step of a GPU program: inputs in, launches in order, logits out.

Takes a device, the program with its code, and the weights. Each call runs one program on at most its `max_tokens`
tokens. A program that replays is captured once for each number of tokens and rows, its copies of inputs and logits
included, and launched as one graph from then on; ids, positions, slots and rows lie at fixed places in device memory.
Where the host acts within a step (a router is read, a piece comes from the disk, the CPU attends to keys and values in
its own memory), each run of launches between two such places is a graph. Graphs and plain launches give the same bits:
they are the same launches.

A step is given to the stream and waited for. Where Ctrl-C or a fault ends the call before that, the next one waits for
what is still under way before it touches anything.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.cuda.device import Arguments, Device, host_view
from runtime.cuda.host_kv import HostKV
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.kv import GpuKV
from runtime.cuda.modules import Image
from runtime.cuda.program import (
    ArenaArgument,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KVArgument,
    SizeArgument,
    WeightArgument,
    prompt_pieces,
)
from runtime.cuda.step_memory import INPUTS, StepInputs, most_rows, scratch_bytes
from runtime.cuda.weights import WeightStore

KEPT_STEPS = 64  # prepared or captured, by their sizes
_NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class StepTimes:
    """When the launches of a step ran: seconds since its first, [launches, 2], by the GPU's clock; `started_s` by
    perf_counter."""

    started_s: float
    ended_s: float
    seconds: np.ndarray


@dataclass(frozen=True)
class _Ready:
    """A launch with all that the driver wants."""

    function: Any
    blocks: int
    threads: int
    dynamic_bytes: int
    arguments: Arguments
    launch: GpuLaunch
    number: int


def device_layers(step: GpuStep, host: HostKV | None) -> list[int]:
    """Layers whose keys and values lie on the device."""
    elsewhere = host.plan.layers if host is not None else {}
    return [layer for layer in range(step.kv.layers) if layer not in elsewhere]


class Executor:
    """Programs on a device. Whoever makes it closes it, with no step under way."""

    def __init__(
        self, device: Device, stream: Any, step: GpuStep, images: Sequence[Image], weights: WeightStore, *,
        slots: int, max_context: int, vocab_size: int, where: str, host: HostKV | None = None,
    ) -> None:  # fmt: skip
        self._host = host  # layers whose keys and values lie there
        self._layers = {layer: i for i, layer in enumerate(device_layers(step, host))}
        self.step, self.weights, self.vocab_size = step, weights, vocab_size
        self.most_rows = most_rows(step, vocab_size)
        self.arena_bytes = scratch_bytes(step, vocab_size)
        self.replayed = self.launched = 0  # steps: as one graph, and not
        self._under_way = False  # of a step, maybe, that nobody has waited for
        self._device, self._stream, self._slots = device, stream, slots
        self._prepared: OrderedDict[tuple[str, int, int, int], list[_Ready]] = OrderedDict()
        self._graphs: OrderedDict[tuple[str, int, int, Any], tuple[Any, Any]] = OrderedDict()  # and what it does
        self._segments: OrderedDict[tuple[str, int, int], dict[int, Any]] = OrderedDict()  # graphs by first launch
        self._cuts: dict[str, list[tuple[int, int]]] = {}  # of a program: its segments
        self._events: list[Any] = []
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._module: Any = None
        self.kv: GpuKV | None = None
        try:
            with uninterrupted():
                self._module = device.load(images, where)
            self._functions = {
                kernel.name: device.function(self._module, kernel.name, kernel.dynamic_bytes) for kernel in step.kernels
            }
            arena = max(p.arena_bytes for p in step.programs)
            self._arena = self._allocate(arena, "activations")
            weights.attach(self._arena)
            if host is not None:
                host.attach(self._arena)
            self._place_inputs()
            logits = 4 * vocab_size * self.most_rows
            self._logits, self._host_logits = self._allocate(logits, "logits"), self._allocate_pinned(logits, "logits")
            self._logits_view = host_view(self._host_logits, logits).view(np.float32).reshape(-1, vocab_size)
            with uninterrupted():
                self.kv = GpuKV(device, stream, replace(step.kv, layers=len(self._layers)), slots, max_context)
        except BaseException:
            self.close()
            raise

    def _allocate(self, nbytes: int, what: str) -> int:
        with uninterrupted():
            self._memory.append(self._device.allocate(nbytes, what))
        return self._memory[-1]

    def _allocate_pinned(self, nbytes: int, what: str) -> int:
        with uninterrupted():
            self._pinned.append(self._device.allocate_pinned(nbytes, what))
        return self._pinned[-1]

    def _place_inputs(self) -> None:
        sizes = [StepInputs.bytes_for(program.max_tokens) for program in self.step.programs]
        device, host = self._allocate(sum(sizes), "inputs"), self._allocate_pinned(sum(sizes), "inputs")
        self._inputs: dict[str, StepInputs] = {}
        for program, nbytes in zip(self.step.programs, sizes, strict=True):
            self._inputs[program.name] = StepInputs(host, device, program.max_tokens)
            host, device = host + nbytes, device + nbytes

    # -- one step

    def run(
        self, program: GpuProgram, ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray,
        logits: np.ndarray, *, timed: bool = False,
    ) -> StepTimes | None:  # fmt: skip
        """One step. int32 [tokens] each, `rows` [rows] ascending; writes `logits`, f32 [rows, vocab].

        The cache has memory behind every position. `timed` launches one by one and gives the times. Raises
        DeviceFault.
        """
        assert 1 <= len(ids) <= program.max_tokens and len(rows) <= self.most_rows and self.kv is not None
        self.settle()
        inputs = self._inputs[program.name]
        pieces = _NONE
        if program.piece_tokens:
            pieces = prompt_pieces(positions, slots, program.piece_tokens)
        for name, values in zip(INPUTS, (ids, positions, slots, rows, pieces), strict=True):
            inputs.write(name, values)
        sizes = {
            "tokens": len(ids), "rows": len(rows), "ctx": self.kv.capacity, "slots": self._slots,
            "pieces": len(pieces),
        }  # fmt: skip
        self._under_way = True
        if self._host is not None:
            self._host.begin()
        times = None
        if timed:
            times = self._run_timed(program, sizes)
        elif program.replays and self.weights.captured and self._host is None:
            self._replay(program, sizes)
            self.replayed += 1
        else:
            with uninterrupted():  # a store of weights keeps books between launches
                if program.replays:
                    self._give_segments(program, sizes)
                else:
                    self.weights.given(self._give(program, sizes), 0)
            self.launched += 1
        self.settle()
        if len(rows):
            logits[:] = self._logits_view[: len(rows)]
        return times

    def settle(self) -> None:
        """Waits for what a step has left under way."""
        if self._under_way:
            self._device.synchronize(self._stream)
            self._under_way = False

    def _replay(self, program: GpuProgram, sizes: dict[str, int]) -> None:
        """The step as one graph."""
        with uninterrupted():
            self.weights.settle()
            graph, does = self._graph(program, sizes)
            self.weights.replayed(None)  # in case that it is not given
            self._device.launch_graph(graph, self._stream)
            self.weights.replayed(does)
            self.weights.given(0, 1)

    def _graph(self, program: GpuProgram, sizes: dict[str, int]) -> tuple[Any, Any]:
        """(the captured step of these sizes, what it does to the weights), captured now if it is the first."""
        key = (program.name, sizes["tokens"], sizes["rows"], self.weights.state)
        if key not in self._graphs:
            with self._capture() as made, self.weights.capturing() as does:
                self._give(program, sizes)
            self._graphs[key] = made[0], does[0]
            if len(self._graphs) > KEPT_STEPS:
                self._device.free_graph(self._graphs.popitem(last=False)[1][0])
        self._graphs.move_to_end(key)
        return self._graphs[key]

    @contextmanager
    def _capture(self) -> Iterator[list[Any]]:
        """What the block gives to the stream is captured; the list has the graph behind it."""
        made: list[Any] = []
        self._device.begin_capture(self._stream)
        try:
            yield made
            made.append(self._device.end_capture(self._stream))
        except BaseException:
            if not self._device.lost:
                self._device.abandon_capture(self._stream)
            raise

    def _give_segments(self, program: GpuProgram, sizes: dict[str, int]) -> None:
        """The step to the stream: what lies between two launches that the store acts at as one graph."""
        inputs = self._inputs[program.name]
        self._device.copy_in(inputs.device, inputs.host, inputs.nbytes, self._stream)
        ready = self._ready(program, sizes)
        key = (program.name, sizes["tokens"], sizes["rows"])
        graphs = self._segments.setdefault(key, {})
        self._segments.move_to_end(key)
        if len(self._segments) > KEPT_STEPS:
            self._free_segments(self._segments.popitem(last=False)[1])
        single = 0
        for start, stop in self._segments_of(program):
            self._before(program, ready[start], sizes)
            given = [one for one in ready[start:stop] if one.blocks]
            if len(given) <= 1:
                self._launch(given)
                single += len(given)
                continue
            if start not in graphs:
                with self._capture() as made:
                    self._launch(given)
                graphs[start] = made[0]
            self._device.launch_graph(graphs[start], self._stream)
            self.weights.given(0, 1)
        self.weights.given(single, 0)
        self._copy_logits(sizes)

    def _segments_of(self, program: GpuProgram) -> list[tuple[int, int]]:
        """(first launch, end) of each run of launches at whose first alone the store acts."""
        if program.name not in self._cuts:
            starts = [n for n, launch in enumerate(program.launches) if n == 0 or self._cuts_at(program, n, launch)]
            self._cuts[program.name] = list(pairwise([*starts, len(program.launches)]))
        return self._cuts[program.name]

    def _cuts_at(self, program: GpuProgram, number: int, launch: GpuLaunch) -> bool:
        """Whether the host acts before a launch."""
        return self.weights.cuts(launch) or (self._host is not None and self._host.cuts(program, number))

    def _before(self, program: GpuProgram, ready: _Ready, sizes: dict[str, int]) -> None:
        """What the host does before a launch."""
        self.weights.before(ready.launch, sizes)
        if self._host is not None:
            inputs = self._inputs[program.name]
            places = [inputs.host + inputs.offsets[name] for name in ("positions", "slots")]
            self._host.before(program, ready.number, sizes, *places)

    def _launch(self, given: Sequence[_Ready]) -> None:
        for one in given:
            self._device.launch(one.function, one.blocks, one.threads, one.dynamic_bytes, one.arguments, self._stream)

    def _free_segments(self, graphs: dict[int, Any]) -> None:
        while graphs:
            self._device.free_graph(graphs.popitem()[1])

    def _give(self, program: GpuProgram, sizes: dict[str, int], events: Sequence[Any] = ()) -> int:
        """The whole step to the stream; event i + 1 behind launch i, event 0 before the first. Gives the launches."""
        inputs = self._inputs[program.name]
        self._device.copy_in(inputs.device, inputs.host, inputs.nbytes, self._stream)
        if events:
            self._device.record(events[0], self._stream)
        ready_ones = self._ready(program, sizes)
        for ready in ready_ones:
            self._before(program, ready, sizes)
            if ready.blocks:
                self._launch([ready])
            if events:
                self._device.record(events[ready.number + 1], self._stream)
        self._copy_logits(sizes)
        return sum(ready.blocks > 0 for ready in ready_ones)

    def _copy_logits(self, sizes: dict[str, int]) -> None:
        nbytes = 4 * self.vocab_size * sizes["rows"]
        if nbytes:
            self._device.copy_out(self._host_logits, self._logits, nbytes, self._stream)

    def _run_timed(self, program: GpuProgram, sizes: dict[str, int]) -> StepTimes:
        count = len(program.launches) + 1
        with uninterrupted():
            while len(self._events) < count:
                self._events.append(self._device.new_event(timed=True))
        started_s = time.perf_counter()
        with uninterrupted():
            self.weights.given(self._give(program, sizes, self._events[:count]), 0)
        self.launched += 1
        self._device.synchronize(self._stream)
        ended_s = time.perf_counter()
        ends = [self._device.seconds_between(self._events[0], event) for event in self._events[:count]]
        return StepTimes(started_s, ended_s, np.stack([ends[:-1], ends[1:]], axis=1).reshape(-1, 2))

    # -- launches

    def _ready(self, program: GpuProgram, sizes: dict[str, int]) -> list[_Ready]:
        """The launches of a step of these sizes, kept for the next one."""
        key = (program.name, sizes["tokens"], sizes["rows"], sizes["pieces"])
        if key not in self._prepared:
            self._prepared[key] = [
                self._prepare(program, number, launch, sizes) for number, launch in enumerate(program.launches)
            ]
            if len(self._prepared) > KEPT_STEPS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _prepare(self, program: GpuProgram, number: int, launch: GpuLaunch, sizes: dict[str, int]) -> _Ready:
        kernel = self.step.kernel(launch.kernel)
        if self._host is not None and self._host.skips(program, number):
            return _Ready(None, 0, kernel.threads, 0, Arguments([], []), launch, number)
        values, extents = [], []
        for argument in launch.arguments:
            value, extent = self._place(program, argument, sizes)
            values.append(value)
            extents.append(extent)
        return _Ready(
            self._functions[kernel.name], launch.blocks(sizes), kernel.threads, kernel.dynamic_bytes,
            Arguments(values, extents), launch, number,
        )  # fmt: skip

    def _place(self, program: GpuProgram, argument: Any, sizes: dict[str, int]) -> tuple[int, int]:
        """The value of an argument, and how many bytes are behind it."""
        assert self.kv is not None
        match argument:
            case ArenaArgument(offset, nbytes):
                return self._arena + offset, nbytes
            case WeightArgument():
                return self.weights.address(argument), self.weights.extent(argument)
            case KVArgument(layer, plane):
                return self.kv.address(self._layers[layer], plane), self.kv.plane_bytes(plane)
            case InputArgument("logits"):
                return self._logits, 4 * self.vocab_size * self.most_rows
            case InputArgument(which):
                inputs = self._inputs[program.name]
                return inputs.device + inputs.offsets[which], 4 * inputs.counts[which]
            case SizeArgument(size):
                return size.evaluate(sizes), 0
        raise AssertionError(argument)

    def forget_places(self) -> None:
        """After weights have moved: nothing that was prepared or captured is used any more."""
        self._prepared.clear()
        while self._graphs:
            self._device.free_graph(self._graphs.popitem()[1][0])
        while self._segments:
            self._free_segments(self._segments.popitem()[1])

    def close(self) -> None:
        """Gives back all that it made, not the weights."""
        if self._device.lost:
            return
        with uninterrupted():
            self.forget_places()
            for event in self._events:
                self._device.free_event(event)
            if self.kv is not None:
                self.kv.close()
            for address in self._memory:
                self._device.free(address)
            for address in self._pinned:
                self._device.free_pinned(address)
            if self._module is not None:
                self._device.free_module(self._module)
            self._events, self._memory, self._pinned, self._module = [], [], [], None
