"""From what `compile-model plan` is given to a plan: shape, machine, formats and session put together, then solved.

    planned = make_plan(PlanRequest("Qwen3-30B-A3B", target="rtx-4090", recipe="w4a8-g32", context=8192))
    planned.placement, planned.gains, planned.judged, planned.warnings

Takes text as the command line has it; reads configurations and headers only. A model that is built already says itself
in what formats. Raises NoFit when nothing fits.

Whole devices that each keep their share are planned here, in closed form. What is more is loaded where it is needed:
`stratum.tier_planning` for plans over the tiers of one machine, `stratum.built_planning` for a built model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from frontends.shape_library import load_shape
from hw_targets import load as load_target
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import spread_placement
from passes.place.format_loss import ESTIMATED, MeasuredLosses
from passes.place.format_menu import Menu, menu_of
from passes.place.formats import Formats, formats_of
from passes.place.given_plan import check_given
from passes.place.machine import machine_of
from passes.place.parallel import best_of, device_unit, spreads
from passes.place.parallel_what_if import Devices, device_gains
from passes.place.placement import Placement
from passes.place.problem import Problem, Session, Slo
from passes.place.solve import too_slow
from runtime.artifact_path import is_artifact
from stratum.plan_experts import check_experts, expert_uses
from stratum.plan_kv import kv_base, kv_menu_for
from stratum.plan_request import PlanRequest, parse_slo, read_placement, session_of
from stratum.planned import Planned

if TYPE_CHECKING:
    from frontends.model_shape import ModelShape
    from hw_targets.target import Target
    from passes.place.gain import Gain


def make_plan(request: PlanRequest, tell: Callable[[str], None] | None = None) -> Planned:
    """The plan that a request leads to. Raises NoFit, and DiagnosticError for what is wrong with the request.

    This machine is measured first where that was never done; `tell` is told so.
    """
    shape, built = load_shape(request.model), None  # first: a wrong name is told before anything is measured
    if is_artifact(request.model):
        from stratum.built_planning import opened

        built = opened(request)
        shape, formats = dataclasses.replace(shape, name=built.name or shape.name), built.formats()
    else:
        asked = request.recipe if request.recipe is not None else next(iter(request.formats), None)
        formats = formats_of(asked, request.dtype)
    target = _measured(request.target, tell)
    given = read_placement(request.plan) if request.plan is not None else None
    if given is not None:
        _same_model(given, shape, request)
        _of_the_file(request, given)
        check_given(given, shape, target, str(request.plan))
    if built is not None:
        built = built.within(request, target, given)
        if built.budget is not None and request.context is None:
            context = built.context_of_run(max(1, request.batch))
            request = dataclasses.replace(request, context=min(context, shape.max_context))
    session = session_of(request, shape)
    if given is not None:
        formats = formats if built is not None else formats_of(given.recipe, given.dtype)
        session = Session(**dataclasses.asdict(given.session))
    slo = parse_slo(request.slo)
    check_experts(request, shape, target, formats, given)
    formats = kv_base(request, formats, given) if built is None else formats
    menu = _menu(request, shape, formats, given)
    kv_menu = kv_menu_for(request, shape, formats, given, menu) if built is None else None
    spread, ways = None, ()
    if device_unit(target) is not None and not (request.pins or request.budgets or kv_menu):
        if given is None or given.degrees.devices > 1:
            fixed = given.degrees if given is not None else None
            any_batch = request.batch == 0
            every = [formats] if menu is None else menu.uniform(shape)
            tried = [
                (uniform, tuple(spreads(shape, target, uniform, session, fixed=fixed, any_batch=any_batch)))
                for uniform in every
            ]
            for bounds in dict.fromkeys((slo, Slo())):
                for uniform, those in tried if spread is None else ():
                    found = best_of(those, bounds, any_batch)
                    if found is not None and (spread is None or found.better(spread, any_batch)):
                        spread, formats, ways = found, uniform, those
    unit = device_unit(target)
    if spread is not None and unit is not None:
        reached = spread.prefill.seconds, spread.decode.seconds
        if not slo.kept(*reached):
            raise too_slow(shape.name, target.name, reached, "in closed form", given is not None)
        machine = machine_of(target)
        problem = Problem(shape, machine, formats, session)
        placement = spread_placement(problem, spread, target, unit.name, unit.tier)
        gains: tuple[Gain, ...] = ()
        if request.what_if and given is None:
            gains = device_gains(Devices(shape, target, formats, session, ways, spread, slo, request.batch == 0))
        closed = (spread.decode.seconds, spread.prefill.seconds) if gains else None
        return Planned(shape, target, placement, gains=gains, gains_from=closed, warnings=shape.warnings)
    from stratum.tier_planning import plan_tiers

    here = built if target.name == "host" else None
    planned = plan_tiers(request, shape, target, formats, session, slo, given, menu, here, kv_menu)
    if target.nodes > 1:
        note = (
            f"this plan is for one of the {target.nodes} nodes: over all of them everything lies in the GPUs' memories"
        )
        planned = dataclasses.replace(planned, warnings=(*planned.warnings, note))
    if request.stand_ins is not None and (here is None or here.budget is None):
        raise DiagnosticError(
            "stand-ins are used by a built model of which not all is in memory", where="--stand-ins",
            expected="an artifact made with 'build --stand-ins', and --memory",
        )  # fmt: skip
    planned = planned if here is None else here.as_run(planned, request.stand_ins)
    if not slo.kept(*planned.seconds):
        free = dataclasses.replace(request, slo=None, what_if=False)
        reached = planned.seconds if given is not None else make_plan(free).seconds
        raise too_slow(shape.name, target.name, reached, "as simulated", given is not None)
    return planned


def _of_the_file(request: PlanRequest, given: Placement) -> None:
    """Refuses options that say otherwise than the plan that is given."""
    session = given.session
    asked = (
        ("--ctx", request.context, session.context),
        ("--batch", "auto" if request.batch == 0 else request.batch if request.batch != 1 else None, session.batch),
        ("--prompt-tokens", request.prompt, session.prompt),
        ("--recipe", request.recipe, given.recipe),
        ("--pin", " ".join(request.pins) or None, None),
        ("--formats", ",".join(request.formats) or None, None),
        ("--kv-formats", ",".join(request.kv_formats) or None, None),
        ("--by-expert", "" if request.by_expert else None, None),
    )
    for option, value, there in asked:
        if value is not None and value != there:
            kept = f"says {there}" if there is not None else "has decided that"
            raise DiagnosticError(
                f"{option} {value}".rstrip() + f": the plan {kept}", where=str(request.plan),
                expected=f"the plan without {option}, or a plan that is edited",
            )  # fmt: skip


def _menu(request: PlanRequest, shape: ModelShape, formats: Formats, given: Placement | None) -> Menu | None:
    """The formats to choose among: those of the request, or those of a plan that is given."""
    losses = MeasuredLosses.read(request.sensitivity) if request.sensitivity is not None else ESTIMATED
    if given is not None:
        if given.quality is None:
            return None
        uses, source = expert_uses(request, shape, losses) if given.quality.uses else ({}, "")
        names = given.quality.formats[1:]
        return menu_of(names, formats, shape, losses, uses=uses, uses_source=source).unbounded()
    if not request.formats:
        bounds = (None if request.kv_formats else request.max_loss, request.bits_per_weight, request.sensitivity)
        if request.by_expert or any(bound is not None for bound in bounds):
            what = "experts of several formats" if request.by_expert else "a bound of quality"
            raise DiagnosticError(
                f"{what} without formats to choose among", expected="--formats w4a8-g32,w3,w8a8 as well"
            )
        return None
    uses, source = expert_uses(request, shape, losses) if request.by_expert else ({}, "")
    return menu_of(
        request.formats, formats, shape, losses, most_loss=request.max_loss, least_bits=request.bits_per_weight,
        uses=uses, uses_source=source,
    )  # fmt: skip


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


def _same_model(given: Placement, shape: ModelShape, request: PlanRequest) -> None:
    if given.model != shape.name:
        raise DiagnosticError(
            f"the plan is for {given.model}, not for {shape.name}", where=str(request.plan), expected="its own model"
        )
