"""Kernels for AMD GPUs: objects, what is in them, where the numbers of matrix products go; nothing is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codegen.amdgpu.compile import ARCHITECTURE, FEATURES, TRIPLE, amd_module, compile_amd
from codegen.amdgpu.fragments import (
    LANES,
    places_of_a,
    places_of_b,
    places_of_columns,
    places_of_rows,
    places_of_sums,
)
from codegen.amdgpu.lowering import launch_threads
from codegen.compile_worker import CompileRequest, compile_many
from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import decode_kernel
from codegen.nvptx.kernels.moe_route import dispatch_kernel, route_kernel
from ir.diagnostics import DiagnosticError
from ir.formats import F8E4M3, F32, GroupedIntFormat
from ir.ops.grid_matrix import multiply_fragments
from tests.codegen.nvptx.amd_table import amd_rows
from tests.codegen.nvptx.kernel_list import one_of_each

PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"


def gathered(words: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """[64] of words [lanes, count]."""
    lanes, numbers = places
    return words[lanes, numbers]


@pytest.mark.parametrize("bits", [16, 8])
def test_a_product_on_a_wave(bits: int) -> None:
    """The instruction as AMD describes it, on words that were brought where it wants them, means what grid.mma does."""
    rng = np.random.default_rng(bits)
    each = 32 // bits  # numbers of a word
    a, b = (rng.integers(-8, 9, (32, words * each)).astype(np.float32) for words in (4, 2))
    want = multiply_fragments(np.zeros((1, 32, 4), np.float32), a[None], b[None])[0]
    both = [np.concatenate([x.reshape(32, -1, each)] * 2) for x in (a, b)]  # the halves of a wave do the same
    left, right = (
        np.stack([gathered(x, places(t)) for t in range(2)], axis=1).reshape(LANES, 2 * each)
        for x, places in zip(both, (places_of_a, places_of_b), strict=True)
    )
    rows, columns = np.zeros((16, 8 * each)), np.zeros((8 * each, 16))
    for lane in range(LANES):
        i, first = lane % 16, lane // 16 * 2 * each
        rows[i, first : first + 2 * each] = left[lane]
        columns[first : first + 2 * each, i] = right[lane]
    product = rows @ columns
    held = np.stack([product[4 * (lane // 16) : 4 * (lane // 16) + 4, lane % 16] for lane in range(LANES)])
    made = np.stack([gathered(held, places_of_sums(i)) for i in range(4)], axis=1)
    np.testing.assert_array_equal(made[:32], want)
    np.testing.assert_array_equal(made[32:], want)


def test_rows_and_columns_of_matrices() -> None:
    """As ldmatrix has them: lane l says where row l mod 8 of matrix l / 8 begins."""
    for matrix in range(4):
        lanes = np.arange(LANES) % 32
        np.testing.assert_array_equal(places_of_rows(matrix), 8 * matrix + lanes // 4)
        for odd in range(2):
            np.testing.assert_array_equal(places_of_columns(matrix, odd), 8 * matrix + lanes % 4 * 2 + odd)


def test_instructions_of_the_ops() -> None:
    request = CompileRequest(amd_module([one_of_each()]), TRIPLE, ARCHITECTURE, FEATURES, emit="assembly")
    text = compile_many([request])[0].decode()
    wanted = (
        "v_mfma_f32_16x16x16_bf16", "v_mfma_f32_16x16x16_f16", "v_mfma_i32_16x16x32_i8", "ds_bpermute_b32",
        "ds_swizzle_b32", "s_barrier", "v_exp_f32", "global_load_dwordx4", "ds_write_b128", "gfx942",
    )  # fmt: skip
    assert [name for name in wanted if name not in text] == []
    assert "max_flat_workgroup_size: 128" in text  # twice the 64 threads of the kernel


def test_objects() -> None:
    kernels = [
        decode_kernel(Fragments.of(64, 128, GroupedIntFormat(4, 32)), "decode"),
        route_kernel(128, 8, True, F32, "route"),
        dispatch_kernel(16, 8, "dispatch"),
    ]
    made = compile_amd(kernels)
    assert made[:4] == b"\x7fELF" and all(kernel.name.encode() in made for kernel in kernels)
    assert [launch_threads(kernel) for kernel in kernels] == [512, 32, 512]


def much(k: GridBuilder) -> None:
    k.shared(17 << 10, F32)


def ticket(k: GridBuilder) -> None:
    k.ticket()


def fp8(k: GridBuilder) -> None:
    k.f32(1.0, 4).cast(F8E4M3)


def fence(k: GridBuilder) -> None:
    k.fence_async()


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (much, "@refused wants 69632 bytes of shared memory"),
        (ticket, "no lowering of tile.ticket to AMD GPUs"),
        (fp8, "@refused computes with f8e4m3, which gfx942 has with another bias"),
        (fence, "no lowering of grid.fence_async to AMD GPUs"),
    ],
)
def test_what_has_no_object(add, message: str) -> None:  # type: ignore[no-untyped-def]
    k = GridBuilder("refused", threads=32)
    add(k)
    with pytest.raises(DiagnosticError, match=message):
        compile_amd([k.grid_kernel()])


def test_the_table_of_objects() -> None:
    page = PAGE.read_text(encoding="utf-8").split("## AMD GPUs")[1].split("\n## ")[0]
    assert [line for line in page.splitlines() if line.startswith("| `")] == amd_rows(), (
        "python -m tests.codegen.nvptx.amd_table prints the rows"
    )
