"""Solving a placement: the best plan, or why there is none and what would fit.

    solution = solve(problem)                  # Solution, or raises NoFit
    solution.placement, solution.outcome, solution.gap, solution.greedy

What is enumerated (few values each): the chunk of a prompt and the number of micro-batches. All else is the program of
`passes.place.milp`; the greedy choice is taken where that should be better, so that no plan is worse than the baseline.
A pin that leaves nothing, or that alone keeps everything from fitting, is named. `NoFit` says the least memory that
would do, of a drive as well, and the largest context and batch that fit the memory there is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hw_targets.quantities import enough_bytes, format_bytes
from ir.diagnostics import Diagnostic, DiagnosticError
from passes.place.build_plan import (
    experts_of,
    from_placement,
    groups_of,
    prefill_threshold,
    quality_plan,
    to_placement,
)
from passes.place.format_menu import Quality
from passes.place.given_plan import restated
from passes.place.greedy import greedy
from passes.place.kv_division import is_near
from passes.place.kv_losses import kv_loss, loses_too_much
from passes.place.machine import UNLIMITED, Machine
from passes.place.milp import FEW_NODES, MANY_NODES, Found, solve_counts
from passes.place.option import RESIDENT, Option
from passes.place.options import options_of
from passes.place.outcome import Choice, Outcome, evaluate, tier_use
from passes.place.placement import Placement
from passes.place.problem import Problem, Slo
from passes.place.tidy import caches_alike, tidied

_CHUNKS = (512, 128, 32, 8)
_MICRO_BATCHES = (1, 2, 4, 8)
MOST_ROUNDED = 2e-3  # that a division may cost in whole blocks before whole layers are tried as well
_TRIES = 5  # of bounds on what formats may lose


@dataclass(frozen=True)
class Solution:
    """A plan and where it comes from. `greedy` is the objective of the baseline, None when it found no fit."""

    problem: Problem
    choice: Choice
    outcome: Outcome
    placement: Placement
    gap: float
    greedy: float | None


class NoFit(DiagnosticError):
    """Nothing fits. `least` is ((tier, bytes), ...) of what would do; largest context and batch that fit, or None."""

    def __init__(
        self,
        message: str,
        *,
        least: tuple[tuple[str, int], ...] = (),
        context: int | None = None,
        batch: int | None = None,
        pins: tuple[str, ...] = (),
        notes: tuple[str, ...] | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.least, self.context, self.batch, self.pins, self.machine = least, context, batch, pins, machine
        super().__init__(message)
        said = list(notes if notes is not None else map(self.enough, least))
        if context is not None:
            said.append(f"the largest context that fits is {context}")
        if batch is not None:
            said.append(f"the largest batch that fits is {batch}")
        if pins:
            said.append(f"without --pin {' '.join(pins)} it fits")
        self.diagnostics = (Diagnostic("error", message, notes=tuple(Diagnostic("note", text) for text in said)),)

    def enough(self, least: tuple[str, int]) -> str:
        """What so many bytes of a tier or drive would do, and whether the machine has them."""
        name, nbytes = least
        has = _stated_bytes(self.machine, name) if self.machine is not None else None
        if has is None or self.machine is None or nbytes <= has:
            return f"with {enough_bytes(nbytes)} of {name} it fits"
        return f"with {enough_bytes(nbytes)} of {name} it would fit; {self.machine.target.name} has {format_bytes(has)}"


def solve(problem: Problem, nodes: int = MANY_NODES) -> Solution:
    """The best plan that fits, searched for in so many nodes of each program.

    Raises NoFit, and DiagnosticError for pins that leave a part without any way.
    """
    best: Solution | None = None
    for variant in _variants(problem):
        shorter = best is not None and variant.session.chunk < problem.session.chunk
        found = _solve_one(variant, min(nodes, FEW_NODES) if shorter else nodes)
        if found is not None and (best is None or found.outcome.objective < best.outcome.objective * (1 - 1e-9)):
            best = found
        elif shorter and variant.session.batch == 1:
            break  # nor would even shorter ones help
        if found is not None and variant.session.batch == 1 and (nodes < MANY_NODES or _at_ease(found)):
            break  # smaller chunks leave no room that anything wants
    if best is None:
        raise _no_fit(problem)
    threshold = prefill_threshold(best.problem, best.choice)
    return dataclasses.replace(best, placement=dataclasses.replace(best.placement, prefill_threshold=threshold))


def replay(problem: Problem, placement: Placement) -> Solution:
    """The same for a plan that is given: its promises computed anew. Raises NoFit where it holds too much."""
    session = dataclasses.replace(problem.session, **dataclasses.asdict(placement.session))
    problem = able(dataclasses.replace(problem, session=session, pins=()))  # what is pinned stands in the plan
    choice = from_placement(problem, placement)
    outcome = evaluate(problem, choice)
    for tier in outcome.tiers:
        if tier.total > tier.room:
            raise NoFit(
                f"the plan needs {format_bytes(tier.total)} of {tier.name}, there are {format_bytes(tier.room)}",
                least=((tier.name, tier.total),),
            )
    groups, kv = restated(problem, placement)
    made = dataclasses.replace(
        to_placement(problem, choice, outcome), groups=groups, kv=kv, degrees=placement.degrees,
        quality=quality_plan(problem, groups, placement.expert_formats), expert_formats=placement.expert_formats,
    )  # fmt: skip
    return Solution(problem, choice, outcome, made, 0.0, None)


def keeps_quality(problem: Problem, placement: Placement) -> bool:
    """Whether the formats of a plan keep the bounds: of layers that lose more or less than others it matters which ones
    have which format."""
    quality, kv = placement.quality, placement.kv_quality
    lost = (quality.loss if quality is not None else 0.0) + (kv.loss if kv is not None else 0.0)
    if kv is not None and kv.most_loss is not None and lost > kv.most_loss * (1 + 1e-6):
        return False
    return problem.menu is None or quality is None or problem.menu.keeps(Quality(quality.loss, quality.bits))


def choices_of(problem: Problem) -> list[list[Option]]:
    """The options of every part; a pin that leaves a part none is named."""
    found = []
    for ways in problem.variants():
        options = [option for part in ways for option in options_of(problem, part)]
        part = ways[0]
        if not options:
            pins = [pin.text for pin in problem.pins if pin.concerns(part)]
            raise DiagnosticError(
                f"{' and '.join(pins)}: target {problem.machine.target.name} has no such way for {part.name}",
                expected="a place that a unit computes from, or that a link leads from to one",
            )
        found.append(options)
    return found


def _at_ease(found: Solution) -> bool:
    """Whether all lies in the memory of one unit, which computes it."""
    options = [option for option, _ in found.choice if option.part.nbytes]
    at_home = all(o.mode == RESIDENT and (not o.kv_home or is_near(found.problem, o)) for o in options)
    return at_home and len({o.unit for o in options} | {o.unit_at(True) for o in options}) == 1


def _variants(problem: Problem) -> list[Problem]:
    """The problem as given, with more micro-batches, then with smaller chunks."""
    session = problem.session
    found = [problem]
    if session.batch > 1 and session.micro_batches == 1:
        turns = [m for m in _MICRO_BATCHES[1:] if m <= session.batch]
        found += [_with(problem, micro_batches=m) for m in turns]
    return [*found, *(_with(problem, chunk=c) for c in _CHUNKS if c < min(session.chunk, session.prompt))]


def _with(problem: Problem, **changes: int) -> Problem:
    return dataclasses.replace(problem, session=dataclasses.replace(problem.session, **changes))


def able(problem: Problem) -> Problem:
    """Without units whose memory has no room for activations: they compute nothing, and it may hold what else there
    is. Units that a pin asks for, or the memory of, stay: then nothing fits."""
    machine, work = problem.machine, problem.workspace_bytes()
    pinned = {pin.where for pin in problem.pins}
    units = tuple(
        unit for unit in machine.units if machine.room_of(unit.tier) >= work or pinned & {unit.name, unit.tier}
    )
    if not units or len(units) == len(machine.units):
        return problem
    return dataclasses.replace(problem, machine=dataclasses.replace(machine, units=units))


def _solve_one(problem: Problem, nodes: int = MANY_NODES) -> Solution | None:
    problem = able(problem)
    options = choices_of(problem)
    found = _best_of_formats(problem, options, nodes)
    base = _baseline(problem, options)
    if found is None and base is not None:
        found = Found(base[0], 1.0)
    if found is None:
        return None
    choice, outcome = found.choice, evaluate(problem, found.choice)
    if base is not None and base[1].objective < outcome.objective:
        choice, outcome = base
    choice = caches_alike(problem, choice)
    outcome = evaluate(problem, choice) if problem.kv_menu is not None else outcome
    tidy = tidied(problem, options, choice)
    placement = to_placement(problem, tidy, evaluate(problem, tidy), threshold=False)
    if keeps_quality(problem, placement):
        choice, outcome = tidy, evaluate(problem, tidy)
    else:  # other layers would have the wider formats
        placement = to_placement(problem, choice, outcome, threshold=False)
    placement = dataclasses.replace(placement, gap=found.gap)
    return Solution(problem, choice, outcome, placement, found.gap, base[1].objective if base is not None else None)


def _best_of_formats(problem: Problem, options: list[list[Option]], nodes: int) -> Found | None:
    """The best counts, never worse than those in which the experts of a layer share a format."""
    found = _best_counts(problem, options, nodes)
    alike = [[option for option in ways if option.part.mix is None] for ways in options]
    if not all(alike) or sum(map(len, alike)) == sum(map(len, options)):
        return found
    plain = _best_counts(problem, alike, nodes)
    if found is None or plain is None:
        return found or plain
    return min(plain, found, key=lambda each: evaluate(problem, each.choice).objective)


def _solve_counts(problem: Problem, options: list[list[Option]], nodes: int, *, divide: bool = False) -> Found | None:
    """The best counts. Where losses differ by layer the program only knows their mean, and layers that lose most get
    the widest formats afterwards: it is asked again with another bound until what is lost is just what may be."""
    limit = problem.menu.most_loss if problem.menu is not None else None
    parts = [part for ways in problem.variants() for part in ways if part.losses]
    differ = any(max(part.losses) > min(part.losses) * (1 + 1e-9) for part in parts)
    if problem.menu is None or limit is None or not differ:
        return solve_counts(problem, options, nodes=nodes, divide=divide)
    best: Found | None = None
    lowest, bound = math.inf, limit
    for _ in range(_TRIES):
        asked = dataclasses.replace(problem, menu=dataclasses.replace(problem.menu, most_loss=bound))
        if problem.kv_menu is not None:
            asked = dataclasses.replace(asked, kv_menu=dataclasses.replace(problem.kv_menu, most_loss=bound))
        found = solve_counts(asked, options, nodes=nodes, divide=divide)
        if found is None:
            break
        made = quality_plan(problem, groups_of(problem, found.choice), experts_of(problem, found.choice))
        assert made is not None
        value = evaluate(problem, found.choice).objective
        lost = made.loss + math.fsum(kv_loss(problem, option) * count for option, count in found.choice)
        if lost <= limit * (1 + 1e-6) and value < lowest:
            best, lowest = found, value
        if 0.99 * limit <= lost <= limit * (1 + 1e-6):
            break
        bound *= 0.999 * limit / lost
    return best


def _best_counts(problem: Problem, options: list[list[Option]], nodes: int) -> Found | None:
    """The best counts where the cache of a layer may be divided; where rounding that to whole blocks costs more than
    the solver leaves open, the better of it and of whole layers."""
    found = _solve_counts(problem, options, nodes, divide=problem.divide_kv)
    if found is None or not problem.divide_kv:
        return found
    outcome = evaluate(problem, found.choice)
    if _in_time(problem, outcome) and outcome.objective <= found.value * (1 + MOST_ROUNDED):
        return found
    whole = _solve_counts(problem, options, nodes)
    late = not _in_time(problem, outcome)
    better = whole is not None and evaluate(problem, whole.choice).objective < outcome.objective
    return whole if late or better else found


def _baseline(problem: Problem, options: list[list[Option]]) -> tuple[Choice, Outcome] | None:
    """The best greedy choice that keeps the bounds, with one format throughout, and one of the cache."""
    best: tuple[Choice, Outcome] | None = None
    names = (None,) if problem.menu is None else problem.menu.allowed(problem.shape)
    caches = ("",) if problem.kv_menu is None else problem.kv_menu.texts
    for name, cache in itertools.product(names, caches):
        mine = [
            [
                o
                for o in found
                if (name is None or name in o.part.recipes) and {o.kv_format, o.old_format} <= {"", cache}
            ]
            for found in options
        ]
        choice = greedy(problem, mine) if all(mine) else None
        outcome = evaluate(problem, choice) if choice is not None else None
        if choice is None or outcome is None or not _in_time(problem, outcome) or loses_too_much(problem, choice):
            continue
        if best is None or outcome.objective < best[1].objective:
            best = (choice, outcome)
    return best


def _in_time(problem: Problem, outcome: Outcome) -> bool:
    return problem.slo.kept(outcome.prefill.seconds, outcome.decode.seconds)


# -- when nothing fits -------------------------------------------------------------------------------------------------


def feasible(problem: Problem) -> bool:
    """Whether any choice fits, with the smallest chunk."""
    smallest = able(_with(problem, chunk=min(problem.session.chunk, _CHUNKS[-1])))
    return solve_counts(smallest, choices_of(smallest), best=False) is not None


def least_budget(problem: Problem, tier: str) -> int | None:
    """Fewest bytes of a tier with which a plan fits; None when no amount of it helps."""
    smallest = _with(problem, chunk=min(problem.session.chunk, _CHUNKS[-1]))
    smallest = able(dataclasses.replace(smallest, machine=smallest.machine.with_room(tier, UNLIMITED), slo=Slo()))
    found = solve_counts(smallest, choices_of(smallest), least_bytes=tier)
    return None if found is None else next(t.total for t in tier_use(smallest, found.choice) if t.name == tier)


def largest(problem: Problem, what: str, high: int) -> int | None:
    """The largest context or batch up to `high` that fits; None when not even 1 does."""

    def fits(value: int) -> bool:
        changed = _with(problem, **{what: value})
        if what == "context":
            prompt = min(changed.session.prompt, max(1, value - 1))
            changed = _with(changed, prompt=prompt)
        return feasible(changed)

    if not fits(1):
        return None
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _no_fit(problem: Problem) -> NoFit:
    name = problem.shape.name
    relaxed = dataclasses.replace(problem, slo=Slo())
    if problem.slo != Slo() and feasible(relaxed):
        reached = _solve_one(relaxed)
        return too_slow(
            name, problem.machine.target.name,
            None if reached is None else (reached.outcome.prefill.seconds, reached.outcome.decode.seconds),
            "in closed form",
        )  # fmt: skip
    if problem.pins and feasible(dataclasses.replace(relaxed, pins=())):
        return NoFit(
            f"{name} fits {problem.machine.target.name}, but not with what is pinned",
            pins=tuple(_culprits(relaxed)),
        )
    least = []
    for home, room in problem.machine.room:
        needed = least_budget(relaxed, home) if room < UNLIMITED else None
        if needed is not None and needed > room:
            least.append((home, needed))
    return NoFit(
        f"{name} does not fit {problem.machine.target.name}: {_rooms(problem)}",
        least=tuple(least),
        context=largest(relaxed, "context", problem.session.context - 1),
        batch=largest(relaxed, "batch", problem.session.batch - 1) if problem.session.batch > 1 else None,
        machine=problem.machine,
    )


def too_slow(
    name: str, target: str, reached: tuple[float, float] | None, how: str, given: bool = False
) -> NoFit:  # fmt: skip
    """No plan keeps the bounds of time, or not the one that is `given`. `reached`: the first token and each further one
    of the shortest session, `how` that was found."""
    which = f"{'this' if given else 'no'} plan of {name}"
    said = f"{which} is {'not ' if given else ''}as fast as asked for on {target}"
    if reached is not None:
        said += (
            f"; {'it' if given else 'the one with the shortest session'} has a first token after {reached[0]:.3g} s"
            f" and {reached[1]:.3g} s for each further one ({how})"
        )
    return NoFit(said)


def _stated_bytes(machine: Machine, name: str) -> int | None:
    """What the machine itself lets plans have of a tier or drive, whatever the budget; None where that is not known."""
    tier, store = machine.target.tier(name), machine.target.store(name)
    return tier.usable_bytes if tier is not None else store.capacity_bytes if store is not None else None


def _culprits(problem: Problem) -> Sequence[str]:
    """Pins that each alone keep the rest from fitting; all of them when it takes several."""
    for pin in problem.pins:
        if feasible(dataclasses.replace(problem, pins=tuple(p for p in problem.pins if p is not pin))):
            return [f"'{pin.text}'"]
    return [f"'{pin.text}'" for pin in problem.pins]


def _rooms(problem: Problem) -> str:
    rooms = (f"{format_bytes(n)} of {name}" for name, n in problem.machine.room if n < UNLIMITED)
    return ", ".join(rooms) + f", context {problem.session.context}, batch {problem.session.batch}"
