"""Runs the sections: all engines of a section open at once, asked in turns, the machine's limits measured between.

Memory bandwidth of shared machines drifts by the second, so turns are short and many, an engine is set against what was
measured right before and after its turn, and engines are compared turn by turn; the median over the turns counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.measure import cli, run
from bench.peers.child import Engine, EngineError
from bench.peers.models import CONTEXT, BuildError, Models
from bench.peers.sections import (
    BATCHES,
    DENSE,
    LLAMA,
    OPENVINO,
    OURS,
    Effort,
    Section,
    product_operations,
)

Say = Callable[[str], None]


@dataclass
class Samples:
    """Of one engine: tokens/s and limits of each round, the work of one request, or why there is nothing."""

    engine: str
    tokens_per_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)  # bytes/s of the machine, around each round
    vnni: list[float] = field(default_factory=list)  # operations/s of the machine
    bytes: float = 0.0  # read in one request, where the engine tells
    operations: float = 0.0
    file_bytes: int = 0
    about: dict[str, object] = field(default_factory=dict)
    fault: str = ""

    @property
    def rate(self) -> float:
        """Median tokens/s; 0 where nothing was measured."""
        return median(self.tokens_per_s) if self.tokens_per_s else 0.0

    @property
    def share_of_bandwidth(self) -> float | None:
        """Median over the rounds of bytes/s over the machine's."""
        if not self.bytes or not self.seconds:
            return None
        return median(self.bytes / s / b for s, b in zip(self.seconds, self.bandwidth, strict=True))

    @property
    def share_of_vnni(self) -> float | None:
        """Median over the rounds of operations/s over the machine's."""
        if not self.operations or not self.seconds:
            return None
        return median(self.operations / s / v for s, v in zip(self.seconds, self.vnni, strict=True))


@dataclass
class Measured:
    """A section with what came out; batches count as engines named `batch N`."""

    section: Section
    samples: list[Samples]


@dataclass(frozen=True)
class Limits:
    """Sustained bytes/s of reading memory, operations/s of i8 and bf16 products (0: no such instruction), just now."""

    read: float
    i8: float
    bf16: float


class Machine:
    """The machine's limits, measured in a quarter of a second by a child that is kept."""

    def __init__(self, threads: int) -> None:
        self._child = Engine("limits", [sys.executable, "-m", "bench.peers.limits_child", "--threads", str(threads)])

    def limits(self) -> Limits:
        """Now."""
        return Limits(**self._child.ask({"do": "measure"}))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.close()


def engine_command(engine: str, section: Section, models: Models, python: Path, threads: int) -> list[str]:
    """The child for an engine; makes what it needs. Raises BuildError when our own build fails."""
    kind, _, what = engine.partition(":")
    size = ["--threads", str(threads)]
    if kind == OURS:
        artifact = models.artifact(section.model, what)
        return [sys.executable, "-m", "bench.peers.stratum_child", str(artifact), *size, "--context", str(CONTEXT)]
    name, _, variant = what.partition("+")
    if kind == LLAMA:
        kv = ["--kv", variant] if variant else []
        file = models.gguf(section.model, name)
        return [str(python), "-m", "bench.peers.llama_cpp_child", str(file), *size, "--context", str(CONTEXT), *kv]
    if kind == OPENVINO:
        directory = models.openvino(section.model, int(name.removeprefix("g")))
        return [str(python), "-m", "bench.peers.openvino_child", str(directory), *size, "--via", variant or "infer"]
    raise ValueError(f"no engine {engine!r}")


def measure_section(
    section: Section,
    models: Models,
    python: Path,
    machine: Machine,
    threads: int,
    effort: Effort,
    peers: bool,
    say: Say,
) -> Measured:
    """All engines of the section in turns, `effort.rounds * section.turns` times after once to warm up."""
    names = [name for name in section.engines if peers or name.startswith(OURS)]
    results = {name: Samples(name) for name in names}
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in names:
            try:
                command = engine_command(name, section, models, python, threads)
                engines[name] = stack.enter_context(Engine(name, command))
            except (BuildError, EngineError) as fault:
                results[name].fault = str(fault)
                say(f"  {fault}")
                continue
            results[name].about = engines[name].about
            results[name].file_bytes = int(engines[name].about["bytes"])
        if section.action == "batch":
            return _measure_batches(section, engines, models, machine, effort, say)
        before = machine.limits()
        turns = effort.rounds * section.turns
        for number in range(turns + 1):
            for name in _rotated(names, number):
                if name not in engines or results[name].fault:
                    continue
                try:
                    seconds = float(engines[name].ask(section.request(name, turns))["seconds"])
                except EngineError as fault:
                    results[name].fault = str(fault)
                    say(f"  {fault}")
                    continue
                if number == 0:
                    continue  # memory is touched for the first time, the depth is filled
                after = machine.limits()
                _add(results[name], section, seconds, before, after)
                before = after
                say(f"  {name}: {results[name].tokens_per_s[-1]:.1f} tok/s")
        for name, engine in engines.items():
            if name.startswith(OURS) and not results[name].fault:
                _add_work(results[name], section, engine, models)
    return Measured(section, [results[name] for name in names])


