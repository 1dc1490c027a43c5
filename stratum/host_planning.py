"""`plan` for a built model on this machine: the placement that `run` would make, judged with what it holds exactly.

    given = placement_for(manifest, budget, session, policy=None, drive="nvme0n1")      # or a file's, maybe edited
    solution = judged(problem, manifest, given, budget)                                 # seconds, bounds, exact tiers

Raises NoFit with the least budget of the process, and the context that fits.
"""

from __future__ import annotations

import dataclasses

from hw_targets.expert_cache import choose_policy
from hw_targets.expert_cache import replay as replay_trace
from hw_targets.routing.trace import RoutingTrace
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import expert_cache_of, from_placement, quality_plan, to_placement
from passes.place.gain import Gain
from passes.place.milp import FEW_NODES
from passes.place.outcome import Choice, Outcome, TierUse
from passes.place.placement import ExpertCache, Placement
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, solve
from passes.place.what_if import gains
from runtime.manifest import Manifest
from runtime.stream_plan import StreamPlan, least_expert_bytes
from stratum.host_placement import DRIVE, default_context, place_on_host
from stratum.process_account import DoesNotFit, ProcessAccount, foreseen_bytes
from stratum.process_room import ROWS_BYTES, budget_of_room, room_of
from stratum.run_bound import bound_of_run, overlapped
from stratum.stream_placement import MEMORY, MemoryPlan, stream_of_placement


def placement_for(manifest: Manifest, budget: int, session: Session, drive: str) -> Placement:
    """What a process keeps of `manifest`'s model that may use `budget` bytes. Raises NoFit."""
    try:
        return place_on_host(
            manifest, budget, baseline=foreseen_bytes(manifest), context=session.context, batch=session.batch,
            prompt=session.prompt, generate=session.generate, drive=drive,
        )  # fmt: skip
    except DoesNotFit as fault:
        raise no_fit(fault) from None


def with_best_policy(manifest: Manifest, given: Placement, trace: RoutingTrace) -> Placement:
    """The plan with the policy that does best on a trace in the cache that it has; experts are pinned where that is
    best, the trace has all layers, and one token's experts fit beside them."""
    cache = given.expert_cache
    if cache is None:
        return given
    units = tuple(piece.unit for piece in manifest.weights.pieces if piece.kind == "experts")
    if len(units) == trace.layer_count:
        trace = dataclasses.replace(trace, expert_bytes=units)  # of this build, whatever ran when it was recorded
    found = choose_policy(trace, cache.nbytes, scopes=("global",))
    room = cache.nbytes - sum(trace.expert_bytes[layer] for layer, _ in found.pinned)
    if found.pinned and (len(units) != trace.layer_count or room < least_expert_bytes(manifest)):
        policy = next(result.policy for name, result in found.candidates if name == result.policy)
        return dataclasses.replace(given, expert_cache=dataclasses.replace(cache, policy=policy))
    chosen = dataclasses.replace(cache, policy=found.best.policy, pinned=found.pinned)
    return dataclasses.replace(given, expert_cache=chosen)


def no_fit(fault: DoesNotFit) -> NoFit:
    """The same as `plan` says it: of memory, what the least budget leaves."""
    least = ((MEMORY, room_of(fault.minimum)),)
    return NoFit(fault.diagnostics[0].message, least=least, context=fault.context or None)


def context_of_run(manifest: Manifest, budget: int, batch: int) -> int:
    """Positions that `run --memory` has room for where none are asked for."""
    return default_context(ProcessAccount(manifest, budget, foreseen_bytes(manifest), batch))


def drive_of_target(target: Target, drive: str) -> str:
    """The drive that a model lies on, where the target knows it; else the target's first."""
    store = target.store(drive) or target.store()
    return store.name if store is not None else DRIVE


def executed(manifest: Manifest, given: Placement, budget: int) -> MemoryPlan:
    """The executable part of a plan in a process that has nothing yet. Raises NoFit, and DiagnosticError for what the
    runtime does not do."""
    try:
        return stream_of_placement(manifest, given, budget, baseline=foreseen_bytes(manifest))
    except DoesNotFit as fault:
        raise no_fit(fault) from None


