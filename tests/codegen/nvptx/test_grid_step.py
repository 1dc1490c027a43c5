"""Whole models lowered for a GPU: launches interpreted one after another, logits as the graph's interpreter has."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from codegen.nvptx.emitters.attention import splits_of
from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import GridSpec, LoweredGridStep, lower_grid_step, program_specs
from ir import print_module
from ir.diagnostics import DiagnosticError
from ir.interpreter import interpret, zero_states
from ir.ops.builtin import ModuleOp
from ir.parser import parse
from ir.size_text import GRID_SIZES, check_size, evaluate_size
from passes.pass_manager import PassManager
from passes.pipelines import gpu_pipeline
from runtime.cuda.sizes import SIZES, SizeExpr
from tests.codegen.harness import Batch
from tests.codegen.models import Model, Shape, build_model
from tests.codegen.nvptx.grid_machine import GridMachine, stored_weights

CTX, SLOTS = 64, 2
SMALL = Shape(hidden=64, ffn=64, vocab=70, dim=16)
CASES: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "dense": (replace(SMALL, layers=2, q_heads=2, kv_heads=1, bias=True), ()),
    "w4": (replace(SMALL, norms="row", clip=0.9, window=7), ("w4a16-g32", "kv8")),
    "int8": (replace(SMALL, hidden=128, ffn=128, dim=32, norms="head"), ("w4a8-g32", "kv4")),
    "experts": (replace(SMALL, experts=5, top_k=2), ("w4a16-g32",)),
    "fp8": (replace(SMALL, experts=3, top_k=2), ("fp8",)),
    "wgmma": (replace(SMALL, layers=2, q_heads=2, kv_heads=1, bias=True), ()),
    "wgmma experts": (replace(SMALL, experts=5, top_k=2), ("w4a16-g32",)),
    "wgmma int8": (replace(SMALL, layers=1, q_heads=2, kv_heads=1), ("w8a8",)),
    "wgmma int8 experts": (replace(SMALL, layers=1, q_heads=2, kv_heads=1, experts=3, top_k=2), ("w4a8-g32",)),
    "wgmma fp8 activations": (replace(SMALL, q_heads=1, kv_heads=1, dim=144), ("w8a8-fp8",)),
}
OPTIONS = GridOptions(multiprocessors=4, split_positions=32, prefill_tokens=16)
PROGRAMS = (GridSpec("decode", 8, 8), GridSpec("prefill", 16, 0))
# Of the largest logit: activations are rounded to bf16 in other places, and to int8 a code apart.
TOLERANCE = {
    "dense": 0.01,
    "w4": 0.015,
    "int8": 0.04,
    "experts": 0.01,
    "fp8": 0.01,
    "wgmma": 0.01,
    "wgmma experts": 0.015,
    "wgmma int8": 0.04,
    "wgmma int8 experts": 0.04,
    "wgmma fp8 activations": 0.04,
}


@cache
def lowered(case: str) -> tuple[Model, LoweredGridStep]:
    shape, recipe = CASES[case]
    model = build_model(shape)
    PassManager(gpu_pipeline(recipe=recipe)).run(model.module)
    options = replace(OPTIONS, hopper=case.startswith("wgmma"))
    return model, lower_grid_step(model.step, options, programs=PROGRAMS)


def batch(*runs: tuple[int, int, int], rows: list[int] | None = None) -> Batch:
    """Tokens of runs (slot, first position, count); logits of the last token of each run unless `rows` says which."""
    positions = np.concatenate([np.arange(first, first + count) for _, first, count in runs])
    slots = np.concatenate([np.full(count, slot) for slot, _, count in runs])
    last = np.cumsum([count for *_, count in runs]) - 1
    return Batch((positions * 7 + slots * 3) % 70, positions, slots, last if rows is None else np.array(rows))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_graph(case: str) -> None:
    """Two prompts in one step, single tokens of both, a prompt that goes on in pieces; the arena holds NaN before."""
    model, step = lowered(case)
    machine = GridMachine(step, model, ctx=CTX, slots=SLOTS)
    states = zero_states(model.step, SLOTS, CTX)
    steps = [batch((0, 0, 11), (1, 0, 3)), batch((1, 3, 1), (0, 11, 1)), batch((0, 12, 3), (1, 4, 6), rows=[8, 0])]
    for one in steps if case == "w4" else steps[: 1 if case.startswith("wgmma") else 2]:  # these differ in prompts
        (want,) = interpret(model.step, one.arrays, weights=model.weights, states=states)
        got = machine.run(one)
        assert got.shape == want.shape and not np.isnan(got).any()
        assert np.abs(got - want).max() <= TOLERANCE[case] * np.abs(want).max()


def test_prompts_take_products_of_warpgroups_on_the_weights_of_decoding() -> None:
    """Where the architecture has them, dense ones and those of experts; the weights lie as for any GPU."""
    dense = ("wgmma", "wgmma int8", "wgmma fp8 activations")
    experts = ("wgmma experts", "wgmma int8 experts")
    kinds = [(case, "decode_", "wgmma_") for case in dense] + [(e, "experts_", "experts_wgmma_") for e in experts]
    for case, few, many in kinds:
        _, step = lowered(case)
        names = [[launch.kernel for launch in program.launches] for program in step.programs]
        assert sum(name.startswith(few) for name in names[0]) == sum(name.startswith(many) for name in names[1]) > 0
        assert not any("wgmma" in name for name in names[0]) and not any(name.startswith("gemm") for name in names[1])
    # behind a norm in bf16 rows come by bulk copies; those of attention and of a gate do not
    assert sum("_tiled" in launch.kernel for launch in lowered("wgmma")[1].programs[1].launches) == 5
    wide = replace(OPTIONS, hopper=True, prefill_tokens=512)
    assert [s.max_tokens for s in program_specs(wide)] == [8, 16, 64, 512]
    model, plain = lowered("dense")[0], lowered("dense")[1]
    assert stored_weights(plain, model) == stored_weights(lowered("wgmma")[1], model)


def test_attention_of_few_tokens_is_split_by_context_and_multiprocessors() -> None:
    """A short cache is not cut into slivers; few tokens fill the multiprocessors; what the parts take is bounded."""
    options = GridOptions(multiprocessors=132)
    most, text = splits_of(8, "tokens", options)
    parts = {
        (tokens, ctx): evaluate_size(text, {"tokens": tokens, "ctx": ctx})
        for tokens in (1, 3, 8)
        for ctx in (64, 512, 8192)
    }
    assert [parts[1, ctx] for ctx in (64, 512, 8192)] == [1, 4, 33]
    for (tokens, ctx), splits in parts.items():
        assert splits == 1 or splits * options.split_positions < ctx + options.split_positions
        assert ctx < 8192 or splits * tokens * 8 >= 2 * 132
        assert splits * tokens <= most + tokens - 1
    assert splits_of(8, "tokens", GridOptions(multiprocessors=58))[0] == 15


def test_programs_that_cannot_be() -> None:
    """A ring of the newest positions holds those of 512 tokens and what the first of them reads."""
    model, _ = lowered("int8")
    with pytest.raises(
        DiagnosticError, match=r"steps of 513 tokens \(program 'prefill'\) with a KV cache of q4_sym"
    ) as caught:
        lower_grid_step(model.step, GridOptions(prefill_tokens=513))
    assert "at most 512 tokens" in str(caught.value)
    with pytest.raises(DiagnosticError, match="multiprocessors of a program for GPUs is 0"):
        lower_grid_step(model.step, GridOptions(multiprocessors=0))


def test_programs_of_few_and_of_many_tokens_agree() -> None:
    model, step = lowered("w4")
    few, many = (GridMachine(step, model, ctx=CTX, slots=SLOTS) for _ in range(2))
    one = batch((0, 0, 5), (1, 0, 2))
    want = many.run(one, "prefill")
    np.testing.assert_allclose(few.run(one, "decode"), want, rtol=0, atol=TOLERANCE["w4"] * np.abs(want).max())
    assert few.launches < many.launches + 2 * CASES["w4"][0].layers


def test_plans_print_parse_and_name_their_grids() -> None:
    _, step = lowered("dense")
    text = print_module(ModuleOp.create(step.programs[0].func))
    assert print_module(parse(text)) == text
    assert [(p.name, p.piece_tokens, p.replays) for p in step.programs] == [("decode", 0, True), ("prefill", 64, False)]
    assert [(s.name, s.max_tokens) for s in program_specs(OPTIONS)] == [
        ("decode", 8),
        ("decode_16", 16),
        ("prefill", 16),
    ]
    launches = [line for line in text.splitlines() if "plan.launch" in line]
    assert launches and all('grid = "' in line for line in launches)
    assert sum("kernel = @add_add_rms_cast" in line for line in launches) == 3  # residuals with the norms behind them
    assert "plan.kv_plane {layer = 1, plane = 1, position_bytes = 32}" in text


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("nf4", "weights in"),
        ("rotate64,w4a16-g32", "rotated activations have no kernel on GPUs"),
        ("kv2", "no KV cache of q2_zp"),
    ],
)
def test_what_gpus_have_no_kernel_for_is_named(recipe: str, said: str) -> None:
    model = build_model(replace(SMALL, hidden=128, ffn=128, dim=32))
    PassManager(gpu_pipeline(recipe=recipe.split(","))).run(model.module)
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
