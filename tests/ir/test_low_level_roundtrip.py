"""The plan and tile level of whole models as text: printed, parsed, verified, printed the same."""

from __future__ import annotations

import pytest

import ir
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from tests.passes.plan_samples import SHAPES, plan_and_tile


@pytest.mark.parametrize("name", SHAPES)
def test_plans_and_kernels_survive_text(name: str) -> None:
    """Kernels of one model only: they are long, and all models have the same ops in them."""
    for module in plan_and_tile(name)[: 2 if name == "experts" else 1]:
        ir.verify(module)
        text = ir.print_module(module)
        again = ir.parse(text)
        ir.verify(again)
        assert ir.print_module(again) == text
        assert ir.structural_equal(module, again, locations=True) is None


def test_text_reads_like_a_plan() -> None:
    """What a reader sees: sizes and places by name, weights under their names in the model."""
    plan, tile = (ir.print_module(module) for module in plan_and_tile("experts"))
    assert 'plan.size {which = "tokens"} : () -> index' in plan
    assert "plan.barrier" in plan and "func @decode()" in plan and "func @prefill()" in plan
    assert "plan.weight {symbol = @lm_head," in plan
    assert "tile.dot2" in tile and "tile.for" in tile and "%x: buffer<" in tile


def test_a_broken_kernel_is_refused_with_its_neighbourhood() -> None:
    _, tile = plan_and_tile("dense")
    text = ir.print_module(next(kernel for kernel in tile.functions if "rms" in kernel.sym_name))
    wrong = text.replace('kind = "add"', 'kind = "mul"', 1)
    with pytest.raises(DiagnosticError) as caught:
        ir.verify(ir.parse(wrong, "tile.ir"))
    line = wrong[: wrong.index('"mul"')].count("\n") + 1
    message = str(caught.value)
    assert f"tile.ir:{line}:" in message and "'tile.reduce' expected kind add or max, got 'mul'" in message
    assert "> %" in message and message.count("tile.") >= 5  # the ops around it


def test_modules_are_made_of_the_functions_once() -> None:
    plan, tile = plan_and_tile("dense")
    assert isinstance(plan, ModuleOp) and [f.sym_name for f in plan.functions] == ["decode", "prefill"]
    assert len({f.sym_name for f in tile.functions}) == len(list(tile.functions)) > 10