def judged(
    problem: Problem, manifest: Manifest, given: Placement, made: MemoryPlan, trace: RoutingTrace | None = None
) -> Solution:
    """The plan with seconds and bounds in closed form, and with the bytes that `made`, its executable part, holds."""
    session = dataclasses.replace(problem.session, **dataclasses.asdict(given.session))
    problem = dataclasses.replace(problem, session=session, pins=())
    if problem.machine.target.store() is None and any(entry.tier == DRIVE for entry in given.groups):
        raise DiagnosticError(
            "the plan reads from a drive that nobody measured",
            hint="'compile-model targets calibrate --disk DIR' does, where DIR is on it",
        )
    choice = from_placement(problem, given)
    outcome = _bound(problem, choice, manifest, made, trace)
    placement = dataclasses.replace(
        to_placement(problem, choice, outcome), groups=given.groups, kv=given.kv, degrees=given.degrees, gap=given.gap,
        quality=quality_plan(problem, given.groups, given.expert_formats),
    )  # fmt: skip
    if placement.expert_cache is not None and given.expert_cache is not None:
        cache = placement.expert_cache
        hits = cache.hit_rate if trace is None else hits_of(cache, made.stream, trace)
        kept = dataclasses.replace(given.expert_cache, hit_rate=hits, belady=cache.belady, source=cache.source)
        placement = dataclasses.replace(placement, expert_cache=kept)
    return Solution(problem, choice, outcome, placement, given.gap, None)


def _bound(
    problem: Problem, choice: Choice, manifest: Manifest, made: MemoryPlan, trace: RoutingTrace | None
) -> Outcome:
    hits = hits_of(expert_cache_of(choice), made.stream, trace)
    found = bound_of_run(problem, choice, manifest, made.stream, hits, made.kv_bytes)
    return dataclasses.replace(found, tiers=held(problem, manifest, made))


def hits_of(cache: ExpertCache | None, stream: StreamPlan | None, trace: RoutingTrace | None) -> float:
    """The share of a decode step's experts that are in memory: the trace replayed in the cache that is executed, else
    what the plan expects."""
    if stream is None or not stream.expert_bytes:
        return 1.0
    if trace is not None:
        found = replay_trace(
            trace, stream.expert_bytes_in(1, stream.kv_bytes // 2), policy=stream.policy, scope=stream.scope,
            pinned=stream.pinned,
        )  # fmt: skip
        return found.decode_hit_rate
    return cache.hit_rate if cache is not None else 1.0


def held(problem: Problem, manifest: Manifest, made: MemoryPlan) -> tuple[TierUse, ...]:
    """Bytes of memory by category, and of the drive."""
    stream, pieces = made.stream, manifest.weights.pieces
    account = ProcessAccount(manifest, stream.budget_bytes, 0, problem.session.batch)
    rows = 0 if all(n in stream.resident for n in account.tables) else stream.rows_bytes
    kv = account.kv_bytes(made.context) if made.kv_bytes is None else made.kv_bytes
    memory = {
        "weights": sum(pieces[n].bytes for n in stream.resident),
        "cache": stream.expert_bytes,
        "kv": kv,
        "activations": account.arena_bytes(stream.step_tokens),
        "buffers": stream.window_bytes + max(0, rows - ROWS_BYTES),  # those are counted as the process's
    }
    if stream.expert_bytes >= account.expert_bytes:
        memory |= {"weights": memory["weights"] + stream.expert_bytes, "cache": 0}
    used = {MEMORY: memory}
    if problem.machine.stores:
        used[problem.machine.stores[0]] = {"weights": manifest.weights.bytes - memory["weights"]}
    return tuple(
        TierUse(name, room, tuple((what, n) for what, n in used.get(name, {}).items() if n))
        for name, room in problem.machine.room
    )


def host_gains(
    solution: Solution, manifest: Manifest, drive: str, trace: RoutingTrace | None = None
) -> tuple[Gain, ...]:
    """What more of each resource would buy, each placed again as `run` would."""

    def again(problem: Problem) -> Outcome:
        if problem.formats != solution.problem.formats:
            return overlapped(problem, solve(problem, FEW_NODES).outcome)  # of a model that is not built yet
        budget = budget_of_room(problem.machine.room_of(MEMORY))
        given = placement_for(manifest, budget, problem.session, drive)
        session = dataclasses.replace(problem.session, **dataclasses.asdict(given.session))
        problem = dataclasses.replace(problem, session=session)
        made = executed(manifest, given, budget)
        return _bound(problem, from_placement(problem, given), manifest, made, trace)

    return gains(solution, again)
