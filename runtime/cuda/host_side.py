"""Experts of a GPU's step that the CPU computes meanwhile: what is copied down, who computes, what is copied up.

Behind a router the rows of tokens and their order come down with the tiles. Experts that the CPU is to compute are
left out on the GPU (their tiles get no rows), which computes the others; a thread has the CPU's team compute them at
the same time, and before the first launch behind the layer's second product their rows of y are copied up. Buffers are
pinned and used again in the next layer, whose wait for its own tiles is behind all copies of this one.

The CPU's numbers are not the GPU's to the last bit: sums are added in another order. Raises RuntimeDiagnostic.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.cuda.device import Device, host_view
from runtime.cuda.host_experts import ExpertCode, HostJob, HostLayer
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import ArenaArgument, GpuLaunch, GpuProgram, GpuStep, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT

_NUMBER_BYTES = 4


@dataclass(frozen=True)
class HostProducts:
    """Where a layer's products have their rows in the arena."""

    layer: HostLayer
    x: ArenaArgument
    order: ArenaArgument
    y: ArenaArgument


@dataclass(frozen=True)
class HostExpert:
    """An expert that the CPU computes: its bytes, and its rows in grouped order."""

    weights: int
    first: int
    rows: int


class HostSide:
    """For the layers of `passing` pieces that `code` has; steps of at most `most_tokens` tokens."""

    def __init__(
        self, device: Device, stream: Any, step: GpuStep, code: ExpertCode, passing: Sequence[int], most_tokens: int
    ) -> None:
        self.code = code
        self._device, self._stream = device, stream
        self._products: dict[int, HostProducts] = {}  # by the launch of the first product
        self._behind: set[int] = set()  # launches that read what the CPU wrote
        for program in step.programs:
            self._find(program, set(passing))
        self._arena = self._x = self._order = self._y = 0
        self._busy: list[tuple[HostProducts, Sequence[HostExpert], Future[None]]] = []  # one after another
        layers = [found.layer for found in self._products.values()]
        pairs = max((most_tokens * layer.choices for layer in layers), default=0)
        out = max((layer.out for layer in layers), default=0)
        row_bytes = max((layer.columns * layer.x_bytes for layer in layers), default=0)
        hidden_bytes = max((layer.hidden * layer.hidden_bytes for layer in layers), default=0)
        self._hidden = np.empty(max(1, pairs * hidden_bytes), np.uint8)
        self._sources = np.empty(max(1, pairs), np.int32)
        self._pool = ThreadPoolExecutor(1, "experts")
        sizes = (most_tokens * row_bytes, pairs * 4, pairs * out * _NUMBER_BYTES)
        try:
            with uninterrupted():
                self._x = device.allocate_pinned(max(1, sizes[0]), "rows of tokens for the CPU")
            with uninterrupted():
                self._order = device.allocate_pinned(max(1, sizes[1]), "the order of tokens for the CPU")
            with uninterrupted():
                self._y = device.allocate_pinned(max(1, sizes[2]), "results of the CPU")
        except BaseException:
            self.close()
            raise
        host_view(self._x, max(1, sizes[0]))[:] = 0  # what is measured before the first step multiplies numbers
        self._sources[:] = 0

    def _find(self, program: GpuProgram, passing: set[int]) -> None:
        """The launches of both products of each layer, and the one behind them."""
        launches = program.launches
        for number, launch in enumerate(launches):
            piece = next((wait.piece for wait in launch.waits if wait.piece in passing), -1)
            layer = self.code.layer(piece) if piece >= 0 else None
            if layer is None:
                continue
            second = next((n for n in range(number + 1, len(launches)) if _weights(launches[n], piece)), 0)
            x: Any = _arguments(launch, piece, 0)
            order = _arguments(launch, piece, 1)
            if layer.rounds:
                x = _rounded_from(launches[number - 1], x) if number else None
            writes = launches[second].writes
            y: Any = launches[second].arguments[writes[0]] if writes else None
            pairs = program.max_tokens * layer.choices
            rows = program.max_tokens * layer.columns * layer.x_bytes, pairs * 4, pairs * layer.out * _NUMBER_BYTES
            if not second or second + 1 == len(launches) or not all(map(_holds, (x, order, y), rows)):
                raise RuntimeDiagnostic(
                    f"the experts of {launch.origin} have code for the CPU, which does not fit their launches",
                    expected="two products, rows of tokens to rows of results", hint=REBUILD_HINT,
                )  # fmt: skip
            self._products[id(launch)] = HostProducts(layer, x, order, y)
            self._behind.add(id(launches[second + 1]))

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device."""
        self._arena = arena

    def products(self, launch: GpuLaunch) -> HostProducts | None:
        """Of a layer whose first product this is; None where the CPU has no code for it."""
        return self._products.get(id(launch))

    def ends(self, launch: GpuLaunch) -> bool:
        """Whether a launch reads what the CPU wrote."""
        return id(launch) in self._behind

    def copy_down(self, products: HostProducts, tokens: int) -> None:
        """Rows and order of a step, on the stream of the step. Nobody reads those of the layer before any more."""
        self.forget()
        layer, arena = products.layer, self._arena
        row_bytes = layer.columns * layer.x_bytes
        self._device.copy_out(self._x, arena + products.x.offset, tokens * row_bytes, self._stream)
        self._device.copy_out(self._order, arena + products.order.offset, tokens * layer.choices * 4, self._stream)

    def start(self, products: HostProducts, experts: Sequence[HostExpert], tokens: int) -> None:
        """Has experts computed, behind those that were started before; what was copied down is there."""
        layer, pairs = products.layer, tokens * products.layer.choices
        if any(e.first < 0 or e.rows <= 0 or e.first + e.rows > pairs for e in experts):
            raise RuntimeDiagnostic("a tile of experts has rows that the step has not", hint=REBUILD_HINT)
        order = host_view(self._order, pairs * 4).view(np.int32)
        sources = self._sources[:pairs]
        np.floor_divide(order, layer.choices, out=sources)
        for e in experts:
            rows = sources[e.first : e.first + e.rows]
            if rows.min() < 0 or rows.max() >= tokens:
                raise RuntimeDiagnostic("an expert was given a token that the step has not", hint=REBUILD_HINT)
        jobs = [self._job(layer, e.weights, e.first, e.rows) for e in experts]
        self._busy.append((products, experts, self._pool.submit(self.code.run, layer, jobs)))

    def _job(self, layer: HostLayer, weights: int, first: int, rows: int) -> HostJob:
        sources = self._sources.ctypes.data + 4 * first
        hidden = self._hidden.ctypes.data + first * layer.hidden * layer.hidden_bytes
        return HostJob(weights, self._x, sources, hidden, self._y + first * layer.out * _NUMBER_BYTES, rows)

    def most_rows(self, layer: HostLayer) -> int:
        """Of one expert that there is room for."""
        return len(self._sources)

    def run_once(self, layer: HostLayer, weights: int, rows: int) -> None:
        """One expert with rows of nothing, to be measured; before any step."""
        self.code.run(layer, [self._job(layer, weights, 0, rows)])

    def copy_up(self) -> None:
        """Waits for the CPU; its rows go to their places behind what the step's stream has been given."""
        while self._busy:
            products, experts, computed = self._busy[0]
            computed.result()
            del self._busy[0]
            row = products.layer.out * _NUMBER_BYTES
            for e in experts:
                at = e.first * row
                self._device.copy_in(self._arena + products.y.offset + at, self._y + at, e.rows * row, self._stream)

    def forget(self) -> None:
        """Waits for what the CPU still computes of a step that was given up."""
        while self._busy:
            self._busy.pop()[2].exception()

    def close(self) -> None:
        """Ends the threads, gives the pinned memory back; no copy may be under way."""
        self.forget()
        self._pool.shutdown()
        self.code.close()
        if not self._device.lost:
            with uninterrupted():
                for address in (self._x, self._order, self._y):
                    if address:
                        self._device.free_pinned(address)
                self._x = self._order = self._y = 0


def _rounded_from(before: GpuLaunch, codes: Any) -> Any:
    """The rows that the launch before a product rounds to the codes that the product takes; None where it does not."""
    return before.arguments[0] if len(before.arguments) > 1 and before.arguments[1] == codes else None


def _holds(argument: Any, nbytes: int) -> bool:
    """Whether an argument is memory of the step of so many bytes at least."""
    return isinstance(argument, ArenaArgument) and argument.bytes >= nbytes


def _weights(launch: GpuLaunch, piece: int) -> int:
    """How many arguments of a launch are weights of a piece."""
    return sum(isinstance(a, WeightArgument) and a.piece == piece for a in launch.arguments)


def _arguments(launch: GpuLaunch, piece: int, number: int) -> Any:
    """Argument `number` behind the weights of a piece; None for none."""
    at = _weights(launch, piece) + number
    return launch.arguments[at] if at < len(launch.arguments) else None
