"""Plans over the tiers of one machine: solved, simulated, the cache of experts judged, and what more would buy.

    planned = plan_tiers(request, shape, target, formats, session, slo, given, menu, built)

Plans for this machine (`host`) are what `run` can carry out: keys and values in memory (on a drive only where they do
not fit), one cache of experts for all layers with the policy of `run`; pins may ask for more. A plan that is given is
computed as it is. Raises NoFit when nothing fits; for this machine it says what --memory would have to be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from frontends.model_shape import ModelShape
from hw_targets.quantities import enough_bytes
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import from_placement, joules
from passes.place.cache_choice import TraceRates, check_trace, judge, session_trace
from passes.place.chunk_choice import best_chunk
from passes.place.format_menu import Menu
from passes.place.formats import Formats
from passes.place.gain import Gain
from passes.place.kv_formats import KVMenu
from passes.place.machine import machine_of, main_tier
from passes.place.outcome import evaluate
from passes.place.parallel import together
from passes.place.pins import MEASURE_DRIVE, parse_pin
from passes.place.placement import Placement, TriedSchedule, layer_numbers
from passes.place.prefill_mode import prefill_mode
from passes.place.problem import Problem, Session, Slo
from passes.place.refine import most_tokens, simulated, simulated_prompt
from passes.place.routing_model import fading_hit_rate
from passes.place.schedule_choice import best_schedule
from passes.place.solve import NoFit, Solution, replay, solve
from passes.place.what_if import gains
from runtime.eviction import DEFAULT_POLICY
from stratum.plan_experts import nothing_said
from stratum.plan_kv import kv_warnings, named_as_built
from stratum.plan_request import PlanRequest, budgets_of
from stratum.planned import Planned
from stratum.process_room import budget_of_room, room_of

if TYPE_CHECKING:
    from stratum.built_planning import BuiltModel


_Rest = ParamSpec("_Rest")


def _advising(
    plan: Callable[Concatenate[PlanRequest, ModelShape, Target, _Rest], Planned],
) -> Callable[Concatenate[PlanRequest, ModelShape, Target, _Rest], Planned]:
    """The same, that says of this machine what --memory would have to be where nothing fits."""

    @functools.wraps(plan)
    def advised(
        request: PlanRequest, shape: ModelShape, target: Target, *rest: _Rest.args, **named: _Rest.kwargs
    ) -> Planned:
        try:
            return plan(request, shape, target, *rest, **named)
        except NoFit as fault:
            if target.name == "host":
                raise _advised(fault, request, target) from None
            raise

    return advised


@_advising
def plan_tiers(
    request: PlanRequest,
    shape: ModelShape,
    target: Target,
    formats: Formats,
    session: Session,
    slo: Slo,
    given: Placement | None,
    menu: Menu | None,
    built: BuiltModel | None,
    kv_menu: KVMenu | None = None,
) -> Planned:
    """A plan over the tiers of one machine; of a built model on this one what `run` does, where nothing is pinned.
    Raises NoFit."""
    sizes = budgets_of(request, target)
    if built is not None and built.budget is not None:
        sizes[main_tier(target)] = room_of(built.budget)
    machine = machine_of(target, budgets=sizes)
    asked_more = request.pins or request.slo is not None or request.batch == 0 or len(sizes) > 1
    by_run = built is not None and built.budget is not None and given is None and not asked_more
    trace = None
    if request.trace is not None:
        from hw_targets.routing.trace_file import read_trace

        trace = check_trace(read_trace(request.trace), shape)
    if by_run and built is not None:
        given = built.placement_for(session, target, trace)
    here = target.name == "host"
    names = menu.names if menu is not None else ()
    apart = menu is not None and bool(menu.uses)
    pins = tuple(parse_pin(p, shape, machine, names, by_expert=apart) for p in request.pins)
    if here and not any(pin.group == "kv" for pin in pins):
        pins = (*pins, parse_pin(f"kv={main_tier(target)}", shape, machine))
    problem = Problem(
        shape, machine, formats, session, pins, slo,
        together(shape, target, session.batch), together(shape, target, session.prompt, session.passes),
        menu=menu, kv_menu=kv_menu,
    )  # fmt: skip
    for pin in pins:
        if pin.text in request.pins and not any(pin.concerns(part) for part in problem.parts()):
            raise DiagnosticError(
                f"pin {pin.text!r}: {shape.name} has no such part",
                expected=", ".join(dict.fromkeys((*(part.group for part in problem.parts()), "kv", "weights"))),
            )
    if trace is not None:
        rates = TraceRates(trace, DEFAULT_POLICY, "global") if here else TraceRates(trace)
        problem = dataclasses.replace(problem, cached=rates, missing=rates.by_rank)
    elif here:  # of the policy of `run`
        problem = dataclasses.replace(problem, cached=fading_hit_rate)
    made = built.executed(given) if built is not None and given is not None else None
    solutions: list[Solution] = []
    if made is not None and built is not None and given is not None:
        solution = built.judged(problem, given, made, trace)
    elif given is not None:
        solution = replay(problem, given)
    else:
        try:
            solutions = _of_batches(problem) if request.batch == 0 else [solve(problem)]
        except NoFit:
            if len(pins) == len(request.pins):
                raise
            # Keys and values may come from a drive where memory has no room for them.
            solutions = [solve(dataclasses.replace(problem, pins=pins[:-1]))]
        solution = solutions[0]
    tried: tuple[tuple[int, float, float], ...] = ()
    schedules: tuple[TriedSchedule, ...] = ()
    step, prompt, bound = None, None, solution  # what would help is judged by bounds: that of the plan with the lowest
    if made is not None:  # played as the runtime does, see `BuiltModel.as_run`
        plan = solution.placement
        plan = dataclasses.replace(plan, session=dataclasses.replace(plan.session, ahead=made.stream.guesses))
        solution = dataclasses.replace(solution, placement=plan)
    elif request.simulate and given is not None:
        step, prompt = simulated(solution), simulated_prompt(solution)
    elif request.simulate:
        bound, refined = most_tokens(solutions)
        chunks = best_chunk(refined.solution, refined.prompt, refined.step_seconds)
        schedule = best_schedule(chunks.solution, chunks.prompt, chunks.step_seconds)
        solution, step, prompt, tried = schedule.solution, schedule.step_seconds, schedule.prompt, chunks.tried
        schedules = schedule.tried
    placement, cliffs, warnings = solution.placement, None, [*shape.warnings, *nothing_said(request, menu, given)]
    placement = dataclasses.replace(placement, simulated_step=step, schedules=schedules)
    if step is not None:
        used = joules(solution.problem, solution.choice, solution.outcome.decode, step)
        placement = dataclasses.replace(placement, joules_per_token=used)
    if request.simulate and placement.prefill_threshold is not None:
        mode = prefill_mode(solution.problem, solution.choice)
        placement = dataclasses.replace(
            placement, prefill_threshold=mode.tokens, prefill_threshold_bound=mode.bound if mode.simulated else None
        )
    if prompt is not None:
        first = {"simulated_prefill": prompt.seconds, "simulated_prefill_bound": prompt.bound}
        placement = dataclasses.replace(placement, **first)
    cached = [g for g in placement.groups if g.mode == "cached"]
    if placement.expert_cache is not None and cached:
        scope = "global" if here else "layer"
        slots: dict[int, int] = {}
        for group in cached:
            at = max(1, group.slots)
            slots[at] = slots.get(at, 0) + (len(layer_numbers(group.layers)) or 1)
        if trace is None:
            layer = next(x for x in shape.layers if x.mlp.is_moe)
            drawn = session_trace(layer.mlp.experts, layer.mlp.top_k)
            cliffs = judge(drawn, slots, "a drawn session, Zipf 1.4", scope)
        else:
            cliffs = judge(trace, slots, str(request.trace), scope)
        warnings += cliffs.warnings
        rate, policy = placement.expert_cache.hit_rate, DEFAULT_POLICY if here and trace is None else cliffs.policy
        if given is not None and given.expert_cache is not None:
            scope, policy = given.expert_cache.scope, given.expert_cache.policy
        if trace is not None and made is None:  # of the policy that is chosen, in the slots that the plan has
            rate = dict(cliffs.rates).get(policy, rate)
        cache = dataclasses.replace(
            placement.expert_cache, scope=scope, policy=policy, hit_rate=rate, belady=max(rate, cliffs.belady),
            source=cliffs.source,
        )  # fmt: skip
        placement = dataclasses.replace(placement, expert_cache=cache)
    if any(entry.positions for entry in placement.kv):
        placement = dataclasses.replace(placement, decode_at_context=_at_context(solution))
    placement, warnings = named_as_built(placement, formats), [*warnings, *kv_warnings(placement)]
    found: tuple[Gain, ...] = ()
    if request.what_if and by_run and built is not None:
        found = built.gains(bound, target, trace)
    elif request.what_if and given is None:
        found = gains(bound)
    lowest = (bound.outcome.decode.seconds, bound.outcome.prefill.seconds)
    return Planned(shape, target, placement, solution, found, cliffs, tuple(warnings), trace, tried, lowest)


def _at_context(solution: Solution) -> float:
    """Seconds of a decode step, at least, when each sequence is as long as the context: old positions are read then."""
    session = solution.problem.session
    full = dataclasses.replace(session, generate=2 * (session.context - session.prompt))
    problem = dataclasses.replace(solution.problem, session=full, pins=())
    return evaluate(problem, from_placement(problem, solution.placement)).decode.seconds


def _advised(fault: NoFit, request: PlanRequest, target: Target) -> NoFit:
    """The same for this machine: what --memory would have to be, and that a drive helps once it was measured."""
    least, notes = [], []
    for tier, nbytes in fault.least:
        if tier == main_tier(target) and "memory" in dict(request.budgets):
            least.append((tier, budget_of_room(nbytes)))
            notes.append(f"with --memory {enough_bytes(least[-1][1])} it fits")
        else:
            least.append((tier, nbytes))
            notes.append(fault.enough((tier, nbytes)))
    if not target.storage:
        notes.append(f"weights could be read from a drive: {MEASURE_DRIVE}")
    return NoFit(
        fault.diagnostics[0].message, least=tuple(least), context=fault.context, batch=fault.batch, pins=fault.pins,
        notes=tuple(notes),
    )  # fmt: skip


def _of_batches(problem: Problem) -> list[Solution]:
    """The best plan of every batch that fits (powers of two), most tokens a second by their bounds first. The cache of
    a layer is not divided: more sequences would pay whose later positions, reserved and not yet read, cost nothing."""
    found: list[Solution] = []
    for exponent in range(11):
        session = dataclasses.replace(problem.session, batch=1 << exponent)
        try:
            found.append(solve(dataclasses.replace(problem, session=session, divide_kv=False)))
        except NoFit:
            if not found:
                raise
            break
    return sorted(found, key=lambda s: -s.placement.tokens_per_second)
