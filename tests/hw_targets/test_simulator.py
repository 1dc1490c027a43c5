"""The simulator: timelines worked out by hand, and properties of every plan."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.cost_model import Price, Work
from hw_targets.fair_share import Flow, Resource, share
from hw_targets.memory import Fabric, Link, MemoryTier, Storage, StoragePoint, Switch
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import Simulator, simulate
from hw_targets.target import ComputeUnit, Target
from hw_targets.timeline import Timeline
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from tests.strategies.stream_plans import PlanOfSteps, realise, stream_plans

KB = 1024
POINTS = (StoragePoint(1, 1, 100.0), StoragePoint(1, 2, 150.0, 50.0), StoragePoint(1 << 30, 1, 100.0),
          StoragePoint(1 << 30, 2, 150.0, 50.0))  # fmt: skip


def machine(**changes: object) -> Target:
    """Two devices of 10 FLOP/s on tiers of no stated speed, links of 10 B/s, a drive of 100 B/s (150 with depth 2)."""
    target = Target(
        "toy",
        "numbers that can be worked out by hand",
        "x86_64-unknown-linux-gnu",
        "x86-64",
        frozenset(),
        units=(ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 10.0),), count=2),
               ComputeUnit("cpu", "cpu", "dram", 1, peak=(("f32", 10.0),))),
        tiers=(MemoryTier("hbm", count=2), MemoryTier("dram")),
        links=(Link("pcie", "dram", "hbm", 10.0, count=2),),
        storage=(Storage("ssd", None, POINTS, tier="hbm"), Storage("disk", None, POINTS, tier="dram")),
        fabrics=(Fabric("nvlink", "hbm", bandwidth=10.0),),
    )  # fmt: skip
    return dataclasses.replace(target, **changes)  # type: ignore[arg-type]


def plan(body: str) -> FuncOp:
    """A plan in short words: `w 30` a segment on dram, `s 30` a slot, `get t w s`, `use s 50`, `free s`, ..."""
    lines = []
    for line in body.strip().splitlines():
        word, *rest = line.split()
        lines.append(_LINES[word](*rest))
    module = ir.parse("func @p() {\n" + "\n".join(lines) + "\nreturn\n}")
    ir.verify(module)
    return module.functions[0]


def _get(token: str, segment: str, slot: str, over: str = "pcie", *more: str) -> str:
    extra = "".join(f", {x.replace('=', ' = ')}" for x in more)
    return (f'%{token} = plan.prefetch %{segment}, %{slot} {{unit = "gpu", over = "{over}"{extra}}} '
            ": (segment, slot) -> token")  # fmt: skip


def _compute(token: str, operand: str, work: str, unit: str, more: str = "") -> str:
    attributes = f'{{unit = "{unit}", kernel = @{token}, work = {work}, launches = 0{more}}}'
    type = "slot" if operand else ""
    return f"%{token} = plan.compute {operand} {attributes} : ({type}) -> token"


_LINES = {
    "segment": lambda n, size, tier="dram": (
        f'%{n} = plan.segment {{symbol = @{n}, tier = "{tier}", bytes = {size}}} : () -> segment'
    ),
    "slot": lambda n, size: f'%{n} = plan.slot {{unit = "gpu", tier = "hbm", bytes = {size}}} : () -> slot',
    "get": _get,
    "put": lambda t, x, a: f'%{t} = plan.store %{x}, %{a} {{unit = "gpu", over = "pcie"}} : (slot, segment) -> token',
    "wait": lambda t, unit="gpu": f'plan.wait %{t} {{unit = "{unit}"}} : (token) -> ()',
    "use": lambda t, slot, work, unit="gpu": _compute(t, f"%{slot}", work, unit),
    "work": lambda t, work, unit="gpu": _compute(t, "", work, unit),
    "read": lambda t, n, unit, tier: _compute(t, "", "0", unit, f', tiers = ["{tier}"], moved = [{n}]'),
    "free": lambda slot: f'plan.evict %{slot} {{unit = "gpu"}} : (slot) -> ()',
}


def times(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {op.name: (round(op.start, 9), round(op.end, 9)) for op in timeline.ops}


WINDOW = """
segment a 30
segment b 40
slot x 30
get ta a x
slot y 40
get tb b y
wait ta
use ca x 50
free x
wait tb
use cb y 10
free y
"""


def test_a_window_of_two_layers_by_hand() -> None:
    """Loads of 3 and 4 s one after another; the first computation (5 s) begins at 3, the second when both are over."""
    timeline = simulate(plan(WINDOW), machine())
    assert times(timeline) == {"load a": (0, 3), "load b": (3, 7), "ca": (3, 8), "cb": (8, 9)}
    assert timeline.seconds == 9
    assert timeline.critical == {"gpu f32": 6.0, "pcie dram->hbm": 3.0}
    assert timeline.bound == "gpu f32"
    assert timeline.busy == {"pcie[0] dram->hbm": 7.0, "gpu": 6.0}
    assert timeline.utilisation("gpu") == pytest.approx(6 / 9)
    assert timeline.peak_bytes == {"dram": 70, "hbm": 70}
    assert timeline.memory["hbm"] == ((0.0, 0), (0.0, 30), (0.0, 70), (8.0, 40), (9.0, 0))
    assert "9000.000 ms, bound by gpu f32" in timeline.table()


def test_two_streams_share_a_link() -> None:
    """30 and 40 bytes at 5 B/s each until the first is over at 6 s; then 10 more bytes at 10 B/s."""
    body = WINDOW.replace("get tb b y", 'get tb b y pcie stream="2"')
    found = times(simulate(plan(body), machine()))
    assert found["load a"] == (0, 6)
    assert found["load b"] == (0, 7)


def test_both_ways_of_a_link() -> None:
    body = "segment a 30\nslot x 30\nget t a x\nwait t\nput s x a\nslot y 20\nsegment b 20\nget u b y\nwait s\nwait u\n"
    body += "free x\nfree y"
    duplex, simplex = machine(), machine(links=(Link("pcie", "dram", "hbm", 10.0, duplex=False),))
    assert simulate(plan(body), duplex).seconds == pytest.approx(6.0)  # 3, then 3 and 2 side by side
    assert simulate(plan(body), simplex).seconds == pytest.approx(8.0)


def test_latency_comes_after_the_flow_and_does_not_hold_the_link() -> None:
    slow = machine(links=(Link("pcie", "dram", "hbm", 10.0, latency_seconds=0.5),))
    timeline = simulate(plan(WINDOW), slow)
    assert times(timeline) == {"load a": (0, 3.5), "load b": (3, 7.5), "ca": (3.5, 8.5), "cb": (8.5, 9.5)}
    assert timeline.critical == {"gpu f32": 6.0, "pcie dram->hbm": 3.0, "pcie dram->hbm latency": 0.5}


def test_a_drive_is_as_fast_as_its_queue_is_deep() -> None:
    """One request: 100 B/s. Two queues of one each: 75 B/s each; the one left alone gets 100 again."""
    one = "segment a 300 ssd\nslot x 300\nget t a x ssd\nwait t\nfree x"
    assert simulate(plan(one), machine()).seconds == pytest.approx(3.0)
    deep = one.replace("get t a x ssd", "get t a x ssd depth=2")
    assert simulate(plan(deep), machine()).seconds == pytest.approx(2.0)
    two = "segment a 300 ssd\nsegment b 400 ssd\nslot x 300\nslot y 400\nget t a x ssd\n"
    two += 'get u b y ssd stream="2"\nwait t\nwait u\nfree x\nfree y'
    found = times(simulate(plan(two), machine()))
    assert found == {"load a": (0, 4), "load b": (0, 5)}


def test_reads_of_a_tier_slow_computations_down() -> None:
    """A tier of 20 B/s: the computation (60 bytes, 3 s alone) and the link (10 B/s) get 10 B/s each while both run."""
    target = machine(tiers=(MemoryTier("hbm", count=2), MemoryTier("dram", read_bandwidth=20.0)))
    body = """
