"""Columns that stay floats: their kernels against the meaning of the ops, and their constants read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.constant_reader import ConstantReader
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Block
from ir.formats import BF16, F32, I32, PlainFormat
from ir.ops.quant_columns import ClearColumnsOp, OutlierColumnsOp, SelectColumnsOp
from ir.ops.tensor import CastOp
from ir.ops.tensor_constant import ConstantOp
from ir.types import SymbolicDim, TensorType
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.models import WholeTensors
from tests.codegen.op_kernels import OpKernel, single

TOKENS = SymbolicDim("tokens")
KINDS = (SelectColumnsOp, ClearColumnsOp)
SIZES = [(1, 1), (5, 2), (16, 16), (33, 7), (70, 1)]  # width, columns


def _kernels() -> list[tuple[OpKernel, int, int, PlainFormat]]:
    made = []
    for kind in KINDS:
        for width, count in SIZES:
            for element in (F32, BF16):
                types = [TensorType((TOKENS, width), element), TensorType((count,), I32)]
                made.append((OpKernel(single(types, kind)), width, count, element))
    return made


@pytest.fixture(scope="module")
def kernels() -> Iterator[tuple[NativeKernels, list]]:
    made = _kernels()
    with native_kernels([k.kernel for k, *_ in made], host_target(), optimize_every=2) as native:
        yield native, made


def test_kernels_mean_what_the_ops_mean(kernels):
    native, made = kernels
    rng = np.random.default_rng(3)
    for kernel, width, count, element in made:
        for tokens in (1, 2, 5):
            x = rng.standard_normal((tokens, width)).astype(element.dtype)
            columns = np.sort(rng.choice(width, count, replace=False)).astype(np.int32)
            (expected,) = kernel.meant([x, columns])
            for got in (kernel.native(native, [x, columns]), kernel.interpreted([x, columns])):
                np.testing.assert_array_equal(got[0], expected)


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 12),
    stack=st.integers(0, 3),
    narrow=st.booleans(),
    cast=st.booleans(),
    data=st.data(),
)
def test_constants_are_read_as_they_are_meant(n, k, stack, narrow, cast, data):
    element = BF16 if narrow else F32
    shape = (*([stack] if stack else []), n, k)
    rng = np.random.default_rng(n * 100 + k)
    w = np.round(rng.standard_normal(shape) * 2).astype(element.dtype)  # ties
    count = data.draw(st.integers(1, k))
    block = Block()
    b = Builder.at_end(block)
    value = b(ConstantOp(symbol=SymbolRef("w"), result_types=[TensorType(shape, element)]))
    columns = b(OutlierColumnsOp(value, count=count))
    chosen = OutlierColumnsOp.reference(w, count=count)
    for kind in KINDS:
        made = b(kind(value, columns))
        expected = kind.reference(w, chosen)
        if cast:
            made = b(CastOp(made, to=BF16))
            expected = expected.astype(BF16.dtype)
        reader = ConstantReader(made, WholeTensors(lambda name: w))
        np.testing.assert_array_equal(reader.read_all(), expected)
        box = []
        for size in reader.shape:
            first = data.draw(st.integers(0, size - 1))
            box.append((first, data.draw(st.integers(first + 1, size))))
        part = reader.read(tuple(box))
        np.testing.assert_array_equal(part, expected[tuple(slice(*bounds) for bounds in box)])
    squares = (w.astype(np.float64) ** 2).reshape(-1, k).sum(axis=0)
    rest = np.delete(squares, chosen)
    assert not len(rest) or squares[chosen].min() >= rest.max() - 1e-9
