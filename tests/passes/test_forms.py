"""`describe`: the parts of fused regions by name, and refusal of regions that no pass makes."""

from __future__ import annotations

import pytest

from ir.builder import Builder
from ir.core import Block, Op, Region
from ir.formats import BF16, F32
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.gemm import MatmulOp
from ir.ops.tensor import AddOp, CastOp, SiluOp
from ir.types import SymbolicDim, TensorType
from passes import PassManager
from passes.fuse.forms import (
    AttentionForm,
    ElementwiseForm,
    FormError,
    GemmForm,
    RopeAppendForm,
    describe,
    describe_gemm,
)
from passes.pipelines import cpu_pipeline
from tests.passes.step_graphs import build_step

X = TensorType((SymbolicDim("tokens"), 8), F32)
W = TensorType((8, 8), F32)


def forms(**shape: object) -> list[tuple[Op, object]]:
    """(op, its form) for every op of a compiled step that has one."""
    module = build_step(element=BF16, **shape)
    PassManager(cpu_pipeline()).run(module)
    names = ("tensor.fused", "gemm.matmul", "moe.grouped_gemm", "attn.attention")
    return [(op, describe(op)) for op in module.function("step").block.ops if op.name in names]


def test_the_parts_of_a_dense_layer():
    found = forms(bias=True, qk_norm="head")
    embed, qkv, rope, attention, output, gate_up, down, head = [form for _, form in found]
    assert isinstance(embed, ElementwiseForm) and embed.head is not None and len(embed.ops) == 1

    assert isinstance(qkv, GemmForm) and qkv.norm is not None and qkv.cast is not None
    assert (qkv.x, qkv.gain, qkv.weight, qkv.epilogue_operands) == (0, 1, 2, (3,))
    assert [op.name for op in qkv.epilogue] == ["tensor.add"]

    assert isinstance(rope, RopeAppendForm)
    assert (rope.q_gain, rope.k_gain) == (6, 7)
    assert rope.q.head_norm is not None and rope.q.row_norm is None and rope.v.rope is None
    assert (rope.q.slice.size, rope.k.slice.start, rope.v.slice.start) == (32, 32, 48)

    assert isinstance(attention, AttentionForm)
    assert attention.reshape is not None and attention.cast is not None

    assert isinstance(output, GemmForm) and output.norm is None and output.cast is None
    assert (output.x, output.gain, output.weight, output.epilogue_operands) == (0, None, 1, (2,))

    assert isinstance(gate_up, GemmForm) and gate_up.has_swiglu
    assert [op.name for op in gate_up.epilogue] == ["tensor.swiglu", "tensor.cast"]
    assert gate_up.epilogue_operands == (None, None)

    assert isinstance(down, GemmForm) and not down.has_swiglu
    assert isinstance(head, GemmForm) and head.epilogue == ()


def test_the_parts_of_a_layer_of_experts():
    found = forms(experts=4)
    by_name = {op.name: form for op, form in found}
    router, down = by_name["gemm.matmul"], by_name["moe.grouped_gemm"]
    assert isinstance(router, GemmForm) and (router.x, router.weight, router.order) == (0, 1, None)
    assert isinstance(down, GemmForm) and (down.x, down.weight, down.order, down.offsets) == (0, 1, 2, 3)
    gate_up = next(f for _, f in found if isinstance(f, GemmForm) and f.has_swiglu)
    assert (gate_up.x, gate_up.weight, gate_up.order, gate_up.offsets) == (0, 1, 2, 3)
    norm = next(f for _, f in found if isinstance(f, ElementwiseForm) and f.head and f.head.name == "norm.rms")
    assert len(norm.results) == 2
    total = next(f for _, f in found if isinstance(f, ElementwiseForm) and f.head and f.head.name == "moe.combine")
    assert [op.name for op in total.ops] == ["tensor.add"]


def test_operand_indices_name_the_operands():
    for op, form in forms(bias=True, experts=4, clip=1.0):
        if isinstance(form, GemmForm):
            assert op.operands[form.weight].type == form.product.operands[1].type
            for inner, index in zip(form.epilogue, form.epilogue_operands, strict=True):
                assert (index is None) == (len(inner.operands) == 1)
                assert index is None or op.operands[index].type == inner.operands[1].type


def fused(kind: str, build) -> FusedOp:
    block = Block([X, W, X], ["x", "w", "r"])
    b = Builder.at_end(block)
    b(YieldOp(build(b, *block.arguments)))
    return FusedOp(*_values(), kind=kind, regions=[Region(block)])


def _values():
    return Block([X, W, X]).arguments


@pytest.mark.parametrize(
    ("kind", "build", "message"),
    [
        ("gemm", lambda b, x, w, r: b(SiluOp(x)), "expected gemm.matmul or moe.grouped_gemm"),
        ("gemm", lambda b, x, w, r: b(AddOp(r, b(MatmulOp(x, w)))), "tensor.add does not continue the chain"),
        ("gemm", lambda b, x, w, r: b(MatmulOp(b(MatmulOp(x, w)), w)), "gemm.matmul is no epilogue op"),
        (
            "gemm",
            lambda b, x, w, r: b(AddOp(b(MatmulOp(x, w)), b(SiluOp(r)))),
            "does not continue",
        ),
        ("gemm", lambda b, x, w, r: (b(SiluOp(b(MatmulOp(x, w)))), r)[1], "does not yield the end of its chain"),
        ("elementwise", lambda b, x, w, r: b(MatmulOp(x, w)), "gemm.matmul is not elementwise"),
        ("attention", lambda b, x, w, r: b(SiluOp(x)), "expected attn.attention first"),
        ("rope_append", lambda b, x, w, r: b(SiluOp(x)), "expected kv.append last and two results"),
        ("other", lambda b, x, w, r: b(SiluOp(x)), "there are no regions of kind 'other'"),
    ],
)
def test_regions_that_no_pass_makes(kind, build, message):
    with pytest.raises(FormError, match=message):
        describe(fused(kind, build))


def test_ops_that_are_no_regions():
    x = Block([X]).arguments[0]
    with pytest.raises(FormError, match=r"tensor\.cast is no fused region"):
        describe(CastOp(x, to=BF16))
    chain = fused("elementwise", lambda b, x, w, r: b(SiluOp(x)))
    with pytest.raises(FormError, match="is no product"):
        describe_gemm(chain)
