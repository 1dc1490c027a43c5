"""Steps played as the runtime plays them: none is faster than what it computes and reads, more room never slows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontends.shape_library import load_shape
from hw_targets.target import StoragePoint
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit
from runtime.artifact import open_artifact
from runtime.await_info import RouterInfo
from runtime.expert_guess import LEAST_SHARE
from runtime.manifest import Manifest
from runtime.stream_plan import StreamPlan, least_expert_bytes, live_bytes
from stratum import planning
from stratum.planning import PlanRequest, make_plan
from stratum.process_account import SLACK_BYTES, foreseen_bytes
from stratum.process_room import ROWS_BYTES
from stratum.run_bound import drive_seconds
from stratum.run_prediction import PhaseTimes, predict, problem_for
from tests.stratum.test_stream_placement import HOST, sketch

RATE = 1e9  # of HOST's drive
DEPTHS = st.sampled_from(((), (1,), (1, 4)))  # of its small reads, where they are known
MODELS = ("TinyLlama-1.1B-Chat-v1.0", "OLMoE-1B-7B-0924")


def model(name: str, batch: int = 1, prompt: int = 512) -> tuple[Problem, Manifest]:
    shape = load_shape(name)
    session = Session(context=1024, batch=batch, prompt=prompt)
    problem = Problem(shape, machine_of(HOST), formats_of("w4a8-g32"), session)
    return problem, sketch(problem)


PREPARED = {(name, prompt): model(name, prompt=prompt) for name in MODELS for prompt in (8, 700)}


def plan(manifest: Manifest, resident: tuple[int, ...], window: int, experts: int, policy: str = "lru") -> StreamPlan:
    least = max(live_bytes(manifest, program, frozenset(resident)) for program in manifest.programs)
    needed = least_expert_bytes(manifest)
    return StreamPlan(1 << 40, resident, least + window, needed + experts if needed else 0, policy=policy)


def dense(manifest: Manifest) -> list[int]:
    return [n for n, piece in enumerate(manifest.weights.pieces) if piece.kind == "dense"]


def test_with_all_in_memory_nothing_waits() -> None:
    for problem, manifest in PREPARED.values():
        times = predict(problem_for(problem, manifest, None), manifest, None)
        for phase in (times.decode, times.prefill):
            assert phase.waited == phase.read_bytes == 0
            assert phase.seconds == pytest.approx(sum(s for _, s in phase.parts))


@settings(max_examples=8, deadline=None)
@given(data=st.data(), name=st.sampled_from(MODELS), prompt=st.sampled_from((8, 700)), hit=st.floats(0, 1))
def test_bounds_and_room(data: st.DataObject, name: str, prompt: int, hit: float) -> None:
    """At least the arithmetic and the reads; no more with a larger window."""
    problem, manifest = PREPARED[name, prompt]
    kept = tuple(sorted(data.draw(st.sets(st.sampled_from(dense(manifest))))))
    window, experts = data.draw(st.integers(0, 1 << 28)), data.draw(st.integers(0, 1 << 32))
    small = plan(manifest, kept, window, experts)
    large = dataclasses.replace(small, window_bytes=small.window_bytes + data.draw(st.integers(0, 1 << 28)))
    found = [predict(problem_for(problem, manifest, one), manifest, one, hit) for one in (small, large)]
    for little, much in zip(*((one.decode, one.prefill) for one in found), strict=True):
        for phase in (little, much):
            _check(phase)
        assert much.seconds <= little.seconds * (1 + 1e-9)
    for one, times in zip((small, large), found, strict=True):
        for decode, phase in ((True, times.decode), (False, times.prefill)):
            busy = drive_seconds(problem_for(problem, manifest, one), manifest, one, hit, None, decode=decode)
            assert phase.seconds >= busy * (1 - 1e-9)


def _check(phase: PhaseTimes) -> None:
    arithmetic = sum(seconds for _, seconds in phase.parts)
    assert phase.seconds == pytest.approx(arithmetic + phase.waited)
    # What was read ahead of the phase comes back at its end: the window holds as much then.
    assert phase.seconds >= phase.read_bytes / RATE * (1 - 1e-6) - 1e-9


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_phase_is_shorter_than_its_closed_form(
    llama_artifact: Path, moe_artifact: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Of any budget and drive: small reads that are slow or fast, by one request or by several."""
    points = [StoragePoint(1 << 20, 4, RATE)]
    points += [StoragePoint(4096, depth, data.draw(st.floats(1e6, RATE))) for depth in data.draw(DEPTHS)]
    host = dataclasses.replace(HOST, storage=(dataclasses.replace(HOST.storage[0], points=tuple(points)),))
    monkeypatch.setattr(planning, "load_target", lambda name: host)
    path = data.draw(st.sampled_from((llama_artifact, moe_artifact)))
    manifest = open_artifact(path).manifest
    least = foreseen_bytes(manifest) + SLACK_BYTES + ROWS_BYTES + (3 << 19)
    budget = data.draw(st.integers(least, least + (3 << 20)))
    request = PlanRequest(
        str(path), context=64, batch=data.draw(st.integers(1, 5)), prompt=data.draw(st.integers(1, 60)), generate=4,
        budgets=(("memory", f"{budget}B"),), what_if=False,
    )  # fmt: skip
    try:
        found = make_plan(request).placement
    except NoFit:
        return
    assert found.simulated_step is not None and found.simulated_prefill is not None
    assert found.simulated_step >= found.decode.seconds * (1 - 1e-6)
    assert found.simulated_prefill >= found.prefill.seconds * (1 - 1e-6)


