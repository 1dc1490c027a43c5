"""The kernels for GPUs with inputs, what they must give, and what they move and compute: for checks and measurements.

`real` sizes are those of an 8-billion-parameter dense model; `small` ones are for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codegen.kernels.rowwise import element_of
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import decode_kernel
from codegen.nvptx.kernels.gemm import GemmShape, gemm_kernel
from codegen.nvptx.kernels.rowwise import row_kernel
from ir.builder import Builder
from ir.core import Block, Op
from ir.formats import BF16, F8E4M3, FP8Format, GroupedIntFormat, PackedArray, PlainFormat
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import SwigluOp
from ir.types import SymbolicDim, TensorType, Type


@dataclass(frozen=True)
class GpuCase:
    """One launch. `make` gives the arguments in order, `meant` the values of those numbered `outputs`.

    A value may be off by `tolerance` of itself and of the largest. `nbytes` and `flops` are what the launch must move
    and compute, at least. `rows`: those of the outputs that are compared, all when it is None.
    """

    name: str
    kernel: GridKernel
    blocks: int
    make: Callable[[np.random.Generator], list[Any]]
    meant: Callable[[Sequence[Any]], list[np.ndarray]]
    outputs: tuple[int, ...]
    nbytes: int
    flops: int
    tolerance: float
    rows: np.ndarray | None = None

    def error(self, arguments: Sequence[Any], results: Sequence[np.ndarray]) -> float:
        """The largest error of the results, as a share of what is allowed; NaN counts as infinite."""
        worst = 0.0
        for got, want in zip(results, self.meant(arguments), strict=True):
            wide, wanted = got.astype(np.float64), want.astype(np.float64)
            if self.rows is not None:
                wide = wide[self.rows]
            allowed = self.tolerance * (np.abs(wanted) + np.abs(wanted).max())
            share = np.abs(wide - wanted) / np.maximum(allowed, 1e-30)
            worst = max(worst, float(np.where(np.isnan(share), np.inf, share).max()))
        return worst


def real_cases() -> list[GpuCase]:
    """Batch 1, 8 and 16 of decoding, a square product, the rows of a prompt."""
    q4, q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)
    products = [
        _decode(f"decode_{name}_m{m}", m, 14336, 4096, format)
        for name, format in (("w16", BF16), ("w8", q8), ("w4", q4))
        for m in (1, 8, 16)
    ]
    return [
        *products, _gemm("gemm", 4096, 4096, 4096, GemmShape()),
        _norm("rms_norm", 8192, 4096), _swiglu("swiglu", 4096, 14336),
    ]  # fmt: skip


def small_cases() -> list[GpuCase]:
    """The same kernels, a few blocks each."""
    return [
        _decode("decode_w16_m3", 3, 40, 192, BF16),
        _decode("decode_w8_m2", 2, 16, 128, GroupedIntFormat(8, 128)),
        _decode("decode_w4_m16", 16, 16, 128, GroupedIntFormat(4, 32)),
        _gemm("gemm", 40, 24, 72, GemmShape(32, 32, 16, 16, 2)),
        _norm("rms_norm", 2, 64), _swiglu("swiglu", 2, 40),
    ]  # fmt: skip


def numbers(rng: np.random.Generator, shape: tuple[int, ...], element: PlainFormat = BF16) -> np.ndarray:
    """Normal numbers."""
    return rng.standard_normal(shape, np.float32).astype(element.dtype)


def packed_weights(rng: np.random.Generator, layout: Fragments, format: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Weights in the order of the fragments, as codes and scales, and as numbers."""
    n, k = layout.n, layout.k
    if isinstance(format, FP8Format):
        codes = numbers(rng, (n, k), F8E4M3).view(np.uint8)
        scales = (rng.random((-(-n // format.block_rows), format.groups(k)), np.float32) + 1) / 64
        fp8 = PackedArray(format, (n, k), codes, scales)
        return [layout.codes(fp8), layout.scales(fp8)], format.unpack(fp8)
    if not isinstance(format, GroupedIntFormat):
        w = numbers(rng, (n, k))
        return [layout.codes(w)], w
    codes = rng.integers(0, 1 << format.bits, (n, k), dtype=np.uint8)
    scales = (rng.random((n, format.groups(k)), np.float32) / 64 + 1 / 64).astype(np.float16)
    packed = PackedArray.assemble(format, (n, k), codes, scales)
    return [layout.codes(packed), layout.scales(packed)], format.unpack(packed)


def products_of(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T in f32."""
    return x.astype(np.float32) @ w.astype(np.float32).T


def _decode(name: str, m: int, n: int, k: int, format: Any) -> GpuCase:
    layout = Fragments.of(n, k, format)
    held: dict[str, np.ndarray] = {}  # the weights as numbers, which the arguments hold packed

    def make(rng: np.random.Generator) -> list[Any]:
        weights, held["w"] = packed_weights(rng, layout, format)
        return [*weights, numbers(rng, (m, k)), np.full((m, n), np.nan, np.float32), m]

    moved = layout.nbytes + m * (2 * k + 4 * n)
    kernel = decode_kernel(layout, name, rows=8 if m <= 8 else 16)
    last = 3 if layout.group else 2
    return GpuCase(
        name, kernel, layout.tiles, make, lambda a: [products_of(a[last - 1], held["w"])], (last,), moved,
        2 * m * n * k, 1e-4,
    )  # fmt: skip


def _gemm(name: str, m: int, n: int, k: int, shape: GemmShape) -> GpuCase:
    def make(rng: np.random.Generator) -> list[Any]:
        return [numbers(rng, (m, k)), numbers(rng, (n, k)), np.full((m, n), -1).astype(BF16.dtype), m]

    moved = 2 * (m * k + n * k + m * n)
    kernel = gemm_kernel(n, k, name, shape, BF16)
    return GpuCase(
        name, kernel, shape.blocks(m, n), make, lambda a: [products_of(a[0], a[1])], (2,), moved, 2 * m * n * k, 2.0**-8
    )


def _row_case(
    name: str, op: Op, make: Callable[[np.random.Generator], list[Any]], rows: int, nbytes: int, tolerance: float
) -> GpuCase:
    kernel = row_kernel(op, name).kernel
    reference: Any = op

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        return [reference.reference(*arguments[:-1], **op.attributes)]

    return GpuCase(name, kernel, rows, make, meant, (len(op.operands),), nbytes, 0, tolerance)


def _single(types: Sequence[Type], make: Callable[..., Op]) -> Op:
    block = Block(types)
    op = make(*block.arguments)
    Builder.at_end(block).insert(op)
    return op


def _norm(name: str, rows: int, width: int) -> GpuCase:
    tokens = SymbolicDim("tokens")
    types = [TensorType((tokens, width), BF16), TensorType((width,), BF16)]
    op = _single(types, lambda x, w: RmsNormOp(x, w, eps=1e-5))

    def make(rng: np.random.Generator) -> list[Any]:
        return [numbers(rng, (rows, width)), numbers(rng, (width,)), np.full((rows, width), np.nan, np.float32)]

    return _row_case(name, op, make, rows, 6 * rows * width, 1e-5)


def _swiglu(name: str, rows: int, width: int) -> GpuCase:
    op = _single([TensorType((SymbolicDim("tokens"), 2 * width), BF16)], SwigluOp)
    out_bytes = element_of(op.results[0]).dtype.itemsize

    def make(rng: np.random.Generator) -> list[Any]:
        out = np.full((rows, width), -1).astype(element_of(op.results[0]).dtype)
        return [numbers(rng, (rows, 2 * width)), out]

    return _row_case(name, op, make, rows, (4 + out_bytes) * rows * width, 2.0**-8)
