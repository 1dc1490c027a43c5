"""What bounds a run of a built model on this machine, in closed form: seconds of arithmetic, and of its drive.

    outcome = bound_of_run(problem, choice, manifest, stream, hit=0.5, kv_bytes=None)    # stream None: all in memory

Both phases last at least as long as their busiest resource is busy: a plan in general waits for a missing expert once
its router has spoken, but the runtime reads experts before, on a guess. The bytes of the drive are those of the pieces,
rows, experts and layers of the KV cache that the runtime reads, piece by piece, so that nothing that
`stratum.run_prediction` plays is shorter; a second account of the same reads, without events.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from passes.place.outcome import Choice, Outcome, PhaseOutcome, evaluate, objective
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts
from runtime.manifest import Manifest, PieceInfo, ProgramInfo
from runtime.stream_plan import StreamPlan
from runtime.weight_streamer import ALL_EXPERTS_USED
from stratum.kv_prediction import KVSizes, kv_calls, kv_sizes
from stratum.run_prediction import PAGE_BYTES, problem_for, rows_rate


def bound_of_run(
    problem: Problem,
    choice: Choice,
    manifest: Manifest,
    stream: StreamPlan | None,
    hit: float = 1.0,
    kv_bytes: int | None = None,
) -> Outcome:
    """The closed form of a choice as the runtime carries it out; arguments as those of `run_prediction.predict`."""
    played = problem_for(problem, manifest, stream)
    drive = {decode: drive_seconds(played, manifest, stream, hit, kv_bytes, decode=decode) for decode in (True, False)}
    return overlapped(problem, evaluate(problem, choice), drive[True], drive[False])


def overlapped(
    problem: Problem, outcome: Outcome, decode: float | None = None, prefill: float | None = None
) -> Outcome:
    """The same with phases as long as their busiest resource is busy; `decode` and `prefill` are seconds of the drive,
    None: as they are."""
    stores = {f"{name} {way}" for name in problem.machine.stores for way in ("read", "write")}
    store = problem.machine.target.store()

    def busiest(found: PhaseOutcome, drive: float | None) -> PhaseOutcome:
        busy = dict(found.busy)
        if drive is not None:
            busy = {name: seconds for name, seconds in busy.items() if name not in stores}
        if drive and store is not None:
            busy[f"{store.name} read"] = drive
        ordered = tuple(sorted(busy.items(), key=lambda item: (-item[1], item[0])))
        return PhaseOutcome(ordered[0][1], ordered[0][0], ordered) if ordered else found

    phases = busiest(outcome.decode, decode), busiest(outcome.prefill, prefill)
    value = objective(problem, phases[0].seconds, phases[1].seconds)
    return dataclasses.replace(outcome, decode=phases[0], prefill=phases[1], objective=value)


def drive_seconds(
    problem: Problem,
    manifest: Manifest,
    stream: StreamPlan | None,
    hit: float,
    kv_bytes: int | None,
    *,
    decode: bool,
) -> float:
    """Seconds that the drive is busy at the least in a phase; `problem` has calls as long as the runtime makes them."""
    session, store = problem.session, problem.machine.target.store()
    if store is None or (stream is None and kv_bytes is None):
        return 0.0
    calls = 1 if decode else session.passes
    rows = float(session.batch) if decode else session.prompt / session.passes
    rate = store.read_rate() or math.inf
    sizes = kv_sizes(problem, manifest, kv_bytes)
    kv = _kv_seconds(problem, sizes, rate, store.write_rate() or rate, decode=decode) if sizes is not None else 0.0
    if stream is None:
        return kv
    rate = store.read_rate(stream.request_bytes) or math.inf
    pieces = manifest.weights.pieces
    program = next((p for p in manifest.programs if p.max_tokens >= rows), manifest.programs[-1])
    tables = sum(
        rows * math.ceil(p.unit / PAGE_BYTES) * PAGE_BYTES
        for n, p in enumerate(pieces) if p.kind == "rows" and n not in stream.resident
    )  # fmt: skip
    small = rows_rate(store, stream, rows, rate)
    streamed = _dense_bytes(pieces, program, stream, calls)
    return kv + calls * tables / small + (streamed + calls * _expert_bytes(manifest, stream, rows, hit)) / rate


def _dense_bytes(pieces: tuple[PieceInfo, ...], program: ProgramInfo, stream: StreamPlan, calls: int) -> int:
    """Of all calls; only the last one passes the head, which comes last."""
    awaited = [w.piece for w in program.awaits if pieces[w.piece].kind == "dense" and w.piece not in stream.resident]
    nbytes = sum(pieces[n].bytes for n in awaited)
    last = sum(pieces[n].bytes for n in awaited if ".layers." not in f".{pieces[n].origin}")
    return calls * (nbytes - last) + last


def _expert_bytes(manifest: Manifest, stream: StreamPlan, rows: float, hit: float) -> float:
    """Of one call: those of few tokens that are not found; of many all that the cache does not hold."""
    layers = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
    top_k, found = manifest.experts_per_token, 0.0
    every = 0
    for piece in layers:
        chosen = rows * top_k
        if chosen < ALL_EXPERTS_USED * piece.count:
            needed = min(distinct_experts(piece.count, top_k, rows), chosen)
            found += needed * (1.0 - hit) * (piece.bytes / piece.count)
        else:
            every += piece.bytes
    return found + max(0, every - stream.expert_bytes)


def _kv_seconds(problem: Problem, sizes: KVSizes, rate: float, write_rate: float, *, decode: bool) -> float:
    """Every call reads what the one before left on the drive, and writes what comes to that."""
    gone = [sizes.gone_bytes(call) for call in kv_calls(problem, decode=decode)]
    if decode:  # one of many
        return gone[0] / rate
    written = sum(max(0, later - sooner) for sooner, later in itertools.pairwise((0, *gone)))
    return sum(gone[:-1]) / rate + written / write_rate
