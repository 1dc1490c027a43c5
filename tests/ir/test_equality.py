"""Structural equality: what counts, what does not, and how the first difference is named."""

from __future__ import annotations

import pytest
from hypothesis import given

import ir
from ir.equality import same_attribute
from tests.strategies import GeneratedModule, graph_modules

BASE = """func @f(%x: tensor<4 x f32>, %z: tensor<4 x f32>) -> tensor<4 x f32> {
  %a = tensor.clip %x {low = 0.0, high = 1.0} : (tensor<4 x f32>) -> tensor<4 x f32> from "layers.0"
  %b = tensor.fused %a, %z {kind = "elementwise"} ({
    ^(%p: tensor<4 x f32>, %q: tensor<4 x f32>):
      %s = tensor.add %p, %q : (tensor<4 x f32>, tensor<4 x f32>) -> tensor<4 x f32>
      tensor.yield %s : (tensor<4 x f32>) -> ()
  }) : (tensor<4 x f32>, tensor<4 x f32>) -> tensor<4 x f32>
  return %b : tensor<4 x f32>
}
"""


def difference(*changes: tuple[str, str]) -> str:
    other = BASE
    for old, new in changes:
        assert old in other
        other = other.replace(old, new)
    return str(ir.structural_equal(ir.parse(BASE), ir.parse(other)))


def test_names_and_origins_do_not_matter() -> None:
    assert difference(("%a", "%first"), ("%s", "%5"), ("layers.0", "elsewhere")) == "None"


def test_origins_matter_on_request() -> None:
    left, right = ir.parse(BASE), ir.parse(BASE.replace("layers.0", "layers.1"))
    found = ir.structural_equal(left, right, locations=True)
    assert str(found) == "builtin.module / @f / op 0 tensor.clip: origins: layers.0 and layers.1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tensor.add", "tensor.mul", "/ @f / op 1 tensor.fused / op 0 tensor.add: ops: tensor.add and tensor.mul"),
        ("low = 0.0", "low = -0.0", "/ op 0 tensor.clip: attribute 'low': 0.0 and -0.0"),
        (
            "add %p, %q",
            "add %p, %p",
            "operand 1: block argument 1 (tensor<4 x f32>) and block argument 0 (tensor<4 x f32>)",
        ),
        ("return %b", "return %a", "operand 0: result 0 of tensor.fused (tensor<4 x f32>) and result 0 of tensor.clip"),
        ("@f", "@g", "builtin.module / @f: attribute 'sym_name': f and g"),
        (
            "tensor.fused %a, %z",
            "tensor.fused %z, %a",
            "operand 0: result 0 of tensor.clip (tensor<4 x f32>) and block arg",
        ),
    ],
)
def test_first_difference_is_named(old: str, new: str, message: str) -> None:
    assert message in difference((old, new))


def test_different_types() -> None:
    assert "block arguments: (tensor<4 x f32>, tensor<4 x f32>) and (tensor<5 x f32>" in difference(("4 x", "5 x"))
    text = "func @f() {\n  %w = tensor.constant {symbol = @w} : () -> tensor<4 x f32>\n  return\n}\n"
    found = ir.structural_equal(ir.parse(text), ir.parse(text.replace("4 x f32", "4 x bf16")))
    assert "result types: (tensor<4 x f32>) and (tensor<4 x bf16>)" in str(found)


def test_different_counts() -> None:
    assert "number of ops: 3 and 2" in difference(("  return %b : tensor<4 x f32>\n", ""))
    two = "tensor.yield %s, %s : (tensor<4 x f32>, tensor<4 x f32>) -> ()"
    assert "number of operands: 1 and 2" in difference(("tensor.yield %s : (tensor<4 x f32>) -> ()", two))


def test_a_difference_before_the_missing_op_is_found_first() -> None:
    found = difference(("low = 0.0", "low = 0.5"), ("  return %b : tensor<4 x f32>\n", ""))
    assert "op 0 tensor.clip: attribute 'low'" in found


def test_different_regions() -> None:
    region = "{ tile.yield : () -> () }"
    text = f"func @f(%m: i1) {{ tile.if %m ({region}, {region}) : (i1) -> () return }}"
    other = text.replace(f", {region}", "")
    assert "number of regions: 2 and 1" in str(ir.structural_equal(ir.parse(text), ir.parse(other)))


def test_different_blocks_and_attributes() -> None:
    left, right = ir.parse(BASE), ir.parse(BASE)
    right.functions[0].regions[0].blocks = ()
    assert "blocks of region 0: 1 and 0" in str(ir.structural_equal(left, right))
    right = ir.parse(BASE)
    del right.functions[0].block.ops[0].attributes["low"]
    assert "names of attributes: (low, high) and (high)" in str(ir.structural_equal(left, right))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (1, True, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ((1, (2,)), (1, (2,)), True),
        ((1, (2,)), (1, (2.0,)), False),
        ((1,), (1, 1), False),
    ],
)
def test_attributes_compare_by_kind_and_value(left: object, right: object, same: bool) -> None:
    assert same_attribute(left, right) is same


@given(graph_modules())
def test_a_module_equals_itself(generated: GeneratedModule) -> None:
    assert ir.structural_equal(generated.module, generated.module, locations=True) is None


def test_deep_chains_do_not_recurse() -> None:
    lines = ["func @f(%x: f32) {", "  %v0 = tile.sqrt %x : (f32) -> f32"]
    lines += [f"  %v{i} = tile.sqrt %v{i - 1} : (f32) -> f32" for i in range(1, 3000)]
    text = "\n".join([*lines, "  return", "}"])
    module = ir.parse(text)
    ir.verify(module)
    assert ir.structural_equal(module, ir.parse(ir.print_module(module))) is None
