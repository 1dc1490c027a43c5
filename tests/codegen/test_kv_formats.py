"""Whole steps on low-bit KV caches: against their meaning, in the interpreter, alone and in batches, on other CPUs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from codegen.build_pipeline import default_pipeline
from codegen.compile_step import CompiledStep, compile_step, lower_step
from codegen.object_cache import ObjectCache
from ir import interpret
from ir.formats import F16, GroupedIntFormat, NumberFormat
from ir.interpreter import zero_states
from ir.ops.kv_cache import KVStateOp
from ir.rewriter import PatternRewriter
from ir.types import KVCacheType
from passes.pass_manager import PassManager
from passes.quantize.set_precision import set_cache
from tests.codegen.harness import CTX, SLOTS, host_target, opt_level, running
from tests.codegen.models import Model, Shape, build_model
from tests.codegen.test_step import chunk, joined


def codes(bits: int) -> GroupedIntFormat:
    return GroupedIntFormat(bits, 0, zero_point=bits == 2, scale=F16)


# (element, rotate, recent, key_group, the model); caches hold 64 positions, so windows are short
CACHES: dict[str, tuple[NumberFormat, int, int, int, Shape]] = {
    "f16": (F16, 0, 0, 0, Shape()),
    "q8": (codes(8), 0, 0, 0, Shape(layers=2, norms="head")),
    "q8 window": (codes(8), 8, 0, 0, Shape(window=5, q_heads=8, kv_heads=1, dim=24, hidden=48)),
    "q4": (codes(4), 16, 16, 0, Shape(q_heads=4, kv_heads=4)),
    "q4 window": (codes(4), 4, 16, 0, Shape(window=21, q_heads=3, kv_heads=1, dim=20, hidden=48)),
    "q2": (codes(2), 16, 16, 32, Shape(q_heads=2)),
}
# Largest difference of a logit as a share of the largest one. Kernels round queries and weights to eight bits, and
# where a key or value lies near the middle of two codes, the other one may be taken.
TOLERANCE = {"f16": 2e-4, "q8": 0.02, "q8 window": 0.02, "q4": 0.05, "q4 window": 0.05, "q2": 0.1}


OPTIMIZED = [("q8", ()), ("q2", ()), ("q4", ("avx512",))]  # as builds are


@cache
def compiled(name: str, without: tuple[str, ...] = ()) -> tuple[Model, CompiledStep]:
    element, rotate, recent, key_group, shape = CACHES[name]
    target, model = host_target(without), build_model(shape, seed=1)
    PassManager(default_pipeline(target, "f32")).run(model.module)
    type = KVCacheType(shape.kv_heads, shape.dim, element, rotate, recent, key_group)
    for op in list(model.step.walk()):
        if isinstance(op, KVStateOp):
            set_cache(op.cache, type, PatternRewriter())
    level = opt_level((name, without) in OPTIMIZED)
    return model, compile_step(model.step, target, cache=ObjectCache(), opt_level=level)


NARROW = [("q8 window", ("avx512",)), ("q4", ("avx512",)), ("q2", ("avx512",))]  # a CPU without 512-bit registers


@pytest.mark.parametrize(("name", "without"), [*((name, ()) for name in CACHES), *NARROW], ids=str)
def test_native_code_equals_the_reference(name: str, without: tuple[str, ...]) -> None:
    model, step = compiled(name, without)
    states = zero_states(model.step, SLOTS, CTX)
    batches = [joined(chunk(0, 0, 30), chunk(1, 0, 3)), chunk(0, 30, 1), joined(chunk(1, 3, 1), chunk(0, 31, 17))]
    with running(step, model, 2) as runner:
        for batch in batches:
            (want,) = interpret(model.step, batch.arrays, weights=model.weights, states=states)
            got = runner.native(batch, "prefill" if len(batch.ids) > 16 else "decode")
            assert not np.isnan(got).any()
            assert np.abs(got - want).max() <= TOLERANCE[name] * np.abs(want).max()


@pytest.mark.parametrize("name", CACHES)
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_token_by_token(name: str) -> None:
    model, step = compiled(name)
    with running(step, model, 2) as alone, running(step, model, 1) as together:
        want = alone.native(chunk(0, 0, 60), "prefill")
        one = [alone.native(chunk(1, i, 1), "decode") for i in range(55)]
        got = together.native(joined(chunk(1, 0, 55), chunk(0, 0, 60)), "prefill")
    np.testing.assert_array_equal(got[:55], np.concatenate(one))
    np.testing.assert_array_equal(got[55:], want)


@pytest.mark.parametrize(("name", "count"), [("q8", 3), ("q4 window", 18), ("q2", 32)])
def test_tile_ir_means_what_the_native_code_computes(name: str, count: int) -> None:
    """The interpreter runs two threads with race and bounds checks."""
    model, step = compiled(name)
    steps = [joined(chunk(0, 0, count), chunk(1, 0, 2)), joined(chunk(0, count, 1), chunk(1, 2, 1))]
    with running(step, model, 2) as native, running(step, model, 1) as meant:
        for batch, program in zip(steps, ("prefill", "decode"), strict=True):
            want = native.native(batch, program)
            got = meant.interpreted(batch, program, 2)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        np.testing.assert_array_equal(native.kv, meant.kv)


@pytest.mark.parametrize("name", ["q8", "q2"])
def test_no_kernel_and_no_arena_holds_a_second_copy(name: str) -> None:
    """What a step needs besides the cache is what it needs with a cache of floats."""
    floats = build_model(CACHES[name][-1], seed=1)
    PassManager(default_pipeline(host_target(), "f32")).run(floats.module)
    plain = lower_step(floats.step, frozenset(host_target().llvm_features))
    assert [p.arena_bytes for p in compiled(name)[1].programs] == [p.arena_bytes for p in plain.programs]
