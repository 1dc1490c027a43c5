"""A choice without needless moves: caches go to the memory of the unit that attends, where that costs nothing.

    choice = tidied(problem, options, choice)
    choice = caches_alike(problem, choice)               # formats of the cache chosen, one of them is enough
    choice = experts_whole(problem, options, choice)     # of a cache of nearly all experts: all of them

A plan is as good as its slowest resource, so the program of `passes.place.milp` may leave keys and values on a drive
whose time nothing waits for, though memory is free. Each such run of layers takes, as many layers as fit, the option
that is the same but for its cache, when no phase gets longer by that; of a divided cache all of it, or else its older
part comes from a drive to a memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.place.attention_option import attention_option
from passes.place.kv_division import divided, siblings
from passes.place.kv_losses import kv_loss, loses_too_much
from passes.place.option import CACHED, RESIDENT, Option
from passes.place.outcome import Choice, evaluate
from passes.place.problem import Problem

MORE_FOR_ONE_FORMAT = 2e-3  # of the session, for caches in one format


def tidied(problem: Problem, options: Sequence[Sequence[Option]], choice: Choice) -> Choice:
    """The same choice with fewer bytes moved, or itself."""
    choice = _with(problem, choice, {id(o): _nearer(problem, options, o) for o, _ in choice}, 1e-9)
    return _with(problem, choice, {id(o): _older_nearer(problem, options, o) for o, _ in choice if o.kv_old}, 1e-9)


def experts_whole(problem: Problem, options: Sequence[Sequence[Option]], choice: Choice) -> Choice:
    """Layers whose experts fit whole where a cache has nearly all of them, as many as cost less than the solver's gap:
    what a plan expects of a helper with hardly anything to do is no reason for a cache."""
    better = {id(o): _resident(options, o) for o, _ in choice if o.mode == CACHED}
    return _with(problem, choice, better, 5e-4)


def caches_alike(problem: Problem, choice: Choice) -> Choice:
    """All caches in one format, which a model can be built with, where formats were chosen and that costs hardly more
    time than the solver leaves open; of several the one that loses least. Else the choice itself."""
    if problem.kv_menu is None:
        return choice
    now = evaluate(problem, choice)
    for cache in sorted(problem.kv_menu.choices, key=lambda c: c.loss):
        made = _in_format(problem, choice, cache.text)
        found = evaluate(problem, made)
        same = found.fits and found.objective <= now.objective * (1 + MORE_FOR_ONE_FORMAT)
        in_time = problem.slo.kept(found.prefill.seconds, found.decode.seconds)
        if same and in_time and not loses_too_much(problem, made):
            return made
    return choice


def _in_format(problem: Problem, choice: Choice, text: str) -> Choice:
    """The same places with all caches in a format; ways that become alike together."""
    found: dict[tuple[int, str], tuple[Option, int]] = {}
    for option, count in choice:
        if option.kv_home:
            places = (option.kv_home, option.kv_unit), (option.old_home, option.old_unit)
            option = attention_option(problem, option, *places, option.kv_old, (text, text))
        key = (id(option.part), option.label)
        found[key] = (option, found.get(key, (option, 0))[1] + count)
    return tuple(found.values())


def _with(problem: Problem, choice: Choice, better_of: Mapping[int, Option | None], slack: float) -> Choice:
    """The choice with as many layers moved to better options as make no phase longer by a share of `slack`."""
    now = evaluate(problem, choice)
    for option, _ in choice:
        better = better_of.get(id(option))
        count = next((n for o, n in choice if o is option), 0)
        if better is None or not count:
            continue
        low, high = 0, count  # the more layers move, the fuller memory gets
        while low < high:
            middle = (low + high + 1) // 2
            trial = _moved(choice, option, better, middle)
            found = evaluate(problem, trial)
            phases = ((found.decode, now.decode), (found.prefill, now.prefill))
            same = found.fits and all(a.seconds <= b.seconds * (1 + slack) for a, b in phases)
            low, high = (middle, high) if same else (low, middle - 1)
        if low:
            choice = _moved(choice, option, better, low)
            now = evaluate(problem, choice)
    return choice


def _nearer(problem: Problem, options: Sequence[Sequence[Option]], option: Option) -> Option | None:
    """The option that differs in where its cache lies only: in the memory of its unit."""
    near = problem.machine.unit(option.unit).tier
    if option.kv_home in ("", near) and not option.kv_old:
        return None
    same = (option.part, option.unit, option.home, option.mode, option.prefill_unit)
    for found in options:
        for other in found:
            if (
                not other.kv_old
                and (other.part, other.unit, other.home, other.mode, other.prefill_unit) == same
                and (other.kv_home, other.kv_unit, other.kv_format) == (near, option.unit, option.kv_format)
                and kv_loss(problem, other) <= kv_loss(problem, option)
            ):
                return other
    return None


def _older_nearer(problem: Problem, options: Sequence[Sequence[Option]], option: Option) -> Option | None:
    """The same with the older part of its cache in a memory instead of on a drive, for the same unit."""
    if option.old_home not in problem.machine.stores:
        return None
    for near, ways in (pair for found in options for pair in siblings(problem, found)):
        if (near.part, near.unit, near.home, near.mode) == (option.part, option.unit, option.home, option.mode):
            for away in ways:
                same = (near.kv_format, away.kv_format, away.kv_unit)
                if away.kv_home not in problem.machine.stores and same == (
                    option.kv_format, option.old_format, option.old_unit,
                ):  # fmt: skip
                    return divided(problem, near, away, option.kv_old)
    return None


def _resident(options: Sequence[Sequence[Option]], option: Option) -> Option | None:
    """The option with all experts in the memory of the unit that has some of them in a cache."""
    same = (option.part, option.unit, RESIDENT, option.prefill_unit)
    ways = (other for found in options for other in found)
    return next((o for o in ways if (o.part, o.unit, o.mode, o.prefill_unit) == same), None)


def _moved(choice: Choice, option: Option, better: Option, count: int) -> Choice:
    """`count` layers take the other option."""
    counts: dict[int, tuple[Option, int]] = {id(o): (o, n) for o, n in choice}
    counts[id(option)] = (option, counts[id(option)][1] - count)
    counts[id(better)] = (better, counts.get(id(better), (better, 0))[1] + count)
    return tuple((o, n) for o, n in counts.values() if n)
