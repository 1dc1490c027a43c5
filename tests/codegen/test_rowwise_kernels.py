"""Row by row kernels and routing against the meaning of their ops: odd widths, several results, ties, idle experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.core import Op
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, I32, PlainFormat
from ir.ops import tensor
from ir.ops.attention import SoftmaxOp
from ir.ops.moe import CombineOp, DispatchOp, RouteOp
from ir.ops.norm import RmsNormOp
from ir.types import SymbolicDim, TensorType
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.op_kernels import OpKernel, fused, single

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")
WIDTHS = (1, 16, 17, 33, 513, 1025)  # around a vector, and around the piece of work of a thread
# f32: a handful of roundings and the functions of codegen.kernels.math; bf16: the last rounding on the other side.
SHARE: dict[PlainFormat, float] = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}


def m(*shape: Any, element: PlainFormat = F32) -> TensorType:
    return TensorType(shape, element)


@dataclass(frozen=True)
class Case:
    """An op for a width of rows."""

    name: str
    make: Callable[[int], Op]


def chain(*operands: Callable[[int], TensorType], body: Any) -> Callable[[int], Op]:
    """A region of kind "elementwise" for any width."""
    return lambda n: fused("elementwise", [t(n) for t in operands], body)


def row(n: int) -> TensorType:
    return m(TOKENS, n)


def two_rows(n: int) -> TensorType:
    return m(TOKENS, 2 * n)


def vector(n: int) -> TensorType:
    return m(n)


IDS = m(TOKENS, element=I32)
CASES = [
    Case("add", lambda n: single([row(n), row(n)], tensor.AddOp)),
    Case("add_row", lambda n: single([row(n), vector(n)], tensor.AddOp)),
    Case("mul_bf16", lambda n: single([m(TOKENS, n, element=BF16), m(n, element=BF16)], tensor.MulOp)),
    Case("mul_heads", lambda n: single([m(TOKENS, 3, n), m(TOKENS, 3, n)], tensor.MulOp)),
    Case("silu", lambda n: single([row(n)], tensor.SiluOp)),
    Case("clip", lambda n: single([row(n)], lambda x: tensor.ClipOp(x, low=-0.5, high=0.25))),
    Case("to_bf16", lambda n: single([row(n)], lambda x: tensor.CastOp(x, to=BF16))),
    Case("from_bf16", lambda n: single([m(TOKENS, n, element=BF16)], lambda x: tensor.CastOp(x, to=F32))),
    Case("swiglu", lambda n: single([two_rows(n)], tensor.SwigluOp)),
    Case("columns", lambda n: single([m(TOKENS, n + 5)], lambda x: tensor.SliceOp(x, axis=1, start=3, size=n))),
    Case("norm", lambda n: single([row(n), vector(n)], lambda x, gain: RmsNormOp(x, gain, eps=1e-6))),
    Case("embed", lambda n: single([IDS, m(7, n, element=BF16)], tensor.EmbedOp)),
    Case("gather_rows", lambda n: single([row(n), m(ROWS, element=I32)], tensor.GatherRowsOp)),
    Case(
        "combine",
        lambda n: single([m(TOKENS * 3, n), m(TOKENS, 3), m(TOKENS * 3, element=I32)], CombineOp),
    ),
    Case(
        "embed_cast",
        chain(lambda n: IDS, lambda n: m(7, n, element=BF16), body=lambda b, ids, table: b(
            tensor.CastOp(b(tensor.EmbedOp(ids, table)), to=F32)
        )),
    ),
    Case("norm_cast", chain(row, vector, body=lambda b, x, g: _twice(b, b(RmsNormOp(x, g, eps=1e-6))))),
    Case(
        "combine_residual",
        chain(lambda n: m(TOKENS * 2, n), lambda n: m(TOKENS, 2), lambda n: m(TOKENS * 2, element=I32), row,
              body=lambda b, y, w, order, x: b(tensor.AddOp(b(CombineOp(y, w, order)), x))),
    ),
    Case("chain", chain(row, row, vector, body=lambda b, x, y, g: _chain(b, x, y, g))),
    Case("two_widths", chain(two_rows, body=lambda b, x: _two_widths(b, x))),
    Case("norm_two_widths", chain(two_rows, lambda n: m(2 * n), body=lambda b, x, g: _two_widths(
        b, b(RmsNormOp(x, g, eps=1e-6))
    ))),
]  # fmt: skip


def _twice(b: Any, n: Any) -> Any:
    return n, b(tensor.CastOp(n, to=BF16))


def _chain(b: Any, x: Any, y: Any, gain: Any) -> Any:
    s = b(tensor.AddOp(b(tensor.SiluOp(x)), y))
    return s, b(tensor.CastOp(b(tensor.ClipOp(b(tensor.MulOp(s, gain)), low=-1.0, high=1.0)), to=BF16))


def _two_widths(b: Any, x: Any) -> Any:
    s = b(tensor.SiluOp(x))
    return s, b(tensor.SwigluOp(s))


@cache
def kernel(case: Case, width: int) -> OpKernel:
    return OpKernel(case.make(width))


ROUTES = [(experts, top_k) for experts in (1, 2, 3, 16, 17, 40) for top_k in sorted({1, min(2, experts), experts})]
DISPATCHES = (1, 2, 5, 17)


@cache
def route(experts: int, top_k: int, normalize: bool) -> OpKernel:
    return OpKernel(single([m(TOKENS, experts)], lambda x: RouteOp(x, top_k=top_k, normalize=normalize)))


@cache
def dispatch(experts: int, placed: bool = False) -> OpKernel:
    ids = m(TOKENS, 2, element=I32)
    places = tuple(np.random.default_rng(experts).permutation(experts).tolist()) if placed else ()
    return OpKernel(single([ids], lambda x: DispatchOp(x, num_experts=experts, places=places)))


@pytest.fixture(scope="module")
def kernels() -> Iterator[NativeKernels]:
    made = [kernel(case, width) for case in CASES for width in WIDTHS]
    made += [route(*key, normalize) for key in ROUTES for normalize in (False, True)] + list(map(dispatch, DISPATCHES))
    made += [dispatch(experts, True) for experts in DISPATCHES]
    with native_kernels([one.kernel for one in made], host_target(), optimize_every=3) as loaded:
        yield loaded


def values_of(op: Op, tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Random operands; i32 operands are ids below 7, rows below the number of tokens, or an order of pairs."""
    random = np.random.default_rng([seed, tokens])
    found = []
    for value in op.operands:
        type = value.type
        assert isinstance(type, TensorType) and isinstance(type.element, PlainFormat)
        sizes = {"tokens": tokens, "rows": tokens + 2}
        shape = [sizes[d.name] * d.scale if isinstance(d, SymbolicDim) else d for d in type.shape]
        if type.element != I32:
            found.append(random.standard_normal(shape).astype(type.element.dtype))
        elif type.shape[0] == ROWS:
            found.append(random.integers(0, tokens, shape).astype(np.int32))
        elif type.shape[0] == TOKENS:
            found.append(random.integers(0, 7, shape).astype(np.int32))
        else:
            found.append(random.permutation(shape[0]).astype(np.int32))
    return found