segment a 30
slot x 30
get ta a x
read c 60 cpu dram
wait ta
free x
"""
    timeline = simulate(plan(body), target)
    assert times(timeline) == {"load a": (0, 3), "c": (0, 4.5)}
    assert next(op.limit for op in timeline.ops if op.name == "c") == "dram read"
    assert timeline.busy["dram"] == pytest.approx(4.5)


def test_switches_are_shared_by_links_and_read_in_place() -> None:
    """Two links of 10 B/s behind a switch of 10 B/s; reading over the link instead of copying takes as long."""
    target = machine(
        links=(Link("pcie", "dram", "hbm", 10.0, count=2, switch="root"),), switches=(Switch("root", 10.0),),
        tiers=(MemoryTier("hbm", count=2), MemoryTier("dram", read_bandwidth=1000.0)),
    )  # fmt: skip
    lines = [
        '%a = plan.segment {symbol = @a, tier = "dram", bytes = 30} : () -> segment',
        *(f'%s{i} = plan.slot {{unit = "gpu[{i}]", tier = "hbm[{i}]", bytes = 30}} : () -> slot\n'
          f'%t{i} = plan.prefetch %a, %s{i} {{unit = "gpu[{i}]", over = "pcie[{i}]"}} : (segment, slot) -> token\n'
          f'plan.wait %t{i} {{unit = "gpu[{i}]"}} : (token) -> ()\n'
          f'plan.evict %s{i} {{unit = "gpu[{i}]"}} : (slot) -> ()' for i in range(2)),
    ]  # fmt: skip
    both = ir.parse("func @p() {" + "\n".join(lines) + " return }").functions[0]
    assert simulate(both, target).seconds == pytest.approx(6.0)
    assert simulate(both, machine()).seconds == pytest.approx(3.0)
    assert simulate(both, target).bound == "root[0] dram->hbm"
    read = ('func @p() { %a = plan.segment {symbol = @a, tier = "dram", bytes = 30} : () -> segment\n'
            '%c = plan.compute %a {unit = "gpu", kernel = @k, tiers = ["dram"], moved = [30], launches = 0} '
            ": (segment) -> token return }")  # fmt: skip
    timeline = simulate(ir.parse(read).functions[0], target)
    assert timeline.seconds == pytest.approx(3.0) and timeline.bound == "pcie dram->hbm"


def test_dispatch_and_page_faults_and_pageable_memory() -> None:
    units = (ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 10.0),), launch_seconds=0.25),)
    body = 'func @p() { %c = plan.compute {unit = "gpu", kernel = @k, work = 20, launches = 4} : () -> token return }'
    timeline = simulate(ir.parse(body).functions[0], machine(units=units))
    assert timeline.seconds == pytest.approx(3.0)
    assert timeline.critical == {"gpu f32": 2.0, "dispatch": 1.0}
    mapped = f"segment a {10 * 4096} ssd\nslot x {10 * 4096}\nget t a x ssd pinned=false\nwait t\nfree x"
    with pytest.raises(DiagnosticError, match="does not state what a page fault of hbm costs"):
        simulate(plan(mapped), machine())
    faults = machine(tiers=(MemoryTier("hbm", count=2, page_fault_seconds=2.0), MemoryTier("dram")))
    assert simulate(plan(mapped), faults).seconds == pytest.approx(409.6 + 20.0)
    pageable = machine(links=(Link("pcie", "dram", "hbm", 10.0, pageable_bandwidth=5.0),))
    body = "segment a 30\nslot x 30\nget t a x pcie pinned=false\nwait t\nfree x"
    assert simulate(plan(body), pageable).seconds == pytest.approx(6.0)
    never = machine(links=(Link("pcie", "dram", "hbm", 10.0, pageable_bandwidth=5.0, pinned=False),))
    assert simulate(plan(body.replace(" pinned=false", "")), never).seconds == pytest.approx(6.0)
    unstated = machine(links=(Link("pcie", "dram", "hbm", 10.0, pinned=False),))
    with pytest.raises(DiagnosticError, match="what link pcie moves of memory that is not pinned"):
        simulate(plan(body), unstated)


def test_only_missing_experts_are_fetched() -> None:
    """The last to be asked for is the first to be there: what is cached is computed first, then as it arrives."""
    body = "segment a 10\n"
    for i in (3, 2, 1):
        body += f'slot x{i} 10\nget t{i} a x{i} pcie cache="layers.0" rank={i}\n'
    body += "".join(f"wait t{i}\nuse c{i} x{i} 10\nfree x{i}\n" for i in (3, 2, 1))
    simulator = Simulator(plan(body), machine())
    assert [simulator.run({"layers.0": m}).seconds for m in (0, 1, 2, 3)] == pytest.approx([3.0, 3.0, 3.0, 4.0])
    assert simulator.run() == simulator.run({"layers.0": 3})
    assert [op.name for op in simulator.run({"layers.0": 1}).ops] == ["load a", "c3", "c2", "c1"]


EXCHANGE = """
func @p() {
  %a = plan.slot {unit = "gpu[0]", tier = "hbm[0]", bytes = 20} : () -> slot
  %b = plan.slot {unit = "gpu[1]", tier = "hbm[1]", bytes = 20} : () -> slot
  %x = plan.compute %a {unit = "gpu[0]", kernel = @embed, work = 30, writes = [0]} : (slot) -> token
  %s = plan.send %a {unit = "gpu[0]", to = "gpu[1]", over = "nvlink", bytes = 20, tag = "h"} : (slot) -> token
  %r = plan.recv %b {unit = "gpu[1]", source = "gpu[0]", over = "nvlink", bytes = 20, tag = "h"} : (slot) -> token
  plan.wait %s {unit = "gpu[0]"} : (token) -> ()
  plan.wait %r {unit = "gpu[1]"} : (token) -> ()
  %c = plan.collective %a {unit = "gpu[0]", kind = "all_reduce", group = ["gpu[0]", "gpu[1]"], over = "nvlink",
    bytes = 20, tag = "r"} : (slot) -> token
  %w = plan.compute {unit = "gpu[1]", kernel = @late, work = 10} : () -> token
  %d = plan.collective %b {unit = "gpu[1]", kind = "all_reduce", group = ["gpu[0]", "gpu[1]"], over = "nvlink",
    bytes = 20, tag = "r"} : (slot) -> token
  plan.wait %c {unit = "gpu[0]"} : (token) -> ()
  plan.wait %d {unit = "gpu[1]"} : (token) -> ()
  plan.evict %a {unit = "gpu[0]"} : (slot) -> ()
  plan.evict %b {unit = "gpu[1]"} : (slot) -> ()
  return
}
"""


def test_messages_and_collectives_by_hand() -> None:
    """The message flows from 3 to 5; the all-reduce of two units moves its bytes once each way, from 6 to 8."""
    program = ir.parse(EXCHANGE).functions[0]
    timeline = simulate(program, machine())
    assert times(timeline) == {
        "embed": (0, 3), "send h": (3, 5), "receive h": (3, 5), "late": (5, 6), "all_reduce r": (6, 8),
    }  # fmt: skip
    assert timeline.critical == {"gpu f32": 4.0, "nvlink": 4.0}
    late = machine(fabrics=(Fabric("nvlink", "hbm", bandwidth=10.0, latency_seconds=0.5),))
    assert simulate(program, late).seconds == pytest.approx(8.0 + 0.5 + 2 * 0.5)


def test_units_that_wait_for_ever_are_named() -> None:
    text = re.sub(r"  %r = [^\n]*\n", "", EXCHANGE).replace("plan.wait %r", "plan.wait %x")
    with pytest.raises(DiagnosticError, match="message 'h' from gpu\\[0\\] to gpu\\[1\\] is never received"):
        simulate(ir.parse(text).functions[0], machine())
    alone = EXCHANGE[: EXCHANGE.index("  %w = ")] + EXCHANGE[EXCHANGE.index("  plan.wait %c") :]
    alone = alone.replace('  plan.wait %d {unit = "gpu[1]"} : (token) -> ()\n', "")
    with pytest.raises(DiagnosticError, match=r"gpu\[0\] waits for ever at 'plan.wait'"):
        simulate(ir.parse(alone).functions[0], machine())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("work c 10 tpu", "has no unit 'tpu'"),
        ("segment a 1 ssd\nslot x 1\nget t a x usb", "has no link, storage or fabric 'usb'"),
    ],
)
def test_what_the_target_lacks(body: str, message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        simulate(plan(body), machine())


def test_trace_file(tmp_path: Path) -> None:
    timeline = simulate(plan(WINDOW), machine())
    timeline.write_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    spans = {e["name"]: (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans["load b"] == (3e6, 4e6)
    assert max(e["args"]["bytes"] for e in events if e["ph"] == "C" and e["name"] == "hbm") == 70
    with pytest.raises(DiagnosticError, match="cannot write the trace"):
        timeline.write_trace(tmp_path / "no" / "trace.json")


# -- properties --------------------------------------------------------------------------------------------------------


def random_machine(scale: float = 1.0, tiers: float | None = None) -> Target:
    """Rates times `scale`; `tiers` is the speed of the devices' memories."""
    points = tuple(StoragePoint(block, depth, rate * scale, rate * scale / 2)
                   for block, depth, rate in ((256, 1, 4e3), (4096, 1, 1e4), (4096, 4, 2.5e4)))  # fmt: skip
    return machine(
        units=(ComputeUnit("gpu", "gpu", "hbm", 1, peak=(("f32", 2e4 * scale),), launch_seconds=0.1, count=2),),
        tiers=(MemoryTier("hbm", read_bandwidth=tiers and tiers * scale, count=2), MemoryTier("dram")),
        storage=(Storage("ssd", None, points, tier="hbm"), Storage("disk", None, points, tier="hbm")),
        fabrics=(Fabric("nvlink", "hbm", bandwidth=1e3 * scale, latency_seconds=0.01),),
    )


