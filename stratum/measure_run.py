"""Phases of a built model, measured: a prompt, and decode steps of several sequences behind it, with what was read.

    with MeasuredRun(artifact, stream, context=640, batch=1) as run:
        run.decode(depth=512, batch=1, steps=16)     # Phase(seconds, parts, waited, read_bytes, ...)

Seconds of a phase are medians; of decode steps under a budget the mean, since reads of one step serve the next. Parts
come from a profile of one more repetition, in seconds of one prompt or step. As a program (`measure_apart`) it runs in
a process of its own, whose memory is that of a model that runs and of nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.diagnostics import DiagnosticError
from runtime.kv_stream import KVStreamOptions
from runtime.process_memory import peak_resident_bytes
from runtime.session import Session
from runtime.stream_plan import StreamPlan

if TYPE_CHECKING:
    from runtime.step_reader import RoutingListener

REPETITIONS = 3
STREAMED_REPETITIONS = 2
# What a kernel's place in the model is called -> the group of the plan; the first that fits.
_GROUPS = (
    ("lm_head", "head"),
    ("embed_tokens.", "head"),
    ("embed", "embedding"),
    ("expert", "experts"),
    ("block_sparse_moe", "experts"),
    ("mlp.gate_proj", "mlp"),
    ("mlp.gate", "attention"),
    ("attn", "attention"),
    ("mlp", "mlp"),
    ("input_layernorm", "attention"),
    ("post_attention_layernorm", "mlp"),
    ("norm", "head"),
)


@dataclass(frozen=True)
class Phase:
    """Of one prompt or decode step: seconds, those of its parts, seconds waited for reads, bytes read, and their rate
    while a read was under way; experts found among those looked up, and experts read on a guess with those of them that
    were wanted (0 of 0 without a budget)."""

    seconds: float
    parts: dict[str, float]
    waited: float = 0.0
    read_bytes: float = 0.0
    read_rate: float = 0.0
    lookups: int = 0
    hits: int = 0
    guesses_read: int = 0
    guesses_right: int = 0
    kv_read_bytes: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 0.0


@dataclass(frozen=True)
class Measured:
    """What a run of its own found. `stream` is the plan that it executed, as JSON; "" without a budget."""

    prefill: Phase
    decode: Phase
    peak_bytes: int
    stream: str
    kv_bytes: int | None = None  # what its KV cache had in memory; None: enough


class MeasuredRun:
    """An open session of one artifact."""

    def __init__(
        self,
        artifact: Path,
        stream: StreamPlan | None,
        *,
        context: int,
        batch: int = 1,
        threads: int | None = None,
        routing: RoutingListener | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        self.session = Session(
            artifact, threads=threads, max_context=context, num_slots=batch, stream=stream, routing=routing,
            kv_stream=KVStreamOptions(kv_bytes) if kv_bytes is not None else None,
        )  # fmt: skip
        self._repetitions = 0

    def __enter__(self) -> MeasuredRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.session.close()

    def prefill(self, tokens: int, *, parts: bool = True) -> Phase:
        """A prompt, after one to warm up."""
        self.fill(tokens, 1)
        return self._phase(lambda: [self.fill(tokens, 1)], parts)

    def decode(self, depth: int, batch: int, steps: int, *, parts: bool = True) -> Phase:
        """A step of `batch` sequences behind `depth` tokens each, as one of `steps`."""
        self.fill(depth, batch)
        self.steps(depth, batch, steps)
        return self._phase(lambda: self.steps(depth, batch, steps), parts)

    def _phase(self, run: Any, parts: bool) -> Phase:
        streamer = self.session.streamer
        before = streamer.report() if streamer is not None else None
        cache = self.session.kv_stream
        kv_before = cache.report() if cache is not None else None
        times: list[list[float]] = [run() for _ in range(REPETITIONS if streamer is None else STREAMED_REPETITIONS)]
        counted: dict[str, Any] = {}
        if streamer is not None and before is not None:
            done, passes = streamer.report().since(before), sum(len(one) for one in times)
            counted = {
                "waited": done.stall_s / passes,
                "read_bytes": done.read_bytes / passes,
                "read_rate": 1e9 * done.gigabytes_per_s,
                "lookups": done.expert_lookups,
                "hits": done.expert_hits,
                "guesses_read": done.guesses_read,
                "guesses_right": done.guesses_right,
            }
        if cache is not None and kv_before is not None:
            kv, passes = cache.report(), sum(len(one) for one in times)
            counted["kv_read_bytes"] = (kv.read_bytes - kv_before.read_bytes) / passes
            counted["waited"] = counted.get("waited", 0.0) + (kv.stall_s - kv_before.stall_s) / passes
        seconds = statistics.median(statistics.median(one) for one in times)
        if streamer is not None:
            seconds = statistics.fmean(seconds for one in times for seconds in one)
        found: dict[str, float] = {}
        if parts:
            with self.session.profile() as profile:
                count = len(run())
            found = parts_measured([(row.origin, row.seconds) for row in profile.rows()], count)
        return Phase(seconds, found, **counted)

    def fill(self, depth: int, batch: int) -> float:
        """Seconds of the prompts of `batch` sequences, one after the other."""
        start = time.perf_counter()
        for slot in range(batch):
            self.session.release(slot)
            ids = self._ids(depth)
            self.session.step(ids, np.arange(depth), np.full(depth, slot), [depth - 1])
        return time.perf_counter() - start

    def steps(self, depth: int, batch: int, steps: int) -> list[float]:
        """Seconds of every step; other tokens each time, since a cache of experts would know those of the last time."""
        slots = np.arange(batch)
        self._repetitions += 1
        ids = self._ids(steps * batch, self._repetitions)
        times = []
        for i in range(steps):
            start = time.perf_counter()
            self.session.step(ids[i * batch : (i + 1) * batch], np.full(batch, depth + i), slots, slots)
            times.append(time.perf_counter() - start)
        return times

    def _ids(self, count: int, repetition: int = 0) -> np.ndarray:
        """Arbitrary tokens, the same for every run."""
        random = np.random.Generator(np.random.PCG64([count, repetition]))
        return random.integers(0, self.session.vocab_size, count)


def parts_measured(rows: Sequence[tuple[str, float]], steps: int) -> dict[str, float]:
    """Seconds of each group in one step, from ((place in the model, seconds of all steps), ...)."""
    found: dict[str, float] = {}
    for origin, seconds in rows:
        group = next((group for word, group in _GROUPS if word in origin), "")
        if group:
            found[group] = found.get(group, 0.0) + seconds / steps
    return found


def measure_apart(
    artifact: Path, *, plan: Path | None, memory: int | None, context: int, batch: int, prompt: int, generate: int
) -> Measured:
    """Both phases in a process of its own, under the plan of a file where one is given. DiagnosticError with what the
    process could not do."""
    request = {"artifact": str(artifact), "plan": str(plan) if plan is not None else "", "memory": memory,
               "context": context, "batch": batch, "prompt": prompt, "generate": generate}  # fmt: skip
    from stratum.build_apart import child_environment

    command = [sys.executable, "-m", "stratum.measure_run", json.dumps(request)]
    environment = child_environment(Path(__file__).resolve().parent.parent)
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    answer = json.loads(found.stdout) if found.returncode in (0, 2) and found.stdout else {}
    if "fault" in answer or not answer:
        text = answer.get("fault") or found.stderr.strip()[-500:] or f"the run ended with {found.returncode}"
        raise DiagnosticError(text.removeprefix("error: "))
    return Measured(
        Phase(**answer["prefill"]), Phase(**answer["decode"]), answer["peak_bytes"], answer["stream"],
        answer["kv_bytes"],
    )  # fmt: skip


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    artifact, stream, kv_bytes = Path(request["artifact"]), None, None
    if request["plan"]:
        from stratum.stream_placement import stream_for

        made = stream_for(artifact, Path(request["plan"]), request["memory"], num_slots=request["batch"])
        stream, kv_bytes = made.stream, made.kv_bytes
    with MeasuredRun(artifact, stream, context=request["context"], batch=request["batch"], kv_bytes=kv_bytes) as run:
        prefill = run.prefill(request["prompt"])
        decode = run.decode(request["prompt"], request["batch"], request["generate"])
    peak = peak_resident_bytes()
    return {"prefill": asdict(prefill), "decode": asdict(decode), "peak_bytes": peak,
            "stream": stream.to_json() if stream is not None else "", "kv_bytes": kv_bytes}  # fmt: skip


def main(arguments: list[str]) -> int:
    """The process: a request as JSON; its answer, or a fault, is one JSON object on stdout."""
    from runtime.errors import RuntimeDiagnostic

    try:
        print(json.dumps(_answer(json.loads(arguments[0]))))
    except (DiagnosticError, RuntimeDiagnostic) as fault:
        print(json.dumps({"fault": str(fault)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
