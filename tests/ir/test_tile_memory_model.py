"""Memory as kernels see it: what a view reads and writes, what it refuses, and which accesses of two threads race."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.formats import BF16, F32, I32, PlainFormat
from ir.tile_memory_model import BufferView, KernelFault, Memory


def view_of(*numbers: float, element: PlainFormat = F32, thread: int = 0) -> BufferView:
    return BufferView(Memory(np.array(numbers).astype(element.dtype), "numbers"), element, 0, thread)


def on(view: BufferView, thread: int) -> BufferView:
    """The same view as another thread has it."""
    return BufferView(view.memory, view.element, view.start, thread, view.bounds)


def test_loads_and_stores() -> None:
    view = view_of(1, 2, 3, 4)
    assert view.load(2, 1) == 3 and isinstance(view.load(2, 1), np.float32)
    view.store(1, np.float32([8, 9]))
    np.testing.assert_array_equal(view.load(0, 4), [1, 8, 9, 4])
    view.store(3, np.float32(5))
    assert view.load(3, 1) == 5


def test_a_load_is_a_copy() -> None:
    view = view_of(1, 2)
    before = view.load(0, 2)
    view.store(0, np.float32(7))
    np.testing.assert_array_equal(before, [1, 2])


def test_masks_touch_the_chosen_elements_only() -> None:
    view = view_of(1, 2, 3)
    np.testing.assert_array_equal(view.load_masked(1, np.array([True, True, False, False])), [2, 3, 0, 0])
    np.testing.assert_array_equal(view.load_masked(-2, np.array([False, False, True])), [0, 0, 1])
    view.store_masked(2, np.float32([7, 8]), np.array([True, False]))
    np.testing.assert_array_equal(view.load(0, 3), [1, 2, 7])
    with pytest.raises(KernelFault, match=r"read of bytes 12\.\.16 of numbers, outside of 0\.\.12"):
        view.load_masked(2, np.array([True, True]))


def test_offsets_and_views() -> None:
    view = view_of(1, 2, 3, 4, element=BF16)
    assert view.offset(1).offset(2).load(0, 1) == 4
    pairs = view.view(I32)
    assert pairs.load(1, 1) == np.array([3, 4], BF16.dtype).view(np.int32)[0]
    pairs.store(0, np.int32(0))
    np.testing.assert_array_equal(view.load(0, 4).astype(float), [0, 0, 3, 4])


@pytest.mark.parametrize(
    ("index", "lanes", "message"),
    [
        (-1, 1, r"read of bytes -4\.\.0 of numbers, outside of 0\.\.16"),
        (4, 1, r"read of bytes 16\.\.20 of numbers, outside of 0\.\.16"),
        (2, 4, r"read of bytes 8\.\.24 of numbers, outside of 0\.\.16"),
    ],
)
def test_reads_out_of_bounds(index: int, lanes: int, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        view_of(1, 2, 3, 4).load(index, lanes)


def test_writes_out_of_bounds_change_nothing() -> None:
    view = view_of(1, 2, 3, 4)
    with pytest.raises(KernelFault, match=r"write of bytes 12\.\.20 of numbers, outside of 0\.\.16"):
        view.store(3, np.float32([8, 9]))
    np.testing.assert_array_equal(view.load(0, 4), [1, 2, 3, 4])


def test_bounds_inside_of_a_memory() -> None:
    """Neighbours in an arena: a view may go anywhere in its own bytes, whatever it was offset by."""
    memory = Memory(np.zeros(16, np.float32), "arena")
    view = BufferView(memory, F32, 16, bounds=(16, 48))
    view.offset(7).store(0, np.float32(1))
    view.offset(7).view(I32).load(-7, 8)
    for index in (-1, 8):
        with pytest.raises(KernelFault, match=r"of arena, outside of 16\.\.48"):
            view.load(index, 1)


def test_a_view_of_wider_elements_is_aligned() -> None:
    view = view_of(1, 2, 3, 4, element=BF16)
    with pytest.raises(KernelFault, match="read of i32 at byte 2 of numbers, which is not aligned"):
        view.offset(1).view(I32).load(0, 1)


def test_scratch_is_undefined_at_first_and_private() -> None:
    scratch = BufferView.undefined(4, F32)
    assert (np.abs(scratch.load(0, 4)) > 1e7).all()
    with pytest.raises(KernelFault, match=r"of scratch, outside of 0\.\.16"):
        scratch.load(4, 1)
    on(scratch, 1).store(0, np.float32(1))  # nobody else has it, so nobody races
    scratch.store(0, np.float32(2))


ACCESSES = {"reads": lambda v: v.load(1, 2), "writes": lambda v: v.store(1, np.float32([0, 0]))}


@pytest.mark.parametrize("first", ACCESSES)
@pytest.mark.parametrize("second", ACCESSES)
def test_races_of_two_threads(first: str, second: str) -> None:
    view = view_of(1, 2, 3, 4)
    ACCESSES[first](view)
    ACCESSES[second](view)  # one thread never races with itself
    if first == second == "reads":
        ACCESSES[second](on(view, 1))
        return
    with pytest.raises(KernelFault, match=f"thread 1 {second} numbers at byte 4, written by another in this phase"):
        ACCESSES[second](on(view, 1))


def test_a_write_meets_several_readers() -> None:
    view = view_of(1, 2, 3, 4)
    for thread in (0, 1, 2):
        on(view, thread).load(0, 4)
    with pytest.raises(KernelFault, match="thread 0 writes numbers at byte 8, read by another in this phase"):
        view.store(2, np.float32(0))


def test_neighbouring_bytes_do_not_race() -> None:
    view = view_of(1, 2, 3, 4, element=BF16)
    for thread in range(4):
        on(view, thread).store(thread, BF16.dtype.type(thread))
    with pytest.raises(KernelFault, match="thread 0 reads numbers at byte 2, written by another in this phase"):
        view.view(I32).load(0, 1)


def test_a_new_phase_forgets() -> None:
    view = view_of(1, 2)
    view.store(0, np.float32(5))
    view.memory.new_phase()
    assert on(view, 1).load(0, 1) == 5


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=8), st.randoms())
def test_a_race_is_found_in_every_order(accesses: list[tuple[bool, int, int]], random: object) -> None:
    """Accesses (write?, thread, element) race when two threads touch an element and one writes, in whatever order."""
    races = any(a[2] == b[2] and a[1] != b[1] and (a[0] or b[0]) for i, a in enumerate(accesses) for b in accesses[:i])
    random.shuffle(accesses)  # type: ignore[attr-defined]
    view = view_of(*range(6))

    def run() -> None:
        for write, thread, element in accesses:
            if write:
                on(view, thread).store(element, np.float32(0))
            else:
                on(view, thread).load(element, 1)

    if races:
        with pytest.raises(KernelFault):
            run()
    else:
        run()


def test_threads_that_touch_a_byte_at_once_are_both_noted() -> None:
    """Many rounds in which two real threads store to one place without a barrier: every round is a race."""
    missed = 0
    for _ in range(200):
        view, faults = view_of(1, 2), []
        start = threading.Barrier(2)

        def store(
            thread: int, view: BufferView = view, faults: list = faults, start: threading.Barrier = start
        ) -> None:
            start.wait()
            try:
                on(view, thread).store(0, np.float32(thread))
            except KernelFault as fault:
                faults.append(fault)

        threads = [threading.Thread(target=store, args=(t,)) for t in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        missed += len(faults) != 1
    assert missed == 0
