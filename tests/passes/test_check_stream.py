"""The proof of streaming plans: sound ones pass, and every kind of fault planted into them is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.memory import Fabric, Link, MemoryTier, Storage
from hw_targets.target import ComputeUnit, Target
from ir.attributes import SymbolRef
from ir.ops.builtin import ModuleOp
from ir.stream_interpreter import interpret_stream
from passes.schedule.check_stream import check_stream
from tests.strategies.stream_plans import PlanOfSteps, Step, realise, stream_plans

MACHINE = Target(
    "pair",
    "two devices and a drive",
    "x86_64-unknown-linux-gnu",
    "x86-64",
    frozenset(),
    units=(ComputeUnit("gpu", "gpu", "hbm", count=2), ComputeUnit("cpu", "cpu", "dram")),
    tiers=(MemoryTier("hbm", 1 << 20, count=2), MemoryTier("dram", 1 << 30, 1 << 20), MemoryTier("far", 1 << 30)),
    links=(Link("pcie", "dram", "hbm", count=2),),
    storage=(Storage("disk", 1 << 40, tier="hbm"), Storage("ssd", 1 << 40, tier="dram")),
    fabrics=(Fabric("nvlink", "hbm"),),
)


def faults(plan: PlanOfSteps) -> list[str]:
    program = realise(plan.steps)
    ir.verify(ModuleOp.create(program))
    return [d.message for d in check_stream(program, capacities=plan.capacities)]


@settings(max_examples=60, deadline=None)
@given(stream_plans())
def test_sound_plans_pass(plan: PlanOfSteps) -> None:
    """And run by their meaning within the same capacities."""
    assert faults(plan) == []
    assert interpret_stream(realise(plan.steps), plan.capacities).peak_bytes == plan.capacities


def positions(steps: list[Step], *ops: str) -> list[int]:
    return [i for i, step in enumerate(steps) if step.op in ops]


Mutation = Callable[[PlanOfSteps, st.DataObject], PlanOfSteps | None]


def forget_a_wait(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    del plan.steps[data.draw(st.sampled_from(positions(plan.steps, "wait")))]
    return plan


def forget_an_eviction(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    del plan.steps[data.draw(st.sampled_from(positions(plan.steps, "evict")))]
    return plan


def evict_twice(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    at = data.draw(st.sampled_from(positions(plan.steps, "evict")))
    plan.steps.insert(data.draw(st.integers(at, len(plan.steps))), plan.steps[at])
    return plan


def evict_too_early(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    """To any place behind the slot's reservation that another use of the slot follows."""
    at = data.draw(st.sampled_from(positions(plan.steps, "evict")))
    step = plan.steps.pop(at)
    uses = [i for i, other in enumerate(plan.steps) if step.operands[0] in other.operands]
    made = next(i for i, other in enumerate(plan.steps) if other.result == step.operands[0])
    plan.steps.insert(data.draw(st.integers(made + 1, max(uses))), step)
    return plan


