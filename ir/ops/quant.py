"""quant.*: tensors whose elements are low-bit numbers, and what is done to floats before they become such.

An element type like q4_sym<group=32, scale=f16> says how an element is stored; what it stands for is a number, and a
product of low-bit tensors means the product of those numbers. In the interpreter such a tensor is a PackedArray.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ir.formats import F32, ROUNDINGS, U8, NumberFormat, PackedArray, PlainFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks
from ir.ops.low_bit import scale_parts, unpacked
from ir.sizes import num_elements
from ir.traits import Pure
from ir.types import TensorType, Type


@register_op
class QuantizeOp(Op):
    """x stored in a low-bit format, group by group along the last axis.

    Of a weight it is evaluated when the artifact is built; of an activation in every step. `rounding` is "nearest"
    (the smallest scales that clip nothing, nearest codes) or "mse" (the scales whose squared error is least).

    Example:
        %q = quant.quantize %x {format = q8_sym<group=32, scale=f32>}
            : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x q8_sym<group=32, scale=f32>>
    """

    name = "quant.quantize"
    traits = (Pure,)
    x = operand("[..., k], finite floats")
    format = attr(NumberFormat, "format of the result, not a plain one")
    rounding = attr(str, '"nearest" or "mse"', default="nearest")
    y = result("x in that format")

    @staticmethod
    def infer_types(x: Type, *, format: NumberFormat, rounding: str) -> TensorType:
        found = checks.float_tensor(x, "x", min_rank=2)
        expect(found.layout is None, f"expected x without a layout, got {found}")
        expect(rounding in ROUNDINGS, f"expected a rounding of {' or '.join(ROUNDINGS)}, got {rounding!r}")
        return checks.low_bit(found.with_element(checks.low_bit_format(format)))

    @staticmethod
    def reference(x: np.ndarray, *, format: Any, rounding: str) -> PackedArray:
        return format.pack(x) if rounding == "nearest" else format.pack(x, rounding)

    def flops(self, sizes: dict[str, int]) -> int:
        return 4 * num_elements(self.y.type, sizes)  # largest, divide, round, clip


@register_op
class AssembleOp(Op):
    """A low-bit tensor made of the parts that a checkpoint or a calibration holds: nothing is rounded.

    Parts follow in this order, those that the format lacks left out: codes, scales, zero points, channel scales, table.

    Example:
        %w = quant.assemble %codes, %scales, %zeros {format = q4_zp<group=32, scale=f16>}
            : (tensor<48 x 64 x u8>, tensor<48 x 2 x f16>, tensor<48 x 2 x u8>)
            -> tensor<48 x 64 x q4_zp<group=32, scale=f16>>
    """

    name = "quant.assemble"
    traits = (Pure,)
    codes = operand("u8 [..., n, k], one code an element; [..., n, k / dim] for product quantization")
    scales = operand("[..., n, groups] in the format of the scales; [..., block rows, block columns] for FP8")
    parts = operand(
        "zero points u8 [..., n, groups]; channel scales [..., n]; table i8 [..., codes] or [..., codes, dim]: "
        "those that the format has",
        variadic=True,
    )
    format = attr(NumberFormat, "format of the result, not a plain one")
    w = result("[..., n, k] in that format")

    @staticmethod
    def infer_types(codes: Type, scales: Type, *parts: Type, format: NumberFormat) -> TensorType:
        checks.low_bit_format(format)
        found = checks.tensor(codes, "codes", min_rank=2)
        expect(found.static and found.layout is None, f"expected codes of known size without a layout, got {found}")
        expect(found.element == U8, f"expected codes of u8, got {found}")
        *outer, n, k = (int(d) for d in found.shape if isinstance(d, int))
        made = checks.low_bit(TensorType((*outer, n, k * getattr(format, "dim", 1)), format))
        wanted = scale_parts(format, made.shape)
        given = dict(zip(wanted, (scales, *parts), strict=False))
        names = ", ".join(wanted)
        expect(
            len(parts) + 1 == len(wanted), f"expected {format} to be made of codes, {names}; got {len(parts) + 2} parts"
        )
        for name, type in given.items():
            expect(type == wanted[name], f"expected {name} to be {wanted[name]}, got {type}")
        return made

    @staticmethod
    def reference(codes: np.ndarray, scales: np.ndarray, *parts: np.ndarray, format: Any) -> PackedArray:
        shape = (*codes.shape[:-1], codes.shape[-1] * getattr(format, "dim", 1))
        names = list(scale_parts(format, shape))
        given = dict(zip(names, (scales, *parts), strict=True))
        flat = {name: _rows_first(value, name, len(shape)) for name, value in given.items()}
        return PackedArray.assemble(format, shape, codes.reshape(-1, codes.shape[-1]), **flat)


def _rows_first(values: np.ndarray, name: str, rank: int) -> np.ndarray:
    """The parts of stacked matrices as those of one matrix with all their rows; tables stay apart."""
    if name == "table":
        return values
    kept = 0 if name == "channel" else 1  # axes behind the rows
    return values.reshape(-1, *values.shape[rank - 1 :][:kept]) if rank > 2 else values


@register_op
class DequantizeOp(Op):
    """The numbers that the elements of a low-bit tensor stand for.

    Example:
        %y = quant.dequantize %w
            : (tensor<48 x 64 x q4_sym<group=32, scale=f16>>) -> tensor<48 x 64 x f32>
    """

    name = "quant.dequantize"
    traits = (Pure,)
    w = operand("[..., n, k] in a low-bit format")
    to = attr(PlainFormat, "format of the result: f32, bf16 or f16", default=F32)
    y = result("w as floats, rounded to `to`")

    @staticmethod
    def infer_types(w: Type, *, to: PlainFormat) -> TensorType:
        found = checks.low_bit_tensor(w, "w")
        expect(found.layout is None, f"expected w without a layout, got {found}")
        expect(to in checks.FLOATS, f"expected to = f32, bf16 or f16, got {to}")
        return found.with_element(to)

    @staticmethod
    def reference(w: PackedArray, *, to: PlainFormat) -> np.ndarray:
        return unpacked(w).astype(to.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.y.type, sizes)


def hadamard(block: int) -> np.ndarray:
    """f64 [block, block]: Sylvester's matrix divided by the root of its size; symmetric, and its own inverse."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(block)


