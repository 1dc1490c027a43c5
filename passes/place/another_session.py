"""A plan in another session than the one that it was made for: other chunks of prompts, depths, micro-batches.

longer = in_session(solution, dataclasses.replace(session, chunk=1024))       # None where nothing fits
"""

from __future__ import annotations

import dataclasses

from ir.diagnostics import DiagnosticError
from passes.place.build_plan import from_placement, to_placement
from passes.place.milp import FEW_NODES
from passes.place.outcome import evaluate
from passes.place.problem import Session
from passes.place.solve import Solution, solve


def in_session(solution: Solution, session: Session, *, anew: bool = True) -> Solution | None:
    """The same placement; where it has no room, with `anew` the best one that has, whose session may be another again.
    None where nothing fits."""
    problem = dataclasses.replace(solution.problem, session=session)
    try:  # what is pinned stands in the plan
        choice = from_placement(dataclasses.replace(problem, pins=()), solution.placement)
        outcome = evaluate(problem, choice)
        if not outcome.fits:
            return solve(problem, FEW_NODES) if anew else None
    except DiagnosticError:
        return None
    same = solution.placement  # the same layers as before: pins and losses may tell them apart
    made = dataclasses.replace(
        to_placement(problem, choice, outcome), gap=solution.gap, groups=same.groups, kv=same.kv, quality=same.quality,
        expert_formats=same.expert_formats,
    )  # fmt: skip
    return dataclasses.replace(solution, problem=problem, choice=choice, outcome=outcome, placement=made)
