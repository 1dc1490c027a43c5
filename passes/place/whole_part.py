"""What it costs to compute all of a part on one unit, wherever its weights lie."""

from __future__ import annotations

import math

from hw_targets.target import ComputeUnit
from passes.place.option import Option, PhaseCost, compute_part, move_part
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts


def whole_part(problem: Problem, option: Option, cost: PhaseCost, unit: ComputeUnit, tokens: int | None) -> None:
    """All of a part passes on `unit`: once for a decode step of `tokens`, once for every chunk when that is None."""
    session, part = problem.session, option.part
    if tokens is None and part.group == "head":
        passes, rows, reads = 1, float(session.prompts), 1  # of a prompt only the last token needs logits
    elif tokens is None:
        passes, rows, reads = session.passes, session.prompt_rows / session.passes, 1
    else:
        passes, rows, reads = 1, float(tokens), min(session.micro_batches, tokens)
    touched = part.nbytes
    if part.experts:
        each = distinct_experts(part.experts, part.top_k, rows / reads)
        touched = math.ceil(part.asked_bytes(rows / reads) * min(each, part.top_k * rows))
    compute_part(problem, cost, unit, part, touched * reads, rows, passes)
    moved = touched if part.experts and tokens is not None else part.nbytes
    move_part(problem, cost, option.home, unit.tier, moved * passes, part)
