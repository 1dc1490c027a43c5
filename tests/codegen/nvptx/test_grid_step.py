"""Whole models lowered for a GPU: launches interpreted one after another, logits as the graph's interpreter has."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import LoweredGridStep, lower_grid_step
from ir import print_module
from ir.diagnostics import DiagnosticError
from ir.formats import BF16
from ir.interpreter import interpret
from ir.ops.builtin import ModuleOp
from ir.parser import parse
from ir.size_text import GRID_SIZES, check_size, evaluate_size
from passes.pass_manager import PassManager
from passes.pipelines import gpu_pipeline
from runtime.cuda.sizes import SIZES, SizeExpr
from tests.codegen.harness import Batch
from tests.codegen.models import Model, Shape, build_model
from tests.codegen.nvptx.grid_machine import GridMachine

CTX, SLOTS = 64, 2
SMALL = Shape(hidden=64, ffn=64, vocab=70, dim=16)
CASES: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "dense": (replace(SMALL, layers=2, q_heads=2, kv_heads=1, bias=True), ()),
    "w4": (replace(SMALL, norms="row", clip=0.9, window=7), ("w4a16-gpu",)),
    "experts": (replace(SMALL, experts=5, top_k=2), ("w4a16-gpu",)),
    "w8": (replace(SMALL, norms="head"), ("w8a16",)),
}
OPTIONS = GridOptions(splits=2, prefill_tokens=16)
TOLERANCE = 0.01  # of the largest logit: bf16 activations, rounded in other places


@cache
def lowered(case: str) -> tuple[Model, LoweredGridStep]:
    shape, recipe = CASES[case]
    model = build_model(shape)
    PassManager(gpu_pipeline(recipe=recipe)).run(model.module)
    return model, lower_grid_step(model.step, OPTIONS)


def batch(*runs: tuple[int, int, int], rows: list[int] | None = None) -> Batch:
    """Tokens of runs (slot, first position, count); logits of the last token of each run unless `rows` says which."""
    positions = np.concatenate([np.arange(first, first + count) for _, first, count in runs])
    slots = np.concatenate([np.full(count, slot) for slot, _, count in runs])
    last = np.cumsum([count for *_, count in runs]) - 1
    return Batch((positions * 7 + slots * 3) % 70, positions, slots, last if rows is None else np.array(rows))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_graph(case: str) -> None:
    """A prompt in chunks beside another, a prompt that ends while others are decoded, single tokens; stale arena."""
    model, step = lowered(case)
    machine = GridMachine(step, model, ctx=CTX, slots=SLOTS)
    states = model.states(SLOTS, CTX, BF16.dtype)
    for one in (batch((0, 0, 11), (1, 0, 3)), batch((1, 3, 1), (0, 11, 1)), batch((0, 12, 3), (1, 4, 6), rows=[8, 0])):
        (want,) = interpret(model.step, one.arrays, weights=model.weights, states=states)
        got = machine.run(one)
        assert got.shape == want.shape and not np.isnan(got).any()
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def test_programs_of_few_and_of_many_tokens_agree() -> None:
    model, step = lowered("w4")
    few, many = (GridMachine(step, model, ctx=CTX, slots=SLOTS) for _ in range(2))
    one = batch((0, 0, 5), (1, 0, 2))
    want = many.run(one, "prefill")
    np.testing.assert_allclose(few.run(one, "decode"), want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert few.launches < many.launches + 2 * CASES["w4"][0].layers


def test_plans_print_parse_and_name_their_grids() -> None:
    _, step = lowered("dense")
    text = print_module(ModuleOp.create(step.programs[0].func))
    assert print_module(parse(text)) == text
    assert [p.name for p in step.programs] == ["decode", "decode_16", "prefill"]
    assert [(p.piece_tokens, p.replays) for p in step.programs] == [(0, True), (0, True), (64, False)]
    launches = [line for line in text.splitlines() if "plan.launch" in line]
    assert launches and all('grid = "' in line for line in launches)
    assert "plan.kv_plane {layer = 1, plane = 1, position_bytes = 32}" in text


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (("w4a8-g32",), "activations in q8_sym<group=128, scale=f32> have no kernel on GPUs"),
        (("w4a16-g32",), "q6_sym<group=32, scale=f16> has no product on GPUs; expected q4_sym or q8_sym"),
        (("kv2",), "no KV cache of q2_zp"),
    ],
)
def test_what_gpus_have_no_kernel_for_is_named(recipe: tuple[str, ...], said: str) -> None:
    model = build_model(replace(SMALL, hidden=128, ffn=128, dim=32))
    PassManager(gpu_pipeline(recipe=recipe)).run(model.module)
    with pytest.raises(DiagnosticError) as caught:
        lower_grid_step(model.step, OPTIONS)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["ceil(tokens, 16) * 32", "min(rows * 2, ctx) + max(slots, 3)", "pieces", "tokens - 1", "x"]
)
def test_compiler_and_runtime_read_sizes_alike(text: str) -> None:
    assert GRID_SIZES == SIZES
    sizes: dict[str, int] = dict(zip(GRID_SIZES, (37, 5, 64, 2, 9), strict=True))
    if check_size(text):
        with pytest.raises(Exception, match="is no size"):
            SizeExpr(text)
    else:
        assert SizeExpr(text).evaluate(sizes) == evaluate_size(text, sizes)
