"""Which keys and values of a cache larger than its memory are there, and which go next: decisions only, no byte moved.

Takes layers and sequences (slots), counted in groups of 64 positions, and the groups that memory has room for. Gives
what goes, what is read and when, call by call (a call: one pass of a program over the layers in their order). The
runtime carries it out (`runtime.kv_stream`), and a plan foretells it with the same books (`stratum.kv_prediction`).

Attention reads the whole layer it is at, and no other; so the layer in use must be there, and of the others as much as
the rest of the room holds (`divide`). Of a layer the oldest groups go, those of the first slot before those of the
second. Each step reads what went, whatever its tokens: of the layer that comes next as much as may be there beside the
one in use, the rest when the program asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

GROUP = 64  # positions that go and come together: whole blocks, and whole groups of keys that share scales
AHEAD = 4  # of a layer one part in so many, for each token of a sequence, is read while the one before is in use

Goal = tuple[int, int, int]  # layer, slot, groups of it, the oldest, that memory is not to have
Read = tuple[int, int, int, int]  # layer, slot, and groups first..end of it


@dataclass(frozen=True)
class Division:
    """`going`: by layer, the groups that are in memory only while it is in use. `ahead`: groups of the layers that
    follow which may be there besides."""

    going: tuple[int, ...]
    ahead: int = 0


def divide(layers: int, groups: int, room: int, ahead: int) -> Division:
    """What of `layers` layers of so many groups goes where `room` groups fit, at least one whole layer, and about
    `ahead` of the next are to be read while one is in use.

    With W = layers * groups and the layer in use whole, what the others lack makes up for what is short: where `most`
    is the largest part that goes, the parts together are W - room + ahead + most. They are least where all are alike:
    W - room + ahead, shared by all layers but one. More ahead than a whole part is of no use, and between two layers
    reading ahead only makes the part larger.
    """
    short = layers * groups - room
    if short <= 0:
        return Division((0,) * layers, 0)
    ahead = max(0, min(ahead, room - groups)) if layers > 2 else 0
    most = -(-(short + ahead) // (layers - 1))
    if most < ahead:
        most = ahead = -(-short // (layers - 2))
    each, more = divmod(short + ahead + most, layers)
    order = sorted(range(layers), key=_reversed_bits)
    longer = set(order[:more])
    return Division(tuple(each + (layer in longer) for layer in range(layers)), ahead)


def wanted_ahead(groups: int, tokens: int, slots: int) -> int:
    """Groups of a layer of so many to be read while one is in use, in calls of `tokens` tokens of `slots` sequences."""
    return min(groups, -(-groups * tokens // (AHEAD * max(1, slots))))


class KVBooks:
    """What of each layer and slot is where, in groups.

    `gone` i64 [layers, slots]: the first so many are not in memory. `asked`, of those: the first so many are not on
    their way either. `clean`: of the first so many, memory or file has what the file has.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.layers = layers
        self.gone, self.asked, self.clean = (np.zeros((layers, slots), np.int64) for _ in range(3))
        self.division = Division((0,) * layers)
        self.current = -1
        self._room = 0
        self._slots: list[int] = []  # of the call
        self._before = self._after = np.zeros(0, np.int64)  # by its slots: groups before its tokens, and with them
        self._first = self._before
        self._groups = 0  # of one layer, with them
        self._passed = np.zeros(layers, np.bool_)

    def begin(
        self, before: Mapping[int, int], first: Mapping[int, int], after: Mapping[int, int], room: int, tokens: int
    ) -> None:
        """A call of `tokens` tokens begins, of slots that have so many groups; `room` is theirs. The `first` so many
        are not written to."""
        self._slots = sorted(after)
        self._before, self._first, self._after = (
            np.array([lens[slot] for slot in self._slots]) for lens in (before, first, after)
        )
        self._groups, self._room, self.current = int(self._after.sum()), room, -1
        self._passed[:] = False
        ahead = wanted_ahead(self._groups, tokens, len(self._slots))
        self.division = divide(self.layers, self._groups, room, ahead)

    def forget(self, slot: int) -> None:
        """The slot's sequence is over."""
        for array in (self.gone, self.asked, self.clean):
            array[:, slot] = 0

    def is_there(self, layer: int) -> bool:
        """Whether all of the layer that the call reads is in memory."""
        return not self.gone[layer, self._slots].any()

    # -- what goes

    def passes(self, layer: int) -> Iterator[Goal]:
        """The program comes to `layer` (-1: its end), and will write to it: what goes of the one before."""
        before, self.current = self.current, layer
        if layer >= 0:
            self.clean[layer, self._slots] = np.minimum(self.clean[layer, self._slots], self._first)
        if before >= 0 and before != layer:
            self._passed[before] = True
            yield from self._goals(before, self.division.going[before], self._after)

    def makes_room(self, layer: int) -> Iterator[Goal]:
        """What goes so that `layer` can be there as a whole: of those that have more than is due to them, the ones that
        are used last. Each to be carried out before the next is asked for."""
        over = self._groups + sum(self._present()[n] for n in self._order(layer)) - self._room
        for other in reversed(self._order(layer)):
            if over <= 0:
                return
            present, due = self._present()[other], self._due(other)
            if present > due:
                lens = self._after if self._passed[other] else self._before
                yield from self._goals(other, max(0, int(lens.sum()) - due), lens)
                over -= present - self._present()[other]

    def _goals(self, layer: int, going: int, lens: np.ndarray) -> Iterator[Goal]:
        """The first `going` groups of a layer, slot by slot."""
        for slot, groups in zip(self._slots, lens.tolist(), strict=True):
            mine = min(groups, going)
            going -= mine
            if mine > self.asked[layer, slot]:
                yield layer, slot, mine

    def unwritten(self, layer: int, slot: int, groups: int) -> tuple[int, int]:
        """Groups first..end that the file must get before the first `groups` of the slot leave memory."""
        return max(int(self.clean[layer, slot]), int(self.gone[layer, slot])), groups

    def went(self, layer: int, slot: int, groups: int) -> None:
        """The first `groups` have left memory; what was on its way was thrown away before (`dropped`)."""
        if self.clean[layer, slot] >= self.gone[layer, slot]:
            self.clean[layer, slot] = max(int(self.clean[layer, slot]), groups)
        self.gone[layer, slot] = self.asked[layer, slot] = max(int(self.gone[layer, slot]), groups)

    # -- what comes

    def reads(self, layer: int) -> Iterator[Read]:
        """What is to be read now: what is missing of `layer` (-1: the call is over), then what may be there of those
        that follow."""
        if layer >= 0:
            yield from self._missing(layer, int(self.asked[layer].sum()))  # after going back more than the call's
        if not any(self.division.going):
            return
        order, present = self._order(layer), self._present()
        in_use = self._groups if layer >= 0 else max(self.division.going)
        left = self._room - in_use - sum(max(present[n], self._due(n)) for n in order)
        for other in order:
            for read in self._missing(other, left):
                left -= read[3] - read[2]
                yield read
            if left <= 0:
                return

    def _missing(self, layer: int, most: int) -> Iterator[Read]:
        """Of what is neither there nor on its way, the newest `most` groups."""
        for slot in self._slots:
            end = int(self.asked[layer, slot])
            first = max(0, end - most)
            if end > first:
                most -= end - first
                self.asked[layer, slot] = first
                yield layer, slot, first, end

    def came(self, layer: int, slot: int, first: int) -> None:
        """All groups from `first` on are in memory."""
        self.gone[layer, slot] = first

    def dropped(self, layer: int, slot: int) -> None:
        """Nothing of this is on its way any more."""
        self.asked[layer, slot] = self.gone[layer, slot]

    # -- counts

    def _order(self, layer: int) -> list[int]:
        """The layers that follow this one, as they are used: also in the next call."""
        return [n % self.layers for n in range(layer + 1, layer + self.layers + (layer < 0))]

    def _due(self, layer: int) -> int:
        """Groups of the layer that may stay."""
        return self._groups - self.division.going[layer]

    def _present(self) -> list[int]:
        """By layer, groups that are there or on their way."""
        lens = np.where(self._passed[:, None], self._after, self._before)
        return np.maximum(0, lens - self.asked[:, self._slots]).sum(axis=1).tolist()


def _reversed_bits(number: int) -> int:
    """An order in which any first few of 0, 1, 2, ... lie evenly among all."""
    return int(f"{number:016b}"[::-1], 2)
