"""tensor.*, norm.*, gemm.*, einsum.*: the references against other ways to say the same; errors of bad values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ir.attributes import SymbolRef
from ir.core import Block
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, I32
from ir.interpreter import Environment
from ir.ops.einsum import ContractOp, parse_spec
from ir.ops.gemm import MatmulOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ConcatOp, EmbedOp, GatherRowsOp, MulOp, SiluOp, SliceOp, SwigluOp
from ir.ops.tensor_constant import ConstantStackOp
from ir.types import SymbolicDim
from tests.samples.base import ints, normal, t

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-50, 50, width=32, allow_subnormal=False),
)


@given(FLOATS)
def test_silu_is_x_over_one_plus_exp(x: np.ndarray) -> None:
    wanted = [[float(v) / (1.0 + math.exp(-float(v))) for v in row] for row in x]
    np.testing.assert_allclose(SiluOp.reference(x), wanted, rtol=1e-6, atol=1e-12)


@given(FLOATS)
def test_swiglu_is_silu_times_the_other_half(x: np.ndarray) -> None:
    both = ConcatOp.reference(x, -x, axis=1)
    np.testing.assert_allclose(
        SwigluOp.reference(both), MulOp.reference(SiluOp.reference(x), -x), rtol=1e-6, atol=1e-30
    )


@given(FLOATS, st.floats(0.25, 8.0))
def test_rms_norm_forgets_the_scale(x: np.ndarray, factor: float) -> None:
    x = x + np.float32(60.0)  # away from zero, where eps would show
    gain = normal(x.shape[1])
    one, other = (RmsNormOp.reference(v, gain, eps=1e-6) for v in (x, x * np.float32(factor)))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rms_norm_with_unit_gain_has_mean_square_one() -> None:
    y = RmsNormOp.reference(normal(4, 33), np.ones(33, np.float32), eps=0.0)
    np.testing.assert_allclose(np.mean(y.astype(np.float64) ** 2, axis=-1), 1.0, rtol=1e-6)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
def test_matmul_is_a_contraction(m: int, n: int, k: int) -> None:
    x, w = normal(m, k), normal(n, k, seed="w")
    np.testing.assert_array_equal(MatmulOp.reference(x, w), ContractOp.reference(x, w, spec="mk,nk->mn"))


def test_matmul_accumulates_wider_than_its_operands() -> None:
    """4096 ones in bf16: an accumulator of bf16 stops at 256, one of f16 at 2048."""
    ones = np.ones((1, 4096), BF16.dtype)
    assert MatmulOp.reference(ones, ones).item() == 4096.0


@given(FLOATS, FLOATS)
def test_slices_of_a_concatenation_are_the_parts(a: np.ndarray, b: np.ndarray) -> None:
    b = np.resize(b, (b.shape[0], a.shape[1]))
    both = ConcatOp.reference(a, b, axis=0)
    np.testing.assert_array_equal(SliceOp.reference(both, axis=0, start=0, size=len(a)), a)
    np.testing.assert_array_equal(SliceOp.reference(both, axis=0, start=len(a), size=len(b)), b)


@given(FLOATS)
def test_cast_to_bf16_keeps_eight_bits(x: np.ndarray) -> None:
    rounded = CastOp.reference(x, to=BF16).astype(np.float32)
    np.testing.assert_allclose(rounded, x, rtol=2.0**-8, atol=1e-38)


def test_bias_is_added_in_either_order() -> None:
    x, bias = normal(3, 4), normal(4)
    np.testing.assert_array_equal(AddOp.reference(x, bias), AddOp.reference(bias, x))
    assert AddOp.infer_types(t(3, 4), t(4)) == AddOp.infer_types(t(4), t(3, 4)) == t(3, 4)


def test_bf16_sum_is_rounded_once() -> None:
    a, b = np.array([256.0], BF16.dtype), np.array([3.0], BF16.dtype)
    assert AddOp.reference(a, b).item() == 260.0  # 259 lies between 258 and 260; ties go to even


def test_stack_names_its_parts() -> None:
    op = ConstantStackOp(symbol=SymbolRef("e.*.w"), count=2, result_types=(t(2, 3),))
    assert op.symbols() == ("e.0.w", "e.1.w")


@pytest.mark.parametrize("bad", [-1, 3])
def test_rows_outside_of_the_table_are_refused(bad: int) -> None:
    """numpy would count -1 from the end."""
    for cls, inputs, wanted in (
        (EmbedOp, (ints(bad), normal(3, 2)), (t(1, element=I32), t(3, 2))),
        (GatherRowsOp, (normal(3, 2), ints(bad)), (t(3, 2), t(1, element=I32))),
    ):
        op = cls(*Block(wanted).arguments)
        with pytest.raises(DiagnosticError, match=rf"in 0 .. 2, got {bad}"):
            Environment({}, {}).run_op(op, inputs)


def test_spec_letters() -> None:
    assert parse_spec("cd,d->c", 2) == (["cd", "d"], "c")
    assert parse_spec("->", 1) == ([""], "")


def test_costs_of_a_matmul() -> None:
    tokens = SymbolicDim("tokens")
    op = MatmulOp(*Block((t(tokens, 16), t(32, 16, element=BF16))).arguments)
    assert op.flops({"tokens": 3}) == 2 * 3 * 32 * 16
    assert op.bytes_moved({"tokens": 3}) == 3 * 16 * 4 + 32 * 16 * 2 + 3 * 32 * 4
