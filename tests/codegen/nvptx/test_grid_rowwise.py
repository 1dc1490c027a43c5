"""Row by row kernels for GPUs: what the op means, without a race, at widths around a warp and a block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.rowwise import RowKernel, row_kernel
from ir.core import Op
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, I32, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.interpreter import Environment
from ir.ops.moe import CombineOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, EmbedOp, GatherRowsOp, MulOp, SiluOp, SliceOp, SwigluOp
from ir.types import SymbolicDim, TensorType
from tests.codegen.op_kernels import fused, single
from tests.samples.base import TOKENS, normal, t


def run(made: RowKernel, op: Op, values: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """(results of the interpreted kernel, results by the op's meaning)"""
    meant = Environment({}, {}).run_op(op, values)
    results = [np.full(m.shape, -1).astype(m.dtype) for m in meant]
    interpret_grid(made.kernel.func, [*values, *results], blocks=len(meant[0]), threads=made.kernel.threads)
    return results, meant


def check(op: Op, *values: np.ndarray, tolerance: float = 1e-6) -> None:
    got, meant = run(row_kernel(op, "rows"), op, values)
    for a, b in zip(got, meant, strict=True):
        ulp = {2: 2.0**-8, 4: 0.0}[b.dtype.itemsize] if b.dtype != F16.dtype else 2.0**-10
        a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance + ulp, atol=tolerance)


ELEMENTS = st.sampled_from([F32, BF16, F16])
WIDTHS = st.sampled_from([1, 6, 8, 64, 250, 264, 2056])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), WIDTHS, ELEMENTS, ELEMENTS)
def test_norms(rows: int, width: int, element: PlainFormat, of_weight: PlainFormat) -> None:
    types = [t(TOKENS, width, element=element), t(width, element=of_weight)]
    op = single(types, lambda x, w: RmsNormOp(x, w, eps=1e-5))
    check(op, normal(rows, width, element=element), normal(width, seed="w", element=of_weight))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), WIDTHS, ELEMENTS)
def test_gates(rows: int, width: int, element: PlainFormat) -> None:
    check(single([t(TOKENS, 2 * width, element=element)], SwigluOp), normal(rows, 2 * width, element=element, scale=3))
    check(single([t(TOKENS, width, element=element)], SiluOp), normal(rows, width, element=element, scale=30))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.sampled_from([8, 24, 520]))
def test_a_residual_with_its_norm_is_one_kernel(rows: int, width: int) -> None:
    """Two results of one region: the sum, and its norm in bf16."""
    x, w = t(TOKENS, width), t(width, element=BF16)

    def body(b, a, c, weight):  # type: ignore[no-untyped-def]
        total = b(AddOp(a, c))
        normed = b(RmsNormOp(total, weight, eps=1e-6))
        return total, b(CastOp(normed, to=BF16)) if normed.type.element != BF16 else normed

    op = fused("elementwise", [x, x, w], body)
    check(op, normal(rows, width), normal(rows, width, seed="b"), normal(width, seed="w", element=BF16))


def test_tables_slices_and_rows_for_all() -> None:
    ids = np.array([2, 0, 2], np.int32)
    op = single([TensorType((TOKENS,), I32), t(4, 40, element=BF16)], EmbedOp)
    check(op, ids, normal(4, 40, element=BF16))
    check(single([t(TOKENS, 40)], lambda x: SliceOp(x, axis=1, start=12, size=20)), normal(2, 40))
    check(single([t(TOKENS, 40), t(40)], MulOp), normal(2, 40), normal(40, seed="w"))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([6, 64, 264]), st.randoms())
def test_answers_of_experts(tokens: int, top_k: int, width: int, random) -> None:  # type: ignore[no-untyped-def]
    """moe.combine with a residual, and rows that are gathered."""
    pairs = tokens * top_k
    order = np.array(random.sample(range(pairs), pairs), np.int32)
    types = [t(TOKENS * top_k, width), t(TOKENS, top_k), TensorType((TOKENS * top_k,), I32), t(TOKENS, width)]
    op = fused("elementwise", types, lambda b, y, w, o, r: b(AddOp(b(CombineOp(y, w, o)), r)))
    values = [normal(pairs, width), normal(tokens, top_k, seed="w"), order, normal(tokens, width, seed="r")]
    made = row_kernel(op, "rows")
    assert made.combines
    (meant,) = Environment({}, {}).run_op(op, values)
    got = np.full(meant.shape, np.nan, np.float32)
    arguments = [*values, got, np.argsort(order).astype(np.int32)]
    interpret_grid(made.kernel.func, arguments, blocks=tokens, threads=made.kernel.threads)
    np.testing.assert_allclose(got, meant, rtol=1e-6, atol=1e-6)
    rows = single([t(TOKENS, width), TensorType((SymbolicDim("rows"),), I32)], GatherRowsOp)
    check(rows, values[0], order[:2])


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda: single([t(3, 8)], lambda x: SliceOp(x, axis=0, start=0, size=1)), "along axis 0 has no kernel"),
        (lambda: single([t(TOKENS, 2, 8), t(8)], lambda x, w: RmsNormOp(x, w, eps=1e-5)), "rows of a matrix"),
    ],
    ids=["slice", "norm of heads"],
)
def test_what_has_no_kernel(op, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiagnosticError, match=message):
        row_kernel(op(), "rows")
