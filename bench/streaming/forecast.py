"""What is foretold of a row before it runs, and what the replay says of the routing that it had.

The plan of memory that the row executes is given; its time is that of the simulated program with a disk as fast as it
was while the row read. Hits are foretold from the kind of routing alone (`Row.router`); `replayed` are those of the
recorded routing in the simulated cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.streaming.rows import Row
from hw_targets import load as load_target
from hw_targets.expert_cache import expected_hit_rate, replay
from hw_targets.routing import RoutingTrace
from runtime.artifact import open_artifact
from runtime.manifest import Manifest
from runtime.stream_plan import StreamPlan
from stratum.planning import PlanRequest, make_plan
from stratum.run_prediction import predict, problem_for


@dataclass(frozen=True)
class Forecast:
    """Seconds of a token (of the prompt, where the row is one). Hits are shares, `distinct` experts of a layer; None
    where there is no cache of experts."""

    seconds: float
    hits: float | None = None
    replayed: float | None = None
    distinct: float | None = None


def forecast(row: Row, artifact: Path, answer: dict[str, Any], target: str, disk: float) -> Forecast:
    """For a row that was run: `target` is this machine as it was, `host{...}`, with a disk of `disk` bytes/s."""
    manifest = open_artifact(artifact).manifest
    stream = StreamPlan.from_json(answer["plan"]) if answer["plan"] else None
    tokens = int(answer["tokens"])
    hits = replayed = distinct = None
    if stream is not None and stream.expert_bytes and row.router is not None:
        trace = trace_of(manifest, answer["routing"], together=bool(row.prompt))
        found = replay(trace, _expert_bytes(stream, row), policy=stream.policy, scope=stream.scope)
        replayed = found.hit_rate
        used = [np.unique(trace.experts[:, layer]).size for layer in range(trace.layer_count)]
        distinct = float(np.mean(used))
        hits = expected_hit_rate(
            experts=trace.expert_count,
            top_k=trace.top_k,
            layers=trace.layer_count,
            slots=_expert_bytes(stream, row) // max(trace.expert_bytes),
            policy=stream.policy,
            scope=stream.scope,
            router=row.router,
            tokens=tokens,
        )
    store = load_target("host").store()
    if store is not None and row.cap:
        target = f"{target[:-1]},{store.name}.read={disk / 1e9:.3f}GB/s}}"
    request = PlanRequest(
        str(artifact),
        target,
        context=row.prompt or 2 * tokens,
        prompt=row.prompt or tokens // 2 or 1,
        generate=1 if row.prompt else tokens,
        budgets=(("memory", f"{row.cap >> 20}MiB"),) if row.cap else (),
        what_if=False,
        simulate=False,
    )
    solution = make_plan(request).solution
    assert solution is not None  # this machine is one unit
    problem = problem_for(solution.problem, manifest, stream)
    times = predict(problem, manifest, stream, hits if hits is not None else 1.0)
    return Forecast((times.prefill if row.prompt else times.decode).seconds, hits, replayed, distinct)


def trace_of(manifest: Manifest, routing: list[list[list[int]]], *, together: bool) -> RoutingTrace:
    """Choices [tokens, layers, top_k] as a trace: tokens of one prompt (`together`), or decoded one by one."""
    pieces = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
    experts = np.array(routing, np.int32)
    count = len(experts)
    return RoutingTrace(
        model="run",
        arch="run",
        expert_count=pieces[0].bytes // pieces[0].unit,
        top_k=experts.shape[2],
        layers=tuple(range(len(pieces))),
        expert_bytes=tuple(piece.unit for piece in pieces),
        dense_bytes=(0,) * len(pieces),
        experts=experts,
        weights=np.full(experts.shape, np.nan, np.float32),
        turn=np.zeros(count, np.int64),
        position=np.arange(count),
        batch=np.zeros(count, np.int64) if together else np.arange(count),
        decode=np.full(count, not together),
    )


def _expert_bytes(stream: StreamPlan, row: Row) -> int:
    """What experts have: of the KV cache, which a row fills by a half at most, what is left."""
    return stream.expert_bytes_in(row.prompt) if row.prompt else stream.expert_bytes_in(1, stream.kv_bytes // 2)
