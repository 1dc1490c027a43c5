"""Models larger than their memory: this compiler beside llama.cpp under a limit, page cache counted, from a cold cache.

    python -m bench.streaming --work DIR --prepare --peers VENV/bin/python     # makes models; twenty minutes
    python -m bench.streaming --work DIR --peers VENV/bin/python --device vda [--only uniform-1g,dense] [--tokens 8]

Every row is a process of its own in a control group of its own (needs root). llama.cpp maps the file and does not
repack its weights, which would have to fit; it is measured at the system's read-ahead and, with `--device vda`, at
128 KiB, which suits it best. A row ends after its tokens or after `--seconds`. What the disk gives by itself is taken
before and after each of our rows, and what it gave meanwhile by the runtime: the time is foretold from the latter, and
from peaks and memory bandwidth of just before and after the row. Without a limit the model is in memory already,
llama.cpp repacks as it likes, and both decode in turns. Forecasts are made at the end. The table takes about eleven
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.measure import machine
from bench.peers.child import Engine, EngineError
from bench.peers.models import Models
from bench.prediction.machine import Moment, between, host_of
from bench.streaming.disk import disk_bytes_per_s, forget, read_ahead, read_by
from bench.streaming.forecast import forecast
from bench.streaming.memory_group import MemoryGroup
from bench.streaming.report import Result, table
from bench.streaming.rows import ROWS, Row, chosen
from bench.streaming.turns import in_turns
from hw_targets import load as load_target
from hw_targets.calibrate import calibrate
from hw_targets.host import usable_cores
from ir.diagnostics import DiagnosticError

BEST_READ_AHEAD_KIB = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--only", default="", help=f"rows, by parts of their names: {', '.join(r.name for r in ROWS)}")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="a row ends after so many, a prompt after half more"
    )
    parser.add_argument("--peers", type=Path, help="python of an environment with llama-cpp-python")
    parser.add_argument("--device", help="block device of the work directory, to set its read-ahead")
    parser.add_argument("--expert-policy", help="instead of the default one")
    parser.add_argument(
        "--prepare", action="store_true", help="make what is missing or older than the sources, and end"
    )
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the device's setting and the group are put back
    rows = chosen(options.only)
    models = Models(options.work, options.peers, _say, keep_builds=not options.prepare)
    files = {row.name: _files(row, models, options.peers is not None) for row in rows}
    if options.prepare:
        for row in rows:
            models.drop_variant(row.model)
        return
    calibrate()  # the target `host` then states what this machine reaches
    if any(row.cap for row in rows) and load_target("host").store() is None:
        sys.exit(f"nothing is known of a drive here: compile-model targets calibrate --disk {options.work}")
    results: list[Result] = []
    for row in rows:
        artifact, gguf = files[row.name]
        if not row.cap:
            found = in_turns(row, _commands(row, artifact, gguf, options), options.tokens)
            results += [_said(result) for result in found]
            continue
        results.append(_ours(row, artifact, options))
        if gguf is not None:
            for kib in (BEST_READ_AHEAD_KIB, None) if options.device else (None,):
                results.append(_llama(row, gguf, kib, options))
    if options.out is not None:  # what took minutes to measure is not lost to a forecast
        options.out.write_text(json.dumps([_plain(result) for result in results], indent=1))
    told = [_told(result, files[result.row.name][0]) for result in results]
    print(f"{machine()}\n\n{table(told)}")
    if options.out is not None:
        options.out.write_text(json.dumps([_plain(result) for result in told], indent=1))


def _told(result: Result, artifact: Path) -> Result:
    """With what is foretold of one of our rows."""
    if not (result.target and result.answer):
        return result
    try:
        found = forecast(result.row, artifact, result.answer, result.target, result.rate_meanwhile)
    except DiagnosticError as fault:
        _say(f"{result.row.name}: {fault}")
        return result
    return replace(result, forecast=found)


def _files(row: Row, models: Models, peers: bool) -> tuple[Path, Path | None]:
    """Our artifact, and llama.cpp's file where it is asked for."""
    return models.artifact(row.model, row.recipe), models.gguf(row.model, row.gguf) if peers else None


