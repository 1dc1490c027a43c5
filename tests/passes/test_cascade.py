"""Passes over the cache: counted from the cascade, and taken away by rewrites that follow from algebra."""

from __future__ import annotations

import numpy as np
import pytest

import ir
from ir.builder import Builder
from ir.core import Block, Op, Region
from ir.formats import F32, I32
from ir.interpreter import Environment
from ir.ops.attention import AttentionOp, row_argument_types
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.cascades import build_deferred_division, build_online_softmax, build_softmax_cascade
from ir.ops.einsum import ContractOp, FoldOp, MapOp, ReduceOp
from ir.ops.fused import YieldOp
from ir.rewriter import PatternRewriter, apply_greedily
from ir.types import KVCacheType, SymbolicDim, TensorType
from passes.analysis.cascade_passes import count_passes
from passes.fuse.cascade_patterns import DeferDivision, FoldOnlineSoftmax

ROW = TensorType((8,), F32)
SCALAR = TensorType((), F32)
POINTS = TensorType((SymbolicDim("ctx"),), F32)


def attention(region: Region) -> AttentionOp:
    """An attention op with this region, in a function."""
    tokens = TensorType((SymbolicDim("tokens"),), I32)
    query = TensorType((SymbolicDim("tokens"), 2, 8), F32)
    func = FuncOp.create("main", [query, KVCacheType(2, 8, F32), tokens, tokens], ("q", "cache", "positions", "slots"))
    b = Builder.at_end(func.block)
    op = AttentionOp(*func.arguments, scale=0.5, regions=[region])
    b(ReturnOp(b(op)))
    ModuleOp.create(func)
    return op


def run_row(op: Op, seed: int, ctx: int) -> np.ndarray:
    """What the region gives for one random row."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s).astype(np.float32) * 3 for s in ((8,), (ctx, 8), (ctx, 8)))
    mask = rng.random(ctx) < 0.5
    mask[rng.integers(ctx)] = True
    (y,) = Environment({}, {}).run_region(op.region, (q, k, v, mask, np.float32(0.5)))
    return y


@pytest.mark.parametrize(
    ("build", "count"), [(build_softmax_cascade, 3), (build_deferred_division, 2), (build_online_softmax, 1)]
)
def test_passes_of_the_known_cascades(build, count):
    found = count_passes(build(8).block)
    assert found.count == count
    assert max(found.pass_of.values()) == count and min(found.pass_of.values()) == 1


def test_each_step_is_told_its_pass():
    block = build_softmax_cascade(8).block
    passes = [count_passes(block).pass_of.get(op) for op in block.ops]
    #                dot scale mask max sub exp sum div weighted sum, yield
    assert passes == [1, 1, 1, 1, 2, 2, 2, 3, 3, None]


def test_steps_beside_the_rank_need_no_pass():
    block = Block([SCALAR, ROW], ["a", "b"])
    b = Builder.at_end(block)
    b(YieldOp(b(MapOp(block.arguments[1], block.arguments[0], op="mul"))))
    assert count_passes(block).count == 0


def test_independent_reductions_share_a_pass_and_chained_ones_do_not():
    block = Block([POINTS, POINTS], ["x", "y"])
    b = Builder.at_end(block)
    x, y = block.arguments
    first, second = b(ReduceOp(x, op="sum", spec="c->")), b(ReduceOp(y, op="max", spec="c->"))
    shared = b(MapOp(first, second, op="add"))
    assert count_passes(block).count == 1
    b(YieldOp(b(ReduceOp(b(MapOp(x, shared, op="sub")), op="sum", spec="c->"))))
    assert count_passes(block).count == 2


def test_the_rewrites_give_the_known_cascades():
    op = attention(build_softmax_cascade(8))
    assert apply_greedily(op, [DeferDivision()]).changed
    assert ir.structural_equal(op.parent_op, attention(build_deferred_division(8)).parent_op) is None
    assert apply_greedily(op, [FoldOnlineSoftmax(block=16)]).changed
    assert ir.structural_equal(op.parent_op, attention(build_online_softmax(8, block=16)).parent_op) is None
    assert not apply_greedily(op, [DeferDivision(), FoldOnlineSoftmax()]).changed
    ir.verify(op)


@pytest.mark.parametrize("ctx", [1, 5, 16, 40])
def test_the_rewrites_keep_what_a_row_computes(ctx):
    op = attention(build_softmax_cascade(8))
    before = [run_row(op, seed, ctx) for seed in range(4)]
    apply_greedily(op, [DeferDivision(), FoldOnlineSoftmax(block=4)])
    for seed, want in enumerate(before):
        np.testing.assert_allclose(run_row(op, seed, ctx), want, rtol=1e-5, atol=1e-5)


def softmax_with(change: str) -> AttentionOp:
    """The two-pass cascade with one thing that online softmax cannot have, or the three-pass one for the division."""
    block = Block(row_argument_types(8), ("q", "k", "v", "mask", "scale"))
    b = Builder.at_end(block)
    q, k, v, _, scale = block.arguments
    s = b(MapOp(b(ContractOp(k, q, spec="cd,d->c")), scale, op="mul"))
    m = b(ReduceOp(s, op="max", spec="c->"))
    e = b(MapOp(b(MapOp(s, m, op="sub")), op="exp"))
    total = b(ReduceOp(e, op="max" if change == "maximum of exponentials" else "sum", spec="c->"))
    weights = e
    if change == "quotient per point":
        weights = b(MapOp(e, s, op="div"))
    elif change == "quotient read twice":
        weights = b(MapOp(e, total, op="div"))
        total = b(ReduceOp(weights, op="sum", spec="c->"))
    y = b(MapOp(b(ContractOp(weights, v, spec="c,cd->d")), total, op="div"))
    b(YieldOp(b(MapOp(y, m, op="mul")) if change == "maximum read elsewhere" else y))
    return attention(Region(block))


@pytest.mark.parametrize(
    ("change", "pattern", "reason"),
    [
        (
            "maximum read elsewhere",
            FoldOnlineSoftmax(),
            "the maximum is read by einsum.map, not only taken",
        ),
        ("maximum of exponentials", FoldOnlineSoftmax(), "the exponentials are read by einsum.reduce, no sum over ctx"),
        ("quotient per point", FoldOnlineSoftmax(), "the exponentials are read by einsum.map, no sum over ctx"),
        ("quotient per point", DeferDivision(), "the divisor tensor<ctx x f32> is not the same for every point"),
        ("quotient read twice", DeferDivision(), "the quotient has other readers"),
    ],
)
def test_what_does_not_fit_is_left_alone(change, pattern, reason):
    op = softmax_with(change)
    rewriter = apply_greedily(op, [pattern], PatternRewriter())
    assert not rewriter.changed
    assert any(r.reason.startswith(reason) for r in rewriter.refusals)


def test_without_such_a_change_the_cascade_folds():
    op = softmax_with("nothing")
    assert apply_greedily(op, [FoldOnlineSoftmax()]).changed
    assert count_passes(op.region.block).count == 1
    assert any(isinstance(inner, FoldOp) for inner in op.region.block.ops)