def dense(plan: PlanOfSteps) -> FuncOp:
    """The plan; computations read a tier as well."""
    for step in plan.steps:
        if step.op == "compute":
            unit = step.attributes["unit"]
            step.attributes |= {"tiers": (f"hbm{unit[3:]}",), "moved": (step.attributes.get("work", 64),)}
    return realise(plan.steps)


@settings(max_examples=30, deadline=None)
@given(stream_plans(), st.sampled_from([None, 1e3, 3e4]))
def test_never_below_the_bound_and_nothing_lost(drawn: PlanOfSteps, tiers: float | None) -> None:
    """Simulated time is at least that of the busiest resource and of the longest chain; all work is done; every op has
    its place on one axis; the critical path explains the whole; a second run is the same."""
    target = random_machine(tiers=tiers) if tiers else random_machine()
    program = dense(drawn) if tiers else realise(drawn.steps)
    timeline = simulate(program, target)
    bound = plan_bound(program, target)
    assert timeline.seconds >= bound.seconds * (1 - 1e-9)
    assert sum(timeline.critical.values()) == pytest.approx(timeline.seconds)
    assert all(0 <= op.start <= op.end <= timeline.seconds for op in timeline.ops)
    assert all(timeline.busy[name] <= timeline.seconds * (1 + 1e-9) for name in timeline.busy)
    if tiers:
        moved = sum(sum(s.attributes.get("moved", ())) for s in drawn.steps if s.op == "compute")
        sizes = {s.result: s.attributes["bytes"] for s in drawn.steps if s.op == "segment"}
        moved += sum(sizes[s.operands[0]] for s in drawn.steps if s.op == "prefetch")
        moved += sum(sizes[s.operands[1]] for s in drawn.steps if s.op == "store")
        moved += 2 * sum(s.attributes["bytes"] for s in drawn.steps if s.op == "send")
        assert sum(timeline.busy.get(f"hbm[{i}]", 0.0) for i in range(2)) == pytest.approx(moved / tiers)
    used = {k: v for k, v in drawn.capacities.items() if v}
    assert {k: v for k, v in timeline.peak_bytes.items() if v} == used
    assert simulate(program, target) == timeline


