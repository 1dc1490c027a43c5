"""What is foretold of keys and values that come and go: bytes as the runtime reads them, plans that are executed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passes.place.placement import PlacedKV
from runtime import Session, open_artifact
from runtime.kv_stream import KVStreamOptions
from stratum import compare_run, measure_run, planning, process_account, process_room
from stratum.cli import main
from stratum.compare_run import compare
from stratum.kv_prediction import KVCall, KVQueue, KVSizes
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


def foretold(path: Path, limit: int, slots: int, calls: list[KVCall]) -> list[tuple[float, float]]:
    """Bytes read and written of every call, as the books say that the runtime does."""
    read, written = [0.0], [0.0]

    def fetch(nbytes: float) -> float:
        read[0] += nbytes
        return 0.0

    def write(nbytes: float) -> None:
        written[0] += nbytes

    sizes = KVSizes(open_artifact(path).manifest, limit, CONTEXT, slots)
    queue, found = KVQueue(sizes, fetch, write), []
    for call in calls:
        read[0] = written[0] = 0.0
        queue.begin(call)
        for layer in range(KV_LAYERS):
            queue.wait(layer)
        queue.end()
        found.append((read[0], written[0]))
    return found


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), slots=st.integers(1, 2))
def test_any_limit_reads_and_writes_what_was_foretold(
    kv_build: Callable[[str], Path], data: st.DataObject, slots: int
) -> None:
    """To the byte, call by call, with the bits of all in memory and never above the limit."""
    path = kv_build("bf16")
    ends = list(itertools.accumulate(data.draw(st.lists(st.integers(2, 440 // slots), min_size=1, max_size=2))))
    ends.append(-(-ends[-1] // 64) * 64 + 2)  # steps behind it fill no group
    calls = [KVCall(first, end, slots) for first, end in itertools.pairwise([0, *ends])]
    calls += [KVCall(at, at + 1, slots) for at in range(ends[-1], ends[-1] + 3)]
    ids = np.random.default_rng(len(calls)).integers(0, VOCAB, (slots, CONTEXT))

    def inputs(call: KVCall) -> tuple[list[int], list[int], list[int], list[int]]:
        at = [(slot, n) for slot in range(slots) for n in range(call.first, call.end)]
        count = call.end - call.first
        rows = [count * (slot + 1) - 1 for slot in range(slots)]
        return [int(ids[slot, n]) for slot, n in at], [n for _, n in at], [slot for slot, _ in at], rows

    with Session(path, threads=1, max_context=CONTEXT, num_slots=slots) as plain:
        wanted = [plain.step(*inputs(call)) for call in calls]
        most, kv = calls[-1].end, plain.kv
        share = data.draw(st.floats(0, 1))
        groups = slots * (most // 64)
        room = groups + int(share * (KV_LAYERS - 1) * groups)
        limit = slots * kv.hot_bytes(most) + room * kv.group_bytes
    said = foretold(path, limit, slots, calls)
    with Session(path, threads=1, max_context=CONTEXT, num_slots=slots, kv_stream=KVStreamOptions(limit)) as session:
        streamer = session.kv_stream
        assert streamer is not None
        before = streamer.report()
        for call, logits, (read, written) in zip(calls, wanted, said, strict=True):
            np.testing.assert_array_equal(session.step(*inputs(call)), logits)
            streamer.settle_reads()
            report = streamer.report()
            assert report.read_bytes - before.read_bytes == read
            assert report.written_bytes - before.written_bytes == written
            assert session.memory().kv_committed <= limit
            before = report
    sizes = KVSizes(open_artifact(path).manifest, limit, CONTEXT, slots)
    whole = KV_LAYERS * kv.group_bytes * groups if room < KV_LAYERS * groups else 0
    assert said[-1] == (sizes.gone_bytes(calls[-1]), 0.0) and said[-1][0] <= whole


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
    """All of it, a share of each layer as a pin names it, and as the file is edited: the tokens of all in memory."""
    path, file = str(kv_build("bf16")), tmp_path / "plan.json"
    words = ["plan", path, "--ctx", str(CONTEXT), "--memory", "512MiB", "--quick", "-o", str(file), "--pin"]
    plain = ["run", path, "word " * 190, "-n", "4", "--json", "-t", "1", "-c", str(CONTEXT), "--temp", "0"]

    def run(*options: str) -> tuple[list[int], dict[str, float]]:
        capsys.readouterr()
        assert main([*plain, *options]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        streamed = next((e for e in events if e.get("event") == "kv_streaming"), {})
        return next(e for e in events if e.get("event") == "done")["token_ids"], streamed

    wanted, _ = run()
    limits = []
    for pin in ("kv=ssd", "kv=ssd:0.5", ""):
        if pin:
            assert main([*words, pin]) == 0
        raw = json.loads(file.read_text())
        if not pin:  # edited: 320 positions stay instead of 512
            for entry in raw["kv"]:
                entry["positions"] = 320 if entry["tier"] == "dram" else CONTEXT - 320
            file.write_text(json.dumps(raw))
        assert {entry["tier"] for entry in raw["kv"]} == ({"ssd"} if pin == "kv=ssd" else {"dram", "ssd"})
        tokens, streamed = run("--plan", str(file), "--kv-dir", str(tmp_path))
        assert tokens == wanted and streamed["calls"] > 0
        limits.append(streamed["limit_bytes"])
    # One layer of 2 MiB and a quarter of the next; of the three others what stays, too; half of them ahead at most.
    block = 64 * 8192
    assert 2.5 * MIB <= limits[0] - hot(path) < 2.5 * MIB + block
    assert 6 * MIB - block <= limits[1] - hot(path) < 6 * MIB + block
    assert limits[0] < limits[2] < limits[1] and limits[1] - limits[2] == pytest.approx(3 * 192 * 2048, abs=2)


def hot(path: str) -> int:
    """What of a full cache always stays."""
    with Session(path, threads=1, max_context=CONTEXT) as session:
        return session.kv.hot_bytes(CONTEXT)


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
