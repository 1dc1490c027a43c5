"""The checker of waits for weights: real programs, and every wait of them taken away, moved or spoilt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ir.core import Op
from ir.ops import plan
from ir.ops.builtin import FuncOp
from ir.ops.plan_await import AwaitExpertsOp, AwaitKVOp, AwaitOp
from passes.schedule.check_awaits import check_awaits
from tests.passes.plan_samples import SHAPES, lowered

PROGRAMS = [(name, number) for name in SHAPES for number in (0, 1)]


def places(name: str) -> list[tuple[str, int, int]]:
    return [(piece.kind, piece.offset, piece.nbytes) for piece in lowered(name).file.pieces]


def faults(name: str, func: FuncOp) -> list[str]:
    return [d.message for d in check_awaits(func, places(name)).diagnostics]


def waits(func: FuncOp) -> Iterator[AwaitOp]:
    for op in list(func.block.ops):
        if isinstance(op, AwaitOp):
            yield op


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_real_programs_wait_for_all_they_read(name: str, number: int) -> None:
    func = lowered(name).programs[number].func
    assert faults(name, func) == []
    assert [op.attributes["number"] for op in waits(func)] == list(range(len(list(waits(func)))))
    awaited = [op.attributes["piece"] for op in waits(func)]
    kinds = [kind for kind, _, _ in places(name)]
    own = [i for i, kind in enumerate(kinds) if kind not in ("rows", "stand_ins")]
    assert awaited == own  # once each, in the order of the file
    copies = [op.stand_ins for op in waits(func) if isinstance(op, AwaitExpertsOp) and op.stand_ins >= 0]
    assert copies == [i for i, kind in enumerate(kinds) if kind == "stand_ins"]
    done = [piece for op in waits(func) for piece in op.attributes["done"]]
    assert len(done) == len(set(done)) and set(done) < set(awaited)
    assert any(isinstance(op, AwaitExpertsOp) for op in waits(func)) == (name in ("experts", "stand_ins"))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_no_wait_can_go(name: str) -> None:
    func = lowered(name).programs[0].func
    for op in waits(func):
        index = func.block.ops.index(op)
        func.block._remove(op)
        assert any("without a wait for piece" in message for message in faults(name, func))
        func.block._insert(index, op)
    assert faults(name, func) == []


def changed(op: Op, **attributes: object) -> dict[str, object]:
    old = {name: op.attributes[name] for name in attributes}
    op.attributes.update(attributes)
    return old


def test_a_piece_done_too_early() -> None:
    """The wait that names it as done, moved before its last reader."""
    func = lowered("experts").programs[0].func
    moved = 0
    for op in waits(func):
        for piece in op.attributes["done"]:
            ops = list(func.block.ops)
            readers = [o for o in ops if isinstance(o, plan.LaunchOp) and _reads(o, piece)]
            index = ops.index(op)
            func.block._remove(op)
            func.block._insert(ops.index(readers[-1]), op)
            assert any(f"without a wait for piece {piece}" in message for message in faults("experts", func))
            func.block._remove(op)
            func.block._insert(index, op)
            moved += 1
    assert moved > 1 and faults("experts", func) == []


def test_a_byte_of_another_piece_counts() -> None:
    """Of the weight that ends last, and of the one that begins first."""
    func = lowered("dense").programs[0].func
    weights = [op for op in func.block.ops if isinstance(op, plan.WeightOp)]
    known = places("dense")
    first, end = min(w.offset for w in weights if w.offset), max(w.offset + w.bytes for w in weights)
    for piece, counts in ((("dense", end - 1, 1), True), (("dense", end, 1), False), (("dense", first, 1), True)):
        missing = [d.message for d in check_awaits(func, [*known, piece]).diagnostics]
        assert any(f"without a wait for piece {len(known)}" in message for message in missing) == counts


def _reads(launch: plan.LaunchOp, piece: int) -> bool:
    _, first, size = places("experts")[piece]
    found = [v.defining_op() for v in launch.arguments]
    return any(isinstance(op, plan.WeightOp) and first <= op.offset < first + size for op in found)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"number": 7}, "is number 7 where 0 follows"),
        ({"piece": 99}, "of piece 99, which is no piece of kind dense"),
        ({"piece": 0}, "of piece 0, which is no piece of kind dense"),  # the rows of the embedding
    ],
)
def test_waits_for_what_is_not_there(attributes: dict[str, object], expected: str) -> None:
    func = lowered("experts").programs[0].func
    op = next(waits(func))
    old = changed(op, **attributes)
    assert any(expected in message for message in faults("experts", func))
    changed(op, **old)
    assert faults("experts", func) == []


def test_stand_ins_are_waited_for_with_their_experts() -> None:
    """Before the pairs are grouped, since the wait says which are used; and gone with the experts."""
    func = lowered("stand_ins").programs[0].func
    wait = next(op for op in waits(func) if isinstance(op, AwaitExpertsOp))
    ops = list(func.block.ops)
    launches = [str(op.kernel.name) for op in ops[ops.index(wait) :] if isinstance(op, plan.LaunchOp)]
    assert launches[0].startswith("dispatch") and sum("stand_ins" in name for name in launches) == 2
    own = wait.stand_ins
    for value, expected in ((-1, f"without a wait for piece {own}"), (0, "no piece of kind stand_ins")):
        old = changed(wait, stand_ins=value)
        assert any(expected in message for message in faults("stand_ins", func))
        changed(wait, **old)
    later = next((op for op in waits(func) if wait.piece in op.attributes["done"]), None)
    if later is not None:
        index, place = ops.index(later), ops.index(wait) + 1
        func.block._remove(later)
        func.block._insert(place, later)
        assert any(f"without a wait for piece {own}" in message for message in faults("stand_ins", func))
        func.block._remove(later)
        func.block._insert(index, later)
    assert faults("stand_ins", func) == []


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_keys_and_values_are_waited_for_layer_by_layer(name: str, number: int) -> None:
    program = lowered(name).programs[number]
    kv_waits = [op for op in program.func.block.ops if isinstance(op, AwaitKVOp)]
    touched = [
        op.layer
        for launch in program.func.block.ops
        if isinstance(launch, plan.LaunchOp)
        for value in launch.arguments
        if isinstance(op := value.defining_op(), plan.KVOp)
    ]
    assert touched
    assert [op.layer for op in kv_waits] == program.kv_awaits() == list(dict.fromkeys(touched))
    assert [op.number for op in kv_waits] == list(range(len(kv_waits)))


def test_no_wait_for_keys_and_values_can_go_or_change() -> None:
    func = lowered("dense").programs[0].func
    for op in [op for op in func.block.ops if isinstance(op, AwaitKVOp)]:
        index = func.block.ops.index(op)
        func.block._remove(op)
        assert any("touches keys and values of layer" in message for message in faults("dense", func))
        func.block._insert(index, op)
        for attributes, expected in (({"layer": 99}, "without a wait"), ({"number": 99}, "is number 99 where")):
            old = changed(op, **attributes)
            assert any(expected in message for message in faults("dense", func))
            changed(op, **old)
    assert faults("dense", func) == []
