"""The cache of a layer divided between two memories: the newest positions where attention is, the older ones elsewhere.

    divided(problem, near, away, old=512)  # `near`, the oldest 512 positions of each layer's cache lying as by `away`
    for option in recent(problem, near, ways): ...  # of what a step of this session reads nothing is elsewhere

Positions are counted to the end of the reserved context: of a layer of n positions the newest n - old ones lie in the
memory of the unit that computes its products, so that nothing is read from elsewhere until a sequence is longer than
that. What is older leaves position by position, and is brought to the unit at every step, or attended to where it lies;
both parts of attention then join by the sums of their weights. Divisions are whole blocks of `BLOCK` positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from passes.place.attention_option import attention_option
from passes.place.option import Option
from passes.place.problem import Problem

BLOCK = 64  # positions that runtimes keep together


def divided(problem: Problem, near: Option, away: Option, old: int) -> Option:
    """`near` with the oldest `old` positions where `away` has its cache, by the unit that attends to it there."""
    places = (near.kv_home, near.kv_unit), (away.kv_home, away.kv_unit)
    return attention_option(problem, near, *places, old, (near.kv_format, away.kv_format))


def is_near(problem: Problem, option: Option) -> bool:
    """Whether the whole cache lies in the memory of the unit that computes the products."""
    at_unit = problem.machine.unit(option.unit).tier
    return not option.kv_old and (option.kv_home, option.kv_unit) == (at_unit, option.unit)


def siblings(problem: Problem, found: Iterable[Option]) -> list[tuple[Option, list[Option]]]:
    """Ways of attention that differ in where the cache lies: the near one, and those elsewhere."""
    alike: dict[tuple[object, ...], list[Option]] = {}
    for option in found:
        if option.kv_home and not option.kv_old:
            key = (id(option.part), option.unit, option.home, option.mode, option.prefill_unit)
            alike.setdefault(key, []).append(option)
    return [
        (near, [o for o in ways if o is not near and o.kv_home != near.kv_home])
        for ways in alike.values()
        for near in ways
        if is_near(problem, near)
    ]


def recent(problem: Problem, near: Option, ways: Iterable[Option]) -> Iterator[Option]:
    """The cache that a step of this session reads in the memory of the unit, the room for longer ones elsewhere."""
    layer = near.part.layer
    assert layer is not None
    whole = layer.kv_tokens(problem.session.context)
    seen = max(layer.kv_tokens(problem.session.decode_context), layer.kv_tokens(problem.session.prompt))
    old = (whole - seen) // BLOCK * BLOCK
    if old > 0:
        yield from (divided(problem, near, away, old) for away in ways)


def kv_alike(problem: Problem, found: Sequence[Option]) -> list[list[Option]]:
    """The ways of a part, those together whose shares of a layer's cache may be mixed: the near one, those elsewhere in
    one format, and of each a division that a step reads nothing elsewhere of. Every other way is alone, and all where
    the place of the cache is pinned. Where formats are chosen, a way may be in several of the groups."""
    pinned = any(pin.group == "kv" and pin.concerns(option.part) for pin in problem.pins for option in found[:1])
    if not found or found[0].part.group != "attention" or pinned:
        return [[option] for option in found]
    groups = []
    for near, ways in siblings(problem, found):
        for format in dict.fromkeys(option.kv_format for option in ways):
            mine = [option for option in ways if option.kv_format == format]
            groups.append([near, *mine, *recent(problem, near, mine)])
    taken = {id(option) for group in groups for option in group}
    return [*groups, *([option] for option in found if id(option) not in taken)]


def with_share(problem: Problem, found: list[Option], place: str, share: float) -> list[Option]:
    """The ways of attention that keep `share` of the cache at `place` (a tier or drive), in whole blocks."""
    made = []
    for near, ways in siblings(problem, found):
        layer = near.part.layer
        assert layer is not None
        whole = layer.kv_tokens(problem.session.context)
        for away in ways:
            part = share if away.kv_home == place else 1.0 - share
            old = min(round(whole * part / BLOCK) * BLOCK, (whole - 1) // BLOCK * BLOCK)
            if place in (near.kv_home, away.kv_home) and old > 0:
                made.append(divided(problem, near, away, old))
    return made


def rounded(problem: Problem, counts: list[tuple[Option, float]]) -> list[tuple[Option, int]]:
    """Whole layers of counts that may be fractions where ways differ in the place of the cache alone: the layers that
    are left over are divided. At most one place elsewhere has a part in them; the newest positions get what they are
    due, rounded down to whole blocks."""
    tiny = 1e-6
    found = [(option, int(count + tiny)) for option, count in counts]
    rest = [(option, count - whole) for (option, count), (_, whole) in zip(counts, found, strict=True)]
    rest = [(option, part) for option, part in rest if part > tiny]
    layers = round(sum(part for _, part in rest))
    if not layers:
        return [(option, count) for option, count in found if count]
    near = next((option for option, _ in counts if is_near(problem, option)), None)
    away: dict[tuple[str, str], float] = {}
    for option, part in rest:
        place = _elsewhere(problem, option)
        if place is not None:
            away[place] = away.get(place, 0.0) + part
    if near is None or not away:
        best = max(rest, key=lambda item: item[1])[0]
        return [(option, count + layers * (option is best)) for option, count in found if count or option is best]
    most = max(away, key=lambda place: away[place])
    assert near.part.layer is not None
    whole = near.part.layer.kv_tokens(problem.session.context)
    due = sum(part * (0 if _elsewhere(problem, o) and not o.kv_old else whole - o.kv_old) for o, part in rest)
    newest = min(whole, int(due / layers + tiny)) // BLOCK * BLOCK
    old = whole - newest
    cold = next(o for o, _ in counts if not o.kv_old and (o.kv_home, o.kv_unit) == most)
    made = cold if not newest else divided(problem, near, cold, old) if old else near
    if all(option is not made for option, _ in found):
        return [*((option, count) for option, count in found if count), (made, layers)]
    more = [(option, count + layers * (option is made)) for option, count in found]
    return [(option, count) for option, count in more if count]


def _elsewhere(problem: Problem, option: Option) -> tuple[str, str] | None:
    """The place that is not near the unit, of a whole cache or of its older part."""
    if option.kv_old:
        return option.old_home, option.old_unit
    return None if is_near(problem, option) else (option.kv_home, option.kv_unit)
