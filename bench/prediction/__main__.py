"""Predicts and measures phases of many models, formats, budgets, depths and batches; writes docs/prediction.md.

    python -m bench.prediction [--quick] [--work DIR] [--only TEXT] [--no-page]

Nothing else may run meanwhile. Missing models and builds are made under --work first (--prepare: nothing else). A
case is run in turns of a few tokens; between them the machine is measured (`bench.prediction.machine`), since a shared
one's rates change by the second, and only from these figures its prediction is made. Predicted is the very plan that
was executed (`stratum.run_prediction`). All samples are kept in WORK/samples.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.measure import ROOT, machine
from bench.peers.child import Engine
from bench.peers.models import OPTIONS
from bench.prediction.configurations import PROMPT_TURNS, RUNS, STEPS, TURNS, Case, Run
from bench.prediction.machine import LEAST_HUGE, Machine, Moment, between, host_of, usual
from bench.prediction.report import InTurns, Row, figures, put
from hw_targets.calibrate import calibrate
from hw_targets.quantities import parse_quantity
from passes.place.placement import RIGHT_GUESSES
from runtime.artifact import open_artifact
from runtime.stream_plan import StreamPlan
from stratum.built_planning import expected_hits
from stratum.planning import PlanRequest, make_plan
from stratum.run_prediction import predict, problem_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "prediction", help="where models are kept")
    parser.add_argument("--quick", action="store_true", help="one short case of each run; the page stays as it is")
    parser.add_argument("--only", default="", help="runs whose name contains one of these: llama-1.1b w3,bf16")
    parser.add_argument("--prepare", action="store_true", help="make what is missing, measure nothing")
    parser.add_argument("--no-page", action="store_true", help="only print the table")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = options.only.split(",")
    runs = [run for run in RUNS if any(text in f"{run.model} {run.recipe} {run.memory or '-'}" for text in wanted)]
    if options.quick:
        runs = [Run(r.model, r.recipe, r.memory, r.cases[:1]) for r in runs]
    for run in runs:
        artifact(options.work, run)
    if options.prepare:
        return
    samples: list[dict[str, Any]] = []
    calibrate()  # once: with it the target `host` states what kernels reach
    rows: list[Row] = []
    for run in runs:
        rows += compared(options.work, run)
        for row in rows[-len(run.cases) :]:
            samples.append({"run": f"{run.model} {run.recipe} {run.memory}", "case": row.name, **row.samples})
            print(f"{run.model} {run.recipe} {run.memory} {row.name}: {row.predicted * 1e3:.2f} ms predicted, "
                  f"{row.measured * 1e3:.2f} measured, {row.error:+.1%}, {row.bound}, "
                  f"memory {row.memory_rate or 0:.3g}/s, {row.measured_bytes or 0:.3g} bytes, drive "
                  f"{row.read_rate or 0:.3g}/s, "
                  f"hits {row.predicted_hits} {row.measured_hits}",
                  file=sys.stderr, flush=True)  # fmt: skip
    (options.work / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")
    text = figures(rows, machine())
    print(text)
    if not (options.quick or options.only or options.no_page):
        put(text)


def artifact(work: Path, run: Run) -> Path:
    """The build of a run's model; it and its checkpoint are made where they are missing."""
    model, path = work / run.model, work / f"{run.model}-{run.recipe}.stratum"
    if not model.exists():
        make = [sys.executable, "examples/make_model.py", run.model, str(model), "--dtype", "bf16"]
        subprocess.run([*make, *OPTIONS.get(run.model, [])], cwd=ROOT, check=True, stdout=sys.stderr)
    if not path.exists():
        print(f"building {path.name}", file=sys.stderr, flush=True)
        recipe = [] if run.recipe == "bf16" else ["--recipe", run.recipe]
        build = [sys.executable, "-m", "stratum.cli", "build", str(model), "-o", str(path), "--quiet", *recipe]
        subprocess.run(build, cwd=ROOT, check=True, stdout=sys.stderr)
    return path


def compared(work: Path, run: Run) -> list[Row]:
    """Runs every case in turns with measurements of the machine, then predicts it from those."""
    budget = int(parse_quantity(run.memory, "bytes", where=run.model)) if run.memory else 0
    path = artifact(work, run)
    records = bool(budget) and run.model.startswith("olmoe")
    request = {
        "artifact": str(path), "memory": budget, "batch": run.batch, "context": run.context, "record": records,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, "-m", "bench.prediction.child", json.dumps(request)]
        engine = stack.enter_context(Engine(path.name, command))
        threads = int(engine.about["threads"])
        machine = stack.enter_context(Machine(threads))
        if machine.huge_share < LEAST_HUGE:
            print(f"only {machine.huge_share:.0%} of the memory that is read lies in huge pages: rates are too low",
                  file=sys.stderr)  # fmt: skip
        found = [in_turns(engine, machine, case) for case in run.cases]
        trace = Path(folder) / "routing.csv" if records else None
        if trace is not None:
            engine.ask({"do": "routing", "path": str(trace)})
        return [row_of(path, run, case, one, threads, trace) for case, one in zip(run.cases, found, strict=True)]


def in_turns(engine: Engine, machine: Machine, case: Case) -> InTurns:
    """A case, measured: turns of a few tokens, the machine between them."""
    engine.ask({"do": "begin", "phase": case.phase, "depth": case.depth, "batch": case.batch, "steps": STEPS})
    turns, before, moments = [], _now(engine, machine), []
    for _ in range(TURNS if case.phase == "decode" else PROMPT_TURNS):
        turns.append(engine.ask({"do": "turn", "steps": STEPS})["seconds"])
        after = _now(engine, machine)
        moments.append(between(before, after))
        before = after
    return InTurns(turns, moments, engine.ask({"do": "end"}))


def _now(engine: Engine, machine: Machine) -> Moment:
    """Memory and products first: what the session reads ahead is there then."""
    moment = machine.now()
    return dataclasses.replace(moment, drive=float(engine.ask({"do": "drive"})["rate"]))


def row_of(path: Path, run: Run, case: Case, found: InTurns, threads: int, trace: Path | None) -> Row:
    """One case's prediction beside what was found: of the very plan that was executed."""
    moment, counts = usual(found.moments), found.counts
    planned = make_plan(
        PlanRequest(
            str(path), host_of(moment, threads), context=run.context, batch=case.batch, prompt=case.depth,
            generate=STEPS if case.phase == "decode" else 1, trace=trace, what_if=False, simulate=False,
        )
    )  # fmt: skip
    assert planned.solution is not None
    manifest = open_artifact(path).manifest
    stream = StreamPlan.from_json(counts["stream"]) if counts["stream"] else None
    hits = expected_hits(planned, stream)
    guesses = counts.get("guesses_read", 0)
    right = counts["guesses_right"] / guesses if guesses else RIGHT_GUESSES
    times = predict(problem_for(planned.solution.problem, manifest, stream), manifest, stream, hits, right)
    phase = times.decode if case.phase == "decode" else times.prefill
    lookups = counts.get("lookups", 0) if case.phase == "decode" else 0
    streamed = stream is not None
    return Row(
        run, case, phase.seconds, found.seconds, phase.bound, hits if lookups else None,
        counts["hits"] / lookups if lookups else None, counts["read_bytes"] if streamed else None,
        phase.read_bytes if streamed else None, moment.drive or None, moment.read, dataclasses.asdict(found),
    )  # fmt: skip


if __name__ == "__main__":
    main()
