"""The PTX of kernels, run instruction by instruction, gives what the kernel's tile IR gives: bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bench.gpu_attention_cases import small_attention
from bench.gpu_cases import GpuCase, small_cases
from bench.gpu_moe_cases import small_experts, small_group_experts
from bench.gpu_product_cases import small_fp8, small_products, small_wgmma
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.kernels.attention_decode import join_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from codegen.nvptx.kernels.rope import rope_table_kernel
from codegen.nvptx.kernels.rope_append import HeadNorm, Projection, rope_append_kernel
from codegen.nvptx.kv_planes import KvPlanes
from codegen.nvptx.lowering import HOPPER, shared_bytes
from ir.formats import BF16, F16, GroupedIntFormat
from ir.grid_interpreter import interpret_grid
from ir.types import KVCacheType
from tests.codegen.nvptx.kernel_list import one_of_each, one_of_each_on_hopper
from tests.codegen.nvptx.ptx_interpreter import run_ptx
from tests.samples.base import normal

CASES = [*small_cases(), *small_products(), *small_attention(), *small_experts()]
Q8, Q4 = GroupedIntFormat(8, 0), GroupedIntFormat(4, 0)
TOKENS = np.array([1, 0], np.int32)


def rope_append(name: str, cache: KVCacheType, norm: HeadNorm | None) -> tuple[GridKernel, int, list[Any]]:
    kv = KvPlanes.of(cache)
    form = Projection(2 * kv.heads, kv, norm, (-1.0, 1.0))
    wide = norm is not None and norm.over_rows
    gains = [normal(n * kv.width if wide else kv.width) for n in (form.heads, kv.heads)] if norm is not None else []
    planes = [np.zeros((2, kv.heads, p.positions or 16, p.row), p.element.dtype) for p in kv.planes]
    arguments = [
        normal(2, form.columns), normal(2, kv.width // 2, seed="c"), normal(2, kv.width // 2, seed="s"), TOKENS, TOKENS,
        *gains, np.zeros((2, form.heads, kv.stored), kv.element.dtype), *planes, 2, 16,
    ]  # fmt: skip
    return rope_append_kernel(form, name), form.blocks(2), arguments


# Kernel, blocks, arguments: what the cases have not.
OTHERS: tuple[tuple[GridKernel, int, list[Any]], ...] = (
    (one_of_each(), 2, [normal(2 * 64 * 8, element=BF16, scale=0.1), np.zeros(8 * 128, np.float32), 2 * 64 * 8 - 4]),
    (
        rope_table_kernel(12, 1.25, "rope_table"), 3,
        [np.array([0, 77, 131071], np.int32), 1e4 ** (np.arange(12) / -12),
         *(np.zeros((3, 12), np.float32) for _ in "cs")],
    ),
    rope_append("rope_append", KVCacheType(2, 24, BF16), HeadNorm(1e-6, True)),
    rope_append("rope_append8", KVCacheType(2, 80, Q8), None),
    rope_append("rope_append16", KVCacheType(2, 8, F16), None),
    rope_append("rope_append4", KVCacheType(1, 128, Q4, rotate=64, recent=16), HeadNorm(1e-5, False)),
    (
        join_kernel(AttentionShape(2, 1, 64), "join"), 2,
        [normal(2, 3, 64), np.abs(normal(2, 3, 2, seed="sums")), np.zeros((2, 64), np.float32), 3],
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def ptx() -> str:
    return compile_ptx([*(c.kernel for c in CASES), *(kernel for kernel, _, _ in OTHERS)], "sm_80")


def check(ptx: str, kernel: GridKernel, blocks: int, arguments: Sequence[Any]) -> None:
    by_ptx, by_ir = copy.deepcopy(list(arguments)), copy.deepcopy(list(arguments))
    interpret_grid(kernel.func, by_ir, blocks=blocks, threads=kernel.threads)
    run_ptx(ptx, kernel.name, by_ptx, blocks=blocks, threads=kernel.threads, shared=shared_bytes(kernel))
    for got, wanted in zip(by_ptx, by_ir, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert any(isinstance(b, np.ndarray) and b.tobytes() != a.tobytes() for a, b in zip(arguments, by_ptx, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ptx_means_what_the_tile_ir_means(ptx: str, case: GpuCase) -> None:
    check(ptx, case.kernel, case.blocks, case.make(np.random.default_rng(11)))


def test_products_of_fp8() -> None:
    cases = small_fp8()
    text = compile_ptx([case.kernel for case in cases], "sm_89")
    for case in cases:
        check(text, case.kernel, case.blocks, case.make(np.random.default_rng(11)))


def test_products_of_warpgroups() -> None:
    kernel = one_of_each_on_hopper()
    text = compile_ptx([kernel], HOPPER)
    assert ".version 8.0" in text
    check(text, kernel, 1, [normal(64 * 64, element=BF16), np.zeros(1024, np.float32)])
    cases = [*small_wgmma(), *small_group_experts()]
    text = compile_ptx([case.kernel for case in cases], HOPPER)
    for case in cases:
        check(text, case.kernel, case.blocks, case.make(np.random.default_rng(11)))


@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o[0].name)
def test_other_kernels(ptx: str, other: tuple[GridKernel, int, list[Any]]) -> None:
    check(ptx, *other)


def test_an_instruction_that_is_not_known() -> None:
    text = ".entry k(\n\t.param .u64 k_param_0\n)\n{\n\tbrev.b32 \t%r1, 5;\n\tret;\n\n}\n"
    with pytest.raises(ValueError, match=r"brev\.b32 is not among the instructions"):
        run_ptx(text, "k", [np.zeros(1)], blocks=1, threads=1, shared=0)
