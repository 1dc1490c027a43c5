"""From the joint projection to queries and cache, on GPUs: a region of kind "rope_append" as one kernel.

    qkv [tokens, (heads + 2 kv heads) d] -> cut, [norm], [clip], rope of q and k, k and v into the planes of the cache

A warp has one head of one token. A lane holds neighbouring columns of the head's first half and the same ones of its
second half, which is what rope turns, what a rotation by Hadamard's matrix mixes with other lanes, and what becomes
codes with a scale that is the largest number of the warp. Queries leave as attention wants them: rounded to 16 bits,
rotated as the keys are, padded to 16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.math import clip
from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.hadamard import rotate_head
from codegen.nvptx.kernels.kv_codes import HeadCodes
from codegen.nvptx.kv_planes import KvPlanes
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32

WARPS = 4  # heads that a block takes


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm of queries and keys: over each head (gain [d]) or over all heads of a row (gain [heads d])."""

    eps: float
    over_rows: bool


@dataclass(frozen=True)
class Projection:
    """What is joined, and what happens to it. `clip`: limits of all, after a norm of rows and before one of heads."""

    heads: int
    kv: KvPlanes
    norm: HeadNorm | None = None
    clip: tuple[float, float] | None = None

    @property
    def columns(self) -> int:
        """Of a token."""
        return (self.heads + 2 * self.kv.heads) * self.kv.width

    def blocks(self, tokens: int) -> int:
        """Blocks of the launch."""
        return -(-tokens * (self.heads + 2 * self.kv.heads) // WARPS)


def rope_append_kernel(form: Projection, name: str) -> GridKernel:
    """A kernel (qkv f32 [tokens, columns], cos and sin f32 [tokens, d / 2], positions and slots i32 [tokens], [gains of
    q and of k f32,] q [tokens, heads, stored d], the planes of the cache, tokens, ctx), launched with
    `form.blocks(tokens)` blocks. q is in bf16, or f16 where the cache is. Writes q and the planes."""
    width, half = form.kv.width, form.kv.width // 2
    lanes = next((n for n in (1, 2, 4, 8) if half % n == 0 and half // n <= WARP), 0)
    if width % 4 or not lanes:
        raise DiagnosticError(f"heads of {width} are not rotated on GPUs", expected="a multiple of 4 up to 128")
    k = GridBuilder(name, WARPS * WARP)
    buffers = {n: k.buffer(n, F32) for n in ("qkv", "cos", "sin")}
    buffers |= {n: k.buffer(n, I32) for n in ("positions", "slots")}
    if form.norm is not None:
        buffers |= {n: k.buffer(n, F32) for n in ("q_gain", "k_gain")}
    q = k.buffer("q", form.kv.element)
    planes = [k.buffer(p.name, p.element) for p in form.kv.planes]
    tokens, ctx = k.size("tokens"), k.size("ctx")
    lane, warp = k.lane_and_warp()
    each = form.heads + 2 * form.kv.heads
    unit = k.block_id() * WARPS + warp
    with k.when(unit.compare("lt", tokens * each)):
        _Head(k, form, buffers, lanes, lane, unit // each, unit % each).write(q, planes, ctx)
    return k.grid_kernel()


class _Head:
    """One warp's head: `first` and `second` are a lane's columns of its halves, in f32."""

    def __init__(
        self, k: GridBuilder, form: Projection, buffers: dict[str, Buffer], lanes: int, lane: Expr, token: Expr,
        head: Expr,
    ) -> None:  # fmt: skip
        self.k, self.form, self.buffers, self.lanes, self.lane, self.token = k, form, buffers, lanes, lane, token
        self.half = form.kv.width // 2
        self.here = (lane * lanes).compare("lt", self.half)  # lanes of a narrow head have nothing
        self.column = (lane * lanes).min(self.half - lanes)
        self.head = head
        self.is_query = head.compare("lt", form.heads)
        self.is_value = head.compare("ge", form.heads + form.kv.heads)

    def write(self, q: Buffer, planes: list[Buffer], ctx: Expr) -> None:
        """Queries to `q`, keys and values to the planes."""
        k, kv, heads = self.k, self.form.kv, self.form.heads
        values = self._turned()
        if kv.rotate:
            values = rotate_head(k, values, self.lane, self.half, kv.rotate)
        position = self.buffers["positions"].load(self.token).to_index()
        slot = self.buffers["slots"].load(self.token).to_index()
        with k.when(self.is_query):
            self._store_row(q, (self.token * heads + self.head) * kv.stored, values)
        kv_head = (self.head - heads).max(0) % kv.heads
        line = slot * kv.heads + kv_head
        packed = HeadCodes.of(k, kv.bits, values, self.lane) if kv.bits else None
        for plane, chosen in enumerate((self._is_key(), self.is_value)):
            with k.when(chosen):
                place = line * ctx + position
                if packed is None:
                    self._store_row(planes[plane], place * kv.stored, values)
                else:
                    packed.store(planes[plane], planes[2 + plane], place, self.column, self.half, kv.stored, self.here)
                if kv.recent:
                    ring = line * kv.ring + position % kv.ring
                    self._store_row(planes[4 + plane], ring * kv.stored, values)

    def _is_key(self) -> Expr:
        return self.head.compare("ge", self.form.heads) & self.head.compare("lt", self.form.heads + self.form.kv.heads)

    def _store_row(self, target: Buffer, start: Expr, values: tuple[Expr, Expr]) -> None:
        """The head's columns, and zeros in those that it is padded by."""
        k, kv = self.k, self.form.kv
        with k.when(self.here):
            for part, value in enumerate(values):
                target.store(start + self.column + part * self.half, value.cast(target.element))
        padding = kv.stored - kv.width
        if padding:
            with k.when(self.lane.compare("lt", padding)):
                target.store(start + self.lane + kv.width, k.f32(0.0).cast(target.element))

    def _turned(self) -> tuple[Expr, Expr]:
        """The columns behind norm, clip and rope; values are clipped only."""
        k, form = self.k, self.form
        source = self.token * form.columns + self.head * form.kv.width + self.column
        plain = self._load(source)
        limited = self._clip(plain)
        first, second = self._normed(plain, limited)
        angle = self.token * self.half + self.column
        cos, sin = (self.buffers[n].load(angle, self.lanes) for n in ("cos", "sin"))
        turned = (first * cos - second * sin, second * cos + first * sin)
        chosen = tuple(k.select(self.is_value, a, b) for a, b in zip(limited, turned, strict=True))
        return chosen[0], chosen[1]

    def _load(self, start: Expr) -> tuple[Expr, Expr]:
        """Zeros for lanes that have nothing."""
        first, second = (self.buffers["qkv"].load(start + part, self.lanes) for part in (0, self.half))
        nothing = self.k.f32(0.0, self.lanes)
        return self.k.select(self.here, first, nothing), self.k.select(self.here, second, nothing)

    def _clip(self, values: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        limits = self.form.clip
        if limits is None:
            return values
        return clip(self.k, values[0], *limits), clip(self.k, values[1], *limits)

    def _normed(self, plain: tuple[Expr, Expr], limited: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        norm = self.form.norm
        if norm is None:
            return limited
        k, kv, heads = self.k, self.form.kv, self.form.heads
        if norm.over_rows:
            squares, share = self._squares_of_row()
        else:
            squares, share = _sum_of_squares(limited), k.f32(1.0 / kv.width)
        scale = 1.0 / k.sqrt(k.warp_reduce(squares, Expr.__add__) * share + norm.eps)
        places = [self.column, self.column]  # in the gains of queries and of keys
        if norm.over_rows:
            own = self.head.min(heads - 1), (self.head - heads).max(0).min(kv.heads - 1)
            places = [self.column + number * kv.width for number in own]
        made = []
        for part, x in enumerate(plain if norm.over_rows else limited):
            gains = [
                self.buffers[name].load(place + part * self.half, self.lanes)
                for name, place in zip(("q_gain", "k_gain"), places, strict=True)
            ]
            made.append(x * scale * k.select(self.is_query, *gains))
        both = made[0], made[1]
        return self._clip(both) if norm.over_rows else both

    def _squares_of_row(self) -> tuple[Expr, Expr]:
        """(this lane's part of the sum of squares over all queries, or all keys, of the token; 1 / their columns)"""
        k, form = self.k, self.form
        counts = [n * form.kv.width for n in (form.heads, form.kv.heads)]
        start = self.token * form.columns + k.select(self.is_query, k.index_value(0), k.index_value(counts[0]))
        count = k.select(self.is_query, k.index_value(counts[0]), k.index_value(counts[1]))
        with k.loop(self.lane * 4, count, WARP * 4, [k.f32(0.0, 4)]) as loop:
            x = self.buffers["qkv"].load(start + loop.i, 4)
            loop.carry(k.fma(x, x, loop.carried[0]))
        inverse = k.select(self.is_query, k.f32(1.0 / counts[0]), k.f32(1.0 / counts[1]))
        return loop.results[0].reduce("add"), inverse


def _sum_of_squares(parts: tuple[Expr, Expr]) -> Expr:
    """Over this lane's columns."""
    total = parts[0] * parts[0] + parts[1] * parts[1]
    return total.reduce("add") if total.lanes > 1 else total
