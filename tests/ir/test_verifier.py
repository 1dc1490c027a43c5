"""Verifier: faults that text cannot express, reporting, speed. The others are in tests/text/ir/verifier_errors.ir."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ir
from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.diagnostics import DiagnosticError, DiagnosticSink
from ir.formats import F32
from ir.op_def import Op as DeclaredOp
from ir.op_def import attr, result
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.tensor import AddOp, ConcatOp, SiluOp, SliceOp
from ir.rewriter import PatternRewriter
from ir.types import INDEX, ScalarType, TensorType, Type
from ir.verifier import attribute_fits, verify_into
from tests.strategies import GeneratedModule, graph_modules

T = TensorType((4,), F32)


def messages_of(root: Op) -> list[str]:
    sink = DiagnosticSink()
    verify_into(root, sink)
    return [d.message for d in sink.errors]


def chain(count: int = 3) -> tuple[ModuleOp, FuncOp]:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    value: Value = func.arguments[0]
    for _ in range(count):
        value = b(SiluOp(value))
    b(ReturnOp(value))
    return ModuleOp.create(func), func


def test_valid_ir_has_no_faults() -> None:
    module, func = chain()
    ir.verify(module)
    ir.verify(func)
    ir.verify(func.block.ops[1])  # an op alone: its operands are given


def _use_before_definition(func: FuncOp) -> None:
    func.block.ops[0]._set_operand(0, func.block.ops[1].results[0])


def _foreign_value(func: FuncOp) -> None:
    func.block.ops[0]._set_operand(0, Block([T]).arguments[0])


def _other_function(func: FuncOp) -> None:
    other, other_func = chain(1)
    module = func.parent_op
    assert isinstance(module, ModuleOp)
    other.block._remove(other_func)
    other_func.attributes["sym_name"] = "g"
    module.append(other_func)
    func.block.ops[0]._set_operand(0, other_func.arguments[0])


def _value_out_of_a_region(func: FuncOp) -> None:
    inner = Block([T])
    made = Builder.at_end(inner)(SiluOp(inner.arguments[0]))
    Builder.at_end(inner).insert(YieldOp(made))
    func.block._insert(0, FusedOp(func.arguments[0], regions=[Region(inner)], kind="elementwise"))
    func.block.ops[2]._set_operand(0, made)


def _through_a_wall(func: FuncOp) -> None:
    inner = Block([T])
    Builder.at_end(inner).insert(YieldOp(func.arguments[0]))
    func.block._insert(0, FusedOp(func.arguments[0], regions=[Region(inner)], kind="elementwise"))


def _operand_without_use(func: FuncOp) -> None:
    op = func.block.ops[1]
    op._operands[0].uses.clear()


def _use_without_operand(func: FuncOp) -> None:
    func.arguments[0].uses.append((func.block.ops[2], 0))


def _operand_changed_alone(func: FuncOp) -> None:
    func.block.ops[1]._operands[0] = func.arguments[0]


def _wrong_parent(func: FuncOp) -> None:
    func.block.ops[1].parent = Block()


def _two_blocks(func: FuncOp) -> None:
    func.regions[0].blocks = (*func.regions[0].blocks, Block())


def _region_of_another(func: FuncOp) -> None:
    func.regions[0].parent = ReturnOp()


def _block_of_another(func: FuncOp) -> None:
    func.block.parent = Region()


def _argument_number(func: FuncOp) -> None:
    func.arguments[0].index = 3


def _attribute_added(func: FuncOp) -> None:
    func.block.ops[0].attributes["axis"] = 3


def _attribute_removed(func: FuncOp) -> None:
    del func.attributes["sym_name"]


def _result_type(func: FuncOp) -> None:
    func.block.ops[0].results[0].type = TensorType((5,), F32)


FAULTS: list[tuple[Callable[[FuncOp], None], str]] = [
    (_use_before_definition, "'tensor.silu' uses operand 0 before 'tensor.silu' defines it"),
    (_foreign_value, "'tensor.silu' uses operand 0, argument 0 of a block that is not part of this IR"),
    (
        _other_function,
        "'tensor.silu' uses operand 0, argument 0 of a block inside of a region that does not contain this",
    ),
    (
        _value_out_of_a_region,
        "'tensor.silu' uses operand 0, a result of 'tensor.silu' inside of a region that does not",
    ),
    (_through_a_wall, "uses operand 0, argument 0 of a block outside of 'tensor.fused', whose regions are isolated"),
    (_operand_without_use, "a value of 'tensor.silu' lists 0 uses, has 1"),
    (_use_without_operand, "'tensor.silu' is listed as a user through operand 0, but reads another value"),
    (_operand_changed_alone, "is listed as a user through operand 0, but reads another value"),
    (_wrong_parent, "'tensor.silu' stands in a block that is not its parent"),
    (_two_blocks, "'func.func' expected one block in region 0, got 2"),
    (_region_of_another, "region 0 of 'func.func' has another op as parent"),
    (_block_of_another, "the block of region 0 of 'func.func' has another region as parent"),
    (_argument_number, "argument 0 of region 0 of 'func.func' is numbered or owned wrongly"),
    (_attribute_added, "'tensor.silu' has no attribute 'axis'; it has none"),
    (_attribute_removed, "'func.func' lacks attribute 'sym_name' (name of the function in its module)"),
    (_result_type, "'tensor.silu' gives tensor<4 x f32>, but its results are declared tensor<5 x f32>"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_fault_is_found(damage: Callable[[FuncOp], None], message: str) -> None:
    module, func = chain()
    damage(func)
    found = messages_of(module)
    assert any(message in m for m in found), found


def test_result_used_inside_its_own_region() -> None:
    """A region of an op that is not isolated sees what is around the op, not what the op itself gives."""
    module = ir.parse(
        "func @f(%m: i1, %i: index) -> index {\n  %z = tile.if %m ({\n    tile.yield %i : (index) -> ()\n  }, {\n"
        "    tile.yield %i : (index) -> ()\n  }) : (i1) -> index\n  return %z : index\n}"
    )
    branch = module.functions[0].block.ops[0]
    branch.regions[0].block.ops[0]._set_operand(0, branch.results[0])
    assert "'tile.yield' uses operand 0 before a result of 'tile.if' is defined" in messages_of(module)


def test_faults_are_reported_together_with_their_surroundings() -> None:
    module, func = chain(6)
    func.block.ops[2].results[0].type = TensorType((5,), F32)
    with pytest.raises(DiagnosticError) as caught:
        ir.verify(module)
    text = str(caught.value)
    assert len(caught.value.diagnostics) == 2  # the op, and the one that reads it and now gives something else
    assert "> %2 = tensor.silu %1 : (tensor<4 x f32>) -> tensor<5 x f32>" in text
    assert "  %0 = tensor.silu %x" in text
    assert "  %4 = tensor.silu %3" in text
    assert "%5" not in text.split("error: ")[1]


def test_errors_have_a_limit() -> None:
    module, func = chain(300)
    for op in func.block.ops[:-1]:
        op.attributes["axis"] = 1
    found = messages_of(module)
    assert len(found) == 50
    assert found[-1].endswith("(and there may be more: stopped after 50 errors)")


def test_the_op_own_errors_count_against_the_limit() -> None:
    func = FuncOp.create("f", [], [])
    b = Builder.at_end(func.block)
    for _ in range(80):
        inner = Block()
        Builder.at_end(inner).insert(YieldOp())
        b.insert(FusedOp(regions=[Region(inner)], kind="nothing"))
    b(ReturnOp())
    found = messages_of(ModuleOp.create(func))
    assert len(found) == 50
    assert all("expected kind of tensor.fused among" in m for m in found)


def test_origin_names_ops_without_source() -> None:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    b(SiluOp(func.arguments[0], origin="layers.3.mlp")).type = TensorType((5,), F32)
    b(ReturnOp())
    with pytest.raises(DiagnosticError, match=r"layers\.3\.mlp: error: 'tensor\.silu' gives"):
        ir.verify(func)


class _Odd(DeclaredOp):
    """Attributes of every kind; not registered."""

    name = "test.odd"
    number = attr(int, "an int")
    real = attr(float, "a float")
    flag = attr(bool, "a bool")
    either = attr((int, float), "a number")
    several = attr(tuple, "a tuple")
    maybe = attr(int, "an int or nothing", default=None)
    value = result("anything")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("number", [1, -1], [True, 1.0, "1", None]),
        ("real", [1.0], [1, True, "1"]),
        ("flag", [True], [1, 0.0]),
        ("either", [1, 1.0], [True, "1"]),
        ("several", [(), (1, ("a", 2.0))], [[1], (object(),), (1, [2])]),
        ("maybe", [1, None], [1.0]),
    ],
)
def test_attribute_kinds(name: str, good: list[object], bad: list[object]) -> None:
    field = next(f for f in _Odd.attr_fields if f.name == name)
    assert [value for value in good if not attribute_fits(field, value)] == []
    assert [value for value in bad if attribute_fits(field, value)] == []


def test_attributes_of_a_wrong_kind_are_named() -> None:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    op = b.insert(SliceOp(func.arguments[0], axis=0, start=0, size=1))
    op.attributes["start"] = 0.5
    op.attributes["size"] = [1]
    b(ReturnOp())
    assert messages_of(func) == [
        "'tensor.slice' expected an int as 'start', got 0.5 (float)",
        "'tensor.slice' expected an int as 'size', got [1] (list)",
    ]


class _Numbered(DeclaredOp):
    """Its result type follows from the kind of a number; not registered."""

    name = "test.numbered"
    value = attr((int, float), "a number")
    out = result("index for an int, else f32")

    @staticmethod
    def infer_types(value: float) -> Type:
        return INDEX if type(value) is int else ScalarType(F32)


def test_inference_is_not_confused_by_equal_numbers() -> None:
    """1 and 1.0 are equal keys of a dict; remembered inference must tell them apart."""
    ir.verify(_Numbered(value=1))
    ir.verify(_Numbered(value=1.0))
    assert messages_of(_Numbered(value=1, result_types=[ScalarType(F32)])) == [
        "'test.numbered' gives index, but its results are declared f32"
    ]


@given(graph_modules(), st.data())
def test_damage_is_found(generated: GeneratedModule, data: st.DataObject) -> None:
    """Cutting any use-def link behind the rewriter's back, or retyping any result, never goes unnoticed."""
    ops = [op for op in generated.func.walk() if op.operands and op.parent is not None]
    if not ops:
        return
    op = data.draw(st.sampled_from(ops))
    kind = data.draw(st.sampled_from(["use", "operand", "type"]))
    value = op._operands[0]
    if kind == "use":
        value.uses.remove((op, 0))
    elif kind == "operand":
        op._operands[0] = Block([value.type]).arguments[0]
    elif op.results:
        op.results[0].type = TensorType((12345,), F32)
    else:
        return
    assert messages_of(generated.module)


def test_rewriting_keeps_links() -> None:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    (x,) = func.arguments
    total = b(AddOp(x, x))
    joined = b(ConcatOp(total, total, total, axis=0))
    b(ReturnOp(joined))
    rewriter = PatternRewriter()
    rewriter.replace(total.op, SiluOp(x))
    ir.verify(func)
    assert [v.op.name for v in joined.op.operands] == ["tensor.silu"] * 3
