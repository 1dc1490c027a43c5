"""Interpreter: inputs, weights and states that do not fit; what happens to KV caches; ops with regions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import ir
from ir.diagnostics import DiagnosticError
from ir.interpreter import Environment, zero_states
from ir.kv_state import KVState
from ir.ops.builtin import FuncOp

F32 = np.float32


def func_of(text: str) -> FuncOp:
    module = ir.parse(text, "f.ir")
    ir.verify(module)
    return module.functions[0]


ADD = func_of(
    "func @f(%x: tensor<tokens x 2 x f32>, %p: tensor<tokens x i32>) -> tensor<tokens x 2 x f32> {\n"
    "  %w = tensor.constant {symbol = @bias} : () -> tensor<2 x f32>\n"
    "  %y = tensor.add %x, %w : (tensor<tokens x 2 x f32>, tensor<2 x f32>) -> tensor<tokens x 2 x f32>\n"
    "  return %y : tensor<tokens x 2 x f32>\n}"
)
WEIGHTS = {"bias": np.array([1, 2], F32)}


def test_weights_as_mapping_and_as_function() -> None:
    inputs = [np.zeros((3, 2), F32), np.zeros(3, np.int32)]
    (first,) = ir.interpret(ADD, inputs, weights=WEIGHTS)
    (second,) = ir.interpret(ADD, inputs, weights=lambda name: {"bias": np.array([1, 2], F32)}[name])
    np.testing.assert_array_equal(first, np.tile(WEIGHTS["bias"], (3, 1)))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([np.zeros((3, 2), F32)], "expected 2 inputs, got 1"),
        (
            [np.zeros((3, 2), np.float64), np.zeros(3, np.int32)],
            "expected input 0 (%x) to be tensor<tokens x 2 x f32>, got float64[3, 2]",
        ),
        ([np.zeros((3, 3), F32), np.zeros(3, np.int32)], "expected input 0 (%x) to be tensor<tokens x 2 x f32> with"),
        (
            [np.zeros(3, F32), np.zeros(3, np.int32)],
            "expected input 0 (%x) to be tensor<tokens x 2 x f32>, got float32[3]",
        ),
        (
            [np.zeros((3, 2), F32), np.zeros(4, np.int32)],
            "expected input 1 (%p) to be tensor<tokens x i32> with tokens = 3, got int32[4]",
        ),
        (
            [[[1.0, 2.0]], np.zeros(1, np.int32)],
            "expected input 0 (%x) to be tensor<tokens x 2 x f32>, got <class 'list'>",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs: list, message: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        ir.interpret(ADD, inputs, weights=WEIGHTS)
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.ir:1:6: error: ")


def test_scaled_dimensions_bind() -> None:
    func = func_of("func @f(%x: tensor<tokens*2 x f32>, %y: tensor<tokens x f32>) { return }")
    assert ir.interpret(func, [np.zeros(6, F32), np.zeros(3, F32)]) == []
    for sizes in ((5, 3), (6, 2)):
        with pytest.raises(DiagnosticError, match="expected input"):
            ir.interpret(func, [np.zeros(n, F32) for n in sizes])


def test_missing_weight_is_named() -> None:
    with pytest.raises(DiagnosticError) as caught:
        ir.interpret(ADD, [np.zeros((1, 2), F32), np.zeros(1, np.int32)], weights={"biass": WEIGHTS["bias"]})
    assert "f.ir:2:8: error: no weight is named 'bias'; did you mean 'biass'?" in str(caught.value)


KV = "kv<1 x 2 x f16>"
ROWS = "tensor<tokens x 1 x 2 x f32>"
APPEND = f"({KV}, {ROWS}, {ROWS}, tensor<tokens x i32>, tensor<tokens x i32>) -> {KV}"
CACHE = f"""func @f(%k: {ROWS}, %p: tensor<tokens x i32>, %s: tensor<tokens x i32>) {{
  %a = kv.state {{symbol = @layers.0}} : () -> {KV}
  %b = kv.state {{symbol = @layers.1}} : () -> {KV}
  %c = kv.append %a, %k, %k, %p, %s : {APPEND}
  return
}}"""
FUSED = f"""func @f(%k: {ROWS}, %p: tensor<tokens x i32>, %s: tensor<tokens x i32>) {{
  %a = kv.state {{symbol = @layers.0}} : () -> {KV}
  %b = kv.state {{symbol = @layers.1}} : () -> {KV}
  %c = tensor.fused %k, %b, %a, %p, %s {{kind = "rope_append"}} ({{
    ^(%k: {ROWS}, %x: {KV}, %y: {KV}, %p: tensor<tokens x i32>, %s: tensor<tokens x i32>):
      %z = kv.append %y, %k, %k, %p, %s : {APPEND}
      tensor.yield %z : ({KV}) -> ()
  }}) : ({ROWS}, {KV}, {KV}, tensor<tokens x i32>, tensor<tokens x i32>) -> {KV}
  return
}}"""


@pytest.mark.parametrize("text", [CACHE, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("shared", [False, True])
def test_newest_cache_is_written_back(text: str, shared: bool) -> None:
    """Also when both layers were given one and the same object, and when the append is inside of a region."""
    func = func_of(text)
    empty = KVState.zeros(2, 4, 1, 2, np.float16)
    states = {"layers.0": empty, "layers.1": empty if shared else KVState.zeros(2, 4, 1, 2, np.float16)}
    k = np.array([[[1.0, 2.0]], [[3.0, 1 / 3]]], F32)
    ir.interpret(func, [k, np.array([3, 0], np.int32), np.array([0, 1], np.int32)], states=states)
    assert not empty.keys.any()  # what was given is left alone
    assert states["layers.0"].keys[0, 3, 0].tolist() == [1.0, 2.0]
    assert states["layers.0"].values[1, 0, 0].tolist() == [3.0, float(np.float16(1 / 3))]
    assert states["layers.0"].keys.sum() == k.astype(np.float16).sum()
    assert not states["layers.1"].keys.any()


def test_steps_follow_each_other_through_states() -> None:
    func = func_of(CACHE)
    states = zero_states(func, slots=1, ctx=4)
    assert sorted(states) == ["layers.0", "layers.1"]
    assert states["layers.0"].keys.shape == (1, 4, 1, 2)
    assert states["layers.0"].dtype == np.float16
    for position in range(3):
        k = np.full((1, 1, 2), position + 1, F32)
        ir.interpret(func, [k, np.array([position], np.int32), np.zeros(1, np.int32)], states=states)
    assert states["layers.0"].keys[0, :, 0, 0].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("position", "slot", "where"), [(4, 0, "slot 0, position 4"), (0, 2, "slot 2, position 0"), (-1, 0, "position -1")]
)
def test_rows_outside_of_the_cache(position: int, slot: int, where: str) -> None:
    states = {f"layers.{i}": KVState.zeros(2, 4, 1, 2, np.float16) for i in range(2)}
    with pytest.raises(DiagnosticError) as caught:
        inputs = [np.zeros((1, 1, 2), F32), np.array([position], np.int32), np.array([slot], np.int32)]
        ir.interpret(func_of(CACHE), inputs, states=states)
    assert f"'kv.append' row 0 goes to slot {slot}, position {position}" in str(caught.value)
    assert where in str(caught.value)
    assert str(caught.value).startswith("f.ir:4:8: error")


def test_missing_state_is_named() -> None:
    inputs = [np.zeros((1, 1, 2), F32), np.zeros(1, np.int32), np.zeros(1, np.int32)]
    with pytest.raises(DiagnosticError, match=r"no kv state is named 'layers\.0'"):
        ir.interpret(func_of(CACHE), inputs)


def test_row_number_outside_of_the_table() -> None:
    func = func_of(
        "func @f(%i: tensor<tokens x i32>, %t: tensor<3 x 2 x f32>) -> tensor<tokens x 2 x f32> {\n"
        "  %y = tensor.embed %i, %t : (tensor<tokens x i32>, tensor<3 x 2 x f32>) -> tensor<tokens x 2 x f32>\n"
        "  return %y : tensor<tokens x 2 x f32>\n}"
    )
    with pytest.raises(DiagnosticError, match=r"'tensor\.embed' expected ids in 0 \.\. 2, got 3"):
        ir.interpret(func, [np.array([0, 3], np.int32), np.zeros((3, 2), F32)])


@pytest.mark.parametrize(
    "op",
    [
        '%x = plan.input {which = "ids"} : () -> buffer<i32>',
        "%t = tile.thread_id : () -> index",
        "tile.barrier : () -> ()",
    ],
)
def test_ops_of_a_team_are_refused(op: str) -> None:
    func = func_of(f"func @f() {{\n  {op}\n  return\n}}")
    with pytest.raises(DiagnosticError, match=r"runs on a team of threads: use ir\.tile_interpreter"):
        ir.interpret(func, [])


def test_regions_run_in_the_environment_around() -> None:
    """Regions that are not isolated read values defined outside; loops run a block again and again."""
    func = func_of(
        "func @f(%n: index) -> index {\n"
        "  %zero = tile.constant {value = 0} : () -> index\n"
        "  %one = tile.constant {value = 1} : () -> index\n"
        "  %s = tile.for %zero, %n, %one, %zero ({\n"
        "    ^(%i: index, %acc: index):\n"
        "      %a = tile.add %acc, %n : (index, index) -> index\n"
        "      tile.yield %a : (index) -> ()\n"
        "  }) : (index, index, index, index) -> index\n"
        "  return %s : index\n}"
    )
    environment = Environment({}, {})
    from ir.ops.tile_control import ForOp

    def run_for(op: ForOp, values: list, context: Environment) -> tuple:
        lower, upper, step, *carried = values
        for i in range(int(lower), int(upper), int(step)):
            carried = list(context.run_region(op.regions[0], [np.int64(i), *carried]))
        return tuple(carried)

    original: Callable | None = ForOp.__dict__.get("interpret")
    if original is None:
        patch = pytest.MonkeyPatch()
        patch.setattr(ForOp, "interpret", run_for, raising=False)
        try:
            (total,) = environment.run_block(func.block, [np.int64(5)])
        finally:
            patch.undo()
    else:
        (total,) = environment.run_block(func.block, [np.int64(5)])
    assert total == 25
    assert environment.values[func.arguments[0]] == 5


def test_long_functions_do_not_recurse() -> None:
    lines = ["func @f(%v: tensor<2 x f32>) -> tensor<2 x f32> {"]
    lines += ["  %v0 = tensor.silu %v : (tensor<2 x f32>) -> tensor<2 x f32>"]
    lines += [f"  %v{i} = tensor.silu %v{i - 1} : (tensor<2 x f32>) -> tensor<2 x f32>" for i in range(1, 2500)]
    func = func_of("\n".join([*lines, "  return %v2499 : tensor<2 x f32>", "}"]))
    (result,) = ir.interpret(func, [np.ones(2, F32)])
    assert result.shape == (2,)


def test_functions_of_a_module() -> None:
    module = ir.parse("func @prefill() { return }\nfunc @decode() { return }")
    assert module.function("decode").sym_name == "decode"
    with pytest.raises(DiagnosticError) as caught:
        module.function("decod")
    assert "no function @decod; did you mean 'decode'?" in str(caught.value)
    assert "one of its functions: @prefill, @decode" in str(caught.value)