def _ours(row: Row, artifact: Path, options: argparse.Namespace) -> Result:
    weights = artifact / "weights" / "weights.bin"
    command = _commands(row, artifact, None, options)["stratum"]
    before, limits = disk_bytes_per_s(weights, scattered=row.scattered), _limits()
    try:
        answer = measured("stratum", command, weights, row, options)
    except EngineError as fault:
        return _said(Result(row, "stratum", {}, fault=str(fault)))
    target = host_of(between(limits, _limits()), usable_cores())
    return _said(Result(row, "stratum", answer, (before, disk_bytes_per_s(weights, scattered=row.scattered)), target))


def _limits() -> Moment:
    found = calibrate(nbytes=1 << 28, seconds=0.01, repeats=5)
    return Moment(found.read_bandwidth, found.f32_peak, found.bf16_peak or 0.0, found.i8_peak or 0.0)


def _llama(row: Row, gguf: Path, kib: int | None, options: argparse.Namespace) -> Result:
    name = f"llama.cpp, read-ahead {'of the system' if kib is None else f'{kib} KiB'}"
    command = [*_llama_command(row, gguf, options), "--mapped"]
    before = disk_bytes_per_s(gguf, scattered=row.scattered)
    try:
        with read_ahead(options.device or "", kib):
            answer = measured(name, command, gguf, row, options)
    except EngineError as fault:
        return _said(Result(row, name, {}, fault=str(fault)))
    return _said(Result(row, name, answer, (before, before)))


def _commands(row: Row, artifact: Path, gguf: Path | None, options: argparse.Namespace) -> dict[str, list[str]]:
    """What starts each engine of a row."""
    ours = [sys.executable, "-m", "bench.streaming.stratum_child", str(artifact), "--memory", str(row.cap)]
    ours += ["--context", str(_context(row, options.tokens))]
    ours += ["--expert-policy", options.expert_policy] if options.expert_policy else []
    return {"stratum": ours} | ({"llama.cpp": _llama_command(row, gguf, options)} if gguf is not None else {})


def _llama_command(row: Row, gguf: Path, options: argparse.Namespace) -> list[str]:
    words = [str(options.peers), "-m", "bench.peers.llama_cpp_child", str(gguf)]
    return [*words, "--context", str(_context(row, options.tokens))]


def measured(name: str, command: Sequence[str], file: Path, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """One request to a fresh process under the cap: its answer, and what the group and the system saw."""
    request: dict[str, object] = {"topics": row.topics}
    if row.prompt:
        request |= {"do": "prefill", "tokens": row.prompt}
    else:
        request |= {"do": "decode", "tokens": options.tokens, "depth": 0, "warm": 0, "seconds": options.seconds}
    forget(file)
    with MemoryGroup(row.cap) as group:
        engine = Engine(name, group.command(command))
        try:
            loaded = read_by(engine.process)
            answer = _asked(engine, request, 1.5 * options.seconds)
            answer = {"tokens": row.prompt or options.tokens, **engine.about, **answer, **group.facts()}
            answer.setdefault("read_bytes", read_by(engine.process) - loaded)
        finally:
            engine.close()
        return answer


def _asked(engine: Engine, request: dict[str, object], seconds: float) -> dict[str, Any]:
    """The answer; the process is ended when the time is over, since a prompt cannot be ended otherwise."""
    timer = threading.Timer(seconds, os.kill, (engine.process, signal.SIGKILL))
    timer.start()
    try:
        return engine.ask(request)
    except EngineError as fault:
        raise EngineError(f"not done after {seconds:.0f} s") if timer.finished.is_set() else fault from None
    finally:
        timer.cancel()


def _context(row: Row, tokens: int) -> int:
    return max(128, row.prompt, 2 * tokens)


def _said(result: Result) -> Result:
    done = f"{result.answer['tokens']} tokens in {result.answer['seconds']:.2f} s" if result.answer else result.fault
    _say(f"{result.row.name}, {result.engine}: {done}")
    return result


def _plain(result: Result) -> dict[str, Any]:
    answer = {key: value for key, value in result.answer.items() if key != "routing"} | {"target": result.target}
    told = asdict(result.forecast) if result.forecast is not None else None
    return {"row": result.row.name, "engine": result.engine, **answer, "disk": result.disk, "forecast": told}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
