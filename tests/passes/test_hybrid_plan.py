"""Plans of a GPU and a CPU: experts in a cache of the GPU, missing ones brought or computed where they lie."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import Simulator, simulate
from ir.ops.builtin import FuncOp, ModuleOp
from ir.ops.plan_stream import ComputeOp, PrefetchOp
from ir.stream_interpreter import interpret_stream
from passes.place.build_plan import from_placement
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.missed_experts import computed_there, divide, expected_misses
from passes.place.outcome import objective
from passes.place.pins import parse_pin
from passes.place.placement import Placement
from passes.place.problem import Problem, Session
from passes.place.refine import Refined, refine
from passes.place.solve import Solution, solve
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan, prompt_plan
from tests.passes.place.machines import MIB, sparse, target

SECONDS = st.floats(1e-6, 1e-2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=7), SECONDS, SECONDS, SECONDS, st.floats(0.0, 1e-3))
def test_missed_experts_are_divided_nearly_as_well_as_can_be(
    loads: list[int], fetch: float, near: float, far: float, start: float
) -> None:
    """Every expert once; no worse than one of both sides alone, and within twice the best of all divisions."""

    def seconds(brought: tuple[int, ...], there: tuple[int, ...]) -> float:
        link = unit = 0.0
        for i in brought:
            link += fetch
            unit = max(unit, link) + near * loads[i]
        return max(unit, start + sum(far * loads[i] for i in there) if there else 0.0)

    brought, there = divide(loads, fetch=fetch, near=lambda n: near * n, far=lambda n: far * n, start=start)
    assert sorted((*brought, *there)) == list(range(len(loads)))
    every = sorted(range(len(loads)), key=lambda i: -loads[i])
    ways = itertools.product((False, True), repeat=len(loads))
    best = min(seconds(tuple(i for i in every if not way[i]), tuple(i for i in every if way[i])) for way in ways)
    took = seconds(brought, there)
    assert took <= 2 * best + 1e-12
    assert took <= seconds(tuple(every), ()) * (1 + 1e-9) or took <= seconds((), tuple(every)) * (1 + 1e-9)


@given(st.integers(1, 12), SECONDS, SECONDS, SECONDS, st.floats(0.0, 1e-3))
def test_equal_loads_are_a_decision_by_rank(count: int, fetch: float, near: float, far: float, start: float) -> None:
    there = computed_there(count, fetch=fetch, near=near, far=far, start=start)
    for some in range(count + 1):
        found = divide([1] * some, fetch=fetch, near=lambda _: near, far=lambda _: far, start=start)
        assert len(found[1]) == sum(there[:some])


def test_a_division_by_hand() -> None:
    """A link of 3 s an expert, a unit of 1, a helper of 2 that begins after 1: done at 3, 4, 5, 7 and 7."""
    assert computed_there(5, fetch=3.0, near=1.0, far=2.0, start=1.0) == (True, False, True, True, False)
    brought, there = divide([5, 1, 1], fetch=3.0, near=lambda n: 0.2 * n, far=lambda n: 2.0 * n)
    assert (brought, there) == ((0,), (2, 1))


@pytest.mark.parametrize(("count", "chance"), [(1, 0.3), (3, 0.25), (4, 0.0), (4, 1.0)])
def test_chances_of_misses(count: int, chance: float) -> None:
    exact = [0.0] * (count + 1)
    for way in itertools.product((0, 1), repeat=count):
        exact[sum(way)] += chance ** sum(way) * (1 - chance) ** (count - sum(way))
    assert expected_misses(count, chance) == pytest.approx([sum(exact[r:]) for r in range(1, count + 1)])


# -- whole plans -------------------------------------------------------------------------------------------------------


def problem(vram: float, link: float, cpu: float, batch: int = 1, prompt: int = 64, layers: int = 3) -> Problem:
    """A mixture of experts beside a GPU that holds a part of it: 6 MiB of experts a layer, `cpu` bytes/s of memory."""
    machine = machine_of(target(vram=int(vram * MIB), link=link, dram_rate=cpu, hbm_rate=1e9))
    return Problem(sparse(layers, experts=16), machine, formats_of(""), Session(256, batch, prompt, 64, chunk=64))


def cached_by_both(base: Problem) -> Solution:
    pins = ("experts=cached", "experts=gpu", "attention=gpu")
    pinned = tuple(parse_pin(text, base.shape, base.machine) for text in pins)
    return solve(dataclasses.replace(base, pins=pinned))


def sound(program: FuncOp, found: Solution) -> None:
    ir.verify(ModuleOp.create(program))
    machine = found.problem.machine
    assert [d.message for d in check_stream(program, machine.target, dict(machine.room))] == []
    interpret_stream(program)
    timeline = simulate(program, machine.target)
    assert timeline.seconds >= plan_bound(program, machine.target).seconds * (1 - 1e-9)
    assert all(peak <= machine.room_of(tier) for tier, peak in timeline.peak_bytes.items() if tier in machine.tiers)


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([8.0, 14.0, 22.0]),
    st.sampled_from([3e6, 3e7, 3e8]),
    st.sampled_from([1e7, 1e8, 5e8]),
    st.sampled_from([1, 3]),
    st.integers(0, 16),
)
def test_divided_caches_are_sound(vram: float, link: float, cpu: float, batch: int, missing: int) -> None:
    """Steps and prompts, in the worst case and with any number of experts missing."""
    found = cached_by_both(problem(vram, link, cpu, batch, prompt=160))
    plan = placed_plan(found.problem, found.choice, 2)
    sound(plan.program, found)
    sound(prompt_plan(found.problem, found.choice), found)
    simulator = Simulator(plan.program, found.problem.machine.target)
    worst = simulator.run().seconds
    some = simulator.run({name: min(missing, most) for name, most in plan.caches}).seconds
    none = simulator.run({name: 0 for name, _ in plan.caches}).seconds
    assert none <= some * (1 + 1e-9) and none <= worst * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([8.0, 14.0, 22.0]),
    st.sampled_from([3e6, 3e7, 3e8]),
    st.sampled_from([1e7, 1e8, 5e8]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.data(),
)
def test_plans_of_few_misses_take_as_long(
    vram: float, link: float, cpu: float, batch: int, micro: int, data: st.DataObject
) -> None:
    """Without what never takes place, the experts that are always there as one: shorter, and as long to a billionth."""
    base = problem(vram, link, cpu, batch, layers=2)
    found = cached_by_both(dataclasses.replace(base, session=dataclasses.replace(base.session, micro_batches=micro)))
    whole = placed_plan(found.problem, found.choice, 2)
    most = {name: data.draw(st.integers(0, asked)) for name, asked in whole.caches}
    short = placed_plan(found.problem, found.choice, 2, most=most)
    missing = {name: data.draw(st.integers(0, m)) for name, m in most.items()}
    ir.verify(ModuleOp.create(short.program))
    assert len(short.program.block.ops) <= len(whole.program.block.ops)
    both = [Simulator(plan.program, found.problem.machine.target) for plan in (whole, short)]
    expected, timeline = both[0].run(missing).seconds, both[1].run(missing)
    assert timeline.seconds == both[1].seconds(missing) == pytest.approx(expected, rel=1e-9)


def test_a_missing_expert_is_computed_by_one_of_both() -> None:
    """Where the link takes as long as the CPU both have some; all are computed once, however many are missing."""
    found = cached_by_both(problem(14.0, 1.2e8, 1e8, batch=3))
    assert {(o.mode, o.helper) for o, _ in found.choice if o.part.experts} == {("cached", "cores")}
    plan = placed_plan(found.problem, found.choice).program
    mine = [op for op in plan.walk() if isinstance(op, ComputeOp) and op.kernel.name == "layers.1.experts"]
    theirs = [op for op in plan.walk() if isinstance(op, ComputeOp) and op.kernel.name == "layers.1.experts.far"]
    fetched = [op for op in plan.walk() if isinstance(op, PrefetchOp) and op.cache == "layers.1.experts.late"]
    assert theirs and len(fetched) > len({op.rank for op in theirs} & {op.rank for op in fetched})
    for missing in range(len(mine) + 1):
        done = sum(not op.cache or (missing >= op.rank) == op.missing for op in (*mine, *theirs))
        assert done == len(mine)
    assert {op.unit for op in mine} == {"gpu"} and {op.unit for op in theirs} == {"cores"}
    again = Placement.from_json(found.placement.to_json())
    assert again == found.placement and {g.rest_unit for g in again.groups if g.group == "experts"} == {"cores"}
    back = from_placement(found.problem, again)
    assert sorted((o.label, count) for o, count in back) == sorted((o.label, count) for o, count in found.choice)


def test_what_is_slow_gets_nothing() -> None:
    """A CPU that is far slower than the link computes no expert, one far faster all of them."""
    for cpu, link, everything in ((2e6, 3e8, False), (1e9, 1e6, True)):
        found = cached_by_both(problem(14.0, link, cpu))
        problem_, choice = found.problem, found.choice
        helped = [o for o, _ in choice if o.part.experts and o.helper]
        ops = list(placed_plan(problem_, choice).program.walk()) if helped else []
        far = [op for op in ops if isinstance(op, ComputeOp) and op.kernel.name.endswith(".far")]
        near = [op for op in ops if isinstance(op, ComputeOp) and op.kernel.name.endswith(".experts")]
        assert (len(far) == len(near) and bool(far)) if everything else not far


@pytest.mark.parametrize(("vram", "link", "cpu"), [(9.0, 1e7, 3e7), (14.0, 1e8, 2e8)])
def test_more_of_anything_is_never_slower(vram: float, link: float, cpu: float) -> None:
    base = solve(problem(vram, link, cpu, layers=2)).outcome.objective
    for better in ((2 * vram, link, cpu), (vram, 2 * link, cpu), (vram, link, 2 * cpu)):
        assert solve(problem(*better, layers=2)).outcome.objective <= base * (1 + 4e-3)  # twice the gap


@pytest.mark.parametrize(("vram", "link", "cpu"), [(9.0, 2e8, 3e7), (9.0, 1e7, 2e8)])
def test_no_plan_is_slower_than_one_of_one_kind(vram: float, link: float, cpu: float) -> None:
    """As simulated: everything by the CPU, everything streamed to the GPU, and experts that stay where they are."""
    base = problem(vram, link, cpu, layers=2)
    best = value(refine(solve(base)))
    for pins in (
        ("attention=cores", "experts=cores", "head=cores", "kv=cores"),
        ("attention=streamed", "experts=streamed", "attention=gpu", "experts=gpu", "head=gpu", "kv=gpu"),
        ("experts=resident",),
    ):
        pinned = dataclasses.replace(base, pins=tuple(parse_pin(text, base.shape, base.machine) for text in pins))
        assert best <= value(refine(solve(pinned))) * (1 + 1e-6)


def value(found: Refined) -> float:
    assert found.step_seconds is not None and found.prompt is not None
    return objective(found.solution.problem, found.step_seconds, found.prompt.seconds)


def test_attention_goes_where_the_cache_lies() -> None:
    """Keys and values in memory beside a slow link: the CPU attends; over a fast link they come to the GPU, where that
    is not ruled out."""
    for link, unit, more in ((1e6, "cores", ()), (1e9, "gpu", ()), (1e9, "cores", ("kv=near",))):
        base = dataclasses.replace(problem(40.0, link, 1e8), session=Session(2048, 8, 512, 64))
        texts = ("kv=dram", "attention=gpu", *more)
        pinned = dataclasses.replace(base, pins=tuple(parse_pin(text, base.shape, base.machine) for text in texts))
        found = solve(pinned)
        assert {o.kv_unit for o, _ in found.choice if o.part.group == "attention"} == {unit}
        sound(placed_plan(found.problem, found.choice).program, found)


# -- computations that may not take place ------------------------------------------------------------------------------

PLAN = """func @p() {
  %w = plan.segment {symbol = @w, tier = "dram", bytes = 64} : () -> segment
  %s = plan.slot {unit = "gpu", tier = "vram", bytes = 64} : () -> slot
  FILL
  %c = plan.compute %w {unit = "cores", kernel = @there, work = 4000000, cache = "x", rank = 1} : (segment) -> token
  %d = plan.compute %s {unit = "cores", kernel = @here, work = 1000000, cache = "x", rank = 1, missing = false} :
    (slot) -> token
  plan.wait %d {unit = "gpu"} : (token) -> ()
  plan.evict %s {unit = "gpu"} : (slot) -> ()
  return
}"""
MAYBE = """%a = plan.compute %s {unit = "gpu", kernel = @maybe, writes = [0], cache = "x", rank = 1} : (slot) -> token
  plan.wait %a {unit = "cores"} : (token) -> ()"""


def test_one_of_two_computations_takes_place() -> None:
    program = ir.parse(PLAN.replace("FILL", MAYBE.replace(', cache = "x", rank = 1', ""))).functions[0]
    machine = target()
    assert [d.message for d in check_stream(program, machine)] == []
    seconds = {n: Simulator(program, machine).run({"x": n}).seconds for n in (0, 1, 5)}
    assert seconds[1] == seconds[5] == simulate(program, machine).seconds
    assert seconds[1] - seconds[0] == pytest.approx(3e6 / 4e9, rel=1e-3)  # four cores of 1 GFLOP/s each
    assert plan_bound(program, machine).seconds == pytest.approx(seconds[1])
    assert [kernel for _, kernel, _ in interpret_stream(program).computed] == ["maybe", "there"]


def test_what_may_not_be_written_counts_as_not_written() -> None:
    program = ir.parse(PLAN.replace("FILL", MAYBE)).functions[0]
    found = [d.message for d in check_stream(program, target())]
    assert any("reads a slot that nothing was put into" in message for message in found), found