def agree(got: np.ndarray, want: np.ndarray, element: PlainFormat) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    wide, exact = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(wide).all()
    assert np.abs(wide - exact).max(initial=0) <= SHARE[element] * max(1.0, np.abs(exact).max(initial=0))


def agree_on_all(made: OpKernel, got: list[Any], want: tuple[Any, ...]) -> None:
    for result, mine, meant in zip(made.op.results, got, want, strict=True):
        assert isinstance(result.type, TensorType) and isinstance(result.type.element, PlainFormat)
        agree(mine, meant, result.type.element)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_width(kernels: NativeKernels, case: Case) -> None:
    for width in WIDTHS:
        made = kernel(case, width)
        for tokens, threads in ((1, 2), (4, 1), (5, 3)):
            values = values_of(made.op, tokens)
            agree_on_all(made, made.native(kernels, values, threads), made.meant(values))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_the_interpreter(kernels: NativeKernels, case: Case) -> None:
    for width in (1, 16, 33, 513):
        made = kernel(case, width)
        values = values_of(made.op, 3)
        agree_on_all(made, made.interpreted(values), tuple(made.native(kernels, values)))


def test_nan_and_infinity_go_through(kernels: NativeKernels) -> None:
    """A model that overflows must show it, also behind a clip or an activation."""
    strange = np.float32([[np.nan, np.inf, -np.inf, 1.0] + [0.0] * 12 + [np.nan]])
    for case in CASES:
        if case.name in ("clip", "silu", "to_bf16", "add", "swiglu"):
            made = kernel(case, 17)
            values = [np.resize(strange, (1, v.type.shape[1])) for v in made.op.operands]
            (got,), (want,) = made.native(kernels, values), _quietly(made, values)
            np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), np.isnan(want.astype(np.float32)))


