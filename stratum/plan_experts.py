"""Formats of single experts in a plan: who says how often each is picked, and what cannot be built.

    check_experts(request, shape, target, formats, given)      # before anything is solved
    uses, source = expert_uses(request, shape, losses)         # by layer how often each expert is picked

A routing trace says it (`--trace`), or the calibration of measured losses (`--sensitivity`). Refuses targets with GPUs:
experts of several formats in a layer have kernels for CPUs only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError
from passes.place.format_loss import Losses, MeasuredLosses
from passes.place.format_menu import Menu
from passes.place.formats import Formats
from passes.place.placement import Placement
from passes.quantize.expert_uses import uses_of_trace
from stratum.plan_request import PlanRequest

if TYPE_CHECKING:
    from frontends.model_shape import ModelShape
    from hw_targets.target import Target


def check_experts(
    request: PlanRequest, shape: ModelShape, target: Target, formats: Formats, given: Placement | None
) -> None:
    """Raises DiagnosticError where experts of a layer may differ, and the target has a GPU or the model no experts."""
    asked = request.by_expert or (given is not None and bool(given.expert_formats))
    if asked and not shape.moe_layers:
        raise DiagnosticError(f"{shape.name} has no experts", where="--by-expert", expected="a mixture of experts")
    gpu = next((unit.name for unit in target.units if unit.kind == "gpu"), None)
    differ = asked or any(formats.at(i, layer.mlp.experts).classes for i, layer in enumerate(shape.layers))
    if gpu is not None and differ:
        raise DiagnosticError(
            f"the experts of a layer have several formats, and target {target.name} computes on {gpu}",
            where="--by-expert" if request.by_expert else "",
            expected="a target of CPUs, such as host or ddr5-laptop: GPUs have no kernels for such layers",
            hint="without --by-expert the experts of a layer share a format" if request.by_expert else "",
        )


def expert_uses(request: PlanRequest, shape: ModelShape, losses: Losses) -> tuple[Mapping[int, Sequence[float]], str]:
    """(by layer how often each expert is picked, who says so); nothing where nobody does. DiagnosticError for a trace
    of another model."""
    experts = {i: layer.mlp.experts for i, layer in enumerate(shape.layers) if layer.mlp.is_moe}
    if request.trace is not None:
        from hw_targets.routing.trace_file import read_trace

        return uses_of_trace(read_trace(request.trace), experts, request.trace), request.trace.name
    if isinstance(losses, MeasuredLosses):
        counted = losses.uses()
        if {layer: len(uses) for layer, uses in counted.items()} == experts:
            return counted, f"the calibration of {losses.source.removeprefix('measured, ')}"
    return {}, ""


def nothing_said(request: PlanRequest, menu: Menu | None, given: Placement | None) -> list[str]:
    """The warning that nobody says which experts are picked how often, where that was asked for."""
    asked = given.quality.uses if given is not None and given.quality is not None else request.by_expert
    if not asked or menu is None or menu.uses:
        return []
    if given is not None:
        return [f"without the trace of the plan ({asked}) all experts of a layer count alike"]
    return [
        "nothing says which experts are picked more often, so those of a layer share a format: --trace FILE does"
        " ('compile-model run --record-routing FILE'), or a file of sensitivities with --by-expert"
    ]
