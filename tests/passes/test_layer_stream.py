"""Layer streaming: every plan is sound and computes the same, the chosen depth is the best, cliffs are named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.cost_model import Work
from hw_targets.memory import Link, MemoryTier, Storage, StoragePoint
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import simulate
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.stream_interpreter import interpret_stream
from passes.schedule.check_stream import check_stream
from passes.schedule.layer_stream import choose_depth, cliffs, emit_layers
from passes.schedule.stream_problem import Layer, Piece, StreamProblem

DEVICE = Target(
    "device",
    "a device behind a link, and a drive",
    "x86_64-unknown-linux-gnu",
    "x86-64",
    frozenset(),
    units=(ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 1e3),)),),
    tiers=(MemoryTier("hbm", 10_000, read_bandwidth=1e5), MemoryTier("dram", 1 << 30)),
    links=(Link("pcie", "dram", "hbm", 100.0, latency_seconds=0.01),),
    storage=(Storage("ssd", 1 << 40, (StoragePoint(1, 1, 40.0), StoragePoint(1 << 20, 1, 50.0)), tier="hbm"),),
)


@st.composite
def problems(draw: st.DrawFn) -> StreamProblem:
    layers = []
    for i in range(draw(st.integers(1, 7))):
        pieces = []
        for k in range(draw(st.integers(0, 2))):
            way = draw(st.sampled_from(["", "pcie", "ssd"]))
            home = {"": "hbm", "pcie": "dram", "ssd": "ssd"}[way]
            pieces.append(Piece(f"layers.{i}.{k}", draw(st.integers(0, 300)), home, way))
        work = Work(float(draw(st.integers(0, 5000))), "f32", (("hbm", float(draw(st.integers(0, 500)))),), launches=1)
        layers.append(Layer(f"layers.{i}", work, tuple(pieces)))
    problem = StreamProblem("gpu", "hbm", tuple(layers), draw(st.integers(1, 3)))
    least = max(layer.streamed_bytes for layer in layers)
    room = draw(st.one_of(st.none(), st.integers(least, least * 3 + 1)))
    return dataclasses.replace(problem, slot_bytes=room, scratch_bytes=draw(st.sampled_from([0, 64])))


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 4))
def test_every_window_is_sound_and_computes_the_same(problem: StreamProblem, depth: int) -> None:
    program = emit_layers(problem, depth, problem.room(DEVICE))
    ir.verify(ModuleOp.create(program))
    assert list(check_stream(program, DEVICE)) == []
    home = sum(p.nbytes for layer in problem.layers for p in layer.pieces if p.home == "hbm")
    if problem.slot_bytes is not None:
        capacity = home + problem.scratch_bytes + problem.slot_bytes
        assert list(check_stream(program, DEVICE, {"hbm": capacity})) == []
    serial = emit_layers(problem, 0, problem.room(DEVICE))
    assert interpret_stream(program).computed == interpret_stream(serial).computed
    assert len(interpret_stream(serial).computed) == problem.steps * len(problem.layers)
    assert simulate(program, DEVICE).seconds >= plan_bound(program, DEVICE).seconds * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_chosen_depth_is_the_best_one_tried(problem: StreamProblem) -> None:
    choice = choose_depth(problem, DEVICE)
    first = simulate(emit_layers(problem, 1, problem.room(DEVICE)), DEVICE).seconds
    assert choice.timeline.seconds <= first
    assert choice.timeline.seconds <= min(s for _, s, _ in choice.tried) * (1 + 1e-3)
    assert list(check_stream(choice.program, DEVICE)) == []


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 600))
def test_more_room_is_never_slower(problem: StreamProblem, more: int) -> None:
    """Of copies over one link, which come in the order of their use."""
    kept = (dataclasses.replace(x, pieces=tuple(p for p in x.pieces if p.over != "ssd")) for x in problem.layers)
    problem = dataclasses.replace(problem, layers=tuple(kept))
    least = max(layer.streamed_bytes for layer in problem.layers)
    small, large = (dataclasses.replace(problem, slot_bytes=n) for n in (least, least + more))
    assert choose_depth(large, FREE).timeline.seconds <= choose_depth(small, FREE).timeline.seconds * (1 + 1e-4)


def layers(flags: str, nbytes: int = 100, flops: float = 1000.0) -> tuple[Layer, ...]:
    """`s` streamed over the link (1 s each), `r` resident; a second of work each."""
    made = []
    for i, flag in enumerate(flags):
        piece = Piece(f"l{i}", nbytes, "dram" if flag == "s" else "hbm", "pcie" if flag == "s" else "")
        made.append(Layer(f"l{i}", Work(flops, "f32"), (piece,)))
    return tuple(made)


FREE = dataclasses.replace(DEVICE, links=(Link("pcie", "dram", "hbm", 100.0),))


def test_depth_one_hides_copies_as_long_as_the_work() -> None:
    """Eight layers: 8 s of work and 8 s of copies. In turn 16 s; with one ahead 9 s, of which the first copy is one."""
    problem = StreamProblem("gpu", "hbm", layers("ssssssss"))
    assert simulate(emit_layers(problem, 0), FREE).seconds == pytest.approx(16.0)
    choice = choose_depth(problem, FREE)
    assert (choice.depth, choice.timeline.seconds) == (1, pytest.approx(9.0))
    assert choice.warnings == ()


def test_the_cliff_of_groups() -> None:
    """Groups of four layers of which two are streamed: two steps of eight. With one ahead, the second of each group
    waits half a second: its copy begins when the first is taken into use; with two ahead no copy is seen."""
    problem = StreamProblem("gpu", "hbm", layers("rrssrrss", nbytes=150), steps=2)
    one, two = (simulate(emit_layers(problem, d), FREE).seconds for d in (1, 2))
    assert (one, two) == (pytest.approx(18.0), pytest.approx(16.0))
    (warning,) = cliffs(problem, 1)
    assert "2 streamed layers follow each other but only 1 are fetched ahead" in warning.message
    assert cliffs(problem, 2) == []
    assert choose_depth(problem, FREE).depth == 2
    tight = dataclasses.replace(problem, slot_bytes=299)
    limited = choose_depth(tight, FREE)
    assert choose_depth(dataclasses.replace(problem, slot_bytes=300), FREE).timeline.seconds == pytest.approx(16.0)
    assert limited.depth == 1 and "give 300 bytes of hbm to slots" in limited.warnings[0].render()
    assert cliffs(StreamProblem("gpu", "hbm", layers("ssss")), 1) == []
    around = StreamProblem("gpu", "hbm", layers("srrs"), steps=2)
    assert len(cliffs(around, 1)) == 1 and cliffs(around.repeated(1), 1) == []


def test_no_room() -> None:
    problem = dataclasses.replace(StreamProblem("gpu", "hbm", layers("ss")), slot_bytes=99)
    with pytest.raises(DiagnosticError) as caught:
        choose_depth(problem, FREE)
    assert "99 bytes of hbm are left for what is streamed" in str(caught.value)
    assert "at least 100, the data of l0" in str(caught.value)
    full = StreamProblem("gpu", "hbm", layers("rrs", nbytes=5000))
    with pytest.raises(DiagnosticError, match="0 bytes of hbm are left"):
        choose_depth(full, FREE)
