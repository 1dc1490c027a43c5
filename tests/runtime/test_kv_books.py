"""Which parts of layers go: never more than whole layers would, always within the room, and what is in use is there."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kv_books import KVBooks, divide, wanted_ahead


def read_by_whole_layers(layers: int, groups: int, room: int) -> int:
    """Groups that a step reads where whole layers stay or go, two of those that go being in memory at once."""
    fit = room // groups
    return 0 if fit >= layers else (layers - fit + min(fit, 2)) * groups


@settings(max_examples=60)
@given(data=st.data(), layers=st.integers(1, 40), groups=st.integers(1, 60))
def test_as_little_goes_as_can(data: st.DataObject, layers: int, groups: int) -> None:
    room = data.draw(st.integers(groups, layers * groups + 5))
    wanted = data.draw(st.integers(0, groups))
    found = divide(layers, groups, room, wanted)
    total, most = sum(found.going), max(found.going)
    assert all(0 <= going <= groups for going in found.going) and most - min(found.going) <= 1
    assert total <= read_by_whole_layers(layers, groups, room)
    short = layers * groups - room
    if short <= 0:
        assert total == 0
        return
    # The layer in use is there, what stays of the others, and what is read ahead.
    for going in found.going:
        assert layers * groups - total + going + found.ahead <= room
    assert found.ahead <= min(wanted, most)
    least = -(-(short + found.ahead) // (layers - 1))  # no division of these layers does with a smaller largest part
    assert most == least and total == short + found.ahead + least


@given(layers=st.integers(2, 40), groups=st.integers(1, 200), part=st.floats(0, 1), wanted=st.integers(0, 200))
def test_more_room_never_reads_more_and_more_ahead_never_less(
    layers: int, groups: int, part: float, wanted: int
) -> None:
    room = groups + int(part * (layers - 1) * groups)
    alone = sum(divide(layers, groups, room, 0).going)
    assert sum(divide(layers, groups, room + 1, 0).going) <= alone <= sum(divide(layers, groups, room, wanted).going)


@settings(max_examples=30)
@given(data=st.data())
def test_any_calls_keep_the_room_and_have_what_they_use(data: st.DataObject) -> None:
    """Sequences that grow, go back and take turns; reads arrive when they are waited for. What is given up is written
    once, and again only when it changed."""
    layers, slots = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    books, lens = KVBooks(layers, slots), [0] * slots
    file: dict[tuple[int, int, int], int] = {}  # the version of each group on file
    version = np.zeros((layers, slots, 100), np.int64)
    memory = np.full((layers, slots, 100), True)
    for serial in range(data.draw(st.integers(1, 7))):
        used = sorted(data.draw(st.sets(st.integers(0, slots - 1), min_size=1)))
        first = {n: data.draw(st.integers(max(0, lens[n] - 3), lens[n])) for n in used}
        after = {n: max(lens[n], first[n] + data.draw(st.integers(0, 6))) for n in used}
        whole = sum(after.values())
        for slot in (n for n in range(slots) if n not in used):  # as the runtime has it when not all fits
            for layer in range(layers):
                give_up(books, (layer, slot, lens[slot]), version, memory, file)
        room = data.draw(st.integers(whole, max(whole, layers * whole + 2)))
        books.begin({n: lens[n] for n in used}, first, after, room, data.draw(st.sampled_from((len(used), 99))))
        there = {n: lens[n] for n in used}
        for layer in (*range(layers), -1):
            if layer >= 0 and not any(books.division.going) and books.is_there(layer):
                continue
            for goal in (*books.passes(layer),):
                give_up(books, goal, version, memory, file)
            for goal in books.makes_room(layer) if layer >= 0 else ():
                give_up(books, goal, version, memory, file)
            for number, slot, start, end in books.reads(layer):
                for group in range(start, end):
                    assert not memory[number, slot, group]
                    assert file[number, slot, group] == version[number, slot, group]
            if layer < 0:
                break
            for slot in used:
                books.came(layer, slot, 0)
                memory[layer, slot] = True
                version[layer, slot, first[slot] : after[slot]] = serial + 1
            counted = 0
            for number in range(layers):
                for slot in used:
                    length = after[slot] if number <= layer else there[slot]
                    counted += max(0, length - int(books.asked[number, slot]))
            assert counted <= room
        lens = [after.get(n, length) for n, length in enumerate(lens)]


def give_up(
    books: KVBooks, goal: tuple[int, int, int], version: np.ndarray, memory: np.ndarray,
    file: dict[tuple[int, int, int], int],
) -> None:  # fmt: skip
    layer, slot, groups = goal
    books.dropped(layer, slot)
    if groups <= books.gone[layer, slot]:
        return
    for group in range(*books.unwritten(layer, slot, groups)):
        assert memory[layer, slot, group]
        file[layer, slot, group] = int(version[layer, slot, group])
    books.went(layer, slot, groups)
    memory[layer, slot, :groups] = False


def test_steps_alike_read_what_went_and_nothing_else() -> None:
    """In the room of half of 8 layers of 32 groups, a decode step reads 32 * 4 short and what must be there besides."""
    books, groups, room = KVBooks(8, 1), {0: 32}, 128
    read = []
    for _ in range(4):
        books.begin(groups, groups, groups, room, 1)
        total = 0
        for layer in (*range(8), -1):
            for number, slot, going in (*books.passes(layer), *(books.makes_room(layer) if layer >= 0 else ())):
                books.dropped(number, slot)
                books.went(number, slot, going)
            total += sum(end - first for *_, first, end in books.reads(layer))
            if layer >= 0:
                books.came(layer, 0, 0)
        read.append(total)
    ahead = wanted_ahead(32, 1, 1)
    assert ahead == 8 and sum(books.division.going) == 128 + ahead + -(-(128 + ahead) // 7)
    assert read[1:] == [sum(books.division.going)] * 3
    assert read[-1] < read_by_whole_layers(8, 32, room)
