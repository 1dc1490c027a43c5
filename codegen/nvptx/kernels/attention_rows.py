"""What the attention kernels for GPUs share: tiles of keys and values in shared memory, softmax kept tile by tile.

Keys and values of a layer lie as bf16 or f16 [slots, kv heads, ctx, d]. Tiles of them are copied into shared memory one
ahead of the computation; the 16-byte pieces of a position are stored at their number xor bits of the position, so that
eight positions lie in different banks. Heads of more than 128 columns have smaller tiles, and their queries wait in
shared memory: registers hold what they have summed up. A head whose width is an odd multiple of 8 lies, in caches and
queries, with 8 columns of zeros behind it: `AttentionShape.stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from codegen.nvptx.builder import GridBuilder
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, PlainFormat
from ir.types import ScalarType

PIECE = 8  # elements of 16 bytes
STAGES = 2
# The score of a position that a row does not see. It is finite, so that two of them differ by 0, and a power of two, so
# that its product with a factor is exact and a fused multiply-add finds that 0 too.
NEVER = -(2.0**100)
LOG2_E = 1.4426950408889634
MOST_WIDTH = 256  # whose sums the registers of a warp hold for 16 rows
NARROW = 128  # with their queries


@dataclass(frozen=True)
class AttentionShape:
    """Query heads, the kv heads that they share, the width of a head, positions a row sees (0: all before it), and the
    element of queries and caches."""

    heads: int
    kv_heads: int
    width: int
    window: int = 0
    element: PlainFormat = BF16

    def check(self) -> None:
        """Raises DiagnosticError for what has no kernel."""
        message = ""
        if self.width % PIECE or not 0 < self.width <= MOST_WIDTH:
            message = f"heads of {self.width} have no attention on GPUs; expected a multiple of 8 up to {MOST_WIDTH}"
        elif self.element not in (BF16, F16):
            message = f"a cache of {self.element} has no attention on GPUs; expected bf16, f16 or integers"
        elif self.heads % self.kv_heads:
            message = f"{self.heads} query heads do not share {self.kv_heads} kv heads evenly"
        if message:
            raise DiagnosticError(message)

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def wide(self) -> bool:
        """Whether registers have no room for queries."""
        return self.stored > NARROW

    @property
    def stored(self) -> int:
        """The width of a head in memory: the matrix unit takes 16 columns at a time."""
        return -(-self.width // 16) * 16


class KvTiles:
    """Tiles of `rows` positions of one slot and kv head, which begin at element `base`; positions end below `end`."""

    stages = STAGES

    def __init__(
        self, k: GridBuilder, sources: tuple[Buffer, Buffer], rows: int, width: int, base: Expr, end: Expr
    ) -> None:
        self.k, self.sources, self.rows, self.width, self.base, self.end = k, sources, rows, width, base, end
        self.memories = [k.shared(STAGES * rows * width, source.element) for source in sources]
        self.lane, _ = k.lane_and_warp()
        self.thread = k.thread_id()

    def arrive(self, tile: Expr) -> None:
        """Until a tile that has been fetched is there for all, and all have read the one before it."""
        self.k.async_wait(0)
        self.k.barrier()

    def fetch(self, tile: Expr) -> None:
        """Starts the copies of a tile into its stage; positions from `end` on become zeros."""
        self.copy(tile, lambda position: position)

    def copy(self, tile: Expr, place: Callable[[Expr], Expr]) -> None:
        """Starts the copies of a tile; a position lies at `place` of it."""
        k, pieces = self.k, self.width // PIECE
        for first in range(0, self.rows * pieces, k.threads):
            number = self.thread + first
            row, piece = number // pieces, number % pieces
            position = tile * self.rows + row
            source = self.base + place(position.min(self.end - 1).max(0)) * self.width + piece * PIECE
            at = self._place(tile, row, piece)
            count = min(k.threads, self.rows * pieces - first)
            with k.when(self.thread.compare("lt", count)) if count < k.threads else nullcontext():
                for memory, whole in zip(self.memories, self.sources, strict=True):
                    k.async_copy(memory, at, whole, source, position.compare("lt", self.end))
        k.async_commit()

    def _place(self, tile: Expr, row: Expr, piece: Expr) -> Expr:
        stage = tile % self.stages if self.stages > 1 else self.k.index(0)
        return (stage * self.rows + row) * self.width + swizzled(self.k, piece, row, self.width) * PIECE

    def keys(self, tile: Expr, first: Expr | int, step: int) -> tuple[Expr, Expr]:
        """Columns 16 * step .. of positions first .. first + 7 and the 8 that follow, as right factors."""
        row = self.k.index(first) + (self.lane // 16 * 8 + self.lane % 8)
        both = self.k.load_matrix(self.memories[0], self._place(tile, row, self.lane // 8 % 2 + 2 * step))
        return self.k.part(both, 0, 4), self.k.part(both, 4, 4)

    def values(self, tile: Expr, first: Expr | int, step: int) -> tuple[Expr, Expr]:
        """Positions first .. first + 15 of columns 16 * step .. + 7 and the 8 that follow, as right factors."""
        row = self.k.index(first) + self.lane % 16
        place = self._place(tile, row, self.lane // 16 + 2 * step)
        both = self.k.load_matrix(self.memories[1], place, transposed=True)
        return self.k.part(both, 0, 4), self.k.part(both, 4, 4)

    def scaled(self, scores: list[Expr], tile: Expr, first: Expr | int) -> list[Expr]:
        """Products with the stored keys of positions from `first` on become scores."""
        return scores

    def weighted(self, weights: list[Expr], tile: Expr, first: Expr | int) -> list[Expr]:
        """Weights of positions from `first` on as left factors, one for 16 positions."""
        element = self.memories[1].element
        return [self.k.join(a, b).cast(element) for a, b in zip(weights[::2], weights[1::2], strict=True)]


@dataclass
class Rows:
    """16 rows of a warp, of which a lane has g and g + 8: largest score, sum of the lane's weights, weighted values.

    `outputs` has for every 8 columns of the head the 4 numbers of the lane.
    """

    k: GridBuilder
    largest: list[Expr]
    total: list[Expr]
    outputs: list[Expr]

    @classmethod
    def empty(cls, k: GridBuilder, width: int) -> Rows:
        return cls(k, [k.f32(NEVER)] * 2, [k.f32(0.0)] * 2, [k.f32(0.0, 4) for _ in range(width // 8)])

    def flat(self) -> list[Expr]:
        return [*self.largest, *self.total, *self.outputs]

    @classmethod
    def of(cls, k: GridBuilder, flat: list[Expr]) -> Rows:
        return cls(k, flat[:2], flat[2:4], flat[4:])

    def over_lanes(self, x: Expr, kind: str) -> Expr:
        """x of the 4 lanes that share a row, added or the largest."""
        for mask in (1, 2):
            other = self.k.shuffle(x, mask)
            x = x + other if kind == "add" else x.max(other)
        return x

    def by_rows(self, pair: list[Expr]) -> Expr:
        """A number of row g and one of row g + 8 at the places of a fragment."""
        return self.k.join(pair[0], pair[0], pair[1], pair[1])

    def add(self, scores: list[Expr], factor: float) -> tuple[Rows, list[Expr]]:
        """The rows when these scores (4 numbers of a lane for 8 positions each) have come, without their values, and
        the weights of the positions, like the scores. `factor` is scale times log2(e)."""
        k = self.k
        largest, shrink = [], []
        for half in range(2):
            best = self.largest[half]
            for s in scores:
                best = best.max(s.extract(2 * half)).max(s.extract(2 * half + 1))
            best = self.over_lanes(best, "max")
            largest.append(best)
            shrink.append(k.exp2((self.largest[half] - best) * factor))
        top = self.by_rows([x * -factor for x in largest])
        weights = [k.exp2(k.fma(s, factor, top)) for s in scores]
        total = []
        for half in range(2):
            added = self.total[half] * shrink[half]
            for w in weights:
                added = added + (w.extract(2 * half) + w.extract(2 * half + 1))
            total.append(added)
        less = self.by_rows(shrink)
        outputs = [o * less for o in self.outputs]
        return Rows(k, largest, total, outputs), weights

    def add_values(self, weights: list[Expr], tiles: KvTiles, tile: Expr, first: Expr | int) -> None:
        """Adds the values of positions from `first` on under their weights, 16 at a time."""
        for number, factor in enumerate(tiles.weighted(weights, tile, first)):
            for step in range(tiles.width // 16):
                for i, v in enumerate(tiles.values(tile, self.k.index(first) + 16 * number, step)):
                    at = 2 * step + i
                    self.outputs[at] = self.k.mma(self.outputs[at], factor, v)


def swizzled(k: GridBuilder, piece: Expr, row: Expr, width: int) -> Expr:
    """Pieces change places within groups of `turn`, by as many rows as begin at different banks anyway."""
    pieces = width // PIECE
    turn = min(PIECE, pieces & -pieces)
    return k.xor(piece, row // (PIECE // turn) % turn) if turn > 1 else piece


class HeldQueries:
    """`rows` rows of queries in shared memory, of which those from `own` on are this warp's: their left factors, one
    for every 16 columns, are loaded when they are asked for, behind a barrier. Row r begins at element `start(r)`."""

    def __init__(
        self, k: GridBuilder, q: Buffer, width: int, rows: int, own: Expr | int, start: Callable[[Expr], Expr]
    ) -> None:
        self.k, self.width, self.own = k, width, k.index(own)
        self.memory = k.shared(rows * width, q.element)
        pieces = width // PIECE
        with k.loop(k.thread_id(), rows * pieces, k.threads) as loop:
            row, piece = loop.i // pieces, loop.i % pieces
            self.memory.store(self._place(row, piece), q.load(start(row) + piece * PIECE, PIECE))

    def _place(self, row: Expr, piece: Expr) -> Expr:
        return row * self.width + swizzled(self.k, piece, row, self.width) * PIECE

    def __iter__(self) -> Iterator[Expr]:
        lane, _ = self.k.lane_and_warp()
        for step in range(self.width // 16):
            yield self.k.load_matrix(self.memory, self._place(self.own + lane % 16, lane // 16 + 2 * step))


def load_queries(k: GridBuilder, q: Buffer, starts: list[Expr], width: int) -> list[Expr]:
    """Left factors of 16 rows, whose rows g and g + 8 begin at these elements: one for every 16 columns."""
    lane, _ = k.lane_and_warp()
    made = []
    for step in range(width // 16):
        places = [(start, column) for column in (0, 8) for start in starts]
        made.append(k.join(*(q.load(start + (step * 16 + column) + lane % 4 * 2, 2) for start, column in places)))
    return made


def scores_of(
    k: GridBuilder, queries: Iterable[Expr], tiles: KvTiles, tile: Expr, first: Expr | int, count: int
) -> list[Expr]:
    """Products of the rows with `count` positions (a multiple of 16), 8 positions a fragment."""
    made = [k.f32(0.0, 4) for _ in range(count // 8)]
    for step, a in enumerate(queries):
        for pair in range(count // 16):
            for i, b in enumerate(tiles.keys(tile, k.index(first) + 16 * pair, step)):
                made[2 * pair + i] = k.mma(made[2 * pair + i], a, b)
    return tiles.scaled(made, tile, first)


@dataclass(frozen=True)
class Sight:
    """What rows g and g + 8 see: positions below `until`, from `since` on, of a window that ends at `positions`."""

    until: list[Expr]
    positions: list[Expr]
    since: list[Expr] | None = None


def masked(k: GridBuilder, scores: list[Expr], first: Expr, sight: Sight, shape: AttentionShape) -> list[Expr]:
    """Scores of positions from `first` on; NEVER where the rows do not see them."""
    lane, _ = k.lane_and_warp()
    made = []
    for number, s in enumerate(scores):
        numbers = []
        for i in range(4):
            at = first + (8 * number + i % 2) + lane % 4 * 2
            seen = at.compare("lt", sight.until[i // 2])
            if shape.window:
                seen = seen & (at + shape.window).compare("gt", sight.positions[i // 2])
            if sight.since is not None:
                seen = seen & at.compare("ge", sight.since[i // 2])
            numbers.append(k.select(seen, s.extract(i), k.constant(ScalarType(F32), NEVER)))
        made.append(k.join(*numbers))
    return made


def rotated_back(k: GridBuilder, outputs: list[Expr], block: int) -> list[Expr]:
    """Outputs of rows (4 numbers of a lane for every 8 columns) times Hadamard's matrix in blocks of columns."""
    lane, _ = k.lane_and_warp()
    made, distance = outputs, 1
    while distance < block:
        if distance == 1:
            numbers = [[o.extract(i) for i in range(4)] for o in made]
            made = [k.join(a + b, a - b, c + d, c - d) for a, b, c, d in numbers]
        elif distance < 8:
            made = [_with_lane(k, o, lane, distance // 2) for o in made]
        else:
            step = distance // 8
            made = [made[i ^ step] - o if i & step else o + made[i ^ step] for i, o in enumerate(made)]
        distance *= 2
    return [o * block**-0.5 for o in made]


def _with_lane(k: GridBuilder, x: Expr, lane: Expr, mask: int) -> Expr:
    """Sums and differences with the lane that is `mask` away."""
    upper = (lane // mask % 2).compare("eq", 1)
    pairs = [(x.extract(i), k.shuffle(x.extract(i), mask)) for i in range(4)]
    return k.join(*(k.select(upper, other - own, own + other) for own, other in pairs))
