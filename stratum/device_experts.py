"""Experts in a streaming plan of a GPU that has no room for all of them: what passes between it, the CPU and the drive.

    experts = ExpertWriter(case, writer, drive, cached)
    experts.bring(piece)                          # behind a router; `results_of(piece)` behind the layer's products

As `runtime.cuda.hybrid_experts` does it: the host is told of the tiles (and has the rows of tokens, where it computes),
decides, reads what lies on the drive only, and answers; the GPU copies what is brought and goes on; the CPU computes
the others, those on the drive as they come, and its rows are copied up before what reads them. Which of a layer's
experts are missing differs from step to step, so each count is a cache of its own for the simulator: see `Counts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw_targets.cost_model import Work, tier_rate
from hw_targets.expert_outcomes import LATE
from ir.core import Value
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter
from runtime.cuda.host_experts import HostLayer
from runtime.cuda.host_tier import READERS, REQUEST_BYTES
from stratum.device_case import TICK_S, DeviceCase

TILE_BYTES = 16


@dataclass(frozen=True)
class Counts:
    """Of a layer in a step: experts that are brought from pinned memory and from the drive, that the CPU computes from
    there and from there, and of these those that are brought all the same, for later."""

    brought: int = 0
    read: int = 0
    computed: int = 0
    read_and_computed: int = 0
    later: int = 0

    def caches(self, piece: int) -> dict[str, int]:
        """As the simulator asks for them, by cache."""
        found = dict(vars(self)) | {"rows": int(self.computed + self.read_and_computed > 0)}
        return {_cache(piece, what): count for what, count in found.items()}


def _cache(piece: int, what: str) -> str:
    return f"piece.{piece}.{what}.{LATE}"


def most_missing(needed: float, slots: int) -> int:
    """Experts that a layer can lack in a step that uses `needed` of them, with so many slots."""
    return min(math.ceil(needed - 1e-9), slots)


class ExpertWriter:
    """`cached`: pieces that pinned memory has no room for; `drive`: where they come from."""

    def __init__(self, case: DeviceCase, writer: StreamWriter, drive: str, cached: frozenset[int]) -> None:
        self.case, self.writer, self.drive, self.cached = case, writer, drive, cached
        self.gpu, self.cpu = self.case.gpu, self.case.cpu
        self.messages = 0
        self.pieces: list[int] = []  # that were asked for, in order
        self.computing: dict[int, list[Value]] = {}  # by piece: what the CPU is at
        self.coming: dict[int, list[tuple[Value, Value]]] = {}  # slots and copies for later

    def most(self, piece: int) -> int:
        """Experts of a piece that a step can lack."""
        return most_missing(self.case.needed(piece), dict(self.case.plan.slots)[piece])

    def bring(self, piece: int) -> None:
        """The host is told of the tiles; what is missing comes, or is computed; then the tiles by slots go back."""
        case, writer, host, most = self.case, self.writer, self.cpu.name, self.most(piece)
        self.pieces.append(piece)
        layer, unit = case.computes(piece), case.pieces[piece].unit
        self._end_later(piece)
        tiles = max(1, case.tokens * max(1, case.experts_per_token) * TILE_BYTES)
        rows = case.tokens * (layer.x_bytes * layer.columns + 4 * layer.choices) if layer is not None else 0
        self._message(self.gpu.name, host, self.gpu.tier, self.cpu.tier, tiles + rows)
        writer.compute(host, "decide", Work(launches=round(case.decide_s / TICK_S)), [])
        reads = self._read(piece, unit, most) if piece in self.cached else []
        self._message(host, self.gpu.name, self.cpu.tier, self.gpu.tier, tiles)
        users = self._copy(piece, unit, most, reads)
        if layer is not None:
            done = self.computing[piece] = self._compute(piece, unit, most, layer, reads)
            users += done
        if reads:
            writer.wait(host, *users)
            writer.evict(host, *(stage for stage, _, _, _ in reads))

    def _read(self, piece: int, unit: int, most: int) -> list[tuple[Value, Value, int, bool]]:
        """Those that are not in pinned memory: all reads begin. (Place, read, rank, whether the CPU computes it)."""
        writer, found = self.writer, list[tuple[Value, Value, int, bool]]()
        for rank in range(1, most + 1):
            for computed in (False, True) if self.case.computes(piece) is not None else (False,):
                what = "read_and_computed" if computed else "read"
                slot = writer.slot(self.cpu.name, self.cpu.tier, unit, f"piece.{piece}.{what}")
                name, drive = f"piece.{piece}.{what}.{rank}", self.drive
                source = Piece(name, unit, drive, drive, "experts", REQUEST_BYTES, READERS)
                read = writer.fetch(self.cpu.name, source, slot, _cache(piece, what), rank)
                found.append((slot, read, rank, computed))
        return found

    def _copy(self, piece: int, unit: int, most: int, reads: list[tuple[Value, Value, int, bool]]) -> list[Value]:
        """What is brought, from pinned memory at once and from the drive as it comes. The copies."""
        writer, gpu, coming = self.writer, self.gpu, []
        for rank in range(most, 0, -1):
            slot = writer.slot(gpu.name, gpu.tier, unit, f"piece.{piece}.missing")
            source = Piece(f"piece.{piece}.{rank}", unit, self.cpu.tier, self.case.link, "experts")
            coming.append((slot, writer.fetch(gpu.name, source, slot, _cache(piece, "brought"), rank)))
        for stage, read, rank, computed in reads:
            if computed:
                continue
            writer.wait(gpu.name, read)
            slot = writer.slot(gpu.name, gpu.tier, unit, f"piece.{piece}.missing")
            source = Piece(f"piece.{piece}.read.{rank}", unit, self.drive, self.case.link, "experts")
            token = writer.fetch(gpu.name, source, slot, _cache(piece, "read"), rank, stage)
            coming.append((slot, token))
        writer.wait(gpu.name, *(token for _, token in coming))
        writer.evict(gpu.name, *(slot for slot, _ in coming))  # it is the cache's now
        if self.case.computes(piece) is not None:
            for rank in range(1, most + 1):
                slot = writer.slot(gpu.name, gpu.tier, unit, f"piece.{piece}.later")
                source = Piece(f"piece.{piece}.{rank}", unit, self.cpu.tier, self.case.link, "experts")
                token = writer.fetch(gpu.name, source, slot, _cache(piece, "later"), rank)
                self.coming.setdefault(piece, []).append((slot, token))
        return [token for _, token in coming]

    def _compute(
        self, piece: int, unit: int, most: int, layer: HostLayer, reads: list[tuple[Value, Value, int, bool]]
    ) -> list[Value]:
        """What the CPU has, one expert after another: those in memory, then those from the drive."""
        writer, host, case = self.writer, self.cpu.name, self.case
        load = max(1, round(case.tokens * layer.choices / max(1.0, case.needed(piece))))
        flows = unit / tier_rate(case.target, self.cpu.tier, self.cpu)
        ticks = max(0, round((case.price.host_s(unit, load) - flows) / TICK_S))
        work = Work(0.0, "f32", ((self.cpu.tier, float(unit)),), launches=ticks)
        done = []
        for rank in range(1, most + 1):
            there = writer.segment(Piece(f"piece.{piece}.there.{rank}", unit, self.cpu.tier))
            done.append(writer.compute(host, "expert", work, [there], cache=_cache(piece, "computed"), rank=rank))
        for stage, read, rank, computed in reads:
            if computed:
                writer.wait(host, read)
                name = _cache(piece, "read_and_computed")
                done.append(writer.compute(host, "expert", work, [stage], cache=name, rank=rank))
        return done

    def results_of(self, piece: int) -> None:
        """The rows that the CPU made, where it made any, before what reads them."""
        case, writer, layer = self.case, self.writer, self.case.computes(piece)
        assert layer is not None
        nbytes = 4 * case.tokens * layer.choices * layer.out
        writer.wait(self.gpu.name, *self.computing.pop(piece))
        slot = writer.slot(self.gpu.name, self.gpu.tier, nbytes, "rows")
        source = Piece(f"piece.{piece}.rows", nbytes, self.cpu.tier, self.case.link)
        writer.wait(self.gpu.name, writer.fetch(self.gpu.name, source, slot, _cache(piece, "rows"), 1))
        writer.evict(self.gpu.name, slot)

    def _end_later(self, piece: int) -> None:
        """What was brought for later in the step before is there."""
        coming = self.coming.pop(piece, [])
        self.writer.wait(self.gpu.name, *(token for _, token in coming))
        self.writer.evict(self.gpu.name, *(slot for slot, _ in coming))

    def finish(self) -> None:
        """The plan ends."""
        for piece in sorted(self.coming):
            self._end_later(piece)

    def _message(self, source: str, goal: str, from_tier: str, to_tier: str, nbytes: int) -> None:
        """A small one that the other side waits for."""
        writer, tag, link = self.writer, f"tiles.{self.messages}", self.case.link
        self.messages += 1
        away, back = writer.slot(source, from_tier, nbytes, "tiles"), writer.slot(goal, to_tier, nbytes, "tiles")
        writer.compute(source, "tiles", Work(), [], [away])
        sent = writer.send(source, goal, link, nbytes, tag, away)
        writer.wait(goal, writer.receive(goal, source, link, nbytes, tag, back))
        writer.wait(source, sent)
        writer.evict(source, away)
        writer.evict(goal, back)
