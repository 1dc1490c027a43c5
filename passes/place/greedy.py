"""The baseline that the solver is measured by: parts in order, each layer to the fastest option that still fits.

Before a part takes anything, the cheapest way to keep the rest is set aside where there is most room. Gives None when
it finds no fit (there may be one all the same).
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.place.option import Option
from passes.place.outcome import Choice, objective, tier_use, workspaces
from passes.place.problem import Problem


def greedy(problem: Problem, options: Sequence[Sequence[Option]]) -> Choice | None:
    """A choice that fits, or None. Room for streams is kept from the start only when it does not work without."""
    return _greedy(problem, options, {}) or _greedy(problem, options, _least_buffers(options))


def _least_buffers(options: Sequence[Sequence[Option]]) -> dict[str, int]:
    """Bytes of a piece, by tier, that let every part be streamed in its smallest pieces."""
    kept: dict[str, int] = {}
    for found in options:
        streamed = [o.buffer for o in found if o.buffer]
        for tier, piece in min(streamed, key=lambda b: sum(n for _, n in b), default=()):
            kept[tier] = max(kept.get(tier, 0), piece)
    return kept


def _greedy(problem: Problem, options: Sequence[Sequence[Option]], pieces: dict[str, int]) -> Choice | None:
    room = dict(problem.machine.room)
    for tier, nbytes in workspaces(problem).items():
        room[tier] -= nbytes
    buffers = {tier: piece * problem.session.depth for tier, piece in pieces.items()}
    for tier, nbytes in buffers.items():
        room[tier] -= nbytes
    chosen: list[tuple[Option, int]] = []
    for at, found in enumerate(options):
        kept = _set_aside(problem, options[at + 1 :], room)
        left = found[0].part.count
        for option in sorted(found, key=lambda o: _alone(problem, o)):
            if not left:
                break
            free, grown = dict(room), dict(buffers)
            for tier, nbytes in kept.items():
                free[tier] -= nbytes
            for tier, piece in option.buffer:
                more = max(0, piece * problem.session.depth - grown.get(tier, 0))
                free[tier] -= more
                grown[tier] = grown.get(tier, 0) + more
            count = min([left, *(_fitting(free, tier, option) for tier in _tiers(option))])
            if count <= 0 or any(free[tier] < 0 for tier, _ in option.buffer):
                continue
            for tier, piece in grown.items():
                room[tier] -= piece - buffers.get(tier, 0)
            buffers = grown
            for tier, _, nbytes in option.holds:
                room[tier] -= nbytes * count
            chosen.append((option, count))
            left -= count
        if left:
            return None
    choice = tuple(chosen)
    return choice if all(t.total <= t.room for t in tier_use(problem, choice)) else None


def _alone(problem: Problem, option: Option) -> float:
    """The time of all sequences if the model were this option only."""
    lengths = [max(c.waited, max(c.streams.values(), default=0.0)) for c in (option.decode, option.prefill)]
    return objective(problem, *lengths)


def _tiers(option: Option) -> list[str]:
    return list(dict.fromkeys(tier for tier, _, nbytes in option.holds if nbytes))


def _fitting(free: dict[str, int], tier: str, option: Option) -> int:
    return free[tier] // sum(n for t, _, n in option.holds if t == tier)


def _set_aside(problem: Problem, rest: Sequence[Sequence[Option]], room: dict[str, int]) -> dict[str, int]:
    """Bytes kept back for later parts: each where its option leaves the most room."""
    kept: dict[str, int] = dict.fromkeys(room, 0)
    for found in rest:
        count = found[0].part.count

        def spare(option: Option, count: int = count) -> float:
            after = dict.fromkeys(kept, 0)
            for tier, _, nbytes in option.holds:
                after[tier] += nbytes * count
            return min((room[t] - kept[t] - after[t]) / max(1, room[t]) for t in after if after[t] or not option.holds)

        best = max(found, key=spare)
        for tier, _, nbytes in best.holds:
            kept[tier] += nbytes * count
    return kept
