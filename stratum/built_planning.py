"""A built model as plans see it: what it was built with, what `run` would keep of it, and the times of running it.

    built = opened(request).within(request, target, given)
    built.formats(), built.placement_for(session, target), built.as_run(planned, stand_ins)

Reads the manifest only, never a weight. Raises NoFit with the least budget, and DiagnosticError for requests that
would change what is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw_targets.quantities import parse_quantity
from hw_targets.routing.trace import RoutingTrace
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import joules, phase_plan
from passes.place.formats import Formats, formats_of
from passes.place.gain import Gain
from passes.place.placement import Placement, StandInPlan
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution
from passes.quantize.recipe import load_recipe
from runtime.artifact import open_artifact
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import Manifest
from runtime.stand_ins import check_stand_ins
from runtime.stream_plan import StreamPlan
from stratum import host_planning
from stratum.host_placement import drive_of
from stratum.plan_request import PlanRequest
from stratum.planned import Planned
from stratum.process_account import foreseen_bytes
from stratum.run_bound import bound_of_run
from stratum.run_prediction import predict, problem_for
from stratum.stand_in_prediction import stand_in_use
from stratum.stand_in_share import check_threshold
from stratum.stream_placement import MemoryPlan, budget_of, recipe_of, stream_of_placement


@dataclass(frozen=True)
class BuiltModel:
    """A built model, and the budget of the whole process on this machine (None: none)."""

    manifest: Manifest
    path: Path
    budget: int | None = None

    @property
    def name(self) -> str:
        """What the model is called, "" where the artifact does not say."""
        name = self.manifest.model.get("name")
        return name if isinstance(name, str) else ""

    def formats(self) -> Formats:
        """The formats that it was built with."""
        recipe = recipe_of(self.manifest)
        if not recipe:
            return formats_of("", self.manifest.dtype)
        return Formats(recipe, load_recipe(str(self.path / "recipe.toml")), self.manifest.dtype)

    def within(self, request: PlanRequest, target: Target, given: Placement | None) -> BuiltModel:
        """With what the whole process may use, where the plan is for this machine: as asked for, or as a given plan
        has it."""
        if target.name != "host":
            return self
        size = dict(request.budgets).get("memory")
        if size is None:
            return dataclasses.replace(self, budget=budget_of(given) if given is not None else None)
        return dataclasses.replace(self, budget=int(parse_quantity(size, "bytes", where="budget of memory")))

    def context_of_run(self, batch: int) -> int:
        """Positions that `run --memory` has room for where none are asked for."""
        assert self.budget is not None
        return host_planning.context_of_run(self.manifest, self.budget, batch)

    def placement_for(self, session: Session, target: Target, trace: RoutingTrace | None = None) -> Placement:
        """What `run` keeps under the budget; with a trace, by the policy that does best on it. Raises NoFit."""
        assert self.budget is not None
        found = host_planning.placement_for(self.manifest, self.budget, session, self._drive(target))
        return found if trace is None else host_planning.with_best_policy(self.manifest, found, trace)

    def executed(self, given: Placement) -> MemoryPlan | None:
        """The executable part of a plan, None where this machine has none or does not do it."""
        if self.budget is None:
            return None
        try:
            return host_planning.executed(self.manifest, given, self.budget)
        except NoFit:
            raise
        except (DiagnosticError, RuntimeDiagnostic):
            return None  # `as_run` says why

    def judged(
        self, problem: Problem, given: Placement, made: MemoryPlan, trace: RoutingTrace | None = None
    ) -> Solution:
        """A plan with seconds and bounds in closed form, and with the bytes that `made`, its executable part, holds."""
        return host_planning.judged(problem, self.manifest, given, made, trace)

    def gains(self, solution: Solution, target: Target, trace: RoutingTrace | None = None) -> tuple[Gain, ...]:
        """What more of each resource would buy, each placed again as `run` would."""
        return host_planning.host_gains(solution, self.manifest, self._drive(target), trace)

    def _drive(self, target: Target) -> str:
        return host_planning.drive_of_target(target, drive_of(self.path))

    def as_run(self, planned: Planned, stand_ins: float | None) -> Planned:
        """With the times as the runtime will take them; as they are where it cannot execute the plan."""
        assert planned.solution is not None
        placement, manifest, stream, kv_bytes = planned.placement, self.manifest, None, None
        share = check_threshold(stand_ins, streams=True)
        check_stand_ins(manifest, share)
        try:
            if self.budget is not None:
                made = stream_of_placement(manifest, placement, self.budget, baseline=foreseen_bytes(manifest))
                stream, kv_bytes = made.stream, made.kv_bytes
            problem = problem_for(planned.solution.problem, manifest, stream)
            hits = expected_hits(planned, stream)
            times = predict(problem, manifest, stream, hits, kv_bytes=kv_bytes)
        except (DiagnosticError, RuntimeDiagnostic) as fault:
            warning = f"this machine cannot execute the plan: {str(fault).removeprefix('error: ')}"
            return dataclasses.replace(planned, warnings=(*planned.warnings, warning))
        bound = bound_of_run(planned.solution.problem, planned.solution.choice, manifest, stream, hits, kv_bytes)
        seconds: dict[str, Any] = {
            "decode": phase_plan(bound.decode),
            "prefill": phase_plan(bound.prefill),
            "joules_per_token": joules(
                planned.solution.problem, planned.solution.choice, bound.decode, times.decode.seconds
            ),
            "simulated_step": times.decode.seconds,
            "simulated_prefill": times.prefill.seconds,
            "simulated_prefill_bound": times.prefill.bound,
        }
        use = (
            stand_in_use(manifest, share, hits, placement.session.batch, planned.trace) if stream is not None else None
        )
        if use is not None:
            other = predict(problem, manifest, stream, hits, kv_bytes=kv_bytes, stand_ins=use).decode
            seconds["stand_ins"] = StandInPlan(
                share, use.used, other.seconds, other.read_bytes, times.decode.read_bytes, use.source
            )
        return dataclasses.replace(planned, placement=dataclasses.replace(placement, **seconds))


def opened(request: PlanRequest) -> BuiltModel:
    """The built model that a request is about. Raises DiagnosticError where it asks for other formats."""
    if request.recipe is not None or request.formats or request.kv_formats:
        option = "--formats" if request.formats else "--kv-formats"
        option = "--recipe" if request.recipe is not None else option
        raise DiagnosticError(
            f"{option} cannot change a model that is built already", where=request.model, expected="its directory"
        )
    return BuiltModel(open_artifact(request.model).manifest, Path(request.model))


def expected_hits(planned: Planned, stream: StreamPlan | None) -> float:
    """The share of a decode step's experts that are in memory, as the plan or its trace says."""
    return host_planning.hits_of(planned.placement.expert_cache, stream, planned.trace)
