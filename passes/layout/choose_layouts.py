"""choose-layouts: where the elements of every GEMM weight lie in memory.

    %y = gemm.matmul %x, %w   -->   %p = tensor.layout %w {layout = strips<rows=64, pack=2>}      (constant expression)
                                    %y = gemm.matmul %x, %p

Weights lie in strips of `rows` rows, inside of which `pack` neighbours of a row come together: a dot instruction that
adds pairs wants two bf16 at once. Rows follow from the width of a vector register, so that one strip is the register
tile of a kernel: four registers of f32 sums for 16-bit weights, two for f32 (64 and 32 rows at 512 bits), and for
low-bit weights two again, since each sum there takes a second register; their pack is what the activations ask for (4
bytes, 2 bf16, 1 f32) and their padding is cheap, so they take whole strips where they have as many rows. A matrix with
fewer rows than a strip, or one that would grow by more than `max_padding`, gets strips of 16 rows, the fewest
that a kernel sums. The gate | up pair in front of a swiglu is interleaved, half a strip of each (but no fewer than 16
rows), so that one tile holds both halves of a pair.

With `grid` the strips are those of GPUs: 16 rows and 64 columns in the order of a warp's lanes, or 8 rows of gate and 8
of up where a swiglu follows the product. f32 weights, and bf16 ones of columns that are no multiple of 8, stay
row-major.

Options left at 0 follow `vector_bits`; that option left at 0 follows `PassContext.options["vector_bits"]`, else 512.
Takes bare products and those in fused regions, dense and grouped; refuses weights computed from step inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op, Value
from ir.formats import BF16, F16, F32, NumberFormat, PlainFormat
from ir.ops.fused import FusedOp
from ir.ops.tensor import SwigluOp
from ir.ops.tensor_layout import LayoutOp
from ir.rewriter import PatternRewriter
from ir.types import Layout, TensorType
from passes.analysis.constants import is_constant_expression
from passes.analysis.value_types import tensor_type
from passes.fuse.forms import PRODUCTS, describe_gemm
from passes.pass_base import FunctionPass, PassContext, register_pass

MIN_ROWS = 16  # rows of the smallest strip: the matrix kernels sum 16 outputs at a time
GRID_ROWS, GRID_COLUMNS, GRID_LANES = 16, 64, 32  # of a tile of the matrix unit, a chunk of it, and a warp
GRID_STEP = 8  # columns that a lane reads at once


def _columns(type: TensorType) -> int:
    k = type.shape[-1]
    assert isinstance(k, int), f"{type} has no fixed columns"
    return k


@register_pass
@dataclass(frozen=True)
class ChooseLayoutsPass(FunctionPass):
    """Strips for every GEMM weight, by format and shape."""

    name: ClassVar[str] = "choose-layouts"
    vector_bits: int = 0
    bf16_rows: int = 0
    bf16_pack: int = 2
    f16_rows: int = 0
    f16_pack: int = 1
    f32_rows: int = 0
    f32_pack: int = 1
    low_bit_rows: int = 0
    small_rows: int = 0
    max_padding: float = 0.1
    grid: bool = False

    def __post_init__(self) -> None:
        rows = (self.bf16_rows, self.f16_rows, self.f32_rows, self.low_bit_rows, self.small_rows)
        if any(n < 0 or n % MIN_ROWS for n in rows):
            raise ValueError(f"expected rows in multiples of {MIN_ROWS}, got {', '.join(map(str, rows))}")
        if self.vector_bits < 0 or self.vector_bits % 128:
            raise ValueError(f"expected vector-bits in multiples of 128, got {self.vector_bits}")
        if min(self.bf16_pack, self.f16_pack, self.f32_pack) < 1 or self.max_padding < 0:
            raise ValueError("expected packs >= 1 and max-padding >= 0")

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        rewriter.pattern = self.name
        lanes = (self.vector_bits or int(ctx.options.get("vector_bits", 512))) // 32  # f32 sums in a register
        laid_out: dict[tuple[Value, Layout], Value] = {}
        for region in func.regions:
            for block in region.blocks:
                for op in list(block.ops):
                    if isinstance(op, PRODUCTS) or (isinstance(op, FusedOp) and op.kind == "gemm"):
                        self._lay_out(op, lanes, laid_out, rewriter)

    def _lay_out(
        self, op: Op, lanes: int, laid_out: dict[tuple[Value, Layout], Value], rewriter: PatternRewriter
    ) -> None:
        form = describe_gemm(op)
        index = form.weight
        weight = op.operands[index]
        type = tensor_type(weight)
        if type.layout is not None:
            return
        if not is_constant_expression(weight):
            rewriter.no_match(op, "the weight is computed from step inputs")
            return
        if self.grid and isinstance(type.element, PlainFormat) and (type.element != BF16 or _columns(type) % GRID_STEP):
            return  # row-major
        pairs = form.has_swiglu or any(isinstance(user, SwigluOp) for user in op.results[0].users)
        if self.grid:
            pairs = bool(form.epilogue) and isinstance(form.epilogue[0], SwigluOp)
        layout = self.layout_of(type, tensor_type(form.product.x).element, lanes, interleave=2 if pairs else 1)
        if layout is None:
            rewriter.no_match(op, f"there is no layout for weights of {type.element} and this activation")
            return
        key = (weight, layout)
        if key not in laid_out or laid_out[key].owner.parent is not op.parent:
            maker = weight.defining_op()
            made = LayoutOp(weight, layout=layout, location=maker.location if maker is not None else None)
            laid_out[key] = rewriter.insert_before(op, made).results[0]
        rewriter.set_operand(op, index, laid_out[key])
        if isinstance(op, FusedOp):
            rewriter.set_type(op.region.block.arguments[index], laid_out[key].type)

    def layout_of(self, type: TensorType, activation: NumberFormat, lanes: int, interleave: int = 1) -> Layout | None:
        """The layout of a weight [.., n, k] of `type` on registers of `lanes` f32; None for other formats."""
        n = type.shape[-2]
        if self.grid:
            pairs = interleave == 2 and isinstance(n, int) and n % GRID_ROWS == 0
            return Layout(GRID_ROWS // 2 if pairs else GRID_ROWS, GRID_COLUMNS, 2 if pairs else 1, GRID_LANES)
        chosen = self._strip(type.element, activation, lanes)
        if chosen is None or not isinstance(n, int):
            return None
        rows, pack = chosen
        smallest = self.small_rows or MIN_ROWS
        pairs = interleave if n % interleave == 0 else 1
        if not isinstance(type.element, PlainFormat):
            # No half strips for pairs: a group of 32 rows keeps a thread in one stream of memory.
            return Layout(rows if n >= rows * pairs else smallest, pack, pairs)
        layout = Layout(max(rows // pairs, MIN_ROWS), pack, pairs)
        fits = n >= layout.rows * pairs and layout.padded(n, 1)[0] <= n * (1 + self.max_padding)
        return layout if fits else Layout(smallest, pack, pairs)

    def _strip(self, element: NumberFormat, activation: NumberFormat, lanes: int) -> tuple[int, int] | None:
        """(rows, pack) of a whole strip."""
        if not isinstance(element, PlainFormat):
            pack = {BF16: 2, F32: 1}.get(activation) if isinstance(activation, PlainFormat) else 4
            return None if pack is None else (self.low_bit_rows or 2 * lanes, pack)
        if element == BF16:
            return self.bf16_rows or 4 * lanes, self.bf16_pack
        if element == F16:
            return self.f16_rows or 4 * lanes, self.f16_pack
        if element == F32:
            return self.f32_rows or 2 * lanes, self.f32_pack
        return None
