"""Products with low-bit weights against the meaning of their ops: every format, every kind of activations, experts,
prologues, odd sizes. All run natively; some also in the tile interpreter, with race and bounds checks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.compile_step import program_specs
from codegen.kernels.call import EmitContext
from codegen.kernels.packed import LONGEST_SEGMENT, segment_of
from codegen.packed_strips import PackedStrips
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I32, NumberFormat, PlainFormat
from ir.ops import tensor
from ir.ops.gemm import MatmulOp
from ir.ops.moe import DispatchOp, GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.quant import QuantizeOp, RotateOp
from ir.parse_value import parse_format
from ir.types import Layout, SymbolicDim, TensorType
from passes.analysis.value_types import tensor_type
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.op_kernels import PREFILL, OpKernel, check_same_bits, fused, single

TOKENS = SymbolicDim("tokens")
EXPERTS, TOP_K = 3, 2
INT8, INT8_LONG, INT8_ROW = (f"q8_sym<group={group}, scale=f32>" for group in (32, 128, "row"))
PACKS = {"bf16": 2, "f32": 1}

# f32 sums of exact products: a few roundings. int8 activations: the kernel divides in f32, the meaning in f64, so that
# a level beside a tie may come out one apart: a share of 1/127 of one term of a sum.
EXACT, NEAR_TIES, ROUNDED_ROWS = 3e-6, 1e-3, 1e-2

WIDTHS = [f"q{bits}_sym<group=32, scale=f16>" for bits in range(1, 9)]
OTHERS = [
    "q4_zp<group=32, scale=f16>", "q3_zp<group=64, scale=bf16>", "q8_zp<group=32, scale=f32>",
    "q4_sym<group=64, scale=bf16>", "q4_sym<group=128, scale=f32>", "q8_sym<group=row, scale=f32>",
    "q5_zp<group=row, scale=f16>", "q4_sym<group=32, scale=u8, channel=f16>", "q4_zp<group=32, scale=u8, channel=f32>",
    "ternary<group=32, scale=f16>", "nf4<group=32, scale=f16>", "k4<group=32, scale=f16>", "k2<group=64, scale=bf16>",
    "k3<group=32, scale=f32>", "mxfp4", "nl4<group=32, scale=f16>", "nl4<group=32, scale=i8, channel=f16>",
    "q3_sym<group=64, scale=i8, channel=f32>",
]  # fmt: skip
PRODUCT = [("pq<dim=4, bits=8, scale=f16>", x) for x in ("q8_sym<group=32, scale=f32>", "q8_sym<group=row, scale=f32>")]
FLOAT8 = ["f8e4m3<block=row, scale=f32>", "f8e5m2<block=row, scale=bf16>", "f8e4m3<block=128x128, scale=f32>"]

Key = tuple[Any, ...]  # weights, activations, n, k, prologue, epilogue, gather, rows of a strip


def activation_type(name: str) -> NumberFormat:
    return parse_format(name)


def product_op(
    weights: str, activations: str, n: int = 20, k: int = 128, prologue: str = "", epilogue: str = "",
    gather: int | None = None, rows: int = 16,
) -> Op:  # fmt: skip
    """[norm] [rotate] [cast, quantize] product [epilogue], with the layout that choose-layouts gives."""
    x_format = activation_type(activations)
    narrow = "quantize" if not isinstance(x_format, PlainFormat) else "cast" if x_format == BF16 else ""
    pack = PACKS.get(activations, 4)
    halves = 2 if "swiglu" in epilogue else 1
    layout = Layout(rows, pack, halves)
    pairs = TOKENS if gather is None else TOKENS * TOP_K
    types: list[TensorType] = [TensorType((pairs if gather == 0 else TOKENS, k), F32)]
    types += [TensorType((k,), F32)] if "norm" in prologue else []
    shape = (n * halves, k) if gather is None else (EXPERTS, n * halves, k)
    types.append(TensorType(shape, parse_format(weights), layout))
    if gather is not None:
        types += [TensorType((pairs,), I32), TensorType((EXPERTS + 1,), I32)]
    types += [TensorType((n * halves,), F32)] if "bias" in epilogue else []

    def body(b: Builder, *arguments: Value) -> Value:
        rest = iter(arguments)
        x = next(rest)
        for part in prologue.split():
            x = b(RmsNormOp(x, next(rest), eps=1e-5)) if part == "norm" else b(RotateOp(x, block=int(part)))
        if narrow:
            x = b(QuantizeOp(x, format=x_format)) if narrow == "quantize" else b(tensor.CastOp(x, to=BF16))
        if gather is None:
            y = b(MatmulOp(x, next(rest)))
        else:
            y = b(GroupedGemmOp(x, next(rest), next(rest), next(rest), gather=gather))
        for part in epilogue.split():
            y = b(tensor.AddOp(y, next(rest))) if part == "bias" else b(tensor.SwigluOp(y))
        return y

    if not narrow and not prologue and not epilogue and gather is None:
        return single(types, MatmulOp)
    return fused("gemm", types, body)


def values_of(op: Op, tokens: int, seed: int = 0, spread: float = 1.0) -> list[Any]:
    """Random operands. `spread` makes some groups of weights very large and others zero."""
    random = np.random.default_rng([seed, tokens])
    ids = np.array([random.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], np.int32).reshape(-1, TOP_K)
    order, offsets = DispatchOp.reference(ids, num_experts=EXPERTS)
    found: list[Any] = []
    for value in op.operands:
        type: Any = value.type
        if type.element == I32:
            found.append(offsets if type.shape == (EXPERTS + 1,) else order)
            continue
        shape = [tokens * d.scale if isinstance(d, SymbolicDim) else d for d in type.shape]
        numbers = random.standard_normal(shape)
        if isinstance(type.element, PlainFormat):
            found.append(numbers.astype(type.element.dtype))
            continue
        numbers *= shape[-1] ** -0.5
        if spread != 1.0:
            factors = np.array([0.0, 1.0, spread])[random.integers(0, 3, (*shape[:-1], -(-shape[-1] // 32)))]
            numbers *= np.repeat(factors, 32, axis=-1)[..., : shape[-1]]
        found.append(type.element.pack(numbers.astype(np.float32), "mse" if "i8" in str(type.element) else "nearest"))
    return found


def tolerance(op: Op) -> float:
    inner = [o.name for o in op.regions[0].block.ops] if op.regions else []
    if "quant.quantize" in inner:
        return NEAR_TIES
    return ROUNDED_ROWS if "tensor.cast" in inner and ("norm.rms" in inner or "quant.rotate" in inner) else EXACT


def agree(got: np.ndarray, want: np.ndarray, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert np.isfinite(got).all()
    assert np.abs(got.astype(np.float64) - want).max(initial=0) <= share * max(1e-30, np.abs(want).max(initial=0))


INTEGER: list[Key] = [(w, INT8) for w in (*WIDTHS, *OTHERS)] + [
    (w, x) for w in (*WIDTHS[::4], *OTHERS[::5]) for x in (INT8_ROW, INT8_LONG)
]
INTEGER += PRODUCT
FLOATS: list[Key] = [(w, "bf16") for w in (*WIDTHS, *OTHERS, *FLOAT8)]
FLOATS += [(w, "f32") for w in (*WIDTHS[3::4], *OTHERS[::6], FLOAT8[0])]
ODD: list[Key] = [
    ("q8_sym<group=row, scale=f32>", x, n, k)
    for x in (INT8_ROW, "bf16", "f32")
    for n, k in ((1, 1), (17, 33), (33, 70))
] + [("q4_sym<group=32, scale=f16>", x, n, 32) for x in (INT8, "bf16") for n in (1, 33)]
AROUND: list[Key] = [
    ("q4_sym<group=32, scale=f16>", x, 20, 128, p, e)
    for x, p, e in (
        (INT8, "", "bias"), (INT8, "norm", "bias swiglu"), (INT8, "64", ""), (INT8, "norm 8", "swiglu"),
        (INT8_ROW, "norm", ""), (INT8_ROW, "64", "bias"), ("bf16", "norm", "swiglu"), ("bf16", "norm 128", ""),
    )
]  # fmt: skip
GATHERS = (("norm", "swiglu", TOP_K), ("", "", 0), ("", "bias", TOP_K))
GROUPED: list[Key] = [
    (w, x, 20, 64, p, e, gather)
    for w, gathers in (
        ("q4_sym<group=32, scale=f16>", GATHERS),
        ("k4<group=32, scale=f16>", GATHERS[:1]),
        ("q3_zp<group=64, scale=bf16>", GATHERS[1:2]),
    )
    for x in (INT8, "bf16")
    for p, e, gather in gathers
]
WIDE: list[Key] = [
    ("q4_sym<group=32, scale=f16>", INT8, 100, 96, "", "", None, 32),
    ("q3_sym<group=32, scale=f16>", INT8, 70, 96, "norm", "swiglu", None, 32),
    ("q6_zp<group=32, scale=f16>", "bf16", 40, 64, "", "bias", None, 32),
]
CONTEXTS = [program_specs(frozenset({"avx512f"}))[0].context, program_specs(frozenset())[1].context]
EVERY = [*INTEGER, *FLOATS, *ODD, *AROUND, *GROUPED]


@cache
def kernel(key: Key, context: EmitContext = PREFILL) -> OpKernel:
    return OpKernel(product_op(*key), context)


@pytest.fixture(scope="module")
def kernels() -> Iterator[NativeKernels]:
    chosen = [kernel(key) for key in EVERY] + [kernel(key, context) for key in WIDE for context in CONTEXTS]
    with native_kernels([k.kernel for k in chosen], host_target(), optimize_every=6) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def narrow_kernels() -> Iterator[NativeKernels]:
    """For a CPU with vectors of 256 bits and no instruction for byte products."""
    chosen = [kernel(key) for key in (*INTEGER[::5], *FLOATS[::7], *AROUND[::6])]
    with native_kernels([k.kernel for k in chosen], host_target(("avx512", "avxvnni")), optimize_every=6) as loaded:
        yield loaded


def check(kernels: NativeKernels, made: OpKernel, values: list[Any], threads: int = 2) -> np.ndarray:
    (want,) = made.meant(values)
    (got,) = made.native(kernels, values, threads)
    agree(got, want, tolerance(made.op))
    return got


@pytest.mark.parametrize("keys", [INTEGER, FLOATS, ODD, AROUND, GROUPED], ids=["int8", "float", "odd", "around", "moe"])
def test_low_bit_products_mean_what_their_ops_say(kernels: NativeKernels, keys: list[Key]) -> None:
    for key in keys:
        for tokens in (1, 5):
            check(kernels, kernel(key), values_of(kernel(key).op, tokens))


def test_without_wide_vectors_and_byte_products(narrow_kernels: NativeKernels) -> None:
    for key in (*INTEGER[::5], *FLOATS[::7], *AROUND[::6]):
        check(narrow_kernels, kernel(key), values_of(kernel(key).op, 3))


@pytest.mark.parametrize("key", [*INTEGER[::7], *FLOATS[::9], *ODD[::3], *AROUND[::7], *GROUPED[::5]], ids=str)
def test_in_the_interpreter(key: Key) -> None:
    made = kernel(key)
    values = values_of(made.op, 3)
    agree(made.interpreted(values)[0], made.meant(values)[0], tolerance(made.op))


@pytest.mark.parametrize("key", WIDE, ids=str)
def test_every_number_of_rows(kernels: NativeKernels, key: Key) -> None:
    """Full tiles, shorter ones, and full ones that take in a rest."""
    for context in CONTEXTS:
        made = kernel(key, context)
        for tokens in (*range(1, 17), 33):
            check(kernels, made, values_of(made.op, tokens))


@pytest.mark.parametrize("spread", [6e4, 1e-6])
def test_zero_huge_and_tiny_groups(kernels: NativeKernels, spread: float) -> None:
    for key in (*INTEGER[::3], *FLOATS[::4]):
        if "channel" not in key[0] and key[0] != "mxfp4":
            check(kernels, kernel(key), values_of(kernel(key).op, 2, spread=spread))


def test_saturated_activations_and_weights(kernels: NativeKernels) -> None:
    """The largest sums that there are: all weights and activations at the end of their range, of one sign and mixed."""
    for key in INTEGER:
        made = kernel(key)
        for signs in (1.0, -1.0):
            values = values_of(made.op, 2)
            x = np.full(values[0].shape, 3.0, np.float32)
            x[:, 1::2] *= signs
            w = np.full(values[1].shape, 0.5, np.float32)
            w[..., 1::2] *= signs
            w[1::2] *= -1
            values[0], values[1] = x, tensor_type(made.op.operands[1]).element.pack(w)
            check(kernels, made, values)


@settings(max_examples=12)
@given(st.sampled_from([*AROUND, *GROUPED]), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_a_row_has_the_same_bits_whatever_is_around_it(
    kernels: NativeKernels, key: Key, tokens: int, seed: int, threads: int
) -> None:
    made = kernel(key)
    values = values_of(made.op, tokens, seed)
    together = check(kernels, made, values, threads)
    row = seed % tokens if len(key) < 7 else None  # rows of grouped products are in grouped order
    check_same_bits(kernels, made, values, together, row)


def test_sums_that_might_overflow_are_refused() -> None:
    """The longest segment fits with its start value: columns * 255 * 127 twice stays below 2**31."""
    assert 2 * LONGEST_SEGMENT * 255 * 127 < 2**31 <= 2 * (LONGEST_SEGMENT + 32) * 255 * 127
    row = parse_format("q8_sym<group=row, scale=f32>")
    longest, longer = (
        PackedStrips.of(TensorType((16, LONGEST_SEGMENT + more), row, Layout(16, 4))) for more in (0, 32)
    )
    assert segment_of(longest, 0, integer=True) == LONGEST_SEGMENT
    with pytest.raises(DiagnosticError, match="might overflow"):
        segment_of(longer, 0, integer=True)


def refused(op: Op) -> str:
    with pytest.raises(DiagnosticError) as caught:
        OpKernel(op)
    return str(caught.value)


def test_refusals() -> None:
    assert "groups of 16 columns do not end with a block" in refused(product_op("q4_sym<group=16, scale=f16>", "bf16"))
    assert "have q8_sym<group=row or multiples of 32, scale=f32>" in refused(
        product_op("q4_sym<group=32, scale=f16>", "q8_sym<group=16, scale=f32>")
    )
    x = TensorType((TOKENS, 32), parse_format(INT8))
    assert "has int8 activations and bf16 weights; quantize the weights too" in refused(
        single([x, TensorType((16, 32), BF16, Layout(16, 4))], MatmulOp)
    )