def _quietly(made: OpKernel, values: list[np.ndarray]) -> tuple[Any, ...]:
    with np.errstate(invalid="ignore"):
        return made.meant(values)


def check_route(kernels: NativeKernels, logits: np.ndarray, top_k: int, normalize: bool) -> None:
    made = route(logits.shape[1], top_k, normalize)
    (ids, weights), (want_ids, want_weights) = made.native(kernels, [logits]), made.meant([logits])
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), ROUTES)
def test_routes_and_their_ties(kernels: NativeKernels, experts: int, top_k: int, normalize: bool) -> None:
    random = np.random.default_rng(experts)
    rows = [
        random.standard_normal(experts),
        np.zeros(experts),  # all alike: the lower numbers
        random.integers(0, 2, experts),  # many ties
        np.arange(experts) * -30.0,  # probabilities that are nothing in f32
        np.arange(experts) * 30.0,
        1.0 + np.arange(experts)[::-1] * 2.0**-23,  # one unit apart: probabilities round to the same number
        random.standard_normal(experts) * 1e4,
    ]
    check_route(kernels, np.array(rows, np.float32), top_k, normalize)


@settings(max_examples=30)
@given(st.sampled_from(ROUTES), st.data())
def test_routes_of_any_logits(kernels: NativeKernels, key: tuple[int, int], data: st.DataObject) -> None:
    experts, top_k = key
    number = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1e30, 88.0]), st.floats(-1e4, 1e4, width=32))
    rows = data.draw(st.lists(st.lists(number, min_size=experts, max_size=experts), min_size=1, max_size=3))
    check_route(kernels, np.array(rows, np.float32), top_k, normalize=True)


def test_a_route_in_the_interpreter(kernels: NativeKernels) -> None:
    logits = np.float32([[1, 3, 3], [0, 0, 0], [-1e30, 5, 4]])
    made = route(3, 2, True)
    for mine, native in zip(made.interpreted([logits]), made.native(kernels, [logits]), strict=True):
        np.testing.assert_array_equal(mine, native)


@settings(max_examples=30)
@given(st.sampled_from(DISPATCHES), st.data(), st.integers(1, 3))
def test_dispatch(kernels: NativeKernels, experts: int, data: st.DataObject, threads: int) -> None:
    tokens = data.draw(st.integers(1, 20))
    lowest, highest = sorted(data.draw(st.tuples(*[st.integers(0, experts - 1)] * 2)))  # the others stay idle
    flat = data.draw(st.lists(st.integers(lowest, highest), min_size=2 * tokens, max_size=2 * tokens))
    ids = np.array(flat, np.int32).reshape(tokens, 2)
    for made in (dispatch(experts), dispatch(experts, True)):
        for mine, meant in zip(made.native(kernels, [ids], threads), made.meant([ids]), strict=True):
            np.testing.assert_array_equal(mine, meant)


def test_dispatch_in_the_interpreter() -> None:
    for ids in ([[0, 1], [4, 0], [0, 2]], [[4, 3]] * 3):
        values = [np.array(ids, np.int32)]
        for mine, meant in zip(dispatch(5).interpreted(values), dispatch(5).meant(values), strict=True):
            np.testing.assert_array_equal(mine, meant)


def refused(op: Op) -> str:
    with pytest.raises(DiagnosticError) as caught:
        OpKernel(op)
    return str(caught.value)


def test_refusals() -> None:
    heads = m(TOKENS, 2, 8)
    assert "'tensor.slice' of tensor<8 x 8 x f32> along axis 0 has no kernel; only columns" in refused(
        single([m(8, 8)], lambda x: tensor.SliceOp(x, axis=0, start=0, size=4))
    )
    assert "'norm.rms' of tensor<tokens x 2 x 8 x f32> has no kernel of its own; only rows of a matrix" in refused(
        single([heads, m(8)], lambda x, gain: RmsNormOp(x, gain, eps=1e-6))
    )
    assert "'tensor.swiglu' of tensor<tokens x 2 x 8 x f32> has no kernel of its own" in refused(
        single([heads], tensor.SwigluOp)
    )
    assert "'tensor.add' of tensor<tokens x 2 x 8 x f32> and tensor<8 x f32> has no kernel; only a row is" in refused(
        single([heads, m(8)], tensor.AddOp)
    )
    assert "no row by row kernel for 'attn.softmax'" in refused(
        fused("elementwise", [row(8)], lambda b, x: b(SoftmaxOp(x)))
    )
