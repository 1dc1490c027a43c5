"""llama-bench's measurements: prompt processing (pp) and token generation (tg) at a depth of the context.

`pp512` is one prompt of 512 tokens, `tg128` 128 steps of one token, both behind `depth` positions that are filled
already; tokenizing and sampling are not part of it. Each is repeated after one run to warm up. The `work` of a test
(bytes and FLOPs, from the manifest) sets the rates against what this machine was measured to do.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from hw_targets.calibrate import Calibration
    from runtime.cuda.session import CudaSession
    from runtime.manifest import Manifest, ProgramInfo
    from runtime.session import Session

_HEAD_STARTS_AT = "gather_rows"  # the kernel behind which work goes with wanted rows, not with tokens


@dataclass(frozen=True)
class BenchTest:
    """One row: `num_prompt` tokens at once, or `num_generate` one by one (the other is 0), at `depth`."""

    num_prompt: int
    num_generate: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench spells it: `pp512`, `tg128 @ d4096`."""
        base = f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_generate}"
        return f"{base} @ d{self.depth}" if self.depth else base

    @property
    def tokens(self) -> int:
        return self.num_prompt or self.num_generate


@dataclass(frozen=True)
class Work:
    """What a whole test moves and computes, counted once: bytes of weights, cache and activations; FLOPs."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Result:
    """Nanoseconds of every repetition, and the work done in each. `first_step_ns`: of a test's first step."""

    test: BenchTest
    threads: int
    samples_ns: tuple[int, ...]
    first_step_ns: tuple[int, ...]
    work: Work
    backend: str = "stratum CPU"

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of every repetition."""
        return tuple(self.test.tokens * 1e9 / ns for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token of a prompt of this length, without sampling; None for tg tests."""
        return statistics.median(self.samples_ns) / 1e6 if self.test.num_prompt else None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token; None for pp tests."""
        return None if self.test.num_prompt else statistics.median(self.samples_ns) / 1e6 / self.test.num_generate

    @property
    def bytes_per_s(self) -> float:
        return self.work.bytes / statistics.median(self.samples_ns) * 1e9

    @property
    def flops_per_s(self) -> float:
        return self.work.flops / statistics.median(self.samples_ns) * 1e9


def plan_tests(prompts: tuple[int, ...], generates: tuple[int, ...], depths: tuple[int, ...]) -> list[BenchTest]:
    """Every combination, in llama-bench's order: for each depth the prompts, then the generations; 0 leaves one out."""
    return [
        test
        for depth in depths
        for test in (
            *(BenchTest(n, 0, depth) for n in prompts if n),
            *(BenchTest(0, n, depth) for n in generates if n),
        )
    ]


def check_context(tests: list[BenchTest], max_context: int, where: str) -> int:
    """The context the tests need. Raises DiagnosticError when the model has less."""
    needed = max((test.depth + test.tokens for test in tests), default=1)
    if needed > max_context:
        raise DiagnosticError(
            f"the tests need a context of {needed} positions",
            where=where,
            expected=f"at most {max_context}, the context of the model",
            hint="smaller values for -p, -n and -d",
        )
    return needed


def measure(session: Session | CudaSession, test: BenchTest, repetitions: int) -> Result:
    """Runs one test in slot 0: the depth is filled once, then every repetition goes back to it."""
    ids = _token_ids(test.depth + test.tokens, session.vocab_size)
    session.release(0)
    if test.depth:
        _step(session, ids[: test.depth], 0)
    samples, firsts = [], []
    for repetition in range(repetitions + 1):
        total, first = _once(session, test, ids)
        if repetition:  # the first run touches memory for the first time
            samples.append(total)
            firsts.append(first)
    backend = f"stratum {session.device_name or 'CPU'}"
    return Result(test, session.threads, tuple(samples), tuple(firsts), work_of(session.manifest, test), backend)


def _once(session: Session | CudaSession, test: BenchTest, ids: np.ndarray) -> tuple[int, int]:
    """(nanoseconds of the test, of its first step)."""
    start = time.perf_counter_ns()
    if test.num_prompt:
        _step(session, ids[test.depth :], test.depth)
        total = time.perf_counter_ns() - start
        return total, total
    first = 0
    for position in range(test.depth, test.depth + test.num_generate):
        _step(session, ids[position : position + 1], position)
        if not first:
            first = time.perf_counter_ns() - start
    return time.perf_counter_ns() - start, first


def _step(session: Session | CudaSession, ids: np.ndarray, start: int) -> None:
    """One step of consecutive positions of slot 0; the logits of the last are wanted."""
    count = len(ids)
    positions = np.arange(start, start + count, dtype=np.int32)
    session.step(ids, positions, np.zeros(count, np.int32), np.array([count - 1], np.int32))


def _token_ids(count: int, vocab_size: int) -> np.ndarray:
    """The same arbitrary tokens every time, spread over the vocabulary so that experts are used as evenly as may be."""
    stream = np.random.PCG64(0).random_raw(count)
    return (np.asarray(stream, dtype=np.uint64) % np.uint64(vocab_size)).astype(np.int32)


