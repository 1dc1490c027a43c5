"""Experts that a GPU's memory lacks: which are brought there, and which the CPU computes where they lie.

    brought, there = divide([9, 4, 1], prices, unit=3 << 20)      # indices, by the tokens that chose each
    brought, there = divide([9, 4, 1], prices, 3 << 20, read=[0])  # the first of them lies on the disk only

HybriMoE's rule (arXiv:2504.05897), as plans have it (`passes.place.missed_experts`): missing experts go one after
another to the side that would be done with one first: the link, which takes the one of the most tokens since bringing
costs the same whatever the load, or the CPU, which takes the one of the fewest. Those on the disk follow, in the order
in which they are read: both ways have to wait for that, the CPU begins then, the link has still to bring them. The same
loads and prices give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import RuntimeDiagnostic

AUTO, FETCH, CPU = "auto", "fetch", "cpu"
MODES = (AUTO, FETCH, CPU)


@dataclass(frozen=True)
class ExpertPrices:
    """Bytes a second that the link brings, and that the CPU multiplies with one token; each further token of an expert
    costs the CPU `row_share` of the first; seconds until the CPU has begun and its results are on the GPU; bytes a
    second that the disk reads (0: nothing is said, as if it took no time)."""

    link_bytes_per_s: float
    host_bytes_per_s: float
    row_share: float = 1.0
    start_s: float = 0.0
    disk_bytes_per_s: float = 0.0

    def read_s(self, unit: int) -> float:
        """Of reading an expert of `unit` bytes."""
        return unit / self.disk_bytes_per_s if self.disk_bytes_per_s > 0 else 0.0

    def fetch_s(self, unit: int) -> float:
        """Of an expert of `unit` bytes."""
        return unit / self.link_bytes_per_s

    def host_s(self, unit: int, tokens: int) -> float:
        """Of an expert of `unit` bytes that so many tokens chose."""
        return unit / self.host_bytes_per_s * (1.0 + self.row_share * (tokens - 1))


@dataclass(frozen=True)
class Missed:
    """What is done about missing experts: `auto` by prices (None: measured when a model is opened), `fetch` always
    brought, `cpu` always computed by the CPU."""

    mode: str = FETCH
    prices: ExpertPrices | None = None


FETCHED = Missed()


def missed_of(asked: str | Missed) -> Missed:
    """Of a mode by its name. Raises RuntimeDiagnostic for others."""
    if isinstance(asked, Missed):
        return asked
    if asked not in MODES:
        raise RuntimeDiagnostic(f"missed experts: {asked!r}", expected=f"one of {', '.join(MODES)}")
    return Missed(asked)


def read_order(loads: Sequence[int], read: Sequence[int]) -> list[int]:
    """The indices of `read` in the order in which they are read: those of the most tokens first."""
    return sorted(sorted(read), key=lambda i: -loads[i])


def divide(
    loads: Sequence[int], prices: ExpertPrices, unit: int, read: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """(indices to bring, in that order; indices that the CPU computes) of missing experts of `unit` bytes. Those in
    `read` come from the disk first, one after another (`read_order`)."""
    order = sorted((i for i in range(len(loads)) if i not in read), key=lambda i: (-loads[i], i))
    brought: list[int] = []
    there: list[int] = []
    link, host, fetch_s = 0.0, prices.start_s, prices.fetch_s(unit)
    while order:
        light_s = prices.host_s(unit, loads[order[-1]])
        if host + light_s <= link + fetch_s:
            host += light_s
            there.append(order.pop())
        else:
            link += fetch_s
            brought.append(order.pop(0))
    for number, index in enumerate(read_order(loads, read), 1):
        arrived = number * prices.read_s(unit)
        by_host = max(host, arrived) + prices.host_s(unit, loads[index])
        by_link = max(link, arrived) + fetch_s
        if by_host <= by_link:
            host = by_host
            there.append(index)
        else:
            link = by_link
            brought.append(index)
    return brought, there


class SpareLink:
    """Time of the link that nothing waits for, while the CPU computes: enough of it brings an expert for later, so that
    the cache follows the session though missing experts are computed elsewhere."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def count(self, prices: ExpertPrices, unit: int, loads: Sequence[int], brought: int, most: int) -> int:
        """How many experts to bring for later beside `brought` ones, while the CPU computes those of `loads`."""
        fetch_s = prices.fetch_s(unit)
        busy = sum(prices.host_s(unit, tokens) for tokens in loads)
        self._seconds += max(0.0, busy - brought * fetch_s)
        found = max(0, min(int(self._seconds / fetch_s), most, len(loads)))
        self._seconds = min(self._seconds - found * fetch_s, fetch_s)  # what is not used now is not saved up
        return found
