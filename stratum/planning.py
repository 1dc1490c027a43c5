"""From what `compile-model plan` is given to a plan: shape, machine, formats and session put together, then solved.

    planned = make_plan(PlanRequest("Qwen3-30B-A3B", target="rtx-4090", recipe="w4a8-g32", context=8192))
    planned.placement, planned.gains, planned.judged, planned.warnings

Takes text as the command line has it; reads configurations and headers only. A model that is built already says itself
in what formats. Plans for this machine (`host`) are what `run` can carry out: keys and values in memory (on a drive
only where they do not fit), one cache of experts for all layers with the policy of `run`; pins may ask for more. Raises
NoFit when nothing fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontends.model_shape import ModelShape
from frontends.shape_library import load_shape
from hw_targets import load as load_target
from hw_targets.expert_cache import replay as replay_trace
from hw_targets.quantities import enough_bytes, parse_quantity
from hw_targets.routing.trace import RoutingTrace
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import spread_placement
from passes.place.cache_choice import Judged, TraceRates, check_trace, judge, session_trace
from passes.place.format_loss import ESTIMATED, MeasuredLosses
from passes.place.format_menu import Menu, menu_of
from passes.place.formats import Formats, formats_of
from passes.place.machine import machine_of, main_tier
from passes.place.parallel import device_unit, search, together
from passes.place.pins import MEASURE_DRIVE, parse_pin
from passes.place.placement import Placement, StandInPlan
from passes.place.prefill_mode import prefill_mode
from passes.place.problem import Problem, Session, Slo
from passes.place.refine import most_tokens, simulated, simulated_prompt
from passes.place.routing_model import fading_hit_rate
from passes.place.solve import NoFit, Solution, replay, solve
from passes.place.what_if import Gain, gains
from passes.quantize.recipe import load_recipe
from runtime.artifact import is_artifact, open_artifact
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import Manifest
from runtime.stand_ins import check_stand_ins
from runtime.stream_plan import DEFAULT_POLICY, StreamPlan
from stratum.host_placement import drive_of
from stratum.host_planning import context_of_run, drive_of_target, executed, host_gains, judged, placement_for
from stratum.plan_request import PlanRequest, budgets_of, parse_slo, session_of
from stratum.process_account import budget_of_room, foreseen_bytes, room_of
from stratum.run_prediction import predict, problem_for
from stratum.stand_in_prediction import stand_in_use
from stratum.stand_in_share import check_threshold
from stratum.stream_placement import MemoryPlan, budget_of, read_placement, recipe_of, stream_of_placement


@dataclass(frozen=True)
class Planned:
    """A plan with what explains it."""

    shape: ModelShape
    target: Target
    placement: Placement
    solution: Solution | None = None  # None: every device keeps its share, found in closed form
    gains: tuple[Gain, ...] = ()
    judged: Judged | None = None
    warnings: tuple[str, ...] = field(default=())
    trace: RoutingTrace | None = None


def make_plan(request: PlanRequest, tell: Callable[[str], None] | None = None) -> Planned:
    """The plan that a request leads to. Raises NoFit, and DiagnosticError for what is wrong with the request.

    This machine is measured first where that was never done; `tell` is told so.
    """
    shape, formats, manifest = _model(request)  # first: a wrong name is told before anything is measured
    target = _measured(request.target, tell)
    given = read_placement(request.plan) if request.plan is not None else None
    budget = _process_budget(request, target, given) if manifest is not None else None
    if budget is not None and manifest is not None and request.context is None:
        context = context_of_run(manifest, budget, max(1, request.batch))
        request = dataclasses.replace(request, context=min(context, shape.max_context))
    session = session_of(request, shape)
    if given is not None:
        _same_model(given, shape, request)
        formats = formats if manifest is not None else formats_of(given.recipe, given.dtype)
        session = Session(**dataclasses.asdict(given.session))
    slo = parse_slo(request.slo)
    menu = _menu(request, shape, formats, given)
    spread = None
    if device_unit(target) is not None and not (request.pins or request.budgets):
        if given is None or given.degrees.devices > 1:
            fixed = given.degrees if given is not None else None
            any_batch = request.batch == 0
            for uniform in [formats] if menu is None else menu.uniform(shape):
                found = search(shape, target, uniform, session, slo, fixed=fixed, any_batch=any_batch)
                if found is not None and (spread is None or found.better(spread, any_batch)):
                    spread, formats = found, uniform
    unit = device_unit(target)
    if spread is not None and unit is not None:
        machine = machine_of(target)
        problem = Problem(shape, machine, formats, session)
        placement = spread_placement(problem, spread, target, unit.name, unit.tier, machine)
        return Planned(shape, target, placement, warnings=shape.warnings)
    built = Built(manifest, budget, Path(request.model)) if manifest is not None and target.name == "host" else None
    try:
        planned = _placed(request, shape, target, formats, session, slo, given, menu, built)
    except NoFit as fault:
        if target.name == "host":
            raise _advised(fault, request, target) from None
        raise
    if request.stand_ins is not None and (built is None or built.budget is None):
        raise DiagnosticError(
            "stand-ins are used by a built model of which not all is in memory", where="--stand-ins",
            expected="an artifact made with 'build --stand-ins', and --memory",
        )  # fmt: skip
    return planned if built is None else _as_run(planned, built, check_threshold(request.stand_ins, streams=True))


@dataclass(frozen=True)
class Built:
    """A built model on this machine, and the budget of the whole process (None: none)."""

    manifest: Manifest
    budget: int | None
    path: Path


def _process_budget(request: PlanRequest, target: Target, given: Placement | None) -> int | None:
    """What the whole process may use, where the plan is for this machine: as asked for, or as a given plan has it."""
    size = dict(request.budgets).get("memory")
    if target.name != "host":
        return None
    if size is None:
        return budget_of(given) if given is not None else None
    return int(parse_quantity(size, "bytes", where="budget of memory"))


def _as_run(planned: Planned, built: Built, share: float) -> Planned:
    """With the times of a built model as the runtime will take them; as they are where it cannot execute the plan."""
    assert planned.solution is not None
    placement, manifest, stream, kv_bytes = planned.placement, built.manifest, None, None
    check_stand_ins(manifest, share)
    try:
        if built.budget is not None:
            made = stream_of_placement(manifest, placement, built.budget, baseline=foreseen_bytes(manifest))
            stream, kv_bytes = made.stream, made.kv_bytes
        problem = problem_for(planned.solution.problem, manifest, stream)
        hits = expected_hits(planned, stream)
        times = predict(problem, manifest, stream, hits, kv_bytes=kv_bytes)
    except (DiagnosticError, RuntimeDiagnostic) as fault:
        warning = f"this machine cannot execute the plan: {str(fault).removeprefix('error: ')}"
        return dataclasses.replace(planned, warnings=(*planned.warnings, warning))
    seconds: dict[str, Any] = {
        "simulated_step": times.decode.seconds,
        "simulated_prefill": times.prefill.seconds,
        "simulated_prefill_bound": times.prefill.bound,
    }
    use = stand_in_use(manifest, share, hits, placement.session.batch, planned.trace) if stream is not None else None
    if use is not None:
        other = predict(problem, manifest, stream, hits, kv_bytes=kv_bytes, stand_ins=use).decode
        seconds["stand_ins"] = StandInPlan(
            share, use.used, other.seconds, other.read_bytes, times.decode.read_bytes, use.source
        )
    return dataclasses.replace(planned, placement=dataclasses.replace(placement, **seconds))


def _placed(
    request: PlanRequest,
    shape: ModelShape,
    target: Target,
    formats: Formats,
    session: Session,
    slo: Slo,
    given: Placement | None,
    menu: Menu | None,
    built: Built | None,
) -> Planned:
    """A plan over the tiers of one machine; of a built model on this one what `run` does, where nothing is pinned."""
    sizes = budgets_of(request, target)
    if built is not None and built.budget is not None:
        sizes[main_tier(target)] = room_of(built.budget)
    machine = machine_of(target, budgets=sizes)
    drive = drive_of_target(target, drive_of(built.path)) if built is not None else ""
    asked_more = request.pins or request.slo is not None or request.batch == 0 or len(sizes) > 1
    by_run = built is not None and built.budget is not None and given is None and not asked_more
    if by_run and built is not None and built.budget is not None:
        given = placement_for(built.manifest, built.budget, session, drive)
    here = target.name == "host"
    names = menu.names if menu is not None else ()
    pins = tuple(parse_pin(p, shape, machine, names) for p in request.pins)
    if here and not any(pin.group == "kv" for pin in pins):
        pins = (*pins, parse_pin(f"kv={main_tier(target)}", shape, machine))
    problem = Problem(
        shape, machine, formats, session, pins, slo,
        together(shape, target, session.batch), together(shape, target, session.prompt, session.passes),
        menu=menu,
    )  # fmt: skip
    trace = None
    if request.trace is not None:
        from hw_targets.routing.trace_file import read_trace

        trace = check_trace(read_trace(request.trace), shape)
        rates = TraceRates(trace, DEFAULT_POLICY, "global") if here else TraceRates(trace)
        problem = dataclasses.replace(problem, cached=rates)
    elif here:  # of the policy of `run`
        problem = dataclasses.replace(problem, cached=fading_hit_rate)
    made = _executed(built, given) if given is not None else None
    solutions: list[Solution] = []
    if made is not None and built is not None and given is not None:
        solution = judged(problem, built.manifest, given, made)
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
    step, prompt, bound = None, None, solution  # what would help is judged by bounds: that of the plan with the lowest
    if made is not None:
        pass  # played as the runtime does, see `_as_run`
    elif request.simulate and given is not None:
        step, prompt = simulated(solution), simulated_prompt(solution)
    elif request.simulate:
        bound, refined = most_tokens(solutions)
        solution, step, prompt = refined.solution, refined.step_seconds, refined.prompt
    placement, cliffs, warnings = solution.placement, None, list(shape.warnings)
    placement = dataclasses.replace(placement, simulated_step=step)
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
        slots = max(1, min(g.slots for g in cached))
        if trace is None:
            layer = next(x for x in shape.layers if x.mlp.is_moe)
            drawn = session_trace(layer.mlp.experts, layer.mlp.top_k)
            cliffs = judge(drawn, slots, "a drawn session, Zipf 1.4", scope)
        else:
            cliffs = judge(trace, slots, str(request.trace), scope)
        warnings += cliffs.warnings
        rate, policy = placement.expert_cache.hit_rate, DEFAULT_POLICY if here else cliffs.policy
        if given is not None and given.expert_cache is not None:
            scope, policy = given.expert_cache.scope, given.expert_cache.policy
        cache = dataclasses.replace(
            placement.expert_cache, scope=scope, policy=policy, belady=max(rate, cliffs.belady), source=cliffs.source
        )
        placement = dataclasses.replace(placement, expert_cache=cache)
    found: tuple[Gain, ...] = ()
    if request.what_if and by_run and built is not None:
        found = host_gains(bound, built.manifest, drive)
    elif request.what_if and given is None:
        found = gains(bound)
    return Planned(shape, target, placement, solution, found, cliffs, tuple(warnings), trace)


def _executed(built: Built | None, given: Placement) -> MemoryPlan | None:
    """The executable part of a plan of a built model, None where this machine has none or does not do it."""
    if built is None or built.budget is None:
        return None
    try:
        return executed(built.manifest, given, built.budget)
    except NoFit:
        raise
    except (DiagnosticError, RuntimeDiagnostic):
        return None  # `_as_run` says why


def expected_hits(planned: Planned, stream: StreamPlan | None) -> float:
    """The share of a decode step's experts that are in memory: the trace replayed in the cache that is executed, else
    what the plan expects."""
    if stream is None or not stream.expert_bytes:
        return 1.0
    if planned.trace is not None:
        found = replay_trace(
            planned.trace, stream.expert_bytes_in(1, stream.kv_bytes // 2), policy=stream.policy, scope=stream.scope
        )
        return found.decode_hit_rate
    cache = planned.placement.expert_cache
    return cache.hit_rate if cache is not None else 1.0


def _menu(request: PlanRequest, shape: ModelShape, formats: Formats, given: Placement | None) -> Menu | None:
    """The formats to choose among: those of the request, or those of a plan that is given."""
    losses = MeasuredLosses.read(request.sensitivity) if request.sensitivity is not None else ESTIMATED
    if given is not None:
        if given.quality is None:
            return None
        return menu_of(given.quality.formats[1:], formats, shape, losses).unbounded()
    if not request.formats:
        if request.max_loss is not None or request.bits_per_weight is not None or request.sensitivity is not None:
            raise DiagnosticError(
                "a bound of quality without formats to choose among", expected="--formats w4a8-g32,w3,w8a8 as well"
            )
        return None
    return menu_of(
        request.formats, formats, shape, losses, most_loss=request.max_loss, least_bits=request.bits_per_weight
    )


def _measured(name: str, tell: Callable[[str], None] | None) -> Target:
    """The target; of this machine with rates, which are measured once and kept."""
    target = load_target(name)
    cores, tier = target.unit(), target.tier()
    known = bool(cores is not None and cores.peak) and bool(tier is not None and tier.read_bandwidth)
    if known or name.partition("{")[0] != "host":
        return target
    from hw_targets.calibrate import calibrate

    if tell is not None:
        tell("measuring this machine once, about 3 s: memory bandwidth and peaks ('compile-model targets calibrate')")
    calibrate()
    return load_target(name)


def _advised(fault: NoFit, request: PlanRequest, target: Target) -> NoFit:
    """The same for this machine: what --memory would have to be, and that a drive helps once it was measured."""
    least, notes = [], []
    for tier, nbytes in fault.least:
        if tier == main_tier(target) and "memory" in dict(request.budgets):
            least.append((tier, budget_of_room(nbytes)))
            notes.append(f"with --memory {enough_bytes(least[-1][1])} it fits")
        else:
            least.append((tier, nbytes))
            notes.append(f"with {enough_bytes(nbytes)} of {tier} it fits")
    if not target.storage:
        notes.append(f"weights could be read from a drive: {MEASURE_DRIVE}")
    return NoFit(
        fault.diagnostics[0].message, least=tuple(least), context=fault.context, batch=fault.batch, pins=fault.pins,
        notes=tuple(notes),
    )  # fmt: skip


def _of_batches(problem: Problem) -> list[Solution]:
    """The best plan of every batch that fits (powers of two), most tokens a second by their bounds first."""
    found: list[Solution] = []
    for exponent in range(11):
        session = dataclasses.replace(problem.session, batch=1 << exponent)
        try:
            found.append(solve(dataclasses.replace(problem, session=session)))
        except NoFit:
            if not found:
                raise
            break
    return sorted(found, key=lambda s: -s.placement.tokens_per_second)


def _model(request: PlanRequest) -> tuple[ModelShape, Formats, Manifest | None]:
    """The shape of what is asked for, and its formats: of a built model those that it was built with."""
    shape = load_shape(request.model)
    if not is_artifact(request.model):
        asked = request.recipe if request.recipe is not None else next(iter(request.formats), None)
        return shape, formats_of(asked, request.dtype), None
    manifest = open_artifact(request.model).manifest
    recipe, name = recipe_of(manifest), manifest.model.get("name")
    if request.recipe is not None or request.formats:
        option = "--recipe" if request.recipe is not None else "--formats"
        raise DiagnosticError(
            f"{option} cannot change a model that is built already", where=request.model, expected="its directory"
        )
    written = Path(request.model) / "recipe.toml"
    formats = Formats(recipe, load_recipe(str(written)), manifest.dtype) if recipe else formats_of("", manifest.dtype)
    return dataclasses.replace(shape, name=name if isinstance(name, str) else shape.name), formats, manifest


def _same_model(given: Placement, shape: ModelShape, request: PlanRequest) -> None:
    if given.model != shape.name:
        raise DiagnosticError(
            f"the plan is for {given.model}, not for {shape.name}", where=str(request.plan), expected="its own model"
        )
