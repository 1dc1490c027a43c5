"""The memories of a machine as streaming plans see them: slots, segments and what is under way.

Data are names, not bytes: a segment holds its symbol, what a computation writes is a digest of the kernel and of all it
read. Handles and tokens are numbers. `ir.stream_interpreter` runs plans on this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


class StreamFault(Exception):
    """A plan did what it must not do with the memories of a machine."""


@dataclass
class Slot:
    """Reserved bytes. `value` is what they hold, "" for nothing; `busy` are the transfers under way that touch it."""

    unit: str
    tier: str
    nbytes: int
    value: str = ""
    freed: bool = False
    filling: int = -1  # the token of the transfer that brings its data
    busy: set[int] = field(default_factory=set)


@dataclass
class Segment:
    """Data at home in a tier."""

    symbol: str
    tier: str
    nbytes: int
    value: str


@dataclass
class Transfer:
    """A token: what is under way. `slot` is filled at the end with `value`, or with what `channel` brings."""

    touches: tuple[int, ...]
    slot: int = -1
    value: str = ""
    channel: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()  # the message that somebody must have begun to receive
    segment: int = -1
    done: bool = False


class StreamMemory:
    """The memories of a machine. Handles are numbers. `capacities` in bytes by tier; a tier not named has no limit."""

    def __init__(self, capacities: Mapping[str, int | None] | None = None) -> None:
        self.capacities = dict(capacities or {})
        self.used: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.slots: dict[int, Slot] = {}
        self.segments: dict[int, Segment] = {}
        self.transfers: dict[int, Transfer] = {}
        self.sent: dict[tuple[str, ...], str] = {}
        self.joined: dict[tuple[str, ...], dict[str, str]] = {}
        self.received: set[tuple[str, ...]] = set()
        self.computed: list[tuple[str, str, tuple[str, ...]]] = []
        self._next = 0

    def _handle(self) -> np.int64:
        self._next += 1
        return np.int64(self._next - 1)

    def take(self, tier: str, nbytes: int) -> None:
        """Counts bytes of a tier as used. Raises StreamFault when the tier has fewer."""
        used = self.used.get(tier, 0) + nbytes
        limit = self.capacities.get(tier)
        if limit is not None and used > limit:
            raise StreamFault(f"{tier} has {limit} bytes, {used} would be taken")
        self.used[tier] = used
        self.peak[tier] = max(self.peak.get(tier, 0), used)

    def segment(self, symbol: str, tier: str, nbytes: int) -> np.int64:
        self.take(tier, nbytes)
        handle = self._handle()
        self.segments[int(handle)] = Segment(symbol, tier, nbytes, symbol)
        return handle

    def slot(self, unit: str, tier: str, nbytes: int) -> np.int64:
        self.take(tier, nbytes)
        handle = self._handle()
        self.slots[int(handle)] = Slot(unit, tier, nbytes)
        return handle

    def live_slot(self, handle: int, what: str) -> Slot:
        """The slot of a handle. Raises StreamFault when it was freed."""
        slot = self.slots[int(handle)]
        if slot.freed:
            raise StreamFault(f"{what} of a slot of {slot.tier} after its eviction")
        return slot

    def value_of(self, handle: int, what: str) -> str:
        """What a slot or segment holds. Raises StreamFault when it has not arrived or is changing."""
        if int(handle) in self.segments:
            return self.segments[int(handle)].value
        slot = self.live_slot(handle, what)
        if slot.filling >= 0:
            raise StreamFault(f"{what} of a slot of {slot.tier} whose data have not arrived")
        if not slot.value:
            raise StreamFault(f"{what} of a slot of {slot.tier} that holds nothing")
        return slot.value

    def idle_slot(self, handle: int, what: str) -> Slot:
        """The slot of a handle that no transfer touches."""
        slot = self.live_slot(handle, what)
        if slot.busy:
            raise StreamFault(f"{what} of a slot of {slot.tier} while a transfer uses it")
        return slot

    def start(self, transfer: Transfer) -> np.int64:
        """The token of a transfer that begins."""
        token = self._handle()
        self.transfers[int(token)] = transfer
        for handle in transfer.touches:
            if handle in self.slots:
                self.slots[handle].busy.add(int(token))
        if transfer.slot >= 0:
            self.slots[transfer.slot].filling = int(token)
        return token

    def done(self) -> np.int64:
        """The token of something that is over."""
        token = self._handle()
        self.transfers[int(token)] = Transfer((), done=True)
        return token

    def wait(self, token: int) -> None:
        """Returns when a transfer is over."""
        transfer = self.transfers[int(token)]
        if transfer.done:
            return
        if transfer.answered and transfer.answered not in self.received:
            raise StreamFault(
                f"waits for {transfer.answered[2]} to take {transfer.answered[3]!r}, which it never began"
            )
        value = transfer.value
        if transfer.channel:
            value = self._arrived(transfer.channel)
        if transfer.slot >= 0:
            slot = self.slots[transfer.slot]
            slot.value, slot.filling = value, -1
        if transfer.segment >= 0:
            self.segments[transfer.segment].value = value
        for handle in transfer.touches:
            if handle in self.slots:
                self.slots[handle].busy.discard(int(token))
        transfer.done = True

    def _arrived(self, channel: tuple[str, ...]) -> str:
        if channel[0] == "collective":
            values, members = self.joined.get(channel, {}), channel[3:]
            missing = [unit for unit in members if unit not in values]
            if missing:
                raise StreamFault(f"waits for {channel[1]} {channel[2]!r}, which {', '.join(missing)} has not joined")
            return digest(channel[1], [values[unit] for unit in members])
        if channel not in self.sent:
            raise StreamFault(f"waits for {channel[3]!r} from {channel[1]}, which has not been sent")
        return self.sent[channel]

    def evict(self, handle: int, unit: str) -> None:
        """Frees a slot."""
        slot = self.idle_slot(handle, "eviction")
        if slot.unit != unit:
            raise StreamFault(f"{unit} evicts a slot of {slot.tier} that {slot.unit} reserved")
        slot.freed = True
        self.used[slot.tier] -= slot.nbytes

    def finish(self) -> None:
        """Raises StreamFault when slots are left, transfers under way or messages unread."""
        left = [s for s in self.slots.values() if not s.freed]
        if left:
            raise StreamFault(f"{len(left)} slots are never evicted, the first of {left[0].tier}")
        if any(not t.done for t in self.transfers.values()):
            raise StreamFault("the plan ends while transfers are under way")
        unread = [c for c in self.sent if c not in self.received]
        if unread:
            raise StreamFault(f"{unread[0][3]!r} from {unread[0][1]} to {unread[0][2]} is never received")


def digest(kernel: str, values: Sequence[str]) -> str:
    """A short name for what a kernel makes of values."""
    return hashlib.sha256("\0".join([kernel, *values]).encode()).hexdigest()[:16]
