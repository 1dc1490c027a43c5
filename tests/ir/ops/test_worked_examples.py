"""Numbers small enough to check by hand: one or two per op whose meaning no other test pins down."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ir.attributes import Rope
from ir.builder import Builder
from ir.core import Block, Region
from ir.formats import BF16, I32
from ir.interpreter import Environment
from ir.ops.attention import AttentionOp, CombineOp, RopeTableOp, ScoresOp, SoftmaxOp
from ir.ops.cascades import build_online_softmax, build_softmax_cascade
from ir.ops.einsum import BLOCK, FoldOp, MapOp, ReduceOp
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import ClipOp, EmbedOp, GatherRowsOp, MulOp
from ir.types import KVCacheType, SymbolicDim
from tests.samples.base import CTX, ROWS, TOKENS, ints, t

IDS = t(TOKENS, element=I32)
KV = KVCacheType(2, 4, BF16)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_rms_norm() -> None:
    y = RmsNormOp.reference(f32(3, 4), f32(1, 2), eps=12.5)  # mean of squares 12.5, plus 12.5: divide by 5
    np.testing.assert_allclose(y, [0.6, 1.6], rtol=1e-7)


def test_clip() -> None:
    assert ClipOp.reference(f32(-3, -1, 0.5, 2), low=-1.0, high=1.0).tolist() == [-1, -1, 0.5, 1]


def test_rope_table() -> None:
    cos, sin = RopeTableOp.reference(ints(0, 10), rope=Rope(4, theta=10000.0))  # 1 and 0.01 radians per position
    np.testing.assert_allclose(cos, [[1, 1], [math.cos(10), math.cos(0.1)]], rtol=1e-6)
    np.testing.assert_allclose(sin, [[0, 0], [math.sin(10), math.sin(0.1)]], rtol=1e-6)


def test_softmax() -> None:
    y = SoftmaxOp.reference(f32(0, math.log(3), -math.inf))
    np.testing.assert_allclose(y, [0.25, 0.75, 0], rtol=1e-6)


def test_matmul_of_f32_is_accumulated_in_f64() -> None:
    assert MatmulOp.reference(f32(1e8, 1, -1e8)[None], np.ones((1, 3), np.float32)).item() == 1.0


def test_grouped_gemm_reads_the_row_of_the_token() -> None:
    x = np.array([[1.0], [10.0]], np.float32)
    w = np.array([[[1.0]], [[2.0]]], np.float32)
    order, offsets = ints(1, 2, 0, 3), ints(0, 2, 4)  # expert 0 has pairs 1, 2; expert 1 has pairs 0, 3
    y = GroupedGemmOp.reference(x, w, order, offsets, gather=2)
    assert y.ravel().tolist() == [1, 10, 2, 20]


@pytest.mark.parametrize(("carry", "wanted"), [("max", -2.0), ("sum", -12.0)])
def test_fold_starts_at_the_identity(carry: str, wanted: float) -> None:
    body = Block((t(), t(SymbolicDim(BLOCK))))
    b = Builder.at_end(body)
    part = b(ReduceOp(body.arguments[1], op=carry, spec="c->"))
    b(YieldOp(b(MapOp(body.arguments[0], part, op="add" if carry == "sum" else "max"))))
    block = Block((t(CTX),))
    fold = FoldOp(*block.arguments, rank="ctx", block=2, carry=(carry,), regions=[Region(body)])
    (y,) = Environment({}, {}).run_op(fold, (f32(-3, -2, -7),))
    assert float(y) == wanted


# --- costs --------------------------------------------------------------------------------------------------------

SIZES = {"tokens": 3, "rows": 2, "ctx": 100}


def test_cost_of_rows_taken_from_a_table() -> None:
    """Only the rows that are asked for are read."""
    embed = EmbedOp(*Block((IDS, t(5000, 8, element=BF16))).arguments)
    assert embed.bytes_moved(SIZES) == 3 * 4 + 2 * (3 * 8 * 2)
    gather = GatherRowsOp(*Block((t(TOKENS, 8), t(ROWS, element=I32))).arguments)
    assert gather.bytes_moved(SIZES) == 2 * 4 + 2 * (2 * 8 * 4)


@pytest.mark.parametrize(("tokens", "experts_read"), [(1, 2), (3, 6), (100, 16)])
def test_cost_of_experts(tokens: int, experts_read: int) -> None:
    types = (t(TOKENS, 8), t(16, 4, 8, element=BF16), t(TOKENS * 2, element=I32), t(17, element=I32))
    op = GroupedGemmOp(*Block(types).arguments, gather=2)
    others = tokens * 8 * 4 + 2 * tokens * 4 + 17 * 4 + 2 * tokens * 4 * 4
    assert op.bytes_moved({"tokens": tokens}) == others + experts_read * 4 * 8 * 2
    assert op.flops({"tokens": tokens}) == 2 * (2 * tokens) * 4 * 8


def test_cost_of_attention() -> None:
    """Keys and values of every position seen, once per row; two multiply-adds per element of them and query head."""
    operands = Block((t(TOKENS, 6, 4), KV, IDS, IDS)).arguments
    io = 2 * (3 * 6 * 4 * 4) + 2 * (3 * 4)
    for window, seen in ((0, 100), (7, 7), (1000, 100)):
        op = AttentionOp(*operands, scale=1.0, window=window, regions=[build_softmax_cascade(4)])
        assert op.bytes_moved(SIZES) == io + 2 * (3 * seen * 2 * 4 * 2)
        assert op.flops(SIZES) == 3 * 6 * seen * 4 * 4


def test_cost_of_scores_and_combine() -> None:
    scores = ScoresOp(*Block((t(TOKENS, 6, 4), KV, IDS, IDS)).arguments, scale=1.0)
    combine = CombineOp(*Block((t(TOKENS, 6, CTX), KV, IDS)).arguments)
    keys, table, rows = 3 * 100 * 2 * 4 * 2, 3 * 6 * 100 * 4, 3 * 6 * 4 * 4
    assert scores.bytes_moved(SIZES) == rows + keys + table + 2 * 12
    assert combine.bytes_moved(SIZES) == rows + keys + table + 12
    assert scores.flops(SIZES) == combine.flops(SIZES) == 2 * 3 * 6 * 100 * 4


def test_cost_of_append_is_what_is_written() -> None:
    op = KVAppendOp(*Block((KV, t(TOKENS, 2, 4), t(TOKENS, 2, 4), IDS, IDS)).arguments)
    assert op.bytes_moved(SIZES) == 2 * (3 * 2 * 4 * 4) + 2 * (3 * 4) + 2 * (3 * 2 * 4 * 2)


def test_cost_of_a_fold_counts_every_block() -> None:
    region = build_online_softmax(4, block=16)
    fold = next(op for op in region.block.ops if isinstance(op, FoldOp))
    per_block = sum(op.flops({"block": 16}) for op in fold.body.block.ops if not isinstance(op, YieldOp))
    assert fold.flops({"ctx": 100}) == 7 * per_block


def test_cost_of_a_fused_op_counts_operands_once_and_caches_by_use() -> None:
    """An operand read twice inside is read from memory once; what stays inside is not counted at all."""
    row = t(TOKENS, 8)
    body = Block((row,))
    b = Builder.at_end(body)
    square = b(MulOp(body.arguments[0], body.arguments[0]))
    b(YieldOp(b(MulOp(square, body.arguments[0]))))
    fused = FusedOp(*Block((row,)).arguments, kind="elementwise", regions=[Region(body)])
    assert fused.bytes_moved(SIZES) == 2 * (3 * 8 * 4)
    assert fused.flops(SIZES) == 2 * 3 * 8

    types = (KV, t(TOKENS, 2, 4), t(TOKENS, 2, 4), IDS, IDS)
    inner = Block(types)
    b = Builder.at_end(inner)
    b(YieldOp(b(KVAppendOp(*inner.arguments))))
    append = FusedOp(*Block(types).arguments, kind="rope_append", regions=[Region(inner)])
    assert append.bytes_moved(SIZES) == KVAppendOp(*Block(types).arguments).bytes_moved(SIZES)


def test_cost_of_a_fused_expert_product_is_that_of_the_bare_one() -> None:
    types = (t(TOKENS, 8), t(16, 4, 8), t(TOKENS * 2, element=I32), t(17, element=I32))
    inner = Block(types)
    b = Builder.at_end(inner)
    b(YieldOp(b(GroupedGemmOp(*inner.arguments, gather=2))))
    fused = FusedOp(*Block(types).arguments, kind="gemm", regions=[Region(inner)])
    bare = GroupedGemmOp(*Block(types).arguments, gather=2)
    assert (fused.bytes_moved(SIZES), fused.flops(SIZES)) == (bare.bytes_moved(SIZES), bare.flops(SIZES))
