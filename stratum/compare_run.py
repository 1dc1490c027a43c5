"""A plan beside what happens: the same model run on this machine under the same plan, phase by phase, part by part.

    rows = compare(request, planned)     # (Compared("decode", "step", predicted, measured), ...)

The model is built (or taken from the cache) with the plan's recipe, or was built already. A process of its own
executes the plan: a prompt, then steps of `batch` sequences behind prompts. Predicted are both phases, as
`stratum.run_prediction` plays the very plan that was executed: each part of the model beside what its kernels took, and
the time that steps wait for reads; under a budget also the bytes read, the experts found in memory and the peak of the
process. Refuses plans for other machines, models without weights, and what the runtime does not do.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.diagnostics import DiagnosticError
from passes.place.machine import main_tier
from passes.place.placement import RIGHT_GUESSES
from runtime.artifact import is_artifact, open_artifact
from runtime.stream_plan import StreamPlan
from stratum.built_planning import expected_hits
from stratum.measure_run import Measured, Phase, measure_apart
from stratum.plan_report import seconds_text, table
from stratum.plan_request import PlanRequest
from stratum.planned import Planned
from stratum.process_room import PROCESS_BYTES
from stratum.run_prediction import PhaseTimes, predict, problem_for

SCHEMA = "stratum.compare/1"
_NAMES = {"while reading": "drive while it reads", "read": "weights read", "kv read": "keys and values read"}


@dataclass(frozen=True)
class Compared:
    """One figure of a phase ("prefill": of a prompt, "decode": of a step), predicted and measured, in `unit`s: "s",
    "MB", "MB/s" or "%". `what` is the phase itself, a part of the model, "other" (what is left of the phase: between
    kernels, and where a profile of one repetition differs), "waiting for reads", "read", "while reading", "kv read",
    "experts found" or "peak memory"."""

    phase: str
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
    from stratum import api
    from stratum.build_apart import built_apart

    check(request, planned)
    placement, path = planned.placement, Path(request.model).expanduser()
    if not is_artifact(path):
        settings = {"target": "host", "dtype": placement.dtype, "pipeline": None, "recipe": placement.recipe or None}
        path = built_apart(path, settings, None, None)
    memory = api.memory_bytes(dict(request.budgets).get("memory"))
    session = placement.session
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(placement.to_json(), encoding="utf-8")
        measured = measure_apart(
            path, plan=file if memory is not None or request.plan is not None else None, memory=memory,
            context=session.context, batch=session.batch, prompt=session.prompt, generate=session.generate,
        )  # fmt: skip
    return rows_of(planned, path, measured)


def rows_of(planned: Planned, artifact: Path, measured: Measured) -> tuple[Compared, ...]:
    """The prediction of the plan that was executed, beside what was found."""
    assert planned.solution is not None
    manifest = open_artifact(artifact).manifest
    stream = StreamPlan.from_json(measured.stream) if measured.stream else None
    hits = expected_hits(planned, stream)
    guesses = measured.decode.guesses_read  # how many come true is the model's, like its routing
    right = measured.decode.guesses_right / guesses if guesses else RIGHT_GUESSES
    times = predict(
        problem_for(planned.solution.problem, manifest, stream), manifest, stream, hits, right, measured.kv_bytes
    )
    rows = [
        *_phase("prefill", times.prefill, measured.prefill, stream),
        *_phase("decode", times.decode, measured.decode, stream),
    ]
    if measured.decode.lookups:
        rows.append(Compared("decode", "experts found", 100 * hits, 100 * measured.decode.hit_rate, "%"))
    used = next((t for t in planned.placement.tiers if t.name == main_tier(planned.target)), None)
    if stream is not None and used is not None:
        peak = Compared("all", "peak memory", (PROCESS_BYTES + used.peak) / 1e6, measured.peak_bytes / 1e6, "MB")
        rows.append(peak)
    return tuple(rows)


def _phase(name: str, times: PhaseTimes, found: Phase, stream: StreamPlan | None) -> list[Compared]:
    parts, predicted = dict(found.parts), dict(times.parts)
    if "mlp" not in predicted:  # what goes to experts and comes from them
        parts["experts"] = parts.get("experts", 0.0) + parts.pop("mlp", 0.0)
    rows = [Compared(name, name, times.seconds, found.seconds)]
    rows += [Compared(name, group, s, parts[group]) for group, s in predicted.items() if parts.get(group)]
    shown = sum(row.predicted for row in rows[1:]), sum(row.measured for row in rows[1:])
    waited = (times.waited, found.waited) if stream is not None else (0.0, 0.0)
    left = times.seconds - shown[0] - waited[0], found.seconds - shown[1] - waited[1]
    rows.append(Compared(name, "other", left[0] if left[0] > 1e-6 else 0.0, max(0.0, left[1])))
    if stream is not None:
        rows.append(Compared(name, "waiting for reads", *waited))
        weights = times.read_bytes - times.kv_read_bytes
        rows.append(Compared(name, "read", weights / 1e6, found.read_bytes / 1e6, "MB"))
        if times.kv_read_bytes or found.kv_read_bytes:
            rows.append(Compared(name, "kv read", times.kv_read_bytes / 1e6, found.kv_read_bytes / 1e6, "MB"))
        if found.read_rate:
            rows.append(Compared(name, "while reading", times.read_rate / 1e6, found.read_rate / 1e6, "MB/s"))
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
            f"{request.model!r} has no weights to run", where=where, expected="a checkpoint directory or an artifact"
        )
    if request.stand_ins is not None:
        raise DiagnosticError(
            "--stand-ins are not compared", where=where, expected="'run --stand-ins', which says what was foretold too"
        )
    if planned.solution is None:
        raise DiagnosticError("the plan is for several devices", where=where, expected="one machine")


def measured_what(planned: Planned) -> str:
    """The title of the table: what was run."""
    session = planned.placement.session
    return f"run on this machine: a prompt of {session.prompt} tokens; steps of {session.batch} behind such prompts"


def compared_text(rows: Sequence[Compared], title: str = "run on this machine") -> str:
    """A table for people."""
    lines: list[Sequence[str]] = [("", "predicted", "measured", "error")]
    for row in rows:
        both = [_shown(value, row.unit) for value in (row.predicted, row.measured)]
        name = {"prefill": "prefill", "decode": "decode step", "peak memory": "peak memory"}.get(row.what)
        error = f"{row.error:+.0%}" if row.measured and row.predicted else "-"
        lines.append((name or f"  {_NAMES.get(row.what, row.what)}", *both, error))
    return "\n".join([title, *table(lines)])


def compared_json(planned: Planned, rows: Sequence[Compared]) -> str:
    """The same as one JSON object: `schema`, the plan, and rows with the fields of `Compared`, seconds as they are."""
    found: list[dict[str, Any]] = [
        {"phase": r.phase, "what": r.what, "unit": r.unit, "predicted": r.predicted, "measured": r.measured}
        for r in rows
    ]
    return json.dumps({"schema": SCHEMA, "plan": json.loads(planned.placement.to_json()), "rows": found}, indent=1)


def _shown(value: float, unit: str) -> str:
    return seconds_text(value) if unit == "s" else f"{value:.1f} {unit}"
