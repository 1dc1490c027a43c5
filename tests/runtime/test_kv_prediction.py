"""What is foretold of keys and values that come and go: bytes as the runtime reads them, plans that are executed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.place.placement import PlacedKV
from runtime import Session, open_artifact
from runtime.kv_stream import KVStreamOptions
from stratum import compare_run, measure_run, planning, process_account, process_room
from stratum.cli import main
from stratum.compare_run import compare
from stratum.kv_prediction import KVCall, KVQueue, KVReads
from stratum.measure_run import Measured, Phase
from stratum.planning import PlanRequest, make_plan
from stratum.run_bound import drive_seconds
from stratum.run_prediction import predict, problem_for
from tests.runtime.conftest import KV_LAYERS
from tests.stratum.test_stream_placement import HOST
from tests.stratum.tiny_model import VOCAB

pytestmark = pytest.mark.slow
MIB = 1 << 20
CONTEXT = 1024


@pytest.fixture(autouse=True)
def stated_host(monkeypatch: pytest.MonkeyPatch) -> None:
    load = planning.load_target
    monkeypatch.setattr(planning, "load_target", lambda name: HOST if name == "host" else load(name))
    monkeypatch.setattr(process_account, "resident_bytes", lambda: 120 * MIB)  # a worker has run many tests before


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_step_reads_what_was_foretold(kv_build: Callable[[str], Path], layers: int) -> None:
    path, depth, steps = kv_build("bf16"), 700, 5
    ids = np.random.default_rng(1).integers(0, VOCAB, depth + steps)
    with Session(path, threads=1, max_context=CONTEXT) as plain:
        limit = plain.kv.hot_bytes(depth + steps) + layers * plain.kv.layer_bytes(depth + steps)
    with Session(path, threads=1, max_context=CONTEXT, kv_stream=KVStreamOptions(limit)) as session:
        assert session.kv_stream is not None
        session.step(ids[:depth], range(depth), [0] * depth, [])
        session.step(ids[depth : depth + 1], [depth], [0], [0])
        before = session.kv_stream.report().read_bytes
        for at in range(depth + 1, depth + steps):
            session.step(ids[at : at + 1], [at], [0], [0])
        found = (session.kv_stream.report().read_bytes - before) / (steps - 1)
    reads = KVReads(open_artifact(path).manifest, limit, CONTEXT, 1)
    call = reads.decode(depth)
    reads.close()
    foretold = call.read_bytes * len(call.going)
    # A read that is under way at the end is counted in parts; a layer that fits beside the one in use is read once.
    assert abs(found - foretold) <= call.at_once * call.read_bytes / (steps - 1) + 1 and foretold > 0


@given(
    going=st.sets(st.integers(0, 9), min_size=3).map(lambda s: tuple(sorted(s))), at_once=st.integers(1, 2),
    calls=st.integers(1, 4),
)  # fmt: skip
def test_layers_are_read_in_order_and_never_more_at_once(going: tuple[int, ...], at_once: int, calls: int) -> None:
    order: list[float] = []

    def fetch(nbytes: float) -> float:
        order.append(nbytes)
        return float(len(order))

    queue, call = KVQueue(fetch), KVCall(going, at_once, 8.0)
    for _ in range(calls):
        for layer in range(10):
            there = queue.wait(call, layer)
            assert len(queue.there) <= at_once + (layer not in going and at_once == 1)
            assert layer not in going or 0 < there <= len(order)
    assert calls * len(going) <= len(order) <= calls * len(going) + at_once


def test_more_room_for_the_cache_is_never_slower(kv_build: Callable[[str], Path]) -> None:
    path = kv_build("bf16")
    manifest = open_artifact(path).manifest
    planned = make_plan(PlanRequest(str(path), context=CONTEXT, prompt=800, generate=8, what_if=False))
    assert planned.solution is not None
    problem = problem_for(planned.solution.problem, manifest, None)
    with Session(path, threads=1, max_context=CONTEXT) as plain:
        limits = [plain.kv.hot_bytes(CONTEXT) + n * plain.kv.layer_bytes(CONTEXT) for n in range(1, KV_LAYERS + 1)]
    found = [predict(problem, manifest, None, kv_bytes=limit) for limit in limits]
    for limit, times in zip(limits, found, strict=True):
        for decode, phase in ((True, times.decode), (False, times.prefill)):
            busy = drive_seconds(problem, manifest, None, 1.0, limit, decode=decode)
            assert phase.seconds >= busy * (1 - 1e-9) and (busy > 0) is (phase.kv_read_bytes > 0)
    for little, much in itertools.pairwise(found):
        assert much.decode.seconds <= little.decode.seconds * (1 + 1e-9)
        assert much.decode.kv_read_bytes <= little.decode.kv_read_bytes
    assert found[0].decode.waited > 0 and found[0].prefill.kv_read_bytes > 0
    enough = predict(problem, manifest, None)
    for most, all_of_it in ((found[-1].decode, enough.decode), (found[-1].prefill, enough.prefill)):
        assert most.seconds == pytest.approx(all_of_it.seconds) and most.kv_read_bytes == 0


def test_plan_then_run_with_keys_and_values_on_a_drive(
    kv_build: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = str(kv_build("bf16")), tmp_path / "plan.json"
    words = ["plan", path, "--ctx", str(CONTEXT), "--memory", "512MiB", "--quick", "--pin", "kv=ssd"]
    assert main([*words, "-o", str(file)]) == 0
    assert {entry["tier"] for entry in json.loads(file.read_text())["kv"]} == {"ssd"}
    plain = ["run", path, "word " * 190, "-n", "4", "--json", "-t", "1", "-c", str(CONTEXT), "--temp", "0"]
    found = []
    capsys.readouterr()
    for options in ([], ["--plan", str(file), "--kv-dir", str(tmp_path)]):
        assert main([*plain, *options]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found.append(next(e for e in events if e.get("event") == "done")["token_ids"])
    assert found[0] == found[1]
    streamed = next(e for e in events if e.get("event") == "kv_streaming")
    assert streamed["limit_bytes"] > 0


def test_compared_with_a_run(kv_build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(artifact: Path, *, plan: Path | None, **request: object) -> Measured:
        answer = measure_run._answer({"artifact": str(artifact), "plan": str(plan) if plan else "", **request})
        phases = [Phase(**answer[name]) for name in ("prefill", "decode")]
        return Measured(*phases, answer["peak_bytes"], answer["stream"], answer["kv_bytes"])

    monkeypatch.setattr(compare_run, "measure_apart", apart)
    path = kv_build("bf16")
    request = PlanRequest(
        str(path), context=CONTEXT, prompt=960, generate=4, budgets=(("memory", "512MiB"),), pins=("kv=ssd",),
        what_if=False,
    )  # fmt: skip
    planned = make_plan(request)
    away = dataclasses.replace(planned.placement, kv=(PlacedKV(f"0-{KV_LAYERS - 1}", "ssd", "cores", "bf16", 0),))
    rows = {(row.phase, row.what): row for row in compare(request, dataclasses.replace(planned, placement=away))}
    read = rows["decode", "kv read"]
    assert read.measured > 0 and read.predicted == pytest.approx(read.measured, rel=0.35)


def test_a_context_that_memory_has_no_room_for_is_planned(kv_build: Callable[[str], Path]) -> None:
    """With keys and values on the drive, as `run` would have them."""
    path = str(kv_build("bf16"))
    whole = make_plan(PlanRequest(path, context=4096, budgets=(("memory", "1GiB"),), what_if=False))
    kv = sum(entry.nbytes for entry in whole.placement.kv)
    assert {entry.tier for entry in whole.placement.kv} == {"dram"}
    used = next(tier.peak for tier in whole.placement.tiers if tier.name == "dram")
    budget = process_room.budget_of_room(used - kv // 2)
    tight = make_plan(PlanRequest(path, context=4096, budgets=(("memory", f"{budget}B"),), what_if=False))
    assert "ssd" in {entry.tier for entry in tight.placement.kv}
