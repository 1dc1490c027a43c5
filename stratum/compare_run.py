"""A plan beside what happens: the same model run on this machine under the same budget, phase by phase, part by part.

    rows = compare(request, planned)     # [Compared("decode step", predicted, measured), ...]

The model is built (or taken from the cache) with the plan's recipe and run as `compile-model bench` runs it: a prompt,
then tokens behind it; medians of three. Parts come from a profile of the decode steps. Under a budget the bytes that a
step reads, the share of experts found in memory and the peak of the process stand beside the plan's. Takes checkpoint
directories on this machine; refuses plans for other machines, for several sequences at once and for models without
weights.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ir.diagnostics import DiagnosticError
from passes.place.machine import main_tier
from runtime.stream_report import StreamReport
from stratum.plan_report import seconds_text, table
from stratum.planning import PROCESS_BYTES, Planned, PlanRequest

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
    """Seconds of one phase, or of one part in a decode step; `unit` "MB" or "%": what else a budget is about."""

    what: str
    predicted: float
    measured: float
    unit: str = "s"

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
        before = runner.streamer.report() if runner.streamer is not None else None
        decode = benchmark.measure(runner, step, REPETITIONS)
        counted: list[Compared] = []
        if runner.streamer is not None and before is not None:
            steps_run = (REPETITIONS + 1) * session.generate  # one repetition warms up
            counted = _counted(planned, runner.streamer.report().since(before), steps_run)
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
    return tuple(rows + counted)


def _counted(planned: Planned, done: StreamReport, steps: int) -> list[Compared]:
    """What a budget is about, of `steps` decode steps."""
    target, plan = planned.target, planned.placement
    store = target.store()
    reads = sum(r.seconds for r in plan.decode.resources if store is not None and r.name == f"{store.name} read")
    rate = (store.read_rate() or 0.0) if store is not None else 0.0
    rows = [Compared("read, a step", reads * rate / 1e6, done.read_bytes / steps / 1e6, "MB")]
    if done.expert_lookups and plan.expert_cache is not None:
        rows.append(Compared("experts found", 100 * plan.expert_cache.hit_rate, 100 * done.hit_rate, "%"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = next((t for t in plan.tiers if t.name == main_tier(target)), None)
    if used is not None:
        rows.append(Compared("peak memory", (PROCESS_BYTES + used.peak) / 1e6, peak / 1e6, "MB"))
    return rows


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
        both = [_shown(value, row.unit) for value in (row.predicted, row.measured)]
        lines.append((row.what, *both, f"{row.error:+.0%}"))
    return "\n".join(table(lines))


def _shown(value: float, unit: str) -> str:
    return seconds_text(value) if unit == "s" else f"{value:.1f} {unit}"
