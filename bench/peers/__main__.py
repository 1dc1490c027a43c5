"""Peers and this compiler side by side in one run: `make bench-peers`, or

    python -m bench.peers [--work build/peers] [--only dense-decode,moe-decode] [--quick] [--prepare] [--no-peers]

Makes what is missing first (the peers' environment, models, their quantized files, our builds: an hour the first time),
then measures one engine at a time, in turns, with the machine's limits between: about ten minutes, in which nothing
else may run. `--prepare` stops after the first part. Prints a Markdown report and keeps it with all samples under WORK.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from datetime import datetime
from pathlib import Path

from bench.measure import ROOT, machine
from bench.peers import report
from bench.peers.child import EngineError
from bench.peers.environment import peers_python
from bench.peers.measurement import (
    Limits,
    Machine,
    Measured,
    Quantized,
    distinct_experts,
    engine_command,
    measure_quantize,
    measure_section,
)
from bench.peers.models import BuildError, Models
from bench.peers.sections import DENSE, KEYS, MOE, OURS, QUANTIZE, SECTIONS, Effort

RECIPE = "w4a8-g32"
EXPERT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="where everything made is kept")
    parser.add_argument("--only", default=",".join(KEYS), help=f"sections by commas: {', '.join(KEYS)}")
    parser.add_argument("--rounds", type=int, default=4, help="of every row, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="one round of a fraction of the tokens: does it all run?")
    parser.add_argument("--prepare", action="store_true", help="make what is missing, and stop")
    parser.add_argument("--keep-builds", action="store_true", help="take our artifacts as they are, whatever changed")
    parser.add_argument("--no-peers", action="store_true", help="our rows alone")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keys = options.only.split(",")
    unknown = sorted(set(keys) - set(KEYS))
    if unknown or options.rounds < 1 or options.threads < 1:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(KEYS)}" if unknown else "at least 1 is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    python = Path(sys.executable) if options.no_peers else peers_python(work, say)
    models = Models(work, python, say, keep_builds=options.keep_builds)
    effort = Effort(1 if options.quick else options.rounds, options.quick)
    sections = [s for s in SECTIONS if s.key in keys]
    if options.quick:
        sections = [dataclasses.replace(s, tokens=max(8, s.tokens // 8), depth=s.depth // 8, turns=1) for s in sections]

    prepare(sections, models, python, options.threads, not options.no_peers)
    if QUANTIZE in keys:
        models.checkpoint(DENSE)
    if options.prepare:
        return
    start = time.perf_counter()
    measured: list[Measured] = []
    peers = not options.no_peers
    with Machine(options.threads) as limits:
        for section in sections:
            say(section.title)
            measured.append(measure_section(section, models, python, limits, options.threads, effort, peers, say))
        at_end = limits.limits()
    quantized = None
    if QUANTIZE in keys:
        say("quantize")
        quantized = measure_quantize(models, RECIPE, effort, say)
    notes = notes_of(measured, models, python, options, at_end, time.perf_counter() - start)
    text = "\n".join([heading(options.quick), "", report.markdown(measured, quantized, notes)])
    print(text)
    keep(work, text, measured, quantized)


def say(message: str) -> None:
    """Progress, on stderr: stdout is the report."""
    print(message, file=sys.stderr, flush=True)


def prepare(sections: list, models: Models, python: Path, threads: int, peers: bool) -> None:
    """Makes every file the sections need, so that measuring is not disturbed by it."""
    for section in sections:
        for engine in section.engines:
            if peers or engine.startswith(OURS):
                try:
                    engine_command(engine, section, models, python, threads)
                except BuildError as fault:
                    say(str(fault))
        if section.model == MOE and peers:
            try:
                distinct_experts(models, MOE, "q4_0", python, threads, EXPERT_TOKENS)
            except EngineError as fault:
                say(str(fault))


def heading(quick: bool) -> str:
    title = f"### {machine()}: peers side by side"
    return title + ("\n\nA quick run, to see that everything works: its figures say nothing." if quick else "")


def notes_of(
    measured: list[Measured],
    models: Models,
    python: Path,
    options: argparse.Namespace,
    limits: Limits,
    seconds: float,
) -> list[str]:
    """Limits, versions, routing, time."""
    bf16 = f"bf16 {limits.bf16 / 1e12:.2f} TFLOP/s, " if limits.bf16 else ""
    notes = [f"At the end: {bf16}read {limits.read / 1e9:.1f} GB/s, {options.threads} threads."]
    if any(item.section.model == MOE for item in measured) and not options.no_peers:
        try:
            experts = distinct_experts(models, MOE, "q4_0", python, options.threads, EXPERT_TOKENS)
            notes.append(
                f"Experts that a layer of {MOE} used over {EXPERT_TOKENS} decoded tokens: {experts['mean']:.0f} of 64 "
                f"on average, {experts['least']} to {experts['most']}."
            )
        except EngineError as fault:
            notes.append(f"The experts used were not counted: {fault}.")
    notes.append(f"Engines: {report.versions(measured)}. The run took {seconds / 60:.1f} minutes.")
    return notes


def keep(work: Path, text: str, measured: list[Measured], quantized: Quantized | None) -> None:
    """Report and samples under names of this moment."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M")
    (work / f"report-{stamp}.md").write_text(text + "\n")
    record = {
        "sections": [
            {"key": item.section.key, "samples": [dataclasses.asdict(s) for s in item.samples]} for item in measured
        ],
        "quantize": dataclasses.asdict(quantized) if quantized else None,
    }
    (work / f"samples-{stamp}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