def work_of(manifest: Manifest, test: BenchTest) -> Work:
    """Bytes and FLOPs of one run of `test`.

    The manifest counts a step of one token; a prompt reads the weights once a chunk and computes for every token, the
    head only for the last one. Attention grows with the position. The bytes of a prompt are a lower bound: of experts
    those of one token are counted, and activations too.
    """
    program = _program(manifest, test.num_prompt or 1)
    head = next((i for i, x in enumerate(program.launches) if x.name == _HEAD_STARTS_AT), len(program.launches))
    body_flops = sum(x.flops_per_token for x in program.launches[:head])
    head_flops = sum(x.flops_per_token for x in program.launches[head:])
    step_bytes = sum(x.bytes for x in program.launches)
    positions = sum(range(test.depth, test.depth + test.tokens))
    facts = manifest.model
    shape = ("num_layers", "num_q_heads", "head_dim")
    attention = 4.0 * math.prod(int(facts.get(name) or 0) for name in shape) * positions  # scores and their use
    cache = manifest.kv.bytes_per_position
    if test.num_generate:
        return Work(
            test.num_generate * step_bytes + cache * positions,
            test.num_generate * (body_flops + head_flops) + attention,
        )
    chunks = math.ceil(test.num_prompt / program.max_tokens)
    starts = range(test.depth, test.depth + test.num_prompt, program.max_tokens)
    return Work(chunks * step_bytes + cache * sum(starts), test.num_prompt * body_flops + head_flops + attention)


def _program(manifest: Manifest, tokens: int) -> ProgramInfo:
    return next((p for p in manifest.programs if tokens <= p.max_tokens), manifest.programs[-1])


def limits(result: Result, dtype: str, calibration: Calibration | None) -> tuple[float | None, float | None]:
    """(fraction of the measured read bandwidth, fraction of the measured arithmetic peak for `dtype`); None where that
    was not measured."""
    if calibration is None:
        return None, None
    peak = calibration.bf16_peak if dtype == "bf16" and calibration.bf16_peak else calibration.f32_peak
    return result.bytes_per_s / calibration.read_bandwidth, result.flops_per_s / peak if peak else None


def markdown(manifest: Manifest, results: list[Result], calibration: Calibration | None) -> str:
    """llama-bench's table, and ours behind it: latency, and the share of what the machine was measured to do."""
    from stratum.progress import format_bytes, format_count

    facts = manifest.model
    size, params = format_bytes(manifest.weights.bytes), format_count(facts.get("parameters") or 0)
    head = ["model", "size", "params", "backend", "threads", "test", "t/s", "TTFT / TPOT ms", "% bandwidth", "% peak"]
    rows = [head, ["---" if i < 4 else "---:" for i in range(len(head))]]
    for result in results:
        bandwidth, peak = limits(result, manifest.dtype, calibration)
        latency = result.ttft_ms if result.ttft_ms is not None else result.tpot_ms
        rows.append(
            [
                f"{facts.get('name')} {manifest.dtype}", size, params, result.backend, str(result.threads),
                result.test.name, f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}", f"{latency:.2f}",
                _percent(bandwidth), _percent(peak),
            ]
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows if row is not rows[1]) for i in range(len(head))]
    lines = []
    for row in rows:
        if row is rows[1]:
            cells = [
                ("-" * (w - 1) + ":") if mark.endswith(":") else "-" * w for mark, w in zip(row, widths, strict=True)
            ]
        else:
            cells = [c.rjust(w) if i >= 4 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


def json_fields(manifest: Manifest, result: Result, calibration: Calibration | None, when: str) -> dict[str, Any]:
    """One JSONL record: llama-bench's keys where it has one of the meaning, then ours."""
    from hw_targets.host import cpu_model

    test = result.test
    bandwidth, peak = limits(result, manifest.dtype, calibration)
    samples = result.samples_ns
    largest = max(p.max_tokens for p in manifest.programs)
    return {
        "build_commit": manifest.stratum_version,
        "cpu_info": cpu_model(),
        "backends": result.backend,
        "model_filename": str(manifest.model.get("name")),
        "model_type": f"{manifest.model.get('family')} {manifest.dtype}",
        "model_size": manifest.weights.bytes,
        "model_n_params": manifest.model.get("parameters"),
        "n_batch": largest,
        "n_ubatch": largest,
        "n_threads": result.threads,
        "type_k": manifest.kv.format,
        "type_v": manifest.kv.format,
        "n_prompt": test.num_prompt,
        "n_gen": test.num_generate,
        "n_depth": test.depth,
        "test_time": when,
        "avg_ns": round(statistics.fmean(samples)),
        "stddev_ns": round(statistics.stdev(samples)) if len(samples) > 1 else 0,
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        "samples_ns": list(samples),
        "samples_ts": list(result.samples_ts),
        "ttft_ms": result.ttft_ms,
        "tpot_ms": result.tpot_ms,
        "target": manifest.target.name,
        "bytes_per_s": result.bytes_per_s,
        "flops_per_s": result.flops_per_s,
        "fraction_of_bandwidth": bandwidth,
        "fraction_of_peak": peak,
        "calibration": calibration.as_dict() if calibration is not None else None,
    }
