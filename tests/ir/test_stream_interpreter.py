"""Streaming plans by their meaning: what is computed from what, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.interpreter import interpret
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.plan_stream import ComputeOp, EvictOp, PrefetchOp, SegmentOp, SlotOp, WaitOp
from ir.stream_interpreter import StreamTrace, interpret_stream
from ir.stream_memory import StreamFault


def window_plan(sizes: list[int], depth: int) -> FuncOp:
    """Layers of these sizes, streamed in order with `depth` of them on their way ahead of the one in use."""
    program = FuncOp.create("decode", [])
    build = Builder.at_end(program.block)
    segments = [build(SegmentOp(symbol=SymbolRef(f"l{i}"), tier="disk", bytes=n)) for i, n in enumerate(sizes)]
    coming: list[tuple[Value, Value]] = []

    def start(i: int) -> None:
        if i < len(sizes):
            slot = build(SlotOp(unit="cpu", tier="dram", bytes=sizes[i]))
            coming.append((slot, build(PrefetchOp(segments[i], slot, unit="cpu", over="ssd"))))

    for i in range(depth):
        start(i)
    for i in range(len(sizes)):
        start(i + depth)
        slot, token = coming[i]
        build(WaitOp(token, unit="cpu"))
        build(ComputeOp(slot, unit="cpu", kernel=SymbolRef("layer"), work=2 * sizes[i]))
        build(EvictOp(slot, unit="cpu"))
    build(ReturnOp())
    return program


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8), st.integers(0, 9))
def test_every_depth_computes_the_same(sizes: list[int], depth: int) -> None:
    """The trace does not depend on the window; the peak is that of the largest window; text carries the whole plan."""
    program = window_plan(sizes, depth)
    ir.verify(ModuleOp.create(program))
    trace = interpret_stream(program)
    assert trace.computed == tuple(("cpu", "layer", (f"l{i}",)) for i in range(len(sizes)))
    windows = [sum(sizes[i : i + depth + 1]) for i in range(len(sizes))]
    assert trace.peak_bytes.get("dram", 0) == max(windows)
    again = ir.parse(ir.print_module(ModuleOp.create(window_plan(sizes, depth)))).functions[0]
    assert interpret_stream(again) == trace


def run(body: str, capacities: dict[str, int | None] | None = None) -> StreamTrace:
    head = """
      %w = plan.segment {symbol = @w, tier = "disk", bytes = 64} : () -> segment
      %s = plan.slot {unit = "gpu", tier = "hbm", bytes = 64} : () -> slot
    """
    module = ir.parse(f"func @p() {{ {head} {body} return }}")
    ir.verify(module)
    return interpret_stream(module.functions[0], capacities)


FETCH = '%t = plan.prefetch %w, %s {unit = "gpu", over = "pcie"} : (segment, slot) -> token\n'
WAIT = 'plan.wait %t {unit = "gpu"} : (token) -> ()\n'
USE = '%c = plan.compute %s {unit = "gpu", kernel = @k} : (slot) -> token\n'
EVICT = 'plan.evict %s {unit = "gpu"} : (slot) -> ()\n'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FETCH + USE + WAIT + EVICT, "use by @k of a slot of hbm whose data have not arrived"),
        (USE + EVICT, "use by @k of a slot of hbm that holds nothing"),
        (FETCH + EVICT + WAIT, "eviction of a slot of hbm while a transfer uses it"),
        (FETCH + WAIT + EVICT + USE, "use by @k of a slot of hbm after its eviction"),
        (FETCH + WAIT + EVICT + EVICT, "eviction of a slot of hbm after its eviction"),
        (FETCH + WAIT + USE, "1 slots are never evicted, the first of hbm"),
        (FETCH + FETCH.replace("%t", "%t2") + WAIT + EVICT, "overwriting of a slot of hbm while a transfer uses it"),
        (FETCH + WAIT + EVICT.replace("gpu", "cpu"), "cpu evicts a slot of hbm that gpu reserved"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(StreamFault, match=message.replace("(", r"\(")):
        run(body)


def test_a_full_tier() -> None:
    assert run(FETCH + WAIT + USE + EVICT, {"hbm": 64}).peak_bytes == {"disk": 64, "hbm": 64}
    with pytest.raises(StreamFault, match="hbm has 63 bytes, 64 would be taken"):
        run(FETCH + WAIT + USE + EVICT, {"hbm": 63})


def test_stores_are_seen_by_later_prefetches() -> None:
    """What a computation wrote goes home and comes back; the value is that of the computation."""
    trace = run(
        FETCH
        + WAIT
        + """
        %a = plan.compute %s {unit = "gpu", kernel = @append, writes = [0]} : (slot) -> token
        %b = plan.store %s, %w {unit = "gpu", over = "pcie"} : (slot, segment) -> token
        plan.wait %b {unit = "gpu"} : (token) -> ()
        %r = plan.slot {unit = "gpu", tier = "hbm", bytes = 64} : () -> slot
        %d = plan.prefetch %w, %r {unit = "gpu", over = "pcie"} : (segment, slot) -> token
        plan.wait %d {unit = "gpu"} : (token) -> ()
        %e = plan.compute %r, %s {unit = "gpu", kernel = @use} : (slot, slot) -> token
        plan.evict %r {unit = "gpu"} : (slot) -> ()
        """
        + EVICT
    )
    (append, use) = trace.computed
    assert append == ("gpu", "append", ("w",))
    assert use[2][0] == use[2][1] not in ("", "w")


EXCHANGE = """
func @p() {
  %a = plan.slot {unit = "gpu[0]", tier = "hbm[0]", bytes = 8} : () -> slot
  %b = plan.slot {unit = "gpu[1]", tier = "hbm[1]", bytes = 8} : () -> slot
  %x = plan.compute %a {unit = "gpu[0]", kernel = @embed, writes = [0]} : (slot) -> token
  %s = plan.send %a {unit = "gpu[0]", to = "gpu[1]", over = "nvlink", bytes = 8, tag = "h"} : (slot) -> token
  %r = plan.recv %b {unit = "gpu[1]", source = "gpu[0]", over = "nvlink", bytes = 8, tag = "h"} : (slot) -> token
  plan.wait %s {unit = "gpu[0]"} : (token) -> ()
  plan.wait %r {unit = "gpu[1]"} : (token) -> ()
  %y = plan.compute %a {unit = "gpu[0]", kernel = @mlp} : (slot) -> token
  %z = plan.compute %b {unit = "gpu[1]", kernel = @mlp} : (slot) -> token
  %c = plan.collective %a {unit = "gpu[0]", kind = "all_reduce", group = ["gpu[0]", "gpu[1]"], over = "nvlink",
    bytes = 8, tag = "r"} : (slot) -> token
  %d = plan.collective %b {unit = "gpu[1]", kind = "all_reduce", group = ["gpu[0]", "gpu[1]"], over = "nvlink",
    bytes = 8, tag = "r"} : (slot) -> token
  plan.wait %c {unit = "gpu[0]"} : (token) -> ()
  plan.wait %d {unit = "gpu[1]"} : (token) -> ()
  %u = plan.compute %a {unit = "gpu[0]", kernel = @norm} : (slot) -> token
  %v = plan.compute %b {unit = "gpu[1]", kernel = @norm} : (slot) -> token
  plan.evict %a {unit = "gpu[0]"} : (slot) -> ()
  plan.evict %b {unit = "gpu[1]"} : (slot) -> ()
  return
}
"""


def test_units_exchange_values() -> None:
    """Both units compute on what was sent, and on the same result of a collective."""
    module = ir.parse(EXCHANGE)
    ir.verify(module)
    computed = interpret_stream(module.functions[0]).computed
    values = {(unit, kernel): read for unit, kernel, read in computed}
    for kernel in ("mlp", "norm"):
        assert values["gpu[0]", kernel] == values["gpu[1]", kernel]
    assert values["gpu[0]", "mlp"] != values["gpu[0]", "norm"]


def without(start: str) -> str:
    """The exchange without its op that begins so."""
    first = EXCHANGE.index(start)
    return EXCHANGE[:first] + EXCHANGE[EXCHANGE.index("-> token\n", first) + len("-> token\n") :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (without("%s = ").replace("plan.wait %s", "plan.wait %x"), "waits for 'h' from gpu\\[0\\], which has not been"),
        (without("%d = ").replace("plan.wait %d", "plan.wait %x"), "all_reduce 'r', which gpu\\[1\\] has not joined"),
        (EXCHANGE.replace('tag = "h"', 'tag = "g"', 1), "waits for gpu\\[1\\] to take 'g', which it never began"),
        (EXCHANGE.replace("plan.wait %s", "plan.wait %x"), "all_reduce of a slot of hbm\\[0\\] while a transfer"),
    ],
)
def test_exchanges_that_do_not_match(text: str, message: str) -> None:
    module = ir.parse(text)
    ir.verify(module)
    with pytest.raises(StreamFault, match=message):
        interpret_stream(module.functions[0])


def test_the_plain_interpreter_says_which_one_is_meant() -> None:
    module = ir.parse('func @p() { %s = plan.slot {unit = "gpu", tier = "hbm", bytes = 8} : () -> slot return }')
    with pytest.raises(DiagnosticError, match="moves data between memories: use ir"):
        interpret(module.functions[0], [])


def test_a_copy_of_a_copy() -> None:
    """Over two links: the slot between holds what the first copy brought, and is busy while the second runs."""
    second = """
      %m = plan.slot {unit = "gpu", tier = "dram", bytes = 64} : () -> slot
      %u = plan.prefetch %w, %m {unit = "gpu", over = "ssd"} : (segment, slot) -> token
      plan.wait %u {unit = "gpu"} : (token) -> ()
      %t = plan.prefetch %m, %s {unit = "gpu", over = "pcie"} : (slot, slot) -> token
      WAIT
      plan.evict %m {unit = "gpu"} : (slot) -> ()
    """
    trace = run(second.replace("WAIT", WAIT) + USE + EVICT)
    assert trace.computed == (("gpu", "k", ("w",)),)
    assert trace.peak_bytes == {"disk": 64, "hbm": 64, "dram": 64}
    with pytest.raises(StreamFault, match="eviction of a slot of dram while a transfer uses it"):
        run(second.replace("WAIT", "") + WAIT + USE + EVICT)
