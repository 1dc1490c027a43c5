"""The checker of launches: arguments that do not fit, accesses that a launch does not list; launches of real models."""

from __future__ import annotations

import pytest

from ir import parse, verify
from ir.ops import plan
from passes.schedule.check_launches import accesses_of, check_launches
from tests.passes.plan_samples import SHAPES, lowered

TEXT = """
func @decode() {
  %n = plan.size {which = "tokens"} : () -> index
  %x = plan.reserve {offset = 0, bytes = 64} : () -> buffer<f32>
  %y = plan.reserve {offset = 64, bytes = 64} : () -> buffer<f32>
  plan.launch %x, %y, %n {kernel = @scale, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index) -> ()
  return
}
func @scale(%x: buffer<f32>, %y: buffer<f32>, %n: index) {
  %zero = tile.constant {value = 0} : () -> index
  %one = tile.constant {value = 1} : () -> index
  %s = tile.scratch {size = 4, element = f32} : () -> buffer<f32, private>
  %t = tile.offset %y, %one : (buffer<f32>, index) -> buffer<f32>
  %words = tile.view %t {element = i32} : (buffer<f32>) -> buffer<i32>
  tile.for %zero, %n, %one ({ ^(%i: index):
    %v = tile.load %x, %i : (buffer<f32>, index) -> f32
    tile.store %s, %zero, %v : (buffer<f32, private>, index, f32) -> ()
    %w = tile.bitcast %v {to = i32} : (f32) -> i32
    tile.prefetch %y, %i : (buffer<f32>, index) -> ()
    tile.store %words, %i, %w : (buffer<i32>, index, i32) -> ()
    tile.yield : () -> ()
  }) : (index, index, index) -> ()
  return
}
"""
MASKED = """
    %m = tile.compare %vv, %vv {predicate = "eq"} : (vector<4 x f32>, vector<4 x f32>) -> vector<4 x i1>
    %u = tile.load_masked %x, %i, %m : (buffer<f32>, index, vector<4 x i1>) -> vector<4 x f32>
    tile.store_masked %x, %i, %u, %m : (buffer<f32>, index, vector<4 x f32>, vector<4 x i1>) -> ()
"""


def faults(text: str) -> list[str]:
    module = parse(text)
    verify(module)
    functions = list(module.functions)
    return [d.message for d in check_launches(functions[:1], functions[1:])]


def changed(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


def test_launches_that_fit() -> None:
    assert faults(TEXT) == []
    assert faults(changed("writes = [1], reads = [0]", "writes = [1, 0], reads = []")) == []  # says more than it does


def test_accesses_are_found_through_views_and_loops() -> None:
    kernel = parse(TEXT).function("scale")
    found = accesses_of(kernel)
    assert (list(found.loads), list(found.stores)) == ([0], [1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@scale,", "@scales,", "launch of @scales, which is no kernel of this module"),
        (
            "%x, %y, %n {kernel = @scale, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index)",
            "%x, %y {kernel = @scale, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>)",
            "launch of @scale expected arguments (buffer<f32>, buffer<f32>, index), got (buffer<f32>, buffer<f32>)",
        ),
        (
            "%x, %y, %n {kernel = @scale, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index)",
            "%n, %y, %x {kernel = @scale, writes = [1], reads = [2]} : (index, buffer<f32>, buffer<f32>)",
            "launch of @scale expected arguments (buffer<f32>, buffer<f32>, index), "
            "got (index, buffer<f32>, buffer<f32>)",
        ),
        (
            "writes = [1], reads = [0]",
            "writes = [0], reads = [1]",
            "@scale stores to argument 1, which its launch does not list in writes",
        ),
    ],
)
def test_each_fault_is_named(old: str, new: str, message: str) -> None:
    assert faults(changed(old, new)) == [message]


def test_masked_accesses_count() -> None:
    vector = "    %vv = tile.load %x, %i {lanes = 4} : (buffer<f32>, index) -> vector<4 x f32>\n"
    text = changed("    tile.prefetch", vector + MASKED + "    tile.prefetch")
    assert faults(text) == ["@scale stores to argument 0, which its launch does not list in writes"]


@pytest.mark.parametrize("name", SHAPES)
def test_real_launches_fit_and_say_no_more_than_their_kernels_do(name: str) -> None:
    """So no barrier is missing, and none is there for nothing."""
    step = lowered(name)
    assert not check_launches([p.func for p in step.programs], step.kernels).errors
    kernels = {kernel.sym_name: accesses_of(kernel) for kernel in step.kernels}
    for program in step.programs:
        for op in program.func.block.ops:
            if isinstance(op, plan.LaunchOp):
                found = kernels[op.kernel.name]
                assert set(op.writes) == set(found.stores)
                # The second product of experts has its rows in grouped order already and does not look at the order.
                spare = {2} if op.kernel.name.startswith(("experts_64x96", "stand_ins_64x96")) else set()
                assert set(op.reads) == set(found.loads) - set(op.writes) | spare


TICKETS = """
func @decode() {
  %y = plan.reserve {offset = 0, bytes = 64} : () -> buffer<f32>
  plan.launch %y {kernel = @first, writes = [0], reads = []} : (buffer<f32>) -> ()
  plan.barrier : () -> ()
  plan.launch %y {kernel = @second, writes = [0], reads = []} : (buffer<f32>) -> ()
  return
}
func @first(%y: buffer<f32>) {
  %n = tile.ticket : () -> index
  %m = tile.ticket : () -> index
  return
}
func @second(%y: buffer<f32>) {
  %n = tile.ticket : () -> index
  return
}
"""


def test_tickets_begin_anew_between_kernels() -> None:
    barrier = "  plan.barrier : () -> ()\n"
    assert faults(TICKETS) == []
    assert faults(TICKETS.replace(barrier, "")) == ["@second takes tickets after @first without a barrier between"]
    assert faults(TICKETS.replace(barrier, "").replace("@second {", "@first {").replace("= @second", "= @first")) == [
        "@first takes tickets after @first without a barrier between"
    ]
    inside = TICKETS.replace(barrier, "").replace(
        "func @second(%y: buffer<f32>) {\n", "func @second(%y: buffer<f32>) {\n  tile.barrier : () -> ()\n"
    )
    assert faults(inside) == []
