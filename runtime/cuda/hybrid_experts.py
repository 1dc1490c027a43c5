"""Experts of a GPU that has no room for all of them: slots, and what is brought to them behind a router.

The host waits for the tiles that the dispatching kernel has made (expert, first row, rows, 0), decides with
`runtime.expert_cache` what is there, copies what is missing into slots that were given up, and writes the numbers of
the slots over those of the experts: kernels find expert s at `base + s * stride` whether all experts are there or some.
So the bits are those of a device that has room for everything.

With a `host` (`runtime.cuda.host_side`) missing experts may be computed by the CPU instead, whichever is sooner by
prices (`runtime.cuda.missed_experts`): their tiles get no rows. In the time that the link then has, some are brought
all the same, for later, unless dense pieces pass over it. The numbers then depend on what was there, in the last bits.
The CPU begins with what lies in pinned memory, and has what the disk gives as it comes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from runtime.cuda.device import Device, host_view
from runtime.cuda.host_experts import ExpertCode
from runtime.cuda.host_side import HostExpert, HostProducts, HostSide
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.missed_experts import CPU, FETCH, FETCHED, ExpertPrices, Missed, SpareLink, divide, read_order
from runtime.cuda.program import ArenaArgument, GpuLaunch, GpuStep, SizeArgument, Wait, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import ExpertCache
from runtime.manifest import PieceInfo
from runtime.manifest_fields import REBUILD_HINT

TILE_WORDS = 4  # of a tile of experts: expert, first row, rows, 0
_MEASURED = 4  # experts that prices are measured by


class Home(Protocol):
    """Where experts lie that are not on the device: `runtime.cuda.host_tier`."""

    def experts(self, piece: int, wanted: Sequence[int]) -> Iterable[tuple[int, int]]:
        """(expert, pinned address) of each as soon as it is there; what is read is read in that order."""
        ...

    def on_disk(self, piece: int, experts: Sequence[int]) -> list[int]:
        """Those that are to be read first."""
        ...

    def rate(self) -> float:
        """Bytes a second that the disk gave so far; 0 where nothing was read."""
        ...

    @property
    def stall_s(self) -> float:
        """Seconds that were waited for reads."""
        ...


@dataclass
class Slots:
    """Experts of a piece: which slot has which."""

    address: int
    unit: int
    count: int
    unused: list[int]
    slot_of: dict[int, int] = field(default_factory=dict)
    later: Any = None  # an event: what was brought for later is there
    coming: bool = False  # nobody has waited for it


class HybridExperts:
    """The slots of a plan, from `region` on. `stream` is that of the steps; `home`, to be set before the first, has the
    experts. `missed` says what is done about those that are not on the device, by `code` of the CPU (which is closed
    with this)."""

    home: Home

    def __init__(
        self, device: Device, stream: Any, step: GpuStep, pieces: Sequence[PieceInfo], plan: HbmPlan, *,
        region: int, report: HybridReport, policy: str = "lrfu", most_tokens: int = 0,
        missed: Missed = FETCHED, code: ExpertCode | None = None,
    ) -> None:  # fmt: skip
        self._device, self._stream, self._pieces, self._policy = device, stream, pieces, policy
        self._report = report
        self._arena = self._host_tiles = 0
        self.copies: Any = None  # of its own: what is waited for is not behind what is only needed next
        self._there: Any = None
        offsets = dict(plan.offsets)
        self._slots = {
            piece: Slots(region + offsets[piece], pieces[piece].unit, count, list(range(count))[::-1])
            for piece, count in plan.slots
        }
        self._caches = {
            piece: ExpertCache([slots.unit], slots.count * slots.unit, policy=policy)
            for piece, slots in self._slots.items()
            if slots.count < self._experts(piece)
        }
        tiles = max([1, *(_most_tiles(launch) for p in step.programs for launch in p.launches)])
        self._missed, self._spare = missed, SpareLink()
        self._free_link = not plan.streamed  # from dense pieces, which every step waits for
        self._host: HostSide | None = None
        self._code = code
        try:
            with uninterrupted():
                self._host_tiles = device.allocate_pinned(tiles * TILE_WORDS * 4, "tiles of experts")
            with uninterrupted():
                self.copies = device.new_stream()
            with uninterrupted():
                self._there = device.new_event()
            for piece in self._caches:
                with uninterrupted():
                    self._slots[piece].later = device.new_event()
            if code is not None and missed.mode != FETCH and self._caches:
                self._host = HostSide(device, stream, step, code, list(self._caches), most_tokens)
                report.host_threads = code.threads
                self._price(missed)
            elif code is not None:
                code.close()
                self._code = None
        except BaseException:
            self.close()
            raise

    def _experts(self, piece: int) -> int:
        return self._pieces[piece].bytes // self._pieces[piece].unit

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device."""
        self._arena = arena
        if self._host is not None:
            self._host.attach(arena)

    def place(self, piece: int) -> tuple[int, int] | None:
        """Where the slots of a piece begin, and their bytes; None for a piece that has none."""
        slots = self._slots.get(piece)
        return None if slots is None else (slots.address, slots.count * slots.unit)

    def passes(self, piece: int) -> bool:
        """Whether only some experts of a piece are there."""
        return piece in self._caches

    def acts(self, launch: GpuLaunch) -> bool:
        """Whether the host has work before a launch."""
        ends = self._host is not None and self._host.ends(launch)
        return ends or any(self.passes(wait.piece) for wait in launch.waits)

    def measure(self) -> None:
        """Prices of bringing and of computing, where they are needed and were not given; before the first step. Experts
        are taken that nobody has touched, so that they come from memory."""
        host, piece = self._host, max(self._caches, key=lambda p: (self._slots[p].unit, -p), default=-1)
        layer = self._code.layer(piece) if self._code is not None and piece >= 0 else None
        if host is None or layer is None or self._missed.prices is not None:
            return
        device, slots = self._device, self._slots[piece]
        most = min(_MEASURED, self._experts(piece))
        brought, one, four = math.inf, math.inf, math.inf
        rows = min(4, host.most_rows(layer))
        address = 0
        for expert, address in self.home.experts(piece, range(most)):
            seconds = []
            for work in (
                lambda address=address: device.copy_in(slots.address, address, slots.unit, self.copies),
                lambda address=address: host.run_once(layer, address, 1),
                lambda address=address: host.run_once(layer, address, rows),
            ):
                started = time.perf_counter()
                work()
                device.synchronize(self.copies)
                seconds.append(time.perf_counter() - started)
            if expert or most == 1:  # the first is slow, whatever it does
                brought, one, four = (min(a, b) for a, b in zip((brought, one, four), seconds, strict=True))
        share = min(1.0, max(0.0, (four / one - 1.0) / max(1, rows - 1)))
        started = time.perf_counter()
        device.copy_in(slots.address, address, 16, self.copies)
        device.synchronize(self.copies)
        start_s = time.perf_counter() - started
        prices = ExpertPrices(slots.unit / brought, slots.unit / one, share, start_s, self.home.rate())
        self._price(replace(self._missed, prices=prices))

    def _price(self, missed: Missed) -> None:
        """From here on by these prices, which the report says."""
        self._missed, prices = missed, missed.prices
        if prices is not None:
            self._report.prices = (prices.link_bytes_per_s, prices.host_bytes_per_s)

    def bring(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        """What a layer's tiles ask for, into slots, and the tiles by slots instead of experts."""
        try:
            self._exchange(wait, launch, sizes)
        except BaseException:
            self._forget(wait.piece)  # what was admitted may not have come
            raise

    def _forget(self, piece: int) -> None:
        """No expert of a piece is there."""
        slots = self._slots[piece]
        slots.coming = False
        self._caches[piece] = ExpertCache([slots.unit], slots.count * slots.unit, policy=self._policy)
        slots.slot_of.clear()
        slots.unused = list(range(slots.count))[::-1]

    def _exchange(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        device, slots, cache, host = self._device, self._slots[wait.piece], self._caches[wait.piece], self._host
        offset, count = _tiles(launch, sizes)
        nbytes = 4 * TILE_WORDS * count
        products = host.products(launch) if host is not None else None
        device.copy_out(self._host_tiles, self._arena + offset, nbytes, self._stream)
        if host is not None and products is not None:
            host.copy_down(products, sizes["tokens"])
        started = time.perf_counter()
        device.synchronize(self._stream)
        began, stalled = time.perf_counter(), self.home.stall_s
        self._report.router_wait_s += began - started
        tiles = host_view(self._host_tiles, nbytes).view(np.int32).reshape(-1, TILE_WORDS)
        filled = tiles[:, 2] > 0
        wanted = np.unique(tiles[filled, 0]).tolist()
        if any(not 0 <= expert < self._experts(wait.piece) for expert in wanted) or len(wanted) > slots.count:
            raise RuntimeDiagnostic(
                f"a step asks for the experts {wanted[:8]} of {self._pieces[wait.piece].origin}",
                expected=f"at most {slots.count} of {self._experts(wait.piece)}", hint=REBUILD_HINT,
            )  # fmt: skip
        hits, missing = cache.lookup(0, wanted)
        self._report.lookups += len(wanted)
        self._report.hits += len(hits)
        if slots.coming:  # brought for later, behind an earlier step
            device.wait(self._stream, slots.later)
            slots.coming = False
        read = self.home.on_disk(wait.piece, missing) if products is not None else []
        brought, computed, later = self._divided(products, missing, tiles[filled], slots, len(hits), read)
        for _, expert in cache.admit(0, [*brought, *later]):  # all that read their slots is done: the stream is empty
            slots.unused.append(slots.slot_of.pop(expert))
        self._copy(wait.piece, brought, computed, later, tiles[filled], products, sizes, read)
        tiles[filled, 2] *= ~np.isin(tiles[filled, 0], computed)  # no rows for the GPU
        tiles[filled, 0] = [0 if e in computed else slots.slot_of[e] for e in tiles[filled, 0].tolist()]
        device.copy_in(self._arena + offset, self._host_tiles, nbytes, self._stream)
        self._report.decisions += 1
        self._report.decide_s += max(0.0, time.perf_counter() - began - (self.home.stall_s - stalled))

    @property
    def prices(self) -> ExpertPrices | None:
        """By which missing experts are divided; None where nothing was measured or given."""
        return self._missed.prices

    def _divided(
        self, products: HostProducts | None, missing: list[int], tiles: np.ndarray, slots: Slots, hits: int,
        read: list[int],
    ) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
        """Of missing experts (`read`: those on the disk) those to bring, those that the CPU computes, and those of them
        to bring for later. Where they come from the disk in several rounds, none may lie in memory for as long as the
        CPU would want it. Both lists, and `read`, are left in the order in which experts are taken."""
        prices, most = self._missed.prices, self._report.host_slots or len(missing)
        if products is None or prices is None or not 0 < len(missing) <= most:
            return missing, [], []
        rows = [int(tiles[tiles[:, 0] == expert, 2].sum()) for expert in missing]
        late = read_order(rows, [i for i, expert in enumerate(missing) if expert in read])
        read[:] = [missing[i] for i in late]
        first: list[int] = []
        second = [*sorted((i for i in range(len(missing)) if i not in late), key=lambda i: (rows[i], -i)), *late]
        if self._missed.mode != CPU:
            first, second = divide(rows, prices, slots.unit, late)
        brought, computed = [missing[i] for i in first], [missing[i] for i in second]
        room = slots.count - hits - len(brought) if self._free_link else 0
        spare = self._spare.count(prices, slots.unit, [rows[i] for i in second], len(brought), room)
        heavy = sorted(second, key=lambda i: (-rows[i], i))
        return brought, computed, [missing[i] for i in heavy[:spare]]

    def _copy(
        self, piece: int, brought: list[int], computed: list[int], later: list[int], tiles: np.ndarray,
        products: HostProducts | None, sizes: Mapping[str, int], read: Sequence[int],
    ) -> None:  # fmt: skip
        """Starts the copies of what is brought and the CPU, each as soon as an expert is there, then the copies for
        later."""
        device, slots, report = self._device, self._slots[piece], self._report
        places: dict[int, int] = {}
        ready: list[HostExpert] = []  # for the CPU, which is given what is in memory at once
        near = [expert for expert in (*brought, *computed) if expert not in read]
        for number, (expert, address) in enumerate(self.home.experts(piece, [*near, *read]), 1):
            places[expert] = address
            if expert in computed:
                chosen = tiles[tiles[:, 0] == expert]
                ready.append(HostExpert(address, int(chosen[:, 1].min()), int(chosen[:, 2].sum())))
            else:
                self._bring(slots, expert, address)
            if ready and number >= len(near):
                assert self._host is not None and products is not None
                self._host.start(products, ready, sizes["tokens"])
                ready = []
        report.computed += len(computed)
        if brought:
            device.record(self._there, self.copies)
            device.wait(self._stream, self._there)
        for expert in later:
            self._bring(slots, expert, places[expert])
        if later:
            device.record(slots.later, self.copies)
            slots.coming = True
        report.later += len(later)
        report.expert_bytes += (len(brought) + len(later)) * slots.unit

    def _bring(self, slots: Slots, expert: int, address: int) -> None:
        """Starts the copy of an expert to a slot of its own."""
        slot = slots.slot_of[expert] = slots.unused.pop()
        self._device.copy_in(slots.address + slot * slots.unit, address, slots.unit, self.copies)

    def finish(self, launch: GpuLaunch) -> None:
        """Before a launch: what the CPU computed for it is copied up."""
        if self._host is not None and self._host.ends(launch):
            started = time.perf_counter()
            self._host.copy_up()
            self._report.host_wait_s += time.perf_counter() - started

    def forget(self) -> None:
        """A step begins: nobody waits for what the CPU computed for one that was given up."""
        if self._host is not None:
            self._host.forget()

    def close(self) -> None:
        """Ends the CPU's part; gives back its stream, events and pinned memory. The slots belong to the region."""
        device = self._device
        if self.copies is not None and not device.lost:
            device.synchronize(self.copies)
        if self._host is not None:
            self._host.close()
        elif self._code is not None:
            self._code.close()
        self._host = self._code = None
        if device.lost:
            return
        with uninterrupted():
            if self.copies is not None:
                device.synchronize(self.copies)
                device.free_stream(self.copies)
            for event in (self._there, *(slots.later for slots in self._slots.values())):
                if event is not None:
                    device.free_event(event)
            for slots in self._slots.values():
                slots.later = None
            if self._host_tiles:
                device.free_pinned(self._host_tiles)
            self.copies, self._there, self._host_tiles = None, None, 0


def _tiles(launch: GpuLaunch, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(offset in the arena, number) of the tiles that a product of experts goes by: its arguments are the matrices (one
    or two), x, order, tiles, y, and how many tiles there are at most."""
    weights = sum(isinstance(argument, WeightArgument) for argument in launch.arguments)
    found = launch.arguments[weights + 2 : weights + 3]
    most = launch.arguments[-1] if launch.arguments else None
    if not found or not isinstance(found[0], ArenaArgument) or not isinstance(most, SizeArgument):
        raise RuntimeDiagnostic(
            f"the launch {launch.kernel} waits for experts, but takes no tiles",
            expected="matrices, x, order, tiles, y, number of tiles", hint=REBUILD_HINT,
        )  # fmt: skip
    return found[0].offset, min(most.size.evaluate(sizes), found[0].bytes // (4 * TILE_WORDS))


def _most_tiles(launch: GpuLaunch) -> int:
    """Room for the tiles of a launch that waits for experts, 0 for others."""
    if not any(wait.ids >= 0 for wait in launch.waits):
        return 0
    found: Sequence[Any] = [a for a in launch.arguments if isinstance(a, ArenaArgument)]
    return max((a.bytes for a in found[2:3]), default=0) // (4 * TILE_WORDS)
