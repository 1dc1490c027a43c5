"""Weights in the order of a GPU's lanes: what is stored, in whatever pieces, is what was given."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from codegen.weights import load_stored, stored_pieces, write_weights
from ir.attributes import SymbolRef
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, PlainFormat
from ir.ops.quant import QuantizeOp
from ir.ops.tensor import CastOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.ops.tensor_layout import LayoutOp
from ir.parse_value import parse_format, parse_layout
from ir.types import Layout, TensorType

FORMATS = (
    "bf16",
    "q4_sym<group=32, scale=f16>",
    "q3_sym<group=32, scale=f16>",
    "q6_sym<group=32, scale=f16>",
    "q8_sym<group=64, scale=f16>",
    "q4_sym<group=row, scale=f16>",
    "f8e4m3<block=row, scale=f32>",
    "f8e4m3<block=16x64, scale=f32>",
)


class Source:
    """A checkpoint of the matrices of a stack."""

    def __init__(self, matrices: np.ndarray) -> None:
        self.matrices = matrices

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        return self.matrices[int(name.removeprefix("w."))][first:last]


def constant(shape: tuple[int, ...], format: str, halves: int) -> Value:
    """The stored form of a matrix [n, k] or a stack [E, n, k] of f32 numbers."""
    if len(shape) == 2:
        value = ConstantOp(symbol=SymbolRef("w.0"), result_types=[TensorType(shape, F32)]).result
    else:
        stack = TensorType(shape, F32)
        value = ConstantStackOp(symbol=SymbolRef("w.*"), count=shape[0], result_types=[stack]).result
    element = parse_format(format)
    if isinstance(element, PlainFormat):
        value = CastOp(value, to=element).result
    else:
        value = QuantizeOp(value, format=element, rounding="nearest").result
    return LayoutOp(value, layout=Layout(16 // halves, 64, halves, lanes=32)).result


@settings(max_examples=12)
@given(
    st.sampled_from([(16, 64), (40, 128), (48, 192), (3, 32, 64), (2, 16, 96), (40, 32)]), st.sampled_from(FORMATS),
    st.sampled_from([1, 2]), st.sampled_from([1, 9000, 1 << 20]),
)  # fmt: skip
def test_what_is_stored_is_read_back(shape: tuple[int, ...], format: str, halves: int, piece: int) -> None:
    assume(halves == 1 or shape[-2] % 16 == 0)
    assume(shape[-1] % 64 == 0 or "64" not in format)
    dense = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    source, value = Source(dense if len(shape) == 3 else dense[None]), constant(shape, format, halves)
    out = io.BytesIO()
    (tensor,), _ = write_weights([("w", value)], source, out)
    element: Any = parse_format(format)
    want = dense.astype(BF16.dtype) if element == BF16 else element.unpack(element.pack(dense))
    np.testing.assert_array_equal(load_stored(out.getvalue(), tensor).astype(np.float32), want.astype(np.float32))
    pieces = b"".join(bytes(p) for p in stored_pieces(value, source, piece_bytes=piece))
    assert pieces == out.getvalue()[: tensor.nbytes]


def test_the_layout_has_a_text_form() -> None:
    assert str(Layout(8, 64, 2, 32)) == "strips<rows=8, pack=64, interleave=2, lanes=32>"
    assert parse_layout("strips<rows=16, pack=64, lanes=32>") == Layout(16, 64, lanes=32)


@pytest.mark.parametrize("k", [12, 100])
def test_columns_that_are_no_chunks_are_refused(k: int) -> None:
    value = constant((16, k), "bf16", 1)
    with pytest.raises(DiagnosticError, match="multiple of 8"):
        write_weights([("w", value)], Source(np.zeros((1, 16, k), np.float32)), io.BytesIO())
