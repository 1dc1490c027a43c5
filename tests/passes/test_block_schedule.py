"""The block schedule: FlexGen's order of events gives a timeline worked out by hand, and every block is sound."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.cost_model import Work
from hw_targets.memory import Link, MemoryTier
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import simulate
from hw_targets.target import ComputeUnit, Target
from ir.ops.builtin import ModuleOp
from ir.ops.plan_stream import ComputeOp, PrefetchOp, StoreOp
from ir.stream_interpreter import interpret_stream
from passes.schedule.block_schedule import BlockLayer, BlockProblem, choose_block, emit_block
from passes.schedule.check_stream import check_stream
from passes.schedule.stream_problem import Piece

DEVICE = Target(
    "device",
    "10 operations and 10 bytes a second",
    "x86_64-unknown-linux-gnu",
    "x86-64",
    frozenset(),
    units=(ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 10.0),)),),
    tiers=(MemoryTier("hbm", 1 << 20), MemoryTier("dram", 1 << 30)),
    links=(Link("pcie", "dram", "hbm", 10.0),),
)


def block(batches: int = 2, tokens: int = 1, new: int = 10) -> BlockProblem:
    """Two layers: 20 bytes of weights (2 s), 10 bytes of keys and values a batch (1 s), 10 operations a batch (1 s)."""
    layers = tuple(
        BlockLayer(f"l{j}", Work(10.0, "f32"), (Piece(f"l{j}.w", 20, "dram", "pcie"),), 10, new) for j in range(2)
    )
    return BlockProblem("gpu", "hbm", layers, batches, tokens, "dram", "pcie")


def test_flexgen_by_hand() -> None:
    """Weights whole in the first batch, everything waited for at the end of a step, as FlexGen does.

    0 .. 3  weights and cache of the first step share the link: the cache (10 bytes) is there at 2, the weights at 3
    3 .. 6  step 0,0: 20 bytes for layer 1 and 10 for batch 1 share the link until 6; computed until 4
    6 .. 7  step 0,1: the cache of 1,0 comes, that of 0,0 is stored, both beside the computation
    7 .. 8  step 1,0; 8 .. 9 step 1,1; then the last new keys and values are stored until 10
    """
    timeline = simulate(emit_block(block(), weights="first", sync="each"), DEVICE)
    found = [(op.name, round(op.start, 6), round(op.end, 6)) for op in timeline.ops]
    assert found == [
        ("load l0.w", 0, 3), ("load l0.kv.0", 0, 2),
        ("load l1.w", 3, 6), ("load l0.kv.1", 3, 5), ("l0", 3, 4),
        ("load l1.kv.0", 6, 7), ("store l0.kv.0.new", 6, 7), ("l0", 6, 7),
        ("load l1.kv.1", 7, 8), ("store l0.kv.1.new", 7, 8), ("l1", 7, 8),
        ("store l1.kv.0.new", 8, 9), ("l1", 8, 9), ("store l1.kv.1.new", 9, 10),
    ]  # fmt: skip
    assert timeline.seconds == pytest.approx(10.0)


def test_long_copies_run_on_under_several_batches() -> None:
    """Four batches of 1 s, weights of 3 s. FlexGen's way waits for them in the first batch; waiting only for what is
    needed, or a part in each batch, hides them."""
    layers = tuple(BlockLayer(f"l{j}", Work(10.0, "f32"), (Piece(f"l{j}.w", 30, "dram", "pcie"),)) for j in range(2))
    choice = choose_block(BlockProblem("gpu", "hbm", layers, batches=4), DEVICE)
    seconds = {(w, s): t for w, s, t in choice.tried}
    assert seconds["first", "each"] == pytest.approx(3 + 3 + 3 + 4)
    assert seconds["first", "needed"] == seconds["spread", "needed"] == pytest.approx(3 + 4 + 4)
    assert (choice.weights, choice.sync, choice.timeline.seconds) == ("spread", "needed", pytest.approx(11.0))
    assert plan_bound(choice.program, DEVICE).seconds == pytest.approx(11.0)


def test_weights_are_copied_once_for_all_batches() -> None:
    """As many bytes for four batches as for one; keys and values grow with the batches."""
    for batches in (1, 4):
        for way in ("first", "spread"):
            program = emit_block(block(batches), weights=way)
            sizes = {op.out: op.bytes for op in program.walk() if op.name == "plan.segment"}  # type: ignore[attr-defined]
            loads = [op for op in program.walk() if isinstance(op, PrefetchOp)]
            names = {op.segment: op.segment.defining_op().attributes["symbol"].name for op in loads}
            weights = sum(sizes[op.segment] for op in loads if ".w" in names[op.segment])
            caches = sum(sizes[op.segment] for op in loads if ".kv" in names[op.segment])
            assert (weights, caches) == (40, 20 * batches)


@st.composite
def blocks(draw: st.DrawFn) -> BlockProblem:
    layers = []
    for j in range(draw(st.integers(1, 3))):
        ways = draw(st.lists(st.sampled_from(["", "pcie"]), max_size=2))
        weights = tuple(
            Piece(f"l{j}.w{n}", draw(st.integers(0, 50)), "dram" if way else "hbm", way) for n, way in enumerate(ways)
        )
        cache, new = draw(st.integers(0, 30)), draw(st.integers(0, 10))
        layers.append(BlockLayer(f"l{j}", Work(float(draw(st.integers(0, 50))), "f32"), weights, cache, new))
    problem = BlockProblem(
        "gpu", "hbm", tuple(layers), draw(st.integers(1, 4)), draw(st.integers(1, 3)), "dram", "pcie"
    )
    if draw(st.booleans()):
        problem = dataclasses.replace(problem, cache_home="hbm", cache_over="")
    hidden = draw(st.sampled_from(["", "pcie"]))
    return dataclasses.replace(problem, hidden_bytes=draw(st.integers(0, 20)), hidden_home="dram", hidden_over=hidden)


@settings(max_examples=30, deadline=None)
@given(blocks(), st.sampled_from(["spread", "first"]), st.sampled_from(["needed", "each"]))
def test_every_block_is_sound(problem: BlockProblem, weights: str, sync: str) -> None:
    """The proof accepts it, it runs by its meaning, computes each layer for each batch, is never below its bound."""
    program = emit_block(problem, weights=weights, sync=sync)
    ir.verify(ModuleOp.create(program))
    assert [d.message for d in check_stream(program, DEVICE)] == []
    order = [kernel for _, kernel, _ in interpret_stream(program).computed]
    assert order == [
        layer.name for _ in range(problem.tokens) for layer in problem.layers for _ in range(problem.batches)
    ]
    timeline = simulate(program, DEVICE)
    assert timeline.seconds >= plan_bound(program, DEVICE).seconds * (1 - 1e-9)
    computed = sum(1 for op in program.walk() if isinstance(op, ComputeOp))
    assert computed == problem.tokens * len(problem.layers) * problem.batches
    stored = sum(1 for op in program.walk() if isinstance(op, StoreOp))
    parked = problem.hidden_over and problem.hidden_bytes and problem.batches > 1
    new = sum(1 for layer in problem.layers if layer.new_cache_bytes and problem.cache_over)
    assert stored == problem.tokens * problem.batches * (new + (len(problem.layers) if parked else 0))


def test_ways_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="expected weights of"):
        emit_block(block(), weights="last")
    with pytest.raises(ValueError, match="one batch, one token"):
        emit_block(dataclasses.replace(block(), batches=0))