def test_a_stream_is_as_long_as_the_longer_of_reads_and_arithmetic() -> None:
    """With a window for everything, and one after the other where it holds nothing ahead."""
    problem, manifest = PREPARED[MODELS[0], 8]
    every = sum(manifest.weights.pieces[n].bytes for n in dense(manifest))
    wide = plan(manifest, (), every, 0)
    step = predict(problem_for(problem, manifest, wide), manifest, wide).decode
    assert step.read_bytes == pytest.approx(every, rel=1e-4) and step.seconds == pytest.approx(every / RATE, rel=0.01)
    narrow = plan(manifest, (), 0, 0)
    step = predict(problem_for(problem, manifest, narrow), manifest, narrow).decode
    arithmetic = sum(seconds for _, seconds in step.parts)
    assert every / RATE < step.seconds <= every / RATE + arithmetic * (1 + 1e-9)


def _with_routers(manifest: Manifest) -> Manifest:
    """It says how routers work, so that experts can be guessed."""
    router = RouterInfo(hidden=0, weights=0, experts=8, columns=8, strip=1)
    kinds = [piece.kind for piece in manifest.weights.pieces]
    programs = tuple(
        dataclasses.replace(program, awaits=tuple(
            dataclasses.replace(wait, router=router) if kinds[wait.piece] == "experts" else wait
            for wait in program.awaits
        ))
        for program in manifest.programs
    )  # fmt: skip
    return dataclasses.replace(manifest, programs=programs)


@settings(max_examples=6, deadline=None)
@given(hit=st.floats(0, 1), right=st.floats(0, 1), better=st.floats(0, 1))
def test_wrong_guesses_cost_reads(hit: float, right: float, better: float) -> None:
    """The fewer come true the more is read; where too few do, none is read on a guess."""
    problem, manifest = PREPARED[MODELS[1], 8]
    manifest = _with_routers(manifest)
    one = plan(manifest, tuple(dense(manifest)), 0, 1 << 30)
    guessing = dataclasses.replace(one, guesses=2)
    right, better = sorted((max(LEAST_SHARE, right), max(LEAST_SHARE, better)))
    played = problem_for(problem, manifest, one)
    worse, good = (predict(played, manifest, guessing, hit, share).decode for share in (right, better))
    assert good.read_bytes <= worse.read_bytes * (1 + 1e-9) and good.seconds <= worse.seconds * (1 + 1e-9)
    none = predict(played, manifest, one, hit).decode
    assert predict(played, manifest, guessing, hit, 0.9 * LEAST_SHARE).decode == none
    assert predict(played, manifest, guessing, hit, 1.0).decode.read_bytes == pytest.approx(none.read_bytes)


def test_prompts_read_what_the_cache_does_not_hold() -> None:
    problem, manifest = PREPARED[MODELS[1], 700]
    experts = [p for p in manifest.weights.pieces if p.kind == "experts"]
    total = sum(p.bytes for p in experts)
    for share in (0.25, 0.5, 1.0):
        one = plan(manifest, tuple(dense(manifest)), 0, int(share * total))
        phase = predict(problem_for(problem, manifest, one), manifest, one).prefill
        calls = problem_for(problem, manifest, one).session.passes
        assert phase.read_bytes <= calls * (total + (1 << 25))
        if share == 1.0:
            assert phase.read_bytes < 1 << 25  # rows of the embedding


def test_a_plan_of_a_built_model_has_times_of_its_run(moe_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "load_target", lambda name: HOST)
    request = PlanRequest(str(moe_artifact), context=64, prompt=16, generate=4, budgets=(("memory", "300MiB"),))
    placement = make_plan(request).placement
    assert placement.simulated_step is not None and placement.simulated_prefill is not None
    pinned = make_plan(dataclasses.replace(request, pins=("kv=ssd",)))  # of two layers, as many as are read ahead
    assert pinned.placement.simulated_prefill == pytest.approx(placement.simulated_prefill) and not pinned.warnings
