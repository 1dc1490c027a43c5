"""Matrix kernels against the meaning of their ops: odd shapes, padded strips, every prologue and epilogue, experts.

Everything runs natively; the tile interpreter runs the same kernels on three threads with race and bounds checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.compile_step import program_specs
from codegen.kernels.call import EmitContext
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, I32, PlainFormat
from ir.ops import tensor
from ir.ops.gemm import MatmulOp
from ir.ops.moe import DispatchOp, GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.types import Layout, SymbolicDim, TensorType
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.op_kernels import PREFILL, OpKernel, check_same_bits, fused, single

TOKENS = SymbolicDim("tokens")
PACK = {F32: 1, BF16: 2}
EXPERTS, TOP_K = 4, 2

# Largest difference as a share of the largest element. Sums in another order than numpy's: a few units of 2**-24 times
# the square root of at most 130 terms. A bf16 result is rounded once, by up to 2**-9 of itself, so that two sums beside
# a tie come 2**-8 apart. Where a norm is rounded to bf16 before the product, its f32 may round the other way for one
# of the terms: 2**-8 of a term.
EXACT, ROUNDED_RESULT, ROUNDED_ROWS = 2e-6, 2.0**-8, 1e-2

PROLOGUES = {F32: ("", "norm"), BF16: ("", "cast", "norm cast")}
EPILOGUES = (
    "", "bias", "residual", "scale", "gate", "silu", "clip", "cast", "swiglu", "bias swiglu", "swiglu cast",
    "bias swiglu residual cast", "silu gate residual", "bias clip residual", "bias silu scale clip cast",
)  # fmt: skip


def gemm_op(
    element: PlainFormat,
    n: int,
    k: int,
    prologue: str = "",
    epilogue: str = "",
    gather: int | None = None,
    rows: int = 16,
) -> Op:
    """A product with its surroundings; `gather` makes it a grouped one. Columns are even where a swiglu halves them."""
    halves = 2 if "swiglu" in epilogue else 1
    layout = Layout(rows, PACK[element], halves)
    pairs = TOKENS if gather is None else TOKENS * TOP_K
    x_rows = pairs if gather == 0 else TOKENS
    types = [TensorType((x_rows, k), F32 if prologue else element)]
    types += [TensorType((k,), F32)] if "norm" in prologue else []
    if gather is None:
        types += [TensorType((n * halves, k), element, layout)]
    else:
        types += [TensorType((EXPERTS, n * halves, k), element, layout)]
        types += [TensorType((pairs,), I32), TensorType((EXPERTS + 1,), I32)]
    width = n * halves
    for part in epilogue.split():
        width = n if part == "swiglu" else width
        if part in ("bias", "scale"):
            types.append(TensorType((width,), F32))
        if part in ("residual", "gate"):
            types.append(TensorType((pairs, width), F32))
    body = partial(_body, element=element, prologue=prologue, epilogue=epilogue, gather=gather)
    if not prologue and not epilogue:
        product = MatmulOp if gather is None else partial(GroupedGemmOp, gather=gather)
        return single(types, product)
    return fused("gemm", types, body)


def _body(
    b: Builder, *arguments: Value, element: PlainFormat, prologue: str, epilogue: str, gather: int | None
) -> Value:
    rest = iter(arguments)
    x = next(rest)
    if "norm" in prologue:
        x = b(RmsNormOp(x, next(rest), eps=1e-5))
    if "cast" in prologue:
        x = b(tensor.CastOp(x, to=element))
    if gather is None:
        y = b(MatmulOp(x, next(rest)))
    else:
        y = b(GroupedGemmOp(x, next(rest), next(rest), next(rest), gather=gather))
    for part in epilogue.split():
        match part:
            case "bias" | "residual":
                y = b(tensor.AddOp(y, next(rest)))
            case "scale" | "gate":
                y = b(tensor.MulOp(y, next(rest)))
            case "silu":
                y = b(tensor.SiluOp(y))
            case "clip":
                y = b(tensor.ClipOp(y, low=-0.5, high=0.75))
            case "swiglu":
                y = b(tensor.SwigluOp(y))
            case "cast":
                y = b(tensor.CastOp(y, to=BF16))
    return y


def values_of(op: Op, tokens: int, seed: int = 0, choices: str = "spread") -> list[np.ndarray]:
    """Random operands; pairs go to experts as `choices` says."""
    random = np.random.default_rng([seed, tokens])
    order, offsets = DispatchOp.reference(expert_ids(choices, tokens, random), num_experts=EXPERTS)
    found: list[np.ndarray] = []
    for value in op.operands:
        type = value.type
        assert isinstance(type, TensorType) and isinstance(type.element, PlainFormat)
        if type.element == I32:
            found.append(offsets if type.shape == (EXPERTS + 1,) else order)
            continue
        shape = [tokens * d.scale if isinstance(d, SymbolicDim) else d for d in type.shape]
        scale = shape[-1] ** -0.5 if type.layout else 1.0
        found.append((random.standard_normal(shape) * scale).astype(type.element.dtype))
    return found


def expert_ids(choices: str, tokens: int, random: np.random.Generator) -> np.ndarray:
    """[tokens, TOP_K]: all experts in turn, everybody to the same two, or only to the last ones."""
    if choices == "spread":
        return np.array([random.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], np.int32)
    pair = (0, 1) if choices == "first" else (EXPERTS - 1, EXPERTS - 2)
    return np.tile(np.array(pair, np.int32), (tokens, 1))


def tolerance(op: Op) -> float:
    inner = [o.name for o in op.regions[0].block.ops] if op.regions else []
    if "norm.rms" in inner and inner.count("tensor.cast") > (inner[-2] == "tensor.cast"):
        return ROUNDED_ROWS
    result = op.results[0].type
    assert isinstance(result, TensorType)
    return ROUNDED_RESULT if result.element == BF16 else EXACT


def agree(got: np.ndarray, want: np.ndarray, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    wide, exact = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(wide).all()
    assert np.abs(wide - exact).max(initial=0) <= share * max(1.0, np.abs(exact).max(initial=0))


Key = tuple[Any, ...]
SIZES = (1, 16, 17, 33)
DEPTHS = (1, 2, 16, 17, 33)
SHAPES: list[Key] = [(e, n, k) for e in (F32, BF16) for n in SIZES for k in DEPTHS]
# All epilogues without a prologue, every third with one: neither looks at the other.
FUSED: list[Key] = [
    (e, 20, 22, p, e2) for e in (F32, BF16) for p in PROLOGUES[e] for e2 in (EPILOGUES[::3] if p else EPILOGUES)
]
ODD_FUSED: list[Key] = [(BF16, 20, 21, p, "bias") for p in PROLOGUES[BF16]]
GROUPED: list[Key] = [
    (e, 20, 22, p, e2, gather)
    for e in (F32, BF16)
    for p in ("", "norm cast" if e == BF16 else "norm")
    for e2 in ("", "swiglu", "swiglu cast", "bias silu gate")
    for gather in (0, TOP_K)
]
ODD_GROUPED: list[Key] = [(BF16, 5, 7, "", "", gather) for gather in (0, TOP_K)]
WIDE: list[Key] = [
    (BF16, 130, 66, "", "", None, 64),
    (BF16, 70, 66, "norm cast", "swiglu cast", None, 32),
    (F32, 70, 65, "", "bias", None, 32),
]


@cache
def kernel(key: Key, context: EmitContext = PREFILL) -> OpKernel:
    return OpKernel(gemm_op(*key), context)


CONTEXTS = [spec.context for spec in program_specs(frozenset({"avx512f"}))] + [program_specs(frozenset())[1].context]


@pytest.fixture(scope="module")
def kernels() -> Iterator[NativeKernels]:
    chosen = [kernel(key) for key in (*SHAPES, *FUSED, *ODD_FUSED, *GROUPED, *ODD_GROUPED)]
    chosen += [kernel(key, context) for key in WIDE for context in CONTEXTS]
    with native_kernels([k.kernel for k in chosen], host_target(), optimize_every=3) as loaded:
        yield loaded


def check(kernels: NativeKernels, made: OpKernel, values: list[np.ndarray], threads: int = 2) -> np.ndarray:
    (want,) = made.meant(values)
    (got,) = made.native(kernels, values, threads)
    agree(got, want, tolerance(made.op))
    return got


def label(key: Key) -> str:
    return "-".join(str(part).replace(" ", "_") for part in key if part not in ("", None)) or "bare"


def test_odd_shapes(kernels: NativeKernels) -> None:
    for key in SHAPES:
        for tokens in (1, 2, 3, 4, 7):
            check(kernels, kernel(key), values_of(kernel(key).op, tokens))


@pytest.mark.parametrize("key", [*FUSED, *ODD_FUSED], ids=label)
def test_prologues_and_epilogues(kernels: NativeKernels, key: Key) -> None:
    made = kernel(key)
    for tokens in (1, 5):
        values = values_of(made.op, tokens)
        native = check(kernels, made, values, threads=3)
    (meant,) = made.interpreted(values)
    agree(meant, native, tolerance(made.op))


@pytest.mark.parametrize("choices", ["spread", "first", "last"])
def test_experts_idle_and_crowded(kernels: NativeKernels, choices: str) -> None:
    for key in (*GROUPED, *ODD_GROUPED):
        for tokens in (1, 6):
            check(kernels, kernel(key), values_of(kernel(key).op, tokens, choices=choices))


@pytest.mark.parametrize("key", [*GROUPED[::3], *ODD_GROUPED], ids=label)
def test_experts_in_the_interpreter(key: Key) -> None:
    made = kernel(key)
    values = values_of(made.op, 4)
    agree(made.interpreted(values)[0], made.meant(values)[0], tolerance(made.op))


@pytest.mark.parametrize("key", WIDE, ids=label)
def test_register_tiles_of_real_targets(kernels: NativeKernels, key: Key) -> None:
    for context in CONTEXTS:
        for tokens in (1, 6, 13):
            made = kernel(key, context)
            check(kernels, made, values_of(made.op, tokens))


@settings(max_examples=25)
@given(st.sampled_from([*FUSED, *GROUPED]), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_a_row_has_the_same_bits_whatever_is_around_it(
    kernels: NativeKernels, key: Key, tokens: int, seed: int, threads: int
) -> None:
    """Alone, among others, on any number of threads: sums are formed in one order."""
    made = kernel(key)
    values = values_of(made.op, tokens, seed)
    together = check(kernels, made, values, threads)
    row = seed % tokens if len(key) == 5 else None  # rows of grouped products are in grouped order
    check_same_bits(kernels, made, values, together, row)


def refused(op: Op) -> str:
    with pytest.raises(DiagnosticError) as caught:
        OpKernel(op)
    return str(caught.value)


def matmul(x: TensorType, w: TensorType) -> Op:
    return single([x, w], MatmulOp)


def test_refusals() -> None:
    x, half = TensorType((TOKENS, 8), F32), TensorType((TOKENS, 8), BF16)
    assert "weight of type tensor<16 x 8 x f32> has no layout; run choose-layouts" in refused(
        matmul(x, TensorType((16, 8), F32))
    )
    assert "kernels take strips of a multiple of 16 rows, got strips<rows=8, pack=1>" in refused(
        matmul(x, TensorType((16, 8), F32, Layout(8)))
    )
    assert "weights of bf16 in strips<rows=16, pack=1> with activations of bf16; it takes pack=2" in refused(
        matmul(half, TensorType((16, 8), BF16, Layout(16)))
    )
    assert "'gemm.matmul' has bf16 activations and f16 weights" in refused(
        matmul(half, TensorType((16, 8), F16, Layout(16)))
    )
    assert "'gemm.matmul' has f32 activations and bf16 weights; set-precision makes them agree" in refused(
        matmul(x, TensorType((16, 8), BF16, Layout(16, 2)))
    )
    assert "weight with layout strips<rows=16, pack=1, interleave=2> feeds no swiglu" in refused(
        matmul(x, TensorType((32, 8), F32, Layout(16, 1, 2)))
    )
    sliced = fused(
        "gemm",
        [x, TensorType((16, 8), F32, Layout(16))],
        lambda b, x, w: b(tensor.SliceOp(b(MatmulOp(x, w)), axis=1, start=0, size=8)),
    )
    assert "tensor.slice is no epilogue op" in refused(sliced)
