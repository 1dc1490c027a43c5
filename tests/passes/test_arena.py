"""Arena assignment: overlapping lifetimes never overlap in memory, and the checker sees it when they do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.schedule.arena import Arena, Lifetime, assign_arena, check_arena


@st.composite
def lifetime_lists(draw) -> list[Lifetime]:
    count = draw(st.integers(0, 24))
    found = []
    for i in range(count):
        first = draw(st.integers(-1, 20))
        length = draw(st.integers(0, 8))
        found.append(Lifetime(f"b{i}", draw(st.integers(0, 1000)), first, first + length))
    return found


@given(lifetime_lists(), st.sampled_from([1, 16, 64, 4096]))
def test_assignment_passes_the_checker(lifetimes, alignment):
    arena = assign_arena(lifetimes, alignment)
    assert check_arena(lifetimes, arena, alignment) == []
    assert arena.total_bytes >= arena.peak_bytes
    assert list(arena.offsets) == [x.buffer for x in lifetimes]


@given(lifetime_lists())
def test_no_byte_is_shared_by_brute_force(lifetimes):
    arena = assign_arena(lifetimes)
    for i, a in enumerate(lifetimes):
        for b in lifetimes[:i]:
            together = a.first <= b.last and b.first <= a.last
            start_a, start_b = arena.offsets[a.buffer], arena.offsets[b.buffer]
            shared = start_a < start_b + b.bytes and start_b < start_a + a.bytes and a.bytes and b.bytes
            assert not (together and shared), (a, b)


@given(lifetime_lists())
def test_assignment_is_deterministic(lifetimes):
    assert assign_arena(lifetimes) == assign_arena(list(lifetimes))


def test_a_chain_needs_two_buffers():
    lifetimes = [Lifetime(i, 6400, i, i + 1) for i in range(50)]
    arena = assign_arena(lifetimes)
    assert arena.total_bytes == arena.peak_bytes == 2 * 6400


def test_a_buffer_written_while_another_is_read_gets_its_own_bytes():
    read, written = Lifetime("read", 64, 0, 1), Lifetime("written", 64, 1, 2)
    arena = assign_arena([read, written])
    assert arena.offsets["read"] != arena.offsets["written"]
    after = assign_arena([read, Lifetime("written", 64, 2, 2)])
    assert after.offsets["read"] == after.offsets["written"] == 0


def test_nothing_to_assign():
    assert assign_arena([]) == Arena({}, 0, 0)
    assert assign_arena([Lifetime("empty", 0, 0, 9)]).total_bytes == 0


@pytest.mark.parametrize(
    ("lifetimes", "message"),
    [
        ([Lifetime("a", -1, 0, 0)], "has -1 bytes"),
        ([Lifetime("a", 1, 3, 2)], "ends at step 2, before it begins at 3"),
        ([Lifetime("a", 1, 0, 0), Lifetime("a", 1, 5, 5)], "two buffers are named a"),
    ],
)
def test_lifetimes_that_make_no_sense(lifetimes, message):
    with pytest.raises(ValueError, match=message):
        assign_arena(lifetimes)
    with pytest.raises(ValueError, match="power of two"):
        assign_arena([], alignment=48)


def test_the_checker_sees_each_fault():
    a, b = Lifetime("a", 100, 0, 2), Lifetime("b", 100, 2, 3)
    assert check_arena([a, b], Arena({"a": 0, "b": 64}, 256)) == ["a and b share memory at step 2"]
    assert check_arena([a, b], Arena({"a": 0, "b": 128}, 200)) == ["b at 128..228 lies outside of 200 bytes"]
    assert check_arena([a, b], Arena({"a": 0, "b": 130}, 256)) == ["b is at 130, which is no multiple of 64"]
    assert check_arena([a, b], Arena({"a": 0}, 256)) == ["b has no offset"]
    assert check_arena([a, b], Arena({"a": 0, "b": -64}, 256))[0].startswith("b at -64")
    wide, inner = Lifetime("wide", 512, 0, 9), Lifetime("inner", 64, 4, 4)
    found = check_arena([wide, inner], Arena({"wide": 0, "inner": 128}, 512))
    assert found == ["wide and inner share memory at step 4"]
