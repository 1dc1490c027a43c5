"""Printer: names, attributes and forms that text tests cannot reach because their IR is not written by the parser."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ir
from ir.attributes import Rope, SymbolRef
from ir.builder import Builder
from ir.core import Block, Region
from ir.formats import BF16, F32, GroupedIntFormat
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.tensor import AddOp, ClipOp, SiluOp
from ir.ops.tensor_constant import ConstantOp
from ir.printer import print_attribute
from ir.types import INDEX, Layout, SymbolicDim, TensorType

T = TensorType((4,), F32)


def silu_chain(hints: list[str]) -> ModuleOp:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    value = func.arguments[0]
    for hint in hints:
        value = b(SiluOp(value), hint)
    b(ReturnOp(value))
    return ModuleOp.create(func)


def names_in(module: ModuleOp) -> list[str]:
    return [line.split(" = ")[0].strip() for line in ir.print_module(module).splitlines() if " = tensor.silu" in line]


def test_names_are_hints_then_numbers() -> None:
    module = silu_chain(["a", "", "a", "b", "", "a", "x"])
    assert names_in(module) == ["%a", "%0", "%a_1", "%b", "%1", "%a_2", "%x_1"]


def test_a_hint_with_a_number_counts_on() -> None:
    assert names_in(silu_chain(["a_1", "a", "a_1", "a", "a_1"])) == ["%a_1", "%a", "%a_2", "%a_3", "%a_4"]


@pytest.mark.parametrize("hint", ["0", "7x", "a b", "%a", "é", "a-b", "_"])
def test_hints_that_are_no_names_are_numbered(hint: str) -> None:
    assert names_in(silu_chain([hint])) == (["%_"] if hint == "_" else ["%0"])


@given(st.lists(st.sampled_from(["", "a", "a_1", "a_1_1", "a_2", "b", "b.c", "0", "x"]), max_size=12))
def test_naming_is_stable(hints: list[str]) -> None:
    text = ir.print_module(silu_chain(hints))
    assert ir.print_module(ir.parse(text)) == text


FLOATS = st.floats(allow_nan=False)


@given(FLOATS, FLOATS)
def test_floats_read_back_exactly(low: float, high: float) -> None:
    func = FuncOp.create("f", [T], ["x"])
    b = Builder.at_end(func.block)
    low, high = min(low, high), max(low, high)
    b(ClipOp(func.arguments[0], low=low, high=high))
    b(ReturnOp())
    (again,) = ir.parse(ir.print_module(ModuleOp.create(func))).functions
    found = again.block.ops[0].attributes
    assert [repr(found["low"]), repr(found["high"])] == [repr(low), repr(high)]


def test_nan_survives() -> None:
    module = ir.parse("func @f() {\n  %x = tile.constant {value = nan} : () -> f32\n  return\n}\n")
    assert math.isnan(module.functions[0].block.ops[0].attributes["value"])
    assert "{value = nan}" in ir.print_module(module)


@given(st.text(), st.text(min_size=1), st.text())
def test_any_symbol_name_and_origin_survives(symbol: str, name: str, origin: str) -> None:
    func = FuncOp.create(name, [], [])
    b = Builder.at_end(func.block)
    b(ConstantOp(symbol=SymbolRef(symbol), result_types=[T], origin=origin))
    b(ReturnOp())
    text = ir.print_module(ModuleOp.create(func))
    text.encode("utf-8")
    again = ir.parse(text)
    assert ir.print_module(again) == text
    assert again.functions[0].sym_name == name
    constant = again.functions[0].block.ops[0]
    assert constant.attributes["symbol"].name == symbol
    assert constant.location.origin == origin


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (-3, "-3"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (1e300, "1e+300"),
        ('a"b\n', '"a\\"b\\n"'),
        ((1, (2.0, "x"), ()), '[1, [2.0, "x"], []]'),
        (SymbolRef("a.*.b"), "@a.*.b"),
        (SymbolRef("a/b"), '@"a/b"'),
        (SymbolRef(""), '@""'),
        (SymbolicDim("tokens", 2), "tokens*2"),
        (BF16, "bf16"),
        (GroupedIntFormat(3, 0, True, BF16), "q3_zp<group=row, scale=bf16>"),
        (Layout(16, 2), "strips<rows=16, pack=2>"),
        (INDEX, "index"),
        (Rope(8), "#rope<dim = 8>"),
        (Rope(8, theta=1e4, truncate=False, scaling="yarn"), '#rope<dim = 8, scaling = "yarn", truncate = false>'),
    ],
)
def test_attribute_text(value: object, text: str) -> None:
    assert print_attribute(value) == text


def test_what_is_no_attribute_cannot_be_printed() -> None:
    with pytest.raises(TypeError, match="is no attribute"):
        print_attribute({1: 2})


def test_op_on_its_own_has_the_names_of_its_function() -> None:
    module = silu_chain(["", "a", ""])
    op = module.functions[0].block.ops[2]
    assert ir.print_op(op) == "%1 = tensor.silu %a : (tensor<4 x f32>) -> tensor<4 x f32>"
    assert ir.print_module(op).startswith("%0 = tensor.silu %<undefined> : ")


def test_function_alone_and_module_in_module() -> None:
    module = silu_chain(["a"])
    assert ir.print_module(module.functions[0]) == ir.print_module(module)
    outer = ModuleOp.create(ModuleOp.create())
    text = ir.print_module(outer)
    assert text == "builtin.module ({\n}) : () -> ()\n"
    assert ir.print_module(ir.parse(text)) == text


def test_invalid_ir_prints_too() -> None:
    """Diagnostics show IR that is wrong; printing must not fail on it."""
    func = FuncOp(sym_name="f", regions=[Region(Block(), Block([T]))])
    assert "func.func" in ir.print_module(func)
    value = SiluOp(Block([T]).arguments[0]).result
    unfinished = FuncOp.create("g", [T], ["x"])
    unfinished.block._insert(0, AddOp(unfinished.arguments[0], value))
    text = ir.print_module(unfinished)
    assert "tensor.add %x, %<undefined>" in text
    assert text.startswith("func @g(%x: tensor<4 x f32>) {")
