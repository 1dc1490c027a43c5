"""The kernels for GPUs at sizes of real models, for tests of what compilers make of them."""

from __future__ import annotations

from functools import cache

from codegen.nvptx.builder import GridKernel
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import join_kernel, split_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from codegen.nvptx.kernels.decode import decode_kernel
from codegen.nvptx.kernels.gemm import gemm_kernel
from codegen.nvptx.kernels.rope import append_kernel, rope_kernel
from codegen.nvptx.kernels.rowwise import row_kernel
from ir.formats import BF16, GroupedIntFormat
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import SwigluOp
from tests.codegen.op_kernels import single
from tests.samples.base import TOKENS, t

HEADS = AttentionShape(32, 8, 128)  # of an 8-billion-parameter model
Q4, Q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)


@cache
def kernels() -> tuple[GridKernel, ...]:
    """One of each family and format."""
    norm = single([t(TOKENS, 4096), t(4096, element=BF16)], lambda x, w: RmsNormOp(x, w, eps=1e-5))
    gate = single([t(TOKENS, 2 * 14336, element=BF16)], SwigluOp)
    return (
        row_kernel(norm, "rms_norm").kernel,
        row_kernel(gate, "swiglu").kernel,
        decode_kernel(Fragments.of(4096, 4096, BF16), "decode_w16"),
        decode_kernel(Fragments.of(4096, 4096, Q8), "decode_w8"),
        decode_kernel(Fragments.of(4096, 4096, Q4), "decode_w4"),
        decode_kernel(Fragments.of(4096, 4096, Q4), "decode_w4_16", rows=16),
        gemm_kernel(4096, 4096, "gemm"),
        prefill_kernel(HEADS, 128**-0.5, "prefill"),
        split_kernel(HEADS, 128**-0.5, 8, "split"),
        join_kernel(HEADS, 8, "join"),
        rope_kernel(32, 128, BF16, "rope"),
        append_kernel(8, 128, BF16, "append"),
    )
