"""Predicts and measures phases of many models, formats, budgets, depths and batches; writes docs/prediction.md.

    python -m bench.prediction [--quick] [--work DIR] [--only TEXT] [--no-page]

Nothing else may run meanwhile. Missing models and builds are made under --work first (--prepare: nothing else). The
read bandwidth and the peaks of this machine are measured right before and after each case, since a shared machine's
change by the second; the means are what its prediction is made from. The drive's rate is the one that it had while it
read for the case. Predicted is the very plan that was executed (`stratum.run_prediction`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import ROOT, machine
from bench.peers.models import OPTIONS
from bench.prediction.configurations import RUNS, STEPS, Case, Run
from bench.prediction.report import Row, figures, put
from hw_targets import load as load_target
from hw_targets.calibrate import Calibration, calibrate
from hw_targets.quantities import parse_quantity
from runtime.artifact import open_artifact
from runtime.stream_plan import StreamPlan
from stratum.planning import PlanRequest, expected_hits, make_plan
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
    calibrate()  # once: with it the target `host` states what kernels reach
    rows: list[Row] = []
    for run in runs:
        rows += compared(options.work, run)
        for row in rows[-len(run.cases) :]:
            print(f"{run.model} {run.recipe} {run.memory} {row.name}: {row.predicted * 1e3:.2f} ms predicted, "
                  f"{row.measured * 1e3:.2f} measured, {row.error:+.1%}, {row.bound}, "
                  f"{row.measured_bytes or 0:.3g} bytes at {row.read_rate or 0:.3g}/s, "
                  f"hits {row.predicted_hits} {row.measured_hits}",
                  file=sys.stderr, flush=True)  # fmt: skip
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
    """Measures a run, then predicts every case from what the machine could do around it."""
    budget = int(parse_quantity(run.memory, "bytes", where=run.model)) if run.memory else 0
    request = {
        "artifact": str(artifact(work, run)), "memory": budget, "batch": run.batch, "context": run.context,
        "steps": STEPS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "routing.csv" if budget and run.model.startswith("olmoe") else None
        request["record"] = str(trace) if trace is not None else ""
        command = [sys.executable, "-m", "bench.prediction.child", json.dumps(request)]
        found: list[dict[str, Any]] = []
        limits = [_limits()]
        with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None and child.stdout is not None
            for case in run.cases:
                child.stdin.write(json.dumps((case.phase, case.depth, case.batch)) + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
                if not answer:
                    raise SystemExit(f"{run.model} {run.recipe} {run.memory}: the run ended early")
                found.append(json.loads(answer))
                limits.append(_limits())
            child.stdin.close()
        targets = [host_of(*pair) for pair in itertools.pairwise(limits)]
        return [row_of(work, run, *three, trace) for three in zip(run.cases, found, targets, strict=True)]


def row_of(work: Path, run: Run, case: Case, found: dict[str, Any], target: str, trace: Path | None) -> Row:
    """One case's prediction beside what was found: of the very plan that was executed."""
    path = artifact(work, run)
    store = load_target("host").store()
    if found["read_rate"] and store is not None:  # the drive as fast as it was meanwhile
        target = f"{target[:-1]},{store.name}.read={found['read_rate'] / 1e9:.3f}GB/s}}"
    planned = make_plan(
        PlanRequest(
            str(path), target, context=run.context, batch=case.batch, prompt=case.depth,
            generate=STEPS if case.phase == "decode" else 1, trace=trace, what_if=False, simulate=False,
        )
    )  # fmt: skip
    assert planned.solution is not None
    manifest = open_artifact(path).manifest
    stream = StreamPlan.from_json(found["stream"]) if found["stream"] else None
    hits = expected_hits(planned, stream)
    times = predict(problem_for(planned.solution.problem, manifest, stream), manifest, stream, hits)
    phase = times.decode if case.phase == "decode" else times.prefill
    lookups = found["lookups"] if case.phase == "decode" else 0
    return Row(
        run, case, phase.seconds, found["seconds"], phase.bound, hits if lookups else None,
        found["hits"] / lookups if lookups else None, found["read_bytes"] if stream is not None else None,
        phase.read_bytes if stream is not None else None, found["read_rate"] or None,
    )  # fmt: skip


def host_of(before: Calibration, after: Calibration) -> str:
    """The target `host` with the means of two measurements."""
    figures_of = {
        "dram.read": (before.read_bandwidth, after.read_bandwidth, 1, "GB/s"),
        **{
            f"cores.peak.{element}": (first, second, before.threads, "GFLOP/s")
            for element, first, second in (
                ("f32", before.f32_peak, after.f32_peak),
                ("bf16", before.bf16_peak, after.bf16_peak),
                ("i8", before.i8_peak, after.i8_peak),
            )
            if first and second
        },
    }
    texts = (f"{name}={(a + b) / 2 / share / 1e9:.3f}{unit}" for name, (a, b, share, unit) in figures_of.items())
    return f"host{{{','.join(texts)}}}"


def _limits() -> Calibration:
    return calibrate(nbytes=1 << 28, seconds=0.01, repeats=5)


if __name__ == "__main__":
    main()
