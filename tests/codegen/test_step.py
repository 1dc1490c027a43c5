"""Compiled steps against the meaning of the graph: generated shapes, ragged batches, both programs, several CPUs."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_targets
from codegen.build_pipeline import default_pipeline
from codegen.compile_step import CompiledStep, compile_step, program_specs
from codegen.object_cache import ObjectCache
from ir import interpret
from ir.formats import BF16
from passes.pass_manager import PassManager
from tests.codegen.harness import CTX, SLOTS, Batch, host_target, opt_level, running
from tests.codegen.models import Model, Shape, build_model

# Largest difference of a logit as a share of the largest logit. f32: sums in another order, at most a few hundred
# terms. bf16: activations are rounded to 8 bits before each product, here and in the reference alike; where the
# reference rounds a sum that was formed in another order the other way, one unit in 2**8 moves.
TOLERANCE = {"f32": 2e-5, "bf16": 4e-2}

SHAPES = [
    Shape(),
    Shape(layers=2, q_heads=4, kv_heads=4, norms="head", element=BF16),
    Shape(hidden=80, ffn=100, vocab=37, bias=True),
    Shape(experts=4, top_k=2, norms="head", element=BF16),
    Shape(experts=5, top_k=5, q_heads=2, kv_heads=1, dim=32, ffn=48, norms="row", clip=0.8),
    Shape(window=5, q_heads=8, kv_heads=1, dim=24, hidden=48),
]
OPTIMIZED = [(2, "f32"), (3, "bf16"), (4, "f32"), (5, "bf16")]  # as builds are: dense and experts, in both types


@cache
def compiled(index: int, dtype: str, without: tuple[str, ...] = ()) -> tuple[Model, Model, CompiledStep]:
    """(model as imported, model after the passes, compiled step)."""
    target = host_target(without)
    original, lowered = build_model(SHAPES[index], seed=index), build_model(SHAPES[index], seed=index)
    PassManager(default_pipeline(target, dtype)).run(lowered.module)
    level = opt_level((index, dtype) in OPTIMIZED)
    return original, lowered, compile_step(lowered.step, target, cache=ObjectCache(), opt_level=level)


@st.composite
def batches(draw: st.DrawFn) -> list[Batch]:
    """A few steps over two sequences: chunks and single tokens mixed, any order of the two in a step."""
    lengths = [0] * SLOTS
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        ids, positions, slots = [], [], []
        for slot in draw(st.permutations(range(SLOTS))):
            count = min(draw(st.sampled_from([0, 1, 1, 2, 5, 7, 13])), CTX - lengths[slot])
            ids += draw(st.lists(st.integers(0, 36), min_size=count, max_size=count))
            positions += range(lengths[slot], lengths[slot] + count)
            slots += [slot] * count
            lengths[slot] += count
        if not ids:
            continue
        rows = draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=len(ids)))
        steps.append(Batch(*(np.array(a, np.int32) for a in (ids, positions, slots, rows))))
    return steps


def agree(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    assert got.shape == want.shape and not np.isnan(got).any()
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_native_code_equals_the_reference(index: int, dtype: str) -> None:
    original, lowered, step = compiled(index, dtype)

    @settings(max_examples=6)
    @given(batches(), st.sampled_from(["decode", "prefill"]), st.sampled_from([1, 2]))
    def check(steps: list[Batch], program: str, threads: int) -> None:
        states = original.states(SLOTS, CTX) if dtype == "f32" else lowered.states(SLOTS, CTX, BF16.dtype)
        model = original if dtype == "f32" else lowered
        with running(step, lowered, threads) as runner:
            for batch in steps:
                limit = runner.programs[program].max_tokens
                chosen = program if len(batch.ids) <= limit else "prefill"
                (want,) = interpret(model.step, batch.arrays, weights=model.weights, states=states)
                agree(runner.native(batch, chosen), want, dtype)

    check()


def test_a_cpu_without_avx512_computes_the_same() -> None:
    original, lowered, step = compiled(3, "f32", ("avx512",))
    _, lowered16, step16 = compiled(3, "bf16", ("avx512",))
    batch = chunk(0, 0, 11)
    (want,) = interpret(original.step, batch.arrays, weights=original.weights, states=original.states(SLOTS, CTX))
    with running(step, lowered, 2) as runner:
        agree(runner.native(batch, "prefill"), want, "f32")
    states = lowered16.states(SLOTS, CTX, BF16.dtype)
    (want,) = interpret(lowered16.step, batch.arrays, weights=lowered16.weights, states=states)
    with running(step16, lowered16, 2) as runner:
        agree(runner.native(batch, "decode"), want, "bf16")
    assert "zmm" not in step.llvm_text and "dpbf16ps" not in step16.llvm_text


def chunk(slot: int, start: int, count: int, seed: int = 0) -> Batch:
    """`count` consecutive tokens of one slot, logits of all."""
    ids = np.random.default_rng([seed, slot]).integers(0, 36, CTX)[start : start + count]
    at = np.arange(start, start + count)
    return Batch(ids, at, np.full(count, slot), np.arange(count))


def joined(*parts: Batch) -> Batch:
    """Several batches as one ragged step."""
    arrays = [np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Batch)]
    return Batch(*arrays[:3], np.arange(len(arrays[0])))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("index", [1, 3, 5])
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_token_by_token(index: int, dtype: str) -> None:
    _, lowered, step = compiled(index, dtype)
    with running(step, lowered, 2) as alone, running(step, lowered, 1) as together:
        want = alone.native(chunk(0, 0, 50), "prefill")
        one = [alone.native(chunk(1, i, 1), "decode") for i in range(45)]
        got = together.native(joined(chunk(1, 0, 45), chunk(0, 0, 50)), "prefill")
    np.testing.assert_array_equal(got[:45], np.concatenate(one))
    np.testing.assert_array_equal(got[45:], want)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("index", [2, 3, 4])
def test_tile_ir_means_what_the_native_code_computes(index: int, dtype: str) -> None:
    """The interpreter runs two threads with race and bounds checks; f32 agrees to the bit where no FMA is split."""
    _, lowered, step = compiled(index, dtype)
    steps = [joined(chunk(0, 0, 5), chunk(1, 0, 2)), joined(chunk(0, 5, 1), chunk(1, 2, 1))]
    with running(step, lowered, 2) as native, running(step, lowered, 1) as meant:
        for batch, program in zip(steps, ("prefill", "decode"), strict=True):
            want = native.native(batch, program)
            got = meant.interpreted(batch, program, 2)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("index", "experts_used"), [(3, "few"), (4, "all")])
def test_idle_and_crowded_experts(index: int, experts_used: str) -> None:
    """All tokens on the same experts, the others idle; and every expert at work."""
    if experts_used == "few":  # the same token in every row: the router decides alike
        batch = Batch(np.full(20, 7), np.arange(20), np.zeros(20, int), np.arange(20))
    else:
        batch = chunk(0, 0, 20)
    original, lowered, step = compiled(index, "f32")
    (want,) = interpret(original.step, batch.arrays, weights=original.weights, states=original.states(SLOTS, CTX))
    with running(step, lowered, 2) as runner:
        agree(runner.native(batch, "prefill"), want, "f32")


@pytest.mark.parametrize(
    "name",
    [n for n in hw_targets.names() if n != "host" and not n.startswith("cuda") and not hw_targets.load(n).is_machine],
)
def test_every_shipped_target_can_be_built_for(name: str) -> None:
    """Cross-compiling needs no such machine; the object says whose code it is. Prompts' code differs in its tiles.

    What a CPU lacks LLVM refuses at any level, so the two extremes alone are optimized.
    """
    target = hw_targets.load(name)
    model = build_model(SHAPES[3])
    PassManager(default_pipeline(target, "bf16")).run(model.module)
    decode = program_specs(frozenset(target.llvm_features))[:1]
    level = opt_level(name in ("aarch64", "x86-64-v4-bf16"))
    step = compile_step(model.step, target, programs=decode, cache=ObjectCache(), opt_level=level)
    machine = {"x86_64": 62, "aarch64": 183}[target.arch]  # e_machine of ELF
    assert step.object_code[:4] == b"\x7fELF" and int.from_bytes(step.object_code[18:20], "little") == machine