def _rotated(names: list[str], by: int) -> list[str]:
    return [*names[by % len(names) :], *names[: by % len(names)]]


def _add(samples: Samples, section: Section, seconds: float, before: Limits, after: Limits) -> None:
    samples.seconds.append(seconds)
    samples.tokens_per_s.append(section.tokens / seconds)
    # What a row's second could have given: the mean of the moments before and after it.
    samples.bandwidth.append((before.read + after.read) / 2)
    samples.vnni.append(max(before.i8, after.i8))  # a peak is only ever measured too low


def _add_work(samples: Samples, section: Section, engine: Engine, models: Models) -> None:
    """Bytes of a decode row by the manifest; operations of the products of a prompt by the model's shape."""
    if section.action == "decode":
        samples.bytes = float(engine.ask({"do": "work", "generate": section.tokens, "depth": section.depth})["bytes"])
    elif section.model == DENSE:
        samples.operations = _operations(models, section.model, section.tokens)


def _operations(models: Models, preset: str, tokens: int) -> float:
    config = json.loads((models.checkpoint(preset) / "config.json").read_text())
    return product_operations(config, tokens)


def _measure_batches(
    section: Section, engines: dict[str, Engine], models: Models, machine: Machine, effort: Effort, say: Say
) -> Measured:
    found = {count: Samples(f"batch {count}") for count in BATCHES}
    for samples in found.values():
        samples.operations = section.tokens * _operations(models, section.model, 1)  # of one of its sequences
    for name, engine in engines.items():
        before = machine.limits()
        for number in range(effort.rounds * section.turns + 1):
            for count, samples in found.items():
                try:
                    answer = engine.ask({"do": "batch", "sequences": count, "steps": section.tokens})
                except EngineError as fault:
                    samples.fault = str(fault)
                    say(f"  {fault}")
                    return Measured(section, list(found.values()))
                if number:
                    after = machine.limits()
                    _add(samples, section, float(answer["seconds"]) / count, before, after)
                    before = after
                    say(f"  {name} {samples.engine}: {samples.tokens_per_s[-1]:.1f} tok/s")
    if not engines:
        for samples in found.values():
            samples.fault = "not built"
    return Measured(section, list(found.values()))


def distinct_experts(
    models: Models, preset: str, kind: str, python: Path, threads: int, tokens: int
) -> dict[str, float]:
    """How many different experts a layer uses over `tokens` decoded tokens: a router that always chooses the same would
    make every cache look good. Counted once with llama.cpp's graph callback, and kept beside the model."""
    kept = models.work / f"{preset}.experts.json"
    if not kept.exists():
        command = [str(python), "-m", "bench.peers.llama_cpp_child", str(models.gguf(preset, kind)), "--experts"]
        with Engine("llama.cpp", [*command, "--threads", str(threads)]) as engine:
            kept.write_text(json.dumps(engine.ask({"do": "experts", "tokens": tokens})))
    return json.loads(kept.read_text())


@dataclass(frozen=True)
class Quantized:
    """A build by a recipe: source bytes a second of the whole command, and its peak resident memory."""

    source_bytes: int
    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def bytes_per_s(self) -> float:
        return self.source_bytes / median(self.seconds)


def measure_quantize(models: Models, recipe: str, effort: Effort, say: Say) -> Quantized:
    """`compile-model build --recipe`, code from the cache: reading, rounding, packing, hashing and writing."""
    source = models.checkpoint(DENSE)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    out = models.work / ".quantize.stratum"
    command = cli("build", str(source), "-o", str(out), "--recipe", recipe, "--quiet")
    seconds, peak = [], 0
    for number in range(min(effort.rounds, 3) + 1):
        done = run(command)
        if number:  # the first one fills the caches of code and files
            seconds.append(done.seconds)
            peak = max(peak, done.peak_bytes)
            say(f"  {size / done.seconds / 1e6:.0f} MB/s, {done.peak_bytes >> 20} MiB")
    run([sys.executable, "-c", f"import shutil; shutil.rmtree({str(out)!r})"])
    return Quantized(size, tuple(seconds), peak)