@settings(max_examples=20, deadline=None)
@given(stream_plans(), st.floats(1.0, 8.0), st.sampled_from([None, 1e3]))
def test_a_faster_machine_is_never_slower(drawn: PlanOfSteps, factor: float, tiers: float | None) -> None:
    """All rates times a factor; and with nothing shared by two, any one rate."""
    program = dense(drawn) if tiers else realise(drawn.steps)
    slow = simulate(program, random_machine(1.0, tiers)).seconds
    assert simulate(program, random_machine(factor, tiers)).seconds <= slow * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(stream_plans(units=1), st.floats(1.0, 8.0), st.sampled_from(["units", "storage"]))
def test_one_faster_resource_is_never_slower(drawn: PlanOfSteps, factor: float, what: str) -> None:
    """In plans of one unit whose transfers and computations share no memory: each queue keeps its order."""
    program = realise(drawn.steps)
    slow, fast = random_machine(), random_machine(factor)
    mixed = dataclasses.replace(slow, **{what: getattr(fast, what)})
    assert simulate(program, mixed).seconds <= simulate(program, slow).seconds * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.5, 100), st.lists(st.integers(0, 3), max_size=3)), min_size=1)
)
def test_sharing_is_max_min_fair(drawn: list[tuple[float, float, list[int]]]) -> None:
    """Nothing is overloaded, every flow is held by its own limit or a full resource, in which nobody has more."""
    resources = [Resource(f"r{i}") for i in range(4)]
    flows = []
    for i, (alone, weight, used) in enumerate(drawn):
        uses = tuple((resources[r], weight / (10.0 * (r + 1))) for r in dict.fromkeys(used))
        flows.append(Flow(i, "own", alone, weight, uses))
    rates = [rate for rate, _ in share(flows)]
    loads = {
        r: sum(rate * s for f, rate in zip(flows, rates, strict=True) for u, s in f.uses if u is r) for r in resources
    }
    assert all(load <= 1 + 1e-9 for load in loads.values())
    for flow, rate in zip(flows, rates, strict=True):
        assert rate <= (1 + 1e-9) / flow.alone
        if rate < (1 - 1e-9) / flow.alone:
            most = {r: max(x * f.weight for f, x in zip(flows, rates, strict=True) if any(u is r for u, _ in f.uses))
                    for r, _ in flow.uses}  # fmt: skip
            assert any(loads[r] > 1 - 1e-9 and rate * flow.weight >= most[r] * (1 - 1e-9) for r, _ in flow.uses)


def test_prices_may_be_given() -> None:
    def fixed(work: Work, unit: ComputeUnit, target: Target) -> Price:
        return Price(7.0, f"{unit.name} measured", ((f"{unit.name} measured", 7.0),))

    timeline = simulate(plan("work c 10"), machine(), fixed)
    assert timeline.seconds == 7.0 and timeline.bound == "gpu measured"
