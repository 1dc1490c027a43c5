"""A plan beside what happens: the same model run on this machine under the same budget, phase by phase, part by part.

    rows = compare(request, planned)     # [Compared("decode step", predicted, measured), ...]

The model is built (or taken from the cache) with the plan's recipe and run as `compile-model bench` runs it: a prompt,
then tokens behind it; medians of three. Parts come from a profile of the decode steps. Takes checkpoint directories on
this machine; refuses plans for other machines, for several sequences at once and for models without weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ir.diagnostics import DiagnosticError
from stratum.plan_report import seconds_text, table
from stratum.planning import Planned, PlanRequest

REPETITIONS = 3
# What a kernel's place in the model is called -> the group of the plan; the first that fits.
_GROUPS = (
    ("lm_head", "head"),
    ("embed", "embedding"),
    ("expert", "experts"),
    ("block_sparse_moe", "experts"),
    ("mlp", "mlp"),
    ("attn", "attention"),
    ("input_layernorm", "attention"),
    ("post_attention_layernorm", "mlp"),
    ("norm", "head"),
)


@dataclass(frozen=True)
class Compared:
    """Seconds of one phase, or of one part in a decode step."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1.0 if self.measured else 0.0


def compare(request: PlanRequest, planned: Planned) -> tuple[Compared, ...]:
    """Runs what was planned; raises DiagnosticError where that cannot be done."""
    from stratum import api, benchmark

    check(request, planned)
    session = planned.placement.session
    memory = dict(request.budgets).get("memory")
    with api.load(
        request.model, dtype=request.dtype, recipe=request.recipe, max_context=session.context, memory=memory
    ) as model:
        runner = model.session
        prompt = benchmark.measure(runner, benchmark.BenchTest(session.prompt, 0, 0), REPETITIONS)
        step = benchmark.BenchTest(0, session.generate, session.prompt)
        decode = benchmark.measure(runner, step, REPETITIONS)
        with runner.profile() as profile:
            benchmark.measure(runner, step, 1)
    step_seconds = planned.placement.simulated_step or planned.placement.decode.seconds
    rows = [
        Compared("prefill", planned.placement.prefill.seconds, statistics.median(prompt.samples_ns) / 1e9),
        Compared("decode step", step_seconds, statistics.median(decode.samples_ns) / 1e9 / session.generate),
    ]
    steps = [s for s in profile.steps if s.tokens == 1]
    if steps and planned.solution is not None:
        profile.steps[:] = steps
        measured = parts_measured([(row.origin, row.seconds) for row in profile.rows()], len(steps))
        rows += [Compared(f"  {g}", s, measured[g]) for g, s in parts_predicted(planned).items() if g in measured]
    return tuple(rows)


def check(request: PlanRequest, planned: Planned) -> None:
    """Whether this machine can run what was planned."""
    where = "--compare-run"
    if request.target.partition("{")[0] != "host":
        raise DiagnosticError(
            f"the plan is for {request.target}, not for this machine", where=where, expected="--target host"
        )
    if not Path(request.model).expanduser().is_dir():
        raise DiagnosticError(
            f"{request.model!r} has no weights to run", where=where, expected="a checkpoint directory"
        )
    if planned.placement.session.batch != 1:
        raise DiagnosticError("several sequences at once are not compared", where=where, expected="--batch 1")


def parts_predicted(planned: Planned) -> dict[str, float]:
    """Seconds that each group takes of the path of a decode step."""
    found: dict[str, float] = {}
    if planned.solution is not None:
        for option, count in planned.solution.choice:
            group = option.part.group
            found[group] = found.get(group, 0.0) + option.decode.waited * count
    return {group: seconds for group, seconds in found.items() if seconds}


def parts_measured(rows: Sequence[tuple[str, float]], steps: int) -> dict[str, float]:
    """Seconds of each group in one step, from ((place in the model, seconds of all steps), ...)."""
    found: dict[str, float] = {}
    for origin, seconds in rows:
        group = next((group for word, group in _GROUPS if word in origin), "")
        if group:
            found[group] = found.get(group, 0.0) + seconds / steps
    return found


def compared_text(rows: Sequence[Compared]) -> str:
    """A table for people."""
    lines: list[Sequence[str]] = [("run on this machine", "predicted", "measured", "error")]
    for row in rows:
        lines.append((row.what, seconds_text(row.predicted), seconds_text(row.measured), f"{row.error:+.0%}"))
    return "\n".join(table(lines))