def wait_too_late(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    """Behind the next op of its unit that is no other wait."""
    at = data.draw(st.sampled_from(positions(plan.steps, "wait")))
    step = plan.steps.pop(at)
    unit = step.attributes["unit"]
    token = next(s for s in plan.steps if s.result == step.operands[0])
    slot = next(name for name in token.operands if plan.steps[made_at(plan.steps, name)].op == "slot")
    later = [i for i, s in enumerate(plan.steps) if i >= at and slot in s.operands and s.attributes["unit"] == unit]
    plan.steps.insert(data.draw(st.integers(later[0] + 1, len(plan.steps))), step)
    return plan


def made_at(steps: list[Step], name: str) -> int:
    return next(i for i, step in enumerate(steps) if step.result == name)


def wait_by_another_unit(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    at = data.draw(st.sampled_from(positions(plan.steps, "wait")))
    plan.steps[at].attributes["unit"] = "gpu[7]"
    return plan


def one_byte_too_many(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    tier = data.draw(st.sampled_from([tier for tier, nbytes in plan.capacities.items() if nbytes > 0]))
    plan.capacities[tier] -= 1
    return plan


def read_an_empty_slot(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    """The computation reads a fresh slot instead of the one that was filled."""
    at = data.draw(
        st.sampled_from(
            [i for i in positions(plan.steps, "compute") if not plan.steps[i].attributes.get("writes")] or [-1]
        )
    )
    if at < 0:
        return None
    step = plan.steps[at]
    unit = step.attributes["unit"]
    step.operands = ("empty",)
    plan.steps.insert(at, Step("slot", "empty", (), {"unit": unit, "tier": f"hbm{unit[3:]}", "bytes": 0}))
    plan.steps.append(Step("evict", "", ("empty",), {"unit": unit}))
    return plan


def overwrite_in_flight(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    """A second copy into a slot while the first is under way."""
    at = data.draw(st.sampled_from(positions(plan.steps, "prefetch")))
    again = copy.deepcopy(plan.steps[at])
    again.result = "again"
    plan.steps.insert(at + 1, again)
    plan.steps.insert(len(plan.steps), Step("wait", "", ("again",), {"unit": again.attributes["unit"]}))
    return plan


def lose_half_of_an_exchange(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    found = positions(plan.steps, "send", "recv", "collective")
    if not found:
        return None
    lost = plan.steps.pop(data.draw(st.sampled_from(found)))
    plan.steps = [s for s in plan.steps if lost.result not in s.operands]
    return plan


def mislabel_an_exchange(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    found = positions(plan.steps, "send", "recv", "collective")
    if not found:
        return None
    step = plan.steps[data.draw(st.sampled_from(found))]
    name = data.draw(st.sampled_from(["tag", "over", "bytes"]))
    step.attributes[name] = step.attributes[name] - 1 if name == "bytes" else "other"
    return plan


def evict_by_another_unit(plan: PlanOfSteps, data: st.DataObject) -> PlanOfSteps | None:
    plan.steps[data.draw(st.sampled_from(positions(plan.steps, "evict")))].attributes["unit"] = "gpu[7]"
    return plan


MUTATIONS: list[Mutation] = [
    forget_a_wait, forget_an_eviction, evict_twice, evict_too_early, wait_too_late, wait_by_another_unit,
    one_byte_too_many, read_an_empty_slot, overwrite_in_flight, lose_half_of_an_exchange, mislabel_an_exchange,
    evict_by_another_unit,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
@settings(max_examples=12, deadline=None)
@given(plan=stream_plans(), data=st.data())
def test_planted_faults_are_refused(mutation: Mutation, plan: PlanOfSteps, data: st.DataObject) -> None:
    broken = mutation(copy.deepcopy(plan), data)
    if broken is not None:
        assert faults(broken) != []


def check(body: str, target: Target | None = MACHINE) -> list[str]:
    module = ir.parse(f"func @p() {{ {body} return }}")
    ir.verify(module)
    return [d.message for d in check_stream(module.functions[0], target)]


def test_orders_other_than_that_of_the_text() -> None:
    """The second unit reads what the first computes; in the text it comes later, but nothing makes it wait."""
    body = """
      %s = plan.slot {unit = "cpu", tier = "dram", bytes = 64} : () -> slot
      %c = plan.compute %s {unit = "cpu", kernel = @route, writes = [0]} : (slot) -> token
      WAIT
      %d = plan.compute %s {unit = "gpu", kernel = @experts} : (slot) -> token
      plan.wait %d {unit = "cpu"} : (token) -> ()
      plan.evict %s {unit = "cpu"} : (slot) -> ()
    """
    assert check(body.replace("WAIT", 'plan.wait %c {unit = "gpu"} : (token) -> ()')) == []
    assert check(body.replace("WAIT", "")) == [
        "'plan.compute' reads slot %s of dram before 'plan.compute' that fills it is known to be over"
    ]


def test_a_deadlock_is_named() -> None:
    body = """
      %a = plan.slot {unit = "gpu[0]", tier = "hbm[0]", bytes = 8} : () -> slot
      %x = plan.compute %a {unit = "gpu[0]", kernel = @k, writes = [0]} : (slot) -> token
      %s = plan.send %a {unit = "gpu[0]", to = "gpu[1]", over = "nvlink", bytes = 8, tag = "m"} : (slot) -> token
      plan.wait %s {unit = "gpu[0]"} : (token) -> ()
      %b = plan.slot {unit = "gpu[1]", tier = "hbm[1]", bytes = 8} : () -> slot
      %r = plan.recv %b {unit = "gpu[1]", source = "gpu[0]", over = "nvlink", bytes = 8, tag = "m"} : (slot) -> token
      plan.wait %r {unit = "gpu[1]"} : (token) -> ()
      plan.evict %a {unit = "gpu[0]"} : (slot) -> ()
      plan.evict %b {unit = "gpu[1]"} : (slot) -> ()
    """
    assert check(body) == ["'plan.wait' waits for 'm', which gpu[1] has not begun: a deadlock"]


PLACES = [
    ('%w = plan.segment {symbol = @w, tier = "dsk", bytes = 1} : () -> segment', "no tier or storage 'dsk'; did"),
    ('%w = plan.segment {symbol = @w, tier = "hbm[2]", bytes = 1} : () -> segment', "has 2 of hbm, not hbm[2]"),
    ('%c = plan.compute {unit = "npu", kernel = @k} : () -> token', "no unit 'npu'"),
    ('%c = plan.compute {unit = "gpu", kernel = @k, tiers = ["far"], moved = [1]} : () -> token', "does not reach"),
    ('%w = plan.segment {symbol = @w, tier = "ssd", bytes = 1} : () -> segment\n'
     '%c = plan.compute %w {unit = "cpu", kernel = @k} : (segment) -> token', "touches ssd, which it does not reach"),
    ('%w = plan.segment {symbol = @w, tier = "dram", bytes = 1073741824} : () -> segment', "and has 1072693248"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), PLACES)
def test_places_that_are_not_there(body: str, message: str) -> None:
    (found,) = check(body)
    assert message in found


@pytest.mark.parametrize(
    ("home", "over", "message"),
    [
        ("dram", "pcie", ""),
        ("dram", "ssd", "over ssd, whose data arrive in dram: from dram to hbm is no such way"),
        ("far", "pcie", "over pcie, which joins dram and hbm, not far and hbm"),
        ("ssd", "ssd", "over ssd, whose data arrive in dram"),
        ("disk", "disk", ""),
    ],
)
def test_ways_between_tiers(home: str, over: str, message: str) -> None:
    body = f"""
      %w = plan.segment {{symbol = @w, tier = "{home}", bytes = 8}} : () -> segment
      %s = plan.slot {{unit = "gpu", tier = "hbm", bytes = 8}} : () -> slot
      %t = plan.prefetch %w, %s {{unit = "gpu", over = "{over}"}} : (segment, slot) -> token
      plan.wait %t {{unit = "gpu"}} : (token) -> ()
      plan.evict %s {{unit = "gpu"}} : (slot) -> ()
    """
    found = check(body)
    assert [message in m for m in found] == ([True] if message else [])


def test_what_two_units_reserve_of_one_tier_adds_up() -> None:
    """Whichever way their ops fall together in time."""
    steps = [Step("slot", "a", (), {"unit": "cpu", "tier": "dram", "bytes": 60}),
             Step("compute", "x", ("a",), {"unit": "cpu", "kernel": SymbolRef("k"), "writes": (0,)}),
             Step("evict", "", ("a",), {"unit": "cpu"}),
             Step("slot", "b", (), {"unit": "gpu", "tier": "dram", "bytes": 50}),
             Step("evict", "", ("b",), {"unit": "gpu"})]  # fmt: skip
    (message,) = [d.message for d in check_stream(realise(steps), capacities={"dram": 100})]
    assert message == "dram needs 110 bytes (0 at home, 60 reserved by cpu, 50 reserved by gpu) and has 100"
    assert not list(check_stream(realise(steps), capacities={"dram": 110}))


def test_what_lies_at_home_takes_room_beside_what_is_reserved() -> None:
    steps = [Step("segment", "w", (), {"symbol": SymbolRef("w"), "tier": "dram", "bytes": 70}),
             Step("slot", "a", (), {"unit": "cpu", "tier": "dram", "bytes": 60}),
             Step("evict", "", ("a",), {"unit": "cpu"})]  # fmt: skip
    (message,) = [d.message for d in check_stream(realise(steps), capacities={"dram": 129})]
    assert message == "dram needs 130 bytes (70 at home, 60 reserved by cpu) and has 129"
    assert not list(check_stream(realise(steps), capacities={"dram": 130}))


SHARED = """
  %s = plan.slot {unit = "cpu", tier = "dram", bytes = 64} : () -> slot
  %c = plan.compute %s {unit = "cpu", kernel = @route, writes = [0]} : (slot) -> token
  plan.wait %c {unit = "gpu[0]"} : (token) -> ()
  plan.wait %c {unit = "gpu[1]"} : (token) -> ()
  %d = plan.compute %s {unit = "gpu[0]", kernel = @experts} : (slot) -> token
  %e = plan.compute %s {unit = "gpu[1]", kernel = @experts} : (slot) -> token
"""


@pytest.mark.parametrize("end", ['plan.evict %s {unit = "cpu"} : (slot) -> ()',
                                 '%f = plan.compute %s {unit = "cpu", kernel = @k, writes = [0]} : (slot) -> token\n'
                                 'plan.evict %s {unit = "cpu"} : (slot) -> ()'])  # fmt: skip
def test_every_reader_is_waited_for(end: str) -> None:
    waits = {name: f'plan.wait %{name} {{unit = "cpu"}} : (token) -> ()\n' for name in "de"}
    assert check(SHARED + waits["d"] + waits["e"] + end) == []
    for name in "de":
        assert any("before 'plan.compute' that" in message for message in check(SHARED + waits[name] + end))


def test_who_reserved_a_slot_evicts_it() -> None:
    """Another unit that knows all of its uses to be over may not either: it does not count what is free."""
    waits = "".join(f'plan.wait %{name} {{unit = "gpu[0]"}} : (token) -> ()\n' for name in "cde")
    found = check(SHARED + waits + 'plan.evict %s {unit = "gpu[0]"} : (slot) -> ()')
    assert found == ["'plan.evict' by gpu[0] of slot %s of dram, which cpu reserved"]


@pytest.mark.parametrize("cache", [True, False])
def test_what_may_not_take_place_fills_nothing(cache: bool) -> None:
    maybe = ', cache = "experts", rank = 1' if cache else ""
    body = f"""
      %s = plan.slot {{unit = "cpu", tier = "dram", bytes = 64}} : () -> slot
      %c = plan.compute %s {{unit = "cpu", kernel = @k, writes = [0]{maybe}}} : (slot) -> token
      %d = plan.compute %s {{unit = "cpu", kernel = @k}} : (slot) -> token
      plan.evict %s {{unit = "cpu"}} : (slot) -> ()
    """
    assert check(body) == (["'plan.compute' reads a slot that nothing was put into (slot %s of dram)"] if cache else [])


def test_a_message_tells_what_its_sender_knows() -> None:
    """What the sender computed before it is over for who has received it, and nothing that it did later."""
    body = """
      %s = plan.slot {unit = "gpu[0]", tier = "dram", bytes = 8} : () -> slot
      %a = plan.slot {unit = "gpu[0]", tier = "hbm[0]", bytes = 8} : () -> slot
      %x = plan.compute %a {unit = "gpu[0]", kernel = @k, writes = [0]} : (slot) -> token
      EARLY
      %m = plan.send %a {unit = "gpu[0]", to = "gpu[1]", over = "nvlink", bytes = 8, tag = "m"} : (slot) -> token
      LATE
      %b = plan.slot {unit = "gpu[1]", tier = "hbm[1]", bytes = 8} : () -> slot
      %r = plan.recv %b {unit = "gpu[1]", source = "gpu[0]", over = "nvlink", bytes = 8, tag = "m"} : (slot) -> token
      plan.wait %m {unit = "gpu[0]"} : (token) -> ()
      plan.wait %r {unit = "gpu[1]"} : (token) -> ()
      %z = plan.compute %s {unit = "gpu[1]", kernel = @k} : (slot) -> token
      plan.wait %z {unit = "gpu[0]"} : (token) -> ()
      plan.evict %s {unit = "gpu[0]"} : (slot) -> ()
      plan.evict %a {unit = "gpu[0]"} : (slot) -> ()
      plan.evict %b {unit = "gpu[1]"} : (slot) -> ()
    """
    fills = '%y = plan.compute %s {unit = "gpu[0]", kernel = @k, writes = [0]} : (slot) -> token'
    assert check(body.replace("EARLY", fills).replace("LATE", "")) == []
    assert check(body.replace("LATE", fills).replace("EARLY", "")) == [
        "'plan.compute' reads slot %s of dram before 'plan.compute' that fills it is known to be over"
    ]
