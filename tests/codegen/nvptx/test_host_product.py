"""Products of CPUs with weights in the order of a GPU's lanes: what gemm.matmul means, interpreted with several
threads, races and bounds checked."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.fragments import Fragments
from codegen.nvptx.host.experts import HostStep
from codegen.nvptx.host.product import HostProduct, host_product
from codegen.nvptx.kernels.gate import turns
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, F32, I32, FP8Format, GroupedIntFormat, NumberFormat, PackedArray, PlainFormat
from ir.ops.gemm import MatmulOp
from ir.tile_interpreter import interpret_kernel
from tests.samples.base import normal

FORMATS = [BF16, *(GroupedIntFormat(bits, group) for bits in (3, 4, 8) for group in (32, 64, 128, 0))]


def numbers(values: np.ndarray, format: NumberFormat) -> np.ndarray | PackedArray:
    return format.pack(values) if isinstance(format, GroupedIntFormat) else values.astype(BF16.dtype)


def run(
    product: HostProduct, w: np.ndarray | PackedArray, x: np.ndarray, sources: list[int], threads: int
) -> np.ndarray:
    arguments = [product.layout.codes(w)]
    if isinstance(w, PackedArray):
        arguments.append(product.layout.scales(w))
    rows = len(sources)
    y = np.full((rows, product.width), np.nan, np.float32).astype(product.out.dtype)
    order = [np.array(sources, I32.dtype)] if product.gather else []
    interpret_kernel(
        host_product(product, "product"), [*arguments, x.reshape(-1), *order, y.reshape(-1), rows], threads
    )
    return y.astype(np.float32)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([16, 48]), st.sampled_from([1, 2]), st.sampled_from(FORMATS), st.integers(1, 3)
)
def test_products(rows: int, n: int, chunks: int, format: NumberFormat, threads: int) -> None:
    k = 64 * chunks * (2 if isinstance(format, GroupedIntFormat) and format.group == 128 else 1)
    x, w = normal(4, k, element=BF16), numbers(normal(n, k, seed="w"), format)
    sources = [3, 0, 2][:rows]
    got = run(HostProduct(Fragments.of(n, k, format), gather=True), w, x, sources, threads)
    scale = np.sqrt(k) * (np.abs(np.asarray(w.scales, np.float32)).max() * 8 if isinstance(w, PackedArray) else 1)
    np.testing.assert_allclose(got, MatmulOp.reference(x[sources], w), rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([BF16, F32]), st.sampled_from([0, 32, 64, 128]), st.sampled_from(FORMATS[2:]), st.booleans())
def test_rows_that_a_gpu_rounds(element: PlainFormat, group: int, format: NumberFormat, zeros: bool) -> None:
    """To int8 under scales of rows or groups, as `quantize_rows` does; a group of zeros stays one."""
    n, k = 16, 128
    x, w = normal(2, k, element=element), numbers(normal(n, k, seed="w"), format)
    x[0, :32] *= not zeros
    got = run(HostProduct(Fragments.of(n, k, format), element=element, rounded=group), w, x, [0, 1], 2)
    grouped = x.astype(np.float32).reshape(2, -1, group or k)
    most = np.abs(grouped).max(axis=-1, keepdims=True)
    codes = np.rint(grouped * np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0))
    rounded = (codes * (most * np.float32(1 / 127))).reshape(2, k)
    want = MatmulOp.reference(rounded, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("format", [BF16, GroupedIntFormat(4, 32), GroupedIntFormat(8, 64)], ids=str)
def test_gates(format: NumberFormat) -> None:
    """Rows of gate and up take turns of 8 as a GPU wants them."""
    n, k = 32, 128
    x, w = normal(2, k, element=BF16), normal(n, k, seed="w") * 0.2
    got = run(HostProduct(Fragments.of(n, k, format), gate=True, out=BF16), numbers(w[turns(n)], format), x, [0, 1], 2)
    gate, up = np.split(MatmulOp.reference(x, numbers(w, format)), 2, axis=1)
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2**-7, atol=1e-5)


def test_what_has_no_product_is_named() -> None:
    for layout in (Fragments.of(24, 64, BF16), Fragments.of(16, 64, FP8Format(F8E4M3))):
        with pytest.raises(DiagnosticError, match="no product on CPUs"):
            HostProduct(layout).check()
    with pytest.raises(DiagnosticError, match="rounded in groups of 24"):
        HostProduct(Fragments.of(16, 192, GroupedIntFormat(8, 64)), rounded=24).check()


def test_all_threads_are_done_when_the_first_returns() -> None:
    """Gate and up before down, down before the caller takes the results: a barrier behind each."""
    layout = Fragments.of(32, 64, BF16)
    products = HostProduct(layout, gate=True, gather=True, out=BF16), HostProduct(layout)
    text = HostStep((), {"both": products}).text("x86_64-unknown-linux-gnu", frozenset(), "nounwind")
    body = text[text.index("define i64 @both(") :].split("}")[0]
    order = re.findall(r"@both_up|@both_down|@stratum_barrier|ret i64", body)
    assert order == ["@both_up", "@stratum_barrier", "@both_down", "@stratum_barrier", "ret i64"]
