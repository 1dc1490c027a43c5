"""Expert schedules: sound for every outcome, ready experts first, early fetches pay where the predictor is right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.cost_model import Work
from hw_targets.expert_outcomes import from_hit_rates, from_misses, simulate_steps
from hw_targets.memory import MemoryTier, Storage, StoragePoint
from hw_targets.simulator import Simulator
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.stream_interpreter import interpret_stream
from passes.schedule.check_stream import check_stream
from passes.schedule.expert_schedule import ExpertLayer, ExpertProblem, choose_ahead, emit_experts, warnings
from passes.schedule.stream_problem import Piece

HOST = Target(
    "host",
    "10 operations and 10 bytes a second",
    "x86_64-unknown-linux-gnu",
    "x86-64",
    frozenset(),
    units=(ComputeUnit("cores", "cpu", "dram", 1, peak=(("f32", 10.0),)),),
    tiers=(MemoryTier("dram", 1 << 30),),
    storage=(Storage("ssd", 1 << 40, (StoragePoint(1, 1, 10.0), StoragePoint(1 << 20, 1, 10.0)), tier="dram"),),
)


def problem(layers: int = 2, **changes: object) -> ExpertProblem:
    """Layers of 2 s of attention and two experts of 1 s of work and 2 s of reading each."""
    made = tuple(
        ExpertLayer(f"l{i}", Work(20.0, "f32"), expert=Work(10.0, "f32"), top_k=2, expert_bytes=20)
        for i in range(layers)
    )
    return dataclasses.replace(ExpertProblem("cores", "dram", made, "ssd", "ssd", 200), **changes)  # type: ignore[arg-type]


def seconds(one: ExpertProblem, **missing: int) -> float:
    """Of one step; `l0_late = 1` is the cache l0.late."""
    return Simulator(emit_experts(one), HOST).run({k.replace("_", "."): n for k, n in missing.items()}).seconds


NONE = {"l0_early": 0, "l0_late": 0, "l1_early": 0, "l1_late": 0}


def test_ready_experts_first() -> None:
    """All there: 2 (2 + 1 + 1). One missing in the first layer: its 2 s run under the other expert, 1 s is seen.
    Both: 2 s to wait, then each computation under the next read, which ends a second after the first: 3 + 1."""
    one = problem()
    assert seconds(one, **NONE) == pytest.approx(8.0)
    assert seconds(one, **(NONE | {"l0_late": 1})) == pytest.approx(9.0)
    assert seconds(one, **(NONE | {"l0_late": 2})) == pytest.approx(2 + 4 + 1 + 4)


def test_early_fetches_run_under_the_layer_before() -> None:
    """Two experts of the second layer foreseen: 4 s of reading under the 4 s of the first layer."""
    one = problem(ahead=2)
    assert seconds(one, **(NONE | {"l1_early": 2})) == pytest.approx(8.0)
    assert seconds(one, **(NONE | {"l1_late": 2})) == pytest.approx(11.0)
    wrong = seconds(one, **(NONE | {"l1_early": 2, "l1_late": 2}))
    assert wrong == pytest.approx(11.0)  # in vain, but under work that had to be done


def test_stand_ins_are_shorter_reads_and_are_said() -> None:
    plain, quick = problem(), problem(stand_ins=2, stand_in_bytes=5)
    none = NONE | {"l0_low": 0, "l1_low": 0}
    assert seconds(quick, **none) == seconds(plain, **NONE)
    assert seconds(quick, **(none | {"l0_late": 2})) == seconds(plain, **(NONE | {"l0_late": 2}))
    replaced = seconds(quick, **(none | {"l0_low": 2}))
    assert replaced == pytest.approx(8.0 + 0.5)
    both = seconds(quick, **(none | {"l0_late": 1, "l0_low": 1}))
    assert replaced < both < seconds(plain, **(NONE | {"l0_late": 2}))
    assert [w.message for w in warnings(plain)] == []
    (said,) = [w.message for w in warnings(quick)]
    assert "2 missing experts of each layer are computed from copies in fewer bits" in said and "tokens differ" in said


def test_the_cliff_is_said() -> None:
    assert problem().token_cycle_bytes == 80
    assert warnings(problem(cache_bytes=80)) == []
    (said,) = warnings(problem(cache_bytes=79))
    assert "least recently used over all layers would never hit" in said.message


def test_no_room_for_one_layer() -> None:
    assert (problem().least_cache_bytes, problem(ahead=1).least_cache_bytes) == (40, 60)
    assert emit_experts(problem(cache_bytes=40)) is not None
    with pytest.raises(DiagnosticError) as caught:
        emit_experts(problem(cache_bytes=39))
    assert "at least 40 bytes in dram" in str(caught.value)


def test_choice_of_early_fetches() -> None:
    """They pay when the predictor is right, and cost when the layer before has to wait behind them."""
    second = np.array([[0, 2]] * 4)
    right = choose_ahead(problem(), HOST, second, accuracy=1.0)
    assert [s for _, s in right.tried] == pytest.approx([11.0, 9.0, 8.0])
    assert (right.ahead, right.times.mean) == (2, pytest.approx(8.0))
    assert choose_ahead(problem(), HOST, second, accuracy=0.0).ahead == 0
    both = choose_ahead(problem(), HOST, np.full((4, 2), 2), accuracy=1.0)
    assert both.ahead == 1 and [s for _, s in both.tried] == pytest.approx([14.0, 12.0, 13.0])
    assert [a for a, _ in choose_ahead(problem(cache_bytes=60), HOST, second, accuracy=1.0).tried] == [0, 1]


def test_outcomes() -> None:
    found = from_misses(np.array([[2, 1], [0, 1], [1, 1]]), ["a", "b"], ahead=1, accuracy=0.5)
    assert [f["a.late"] for f in found] == [2, 0, 1] and [f["a.early"] for f in found] == [0, 0, 0]
    assert [f["b.early"] for f in found] == [1, 1, 1]
    assert [f["b.late"] for f in found] == [1, 0, 1]  # every second one is foreseen
    drawn = from_hit_rates([0.0, 1.0, 0.75], 8, 4000, seed=1)
    assert drawn.mean(axis=0) == pytest.approx([8, 0, 2], abs=0.1)
    assert (drawn == from_hit_rates([0.0, 1.0, 0.75], 8, 4000, seed=1)).all()
    times = simulate_steps(
        Simulator(emit_experts(problem()), HOST), from_misses(np.array([[0, 0], [1, 0]]), ["l0", "l1"])
    )
    assert times.seconds == pytest.approx((8.0, 9.0)) and times.mean == pytest.approx(8.5)
    assert (times.quantile(0.0), times.quantile(1.0)) == pytest.approx((8.0, 9.0))
    for wrong in (np.zeros((2, 3), int), np.full((2, 2), -1)):
        with pytest.raises(ValueError, match="misses"):
            from_misses(wrong, ["a", "b"])
    with pytest.raises(ValueError, match="hit rates"):
        from_hit_rates([1.5], 2, 1)


def test_guesses_of_any_distance() -> None:
    """Three layers of 4 s, two experts of the last one missing, 4 s of reading: before its own attention the half is
    hidden at least, one layer before or two all of it."""
    late = seconds(problem(3), l0_late=0, l1_late=0, l2_late=2)
    assert late == pytest.approx(15.0)
    found = [
        seconds(problem(3, ahead=2, distance=d), l0_late=0, l1_late=0, l2_late=0, l0_early=0, l1_early=0, l2_early=2)
        for d in (0, 1, 2)
    ]
    assert found == pytest.approx([13.0, 12.0, 12.0])
    assert [problem(3, ahead=1, distance=d).least_cache_bytes for d in (0, 1, 2, 3)] == [60, 80, 60, 40]


def test_wrong_guesses_are_read() -> None:
    misses = np.zeros((4, 3), int)
    names = ["l0", "l1", "l2"]
    (vain, *_) = from_misses(misses, names, ahead=2, accuracy=0.0, absent=1.0)
    assert [vain[f"{n}.early"] for n in names] == [0, 2, 2] and sum(vain[f"{n}.late"] for n in names) == 0
    half = from_misses(misses, names, ahead=2, accuracy=0.5, absent=0.5, distance=2)
    assert [[step[f"{n}.early"] for n in names] for step in half] == [[0, 0, 0], [0, 0, 1]] * 2
    assert from_misses(misses, names, ahead=2, accuracy=1.0, absent=1.0) == from_misses(misses, names, ahead=0)
    # 16 s of reading a step in vain on a drive that is else idle cost what they do not hide under.
    busy = problem(3, ahead=2, distance=0)
    free = from_misses(misses[:1], names, ahead=2, accuracy=1.0, distance=0)
    lost = from_misses(misses[:1], names, ahead=2, accuracy=0.0, absent=1.0, distance=0)
    simulator = Simulator(emit_experts(busy), HOST)
    assert simulate_steps(simulator, lost).mean > simulate_steps(simulator, free).mean == pytest.approx(12.0)
    assert choose_ahead(busy, HOST, misses[:1], accuracy=0.0, absent=1.0).ahead == 0
    with pytest.raises(ValueError, match="wrong guesses"):
        from_misses(misses, names, ahead=1, absent=2.0)
    with pytest.raises(ValueError, match="distance >= 0"):
        from_misses(misses, names, ahead=1, distance=-1)


@st.composite
def expert_problems(draw: st.DrawFn) -> ExpertProblem:
    layers = []
    for i in range(draw(st.integers(1, 5))):
        top_k = draw(st.integers(0, 4))
        dense = (Piece(f"l{i}.attention", draw(st.integers(0, 50)), "dram"),) if draw(st.booleans()) else ()
        router = Work(1.0, "f32") if top_k and draw(st.booleans()) else None
        expert = Work(float(draw(st.integers(0, 40))), "f32") if top_k else None
        size = draw(st.integers(1, 40))
        layers.append(ExpertLayer(f"l{i}", Work(float(draw(st.integers(0, 40)))), dense, router, expert, top_k, size))
    ahead, distance = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    made = ExpertProblem("cores", "dram", tuple(layers), "ssd", "ssd", 0, ahead=ahead, distance=distance)
    if draw(st.booleans()):
        made = dataclasses.replace(made, stand_ins=draw(st.integers(1, 2)), stand_in_bytes=1)
    return dataclasses.replace(made, cache_bytes=made.least_cache_bytes + draw(st.integers(0, 100)))


@settings(max_examples=15, deadline=None)
@given(expert_problems(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_guesses_never_need_more_than_was_proven(one: ExpertProblem, accuracy: float, absent: float, seed: int) -> None:
    """Whatever is guessed and missed, a step stays within what was proven for the worst case, in room and in time."""
    program = emit_experts(one)
    room = home(one) + one.cache_bytes
    assert [d.message for d in check_stream(program, HOST, {"dram": room})] == []
    names = one.names
    if not names:
        return
    top_k = max(layer.top_k for layer in one.layers)
    misses = from_hit_rates([0.5] * len(names), top_k, 3, seed)
    outcomes = from_misses(misses, names, ahead=one.ahead, accuracy=accuracy, distance=one.distance, absent=absent)
    simulator = Simulator(program, HOST)
    worst = simulator.run()
    for outcome in outcomes:
        run = simulator.run(outcome)
        assert run.peak_bytes.get("dram", 0) <= room
        assert run.seconds <= worst.seconds * (1 + 1e-9)


def home(one: ExpertProblem) -> int:
    """Bytes of dense weights."""
    return sum(piece.nbytes for layer in one.layers for piece in layer.dense)


@settings(max_examples=40, deadline=None)
@given(expert_problems(), st.data())
def test_every_plan_is_sound_and_fewer_misses_are_never_slower(one: ExpertProblem, data: st.DataObject) -> None:
    """Within dense weights plus the cache, even when all are missing."""
    program = emit_experts(one)
    ir.verify(ModuleOp.create(program))
    dense = sum(p.nbytes for layer in one.layers for p in layer.dense)
    assert [d.message for d in check_stream(program, HOST, {"dram": dense + one.cache_bytes})] == []
    chosen = [k for _, k, _ in interpret_stream(program).computed if k.endswith(".expert")]
    assert len(chosen) == sum(layer.top_k for layer in one.layers)
    simulator = Simulator(program, HOST)
    caches = {f"{layer.name}.{when}": layer.top_k for layer in one.layers for when in ("early", "late")}
    caches |= {f"{layer.name}.low": one.replaced(layer) for layer in one.layers}
    few = {name: data.draw(st.integers(0, most)) for name, most in caches.items()}
    more = {name: data.draw(st.integers(few[name], most)) for name, most in caches.items()}
    nothing = simulator.run(dict.fromkeys(caches, 0)).seconds
    assert nothing <= simulator.run(few).seconds <= simulator.run(more).seconds <= simulator.run().seconds * (1 + 1e-9)