@register_op
class RotateOp(Op):
    """Every run of `block` neighbours along the last axis times the orthonormal Hadamard matrix (Sylvester's order).

    A rotation is its own inverse, and rotating both operands of a product changes nothing but how its numbers spread:
    (x R)(w R)^T = x w^T. It evens out the outliers of a row (arXiv:2404.00456).

    Example:
        %y = quant.rotate %x {block = 32} : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
    """

    name = "quant.rotate"
    traits = (Pure,)
    x = operand("[..., k]")
    block = attr(int, "a power of two that divides k")
    y = result("[..., k] in f32")

    @staticmethod
    def infer_types(x: Type, *, block: int) -> TensorType:
        found = checks.float_tensor(x, "x", min_rank=1)
        expect(found.layout is None, f"expected x without a layout, got {found}")
        expect(block >= 1 and block & (block - 1) == 0, f"expected a block that is a power of two, got {block}")
        k = checks.known(found.shape[-1], "last dimension of x")
        expect(k % block == 0, f"expected the last dimension of x to be a multiple of block = {block}, got {k}")
        return found.with_element(F32)

    @staticmethod
    def reference(x: np.ndarray, *, block: int) -> np.ndarray:
        runs = x.astype(np.float64).reshape(-1, block)
        return (runs @ hadamard(block)).astype(np.float32).reshape(x.shape)

    def flops(self, sizes: dict[str, int]) -> int:
        return num_elements(self.y.type, sizes) * (self.block.bit_length() - 1 + 1)  # butterflies, one scaling
