"""Writing tile IR with ordinary arithmetic: `Expr` for numbers and vectors, `Buffer` for memory, `KernelBuilder`.

    k = KernelBuilder("scale")
    x, y, n = k.buffer("x", F32), k.buffer("y", F32), k.size("tokens")
    with k.loop(0, n, 16) as loop:
        y.store(loop.i, x.load(loop.i, 16) * 2.0)
    func = k.finish()

Index arithmetic on Python integers is folded as it is written; everything else becomes one op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.formats import BF16, F32, I32, PlainFormat
from ir.ops import tile, tile_control, tile_convert, tile_lanes, tile_memory, tile_packed, tile_products
from ir.ops.builtin import FuncOp, ReturnOp
from ir.ops.tile_types import element_of, is_float, lanes_of
from ir.types import INDEX, BufferType, IndexType, ScalarType, Type, VectorType

Number = int | float


class Expr:
    """A scalar or vector of a kernel, or an index known while the kernel is written (`constant`)."""

    __slots__ = ("_value", "constant", "kernel")

    def __init__(self, kernel: KernelBuilder, value: Value | None = None, constant: int | None = None) -> None:
        self.kernel = kernel
        self._value = value
        self.constant = constant

    @property
    def value(self) -> Value:
        """The IR value; a known index is written as a constant here."""
        if self._value is not None:
            return self._value
        assert self.constant is not None
        return self.kernel.emit(tile.ConstantOp(value=self.constant, result_types=[INDEX]))

    @property
    def type(self) -> Type:
        return INDEX if self._value is None else self._value.type

    @property
    def lanes(self) -> int:
        return lanes_of(self.type)

    def _other(self, other: Expr | Number) -> Expr:
        """`other` as an Expr of this type: numbers become constants, scalars are spread over the lanes."""
        if isinstance(other, Expr):
            if isinstance(self.type, VectorType) and not isinstance(other.type, VectorType):
                return self.kernel.splat(other, self.type.lanes)
            return other
        if isinstance(self.type, IndexType):
            assert isinstance(other, int), f"index arithmetic with {other!r}"
            return Expr(self.kernel, constant=other)
        return self.kernel.constant(self.type, other)

    def _binary(self, op: type[tile.BinaryOp], other: Expr | Number) -> Expr:
        other = self._other(other)
        if self.constant is not None and other.constant is not None:
            return Expr(self.kernel, constant=int(op.reference(self.constant, other.constant)))
        if isinstance(other.type, VectorType) and not isinstance(self.type, VectorType):
            return other.kernel.splat(self, other.type.lanes)._binary(op, other)
        if op is tile.AddOp and other.constant == 0:
            return self
        if op is tile.AddOp and self.constant == 0:
            return other
        if op in (tile.MulOp, tile.DivOp) and other.constant == 1:
            return self
        return Expr(self.kernel, self.kernel.emit(op(self.value, other.value)))

    def __add__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.AddOp, other)

    def __radd__(self, other: Number) -> Expr:
        return self._binary(tile.AddOp, other)

    def __sub__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.SubOp, other)

    def __rsub__(self, other: Number) -> Expr:
        return self._other(other)._binary(tile.SubOp, self)

    def __mul__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.MulOp, other)

    def __rmul__(self, other: Number) -> Expr:
        return self._binary(tile.MulOp, other)

    def __truediv__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.DivOp, other)

    def __rtruediv__(self, other: Number) -> Expr:
        return self._other(other)._binary(tile.DivOp, self)

    def __floordiv__(self, other: Expr | Number) -> Expr:
        """Integer division; operands are never negative here, so rounding down and towards zero agree."""
        return self._binary(tile.DivOp, other)

    def __mod__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.RemOp, other)

    def __and__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.AndOp, other)

    def __or__(self, other: Expr | Number) -> Expr:
        return self._binary(tile.OrOp, other)

    def shifted_left(self, bits: int) -> Expr:
        return self._binary(tile.ShlOp, bits)

    def shifted_right(self, bits: int) -> Expr:
        """The sign is kept."""
        return self._binary(tile.ShrOp, bits)

    def min(self, other: Expr | Number) -> Expr:
        return self._binary(tile.MinOp, other)

    def max(self, other: Expr | Number) -> Expr:
        return self._binary(tile.MaxOp, other)

    def compare(self, predicate: str, other: Expr | Number) -> Expr:
        """i1 per lane: `predicate` is lt, le, eq, ne, gt or ge."""
        other = self._other(other)
        return Expr(self.kernel, self.kernel.emit(tile_lanes.CompareOp(self.value, other.value, predicate=predicate)))

    def cast(self, to: PlainFormat) -> Expr:
        if element_of(self.type) == to:
            return self
        return Expr(self.kernel, self.kernel.emit(tile_convert.CastOp(self.value, to=to)))

    def bitcast(self, to: Type) -> Expr:
        return Expr(self.kernel, self.kernel.emit(tile_convert.BitcastOp(self.value, to=to)))

    def reduce(self, kind: str) -> Expr:
        """All lanes combined: "add" or "max"."""
        return Expr(self.kernel, self.kernel.emit(tile_lanes.ReduceOp(self.value, kind=kind)))

    def extract(self, lane: int) -> Expr:
        return Expr(self.kernel, self.kernel.emit(tile_lanes.ExtractOp(self.value, lane=lane)))

    def to_index(self) -> Expr:
        return Expr(self.kernel, self.kernel.emit(tile_convert.ToIndexOp(self.value)))

    def from_index(self) -> Expr:
        return Expr(self.kernel, self.kernel.emit(tile_convert.FromIndexOp(self.value)))


class Buffer:
    """A buffer of a kernel."""

    __slots__ = ("kernel", "value")

    def __init__(self, kernel: KernelBuilder, value: Value) -> None:
        self.kernel = kernel
        self.value = value

    @property
    def element(self) -> PlainFormat:
        assert isinstance(self.value.type, BufferType) and isinstance(self.value.type.element, PlainFormat)
        return self.value.type.element

    def load(self, index: Expr | int, lanes: int = 1, mask: Expr | None = None) -> Expr:
        """`lanes` elements from `index` on; lanes where the mask does not hold are zero."""
        at = self.kernel.index(index).value
        if mask is not None:
            return Expr(self.kernel, self.kernel.emit(tile_memory.LoadMaskedOp(self.value, at, mask.value)))
        return Expr(self.kernel, self.kernel.emit(tile_memory.LoadOp(self.value, at, lanes=lanes)))

    def gather(self, index: Expr) -> Expr:
        """The elements at the lanes of an i32 vector."""
        return Expr(self.kernel, self.kernel.emit(tile_memory.GatherOp(self.value, index.value)))

    def store(self, index: Expr | int, value: Expr, mask: Expr | None = None) -> None:
        at = self.kernel.index(index).value
        if mask is not None:
            self.kernel.emit_op(tile_memory.StoreMaskedOp(self.value, at, value.value, mask.value))
        else:
            self.kernel.emit_op(tile_memory.StoreOp(self.value, at, value.value))

    def prefetch(self, index: Expr | int, level: int = 1) -> None:
        self.kernel.emit_op(tile_memory.PrefetchOp(self.value, self.kernel.index(index).value, level=level))

    def at(self, index: Expr | int) -> Buffer:
        """The buffer from element `index` on."""
        at = self.kernel.index(index)
        if at.constant == 0:
            return self
        return Buffer(self.kernel, self.kernel.emit(tile_memory.OffsetOp(self.value, at.value)))

    def view(self, element: PlainFormat) -> Buffer:
        if self.element == element:
            return self
        return Buffer(self.kernel, self.kernel.emit(tile_memory.ViewOp(self.value, element=element)))


@dataclass
class Loop:
    """An open loop: counter `i`, `carried` values, and after the `with` block the `results`."""

    i: Expr
    carried: list[Expr]
    yielded: list[Expr] = field(default_factory=list)
    results: list[Expr] = field(default_factory=list)

    def carry(self, *values: Expr) -> None:
        """The carried values of the next iteration."""
        self.yielded = list(values)


class KernelBuilder:
    """Builds one kernel function. Scratch buffers are placed at its top whenever they are asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.block = Block()
        self.top = self.builder = Builder.at_end(self.block)
        self.scratch_count = 0

    # -- parameters and scratch

    def buffer(self, name: str, element: PlainFormat) -> Buffer:
        """A new buffer parameter."""
        return Buffer(self, self.block._append_argument(BufferType(element), name))

    def size(self, name: str) -> Expr:
        """A new index parameter."""
        return Expr(self, self.block._append_argument(INDEX, name))

    def scratch(self, size: int, element: PlainFormat) -> Buffer:
        """Private memory of this thread: a fixed number of elements."""
        op = tile_memory.ScratchOp(size=size, element=element)
        self.place_on_top(op)
        return Buffer(self, op.out)

    def place_on_top(self, op: Op) -> None:
        """Inserts an op at the top of the kernel, wherever ops are added now, behind those that are there already."""
        self.block._insert(self.scratch_count, op)
        self.scratch_count += 1
        self.top.point.index += 1

    def finish(self) -> FuncOp:
        """The kernel; nothing can be added any more."""
        self.emit_op(ReturnOp())
        return FuncOp(sym_name=self.name, regions=[Region(self.block)])

    # -- single ops

    def emit(self, op: Op) -> Value:
        self.builder.insert(op)
        return op.results[0]

    def emit_op(self, op: Op) -> None:
        self.builder.insert(op)

    def index(self, value: Expr | int) -> Expr:
        return value if isinstance(value, Expr) else Expr(self, constant=value)

    def constant(self, type: Type, value: Number | tuple[float, ...]) -> Expr:
        """A number of that type; a tuple gives each lane its own."""
        if not isinstance(value, tuple):
            value = float(value) if is_float(type) else int(value)
        return Expr(self, self.emit(tile.ConstantOp(value=value, result_types=[type])))

    def f32(self, value: float, lanes: int = 1) -> Expr:
        """An f32 constant, in every lane of a vector when lanes > 1."""
        return self.constant(VectorType(lanes, F32) if lanes > 1 else ScalarType(F32), value)

    def splat(self, x: Expr, lanes: int) -> Expr:
        if lanes == 1:
            return x
        return Expr(self, self.emit(tile_lanes.SplatOp(x.value, lanes=lanes)))

    def fma(self, a: Expr, b: Expr | Number, c: Expr | Number) -> Expr:
        """a * b + c."""
        b, c = a._other(b), a._other(c)
        return Expr(self, self.emit(tile_products.FmaOp(a.value, b.value, c.value)))

    def dot2(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return Expr(self, self.emit(tile_products.Dot2Op(acc.value, a.value, b.value)))

    def dot4(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        return Expr(self, self.emit(tile_packed.Dot4Op(acc.value, a.value, b.value)))

    def lookup(self, table: Expr, index: Expr) -> Expr:
        return Expr(self, self.emit(tile_packed.LookupOp(table.value, index.value)))

    def sqrt(self, x: Expr) -> Expr:
        return Expr(self, self.emit(tile.SqrtOp(x.value)))

    def round(self, x: Expr) -> Expr:
        return Expr(self, self.emit(tile.RoundOp(x.value)))

    def select(self, condition: Expr, a: Expr, b: Expr | Number) -> Expr:
        return Expr(self, self.emit(tile_lanes.SelectOp(condition.value, a.value, a._other(b).value)))

    def iota(self, lanes: int) -> Expr:
        """0, 1, 2, ... as i32 lanes."""
        return Expr(self, self.emit(tile_lanes.IotaOp(lanes=lanes)))

    def lanes_below(self, limit: Expr | int, lanes: int) -> Expr:
        """Mask of the lanes whose number is below `limit`."""
        bound = self.splat(self.index(limit).from_index(), lanes)
        return self.iota(lanes).compare("lt", bound)

    def thread_id(self) -> Expr:
        return Expr(self, self.emit(tile_control.ThreadIdOp()))

    def num_threads(self) -> Expr:
        return Expr(self, self.emit(tile_control.NumThreadsOp()))

    def ticket(self) -> Expr:
        return Expr(self, self.emit(tile_control.TicketOp()))

    def barrier(self) -> None:
        self.emit_op(tile_control.BarrierOp())

    # -- control flow

    @contextmanager
    def loop(
        self, lower: Expr | int, upper: Expr | int, step: Expr | int = 1, carried: Sequence[Expr] = ()
    ) -> Iterator[Loop]:
        """`for i in range(lower, upper, step)`; see `Loop` for carried values."""
        bounds = [self.index(b).value for b in (lower, upper, step)]
        initial = [c.value for c in carried]
        body = Block([INDEX, *(v.type for v in initial)])
        outer, self.builder = self.builder, Builder.at_end(body)
        arguments = [Expr(self, a) for a in body.arguments]
        loop = Loop(arguments[0], arguments[1:])
        yield loop
        self.builder.insert(tile_control.YieldOp(*(e.value for e in loop.yielded)))
        self.builder = outer
        op = tile_control.ForOp(*bounds, *initial, regions=[Region(body)])
        self.builder.insert(op)
        loop.results = [Expr(self, r) for r in op.results]

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Runs the body only when the condition holds."""
        then, otherwise = Block(), Block()
        outer, self.builder = self.builder, Builder.at_end(then)
        yield
        self.builder.insert(tile_control.YieldOp())
        Builder.at_end(otherwise).insert(tile_control.YieldOp())
        self.builder = outer
        self.builder.insert(tile_control.IfOp(condition.value, regions=[Region(then), Region(otherwise)]))

    def thread_share(self, count: Expr | int, unit: int = 1) -> tuple[Expr, Expr]:
        """This thread's contiguous part [first, last) of `count` items; borders fall on multiples of `unit`."""
        count = self.index(count)
        blocks = (count + (unit - 1)) // unit
        thread, threads = self.thread_id(), self.num_threads()
        first = thread * blocks // threads * unit
        last = ((thread + 1) * blocks // threads * unit).min(count)
        return first, last


def bf16_pair(x: Expr, lanes: int) -> Expr:
    """A pair of bf16, loaded as one i32, in every lane pair of a bf16 vector of 2 * lanes lanes."""
    assert x.type == ScalarType(I32)
    return x.kernel.splat(x, lanes).bitcast(VectorType(2 * lanes, BF16))
