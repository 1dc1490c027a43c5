"""Budgets: what is planned for them, `run --memory` and what it says, the recorded routing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratum
from hw_targets.routing import read_trace
from ir.diagnostics import DiagnosticError
from passes.place.piece_choice import AHEAD_BYTES, MEMORY_OVER_DISK
from runtime.artifact import open_artifact
from runtime.await_info import AwaitInfo
from runtime.manifest import KVInfo, Manifest, PieceInfo, ProgramInfo, TargetInfo, WeightsInfo
from runtime.process_memory import resident_bytes
from runtime.stream_plan import least_expert_bytes, live_bytes
from stratum.memory_plan import DoesNotFit, plan_memory
from stratum.process_room import PROCESS_BYTES, budget_of_room, room_of
from tests.own_cache import own_cache
from tests.plain_code import plain_code
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, write_model

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
PAGE = 4096


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stratum.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def manifest(dense: list[int], experts: int, expert_pages: int, layers: int, table_pages: int) -> Manifest:
    """A model of `layers` layers, each with those dense pieces (pages) and experts."""
    pieces = [PieceInfo("rows", 0, table_pages * PAGE, PAGE, "embed")]
    awaits: list[AwaitInfo] = []

    def add(kind: str, pages: int, unit: int, origin: str) -> None:
        offset = pieces[-1].offset + pieces[-1].bytes
        awaits.append(AwaitInfo(len(pieces), (len(pieces) - 1,) if len(pieces) > 1 else ()))
        pieces.append(PieceInfo(kind, offset, pages * PAGE, unit, origin))

    for layer in range(layers):
        for number, pages in enumerate(dense):
            add("dense", pages, 0, f"layers.{layer}.mlp.p{number}")
        if experts:
            add("experts", experts * expert_pages, expert_pages * PAGE, f"layers.{layer}.mlp.experts")
    programs = tuple(
        ProgramInfo(name, f"stratum_step_{name}", tokens, tokens * 16384, (), tuple(awaits))
        for name, tokens in (("decode", 16), ("prefill", 512))
    )
    weights = WeightsInfo("weights/weights.bin", pieces[-1].offset + pieces[-1].bytes, (), tuple(pieces))
    kv = KVInfo(layers, 2, 64, "bf16", layers * 512, 16)
    target = TargetInfo("host", "", "", ())
    return Manifest("", {}, 100, 4096, "bf16", target, programs, kv, weights, {}, {}, 2 if experts else 0)


MODELS = st.builds(
    manifest,
    st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    st.sampled_from((0, 4, 16)),
    st.integers(1, 500),
    st.integers(1, 4),
    st.integers(1, 2000),
)


@settings(deadline=None)
@given(model=MODELS, extra=st.integers(0, 200 * MIB), baseline=st.integers(10 * MIB, 100 * MIB))
def test_plans_fit_their_budget_and_run(model: Manifest, extra: int, baseline: int) -> None:
    """Every budget has a plan within it that can run, or a minimum that has one."""
    budget = baseline + extra
    try:
        made = plan_memory(model, budget, baseline=baseline, context=256)
    except DoesNotFit as fault:
        assert fault.minimum > budget and fault.exit_code == 3
        made = plan_memory(model, fault.minimum, baseline=baseline, context=256)
        budget = fault.minimum
        with pytest.raises(DoesNotFit):
            plan_memory(model, budget - 2 * MIB, baseline=baseline, context=256)
    plan, pieces = made.stream, model.weights.pieces
    plan.check(model)
    kept = sum(pieces[n].bytes for n in plan.resident)
    rows = 0 if 0 in plan.resident else plan.rows_bytes
    assert plan.other_bytes + kept + plan.window_bytes + plan.expert_bytes + rows <= budget
    assert plan.expert_bytes >= least_expert_bytes(model)
    assert plan.window_bytes >= max(live_bytes(model, p, frozenset(plan.resident)) for p in model.programs)


@given(st.integers(PROCESS_BYTES, 1 << 45))
def test_what_a_budget_leaves_and_back(budget: int) -> None:
    """To a byte for each 256 that page tables take."""
    room = room_of(budget)
    assert (0 <= room < budget and abs(budget_of_room(room) - budget) <= 2) or room == 0
    assert room_of(budget + 4096) >= room and room_of(PROCESS_BYTES // 2) == 0


@settings(deadline=None, max_examples=40)
@given(model=MODELS, budget=st.integers(60 * MIB, 200 * MIB), more=st.integers(0, 100 * MIB))
def test_more_memory_never_streams_more(model: Manifest, budget: int, more: int) -> None:
    def streamed(size: int) -> tuple[int, int] | None:
        try:
            plan = plan_memory(model, size, baseline=20 * MIB, context=256).stream
        except DoesNotFit:
            return None
        pieces = model.weights.pieces
        dense = sum(p.bytes for n, p in enumerate(pieces) if p.kind == "dense" and n not in plan.resident)
        return dense, plan.expert_bytes

    little, much = streamed(budget), streamed(budget + more)
    if little is not None:
        assert much is not None
        # Pieces are whole, so spreading them evenly may leave out a few that fit before; room to read ahead is worth
        # some bytes that are read in any case.
        dense = [p.bytes for p in model.weights.pieces if p.kind == "dense"]
        slack = max(dense) + sum(dense) // MEMORY_OVER_DISK
        assert much[0] <= little[0] + slack and (much[0] or much[1] >= little[1] or little[0])


def test_the_disk_goes_on_while_a_piece_is_used() -> None:
    """Half of a model stays: what is streamed is spread over it, and the window has room for more than is used."""
    model = manifest([600, 1300], 0, 0, 20, 10)
    plan = plan_memory(model, 120 * MIB, baseline=20 * MIB, context=256).stream
    live = max(live_bytes(model, p, frozenset(plan.resident)) for p in model.programs)
    assert plan.window_bytes >= live + AHEAD_BYTES
    streamed = [n for n in range(1, 41) if n not in plan.resident]
    assert len(streamed) > 10 and max(b - a for a, b in itertools.pairwise(streamed)) <= 6


def test_a_smaller_context_is_offered() -> None:
    model = manifest([100], 0, 0, 4, 10)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(model, 50 * MIB, baseline=20 * MIB, context=4096 * 16)
    assert "a context of " in str(caught.value) and "at least " in str(caught.value)


def test_a_default_context_is_one_that_fits() -> None:
    """It is nobody's wish: where an eighth of the budget is too much it comes down, and the least budget works."""
    model = manifest([100], 0, 0, 2, 10)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(model, 20 * MIB, baseline=20 * MIB)
    least = caught.value.minimum
    found = [plan_memory(model, least + more * MIB, baseline=20 * MIB).context for more in (0, 1, 2, 64)]
    assert found == sorted(found) and 64 <= found[0] < found[-1]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("memory")
    families = {"dense": {**LLAMA, "tie_word_embeddings": True}, "experts": QWEN3_MOE}
    with plain_code():
        return {
            name: stratum.build(write_model(folder / name, family), folder / f"{name}.stratum")
            for name, family in families.items()
        }


def test_the_table_of_a_tied_model_is_read_by_rows(artifacts: dict[str, Path]) -> None:
    """Its head is stored beside it in a layout of its own, so that nothing else reads the table."""
    pieces = open_artifact(artifacts["dense"]).manifest.weights.pieces
    assert (pieces[0].kind, pieces[0].origin, pieces[0].unit) == ("rows", "embed_tokens", 2 * LLAMA["hidden_size"])


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_run_under_a_budget(artifacts: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The same text, and the events say what was done; the routing can be read back."""
    arguments = ["run", str(artifacts[name]), "some text", "-n", "6", "--json", "-t", "1", "-c", "64"]
    recorded = tmp_path / "routing.csv"
    more = [
        "--memory",
        "1GiB",
        "--expert-policy",
        "lfu",
        *(["--record-routing", str(recorded)] if name == "experts" else []),
    ]
    plain, bounded = run_cli(*arguments), run_cli(*arguments, *more)
    assert plain.returncode == bounded.returncode == 0, bounded.stderr
    events = [[json.loads(line) for line in r.stdout.splitlines()] for r in (plain, bounded)]
    done = [next(e for e in found if e["event"] == "done") for found in events]
    chosen = next(e for e in events[1] if e["event"] == "chosen")
    assert chosen["streaming"]["policy"] == "lfu" and chosen["streaming"]["budget_bytes"] == 1 << 30
    assert done[0]["token_ids"] == done[1]["token_ids"]
    report = next(e for e in events[1] if e["event"] == "streaming")
    assert report["read_bytes"] > 0 and report["budget_bytes"] == 1 << 30
    assert report["peak_resident_bytes"] < 1 << 30
    if name == "experts":
        trace = read_trace(recorded)
        prompt = len(done[1]["prompt_ids"])
        assert trace.tokens == prompt + 5 and trace.decode_tokens == 5  # the last token is not run
        assert trace.experts.shape == (prompt + 5, 2, 2) and np.all(trace.experts >= 0)
        assert [batch.decode for batch in trace.batches()][:2] == [False, False]


def test_a_budget_that_is_too_small(artifacts: dict[str, Path]) -> None:
    done = run_cli("run", str(artifacts["dense"]), "text", "--memory", "8MiB")
    assert done.returncode == 3 and "8 MiB are too small" in done.stderr and "expected: at least" in done.stderr
    least = int(done.stderr.split("at least ")[1].split(" MiB")[0])
    assert run_cli("run", str(artifacts["dense"]), "text", "-n", "1", "--memory", f"{least + 16}MiB").returncode == 0


def test_weights_copied_into_memory(artifacts: dict[str, Path]) -> None:
    arguments = ["run", str(artifacts["dense"]), "some text", "-n", "4", "--json", "-t", "2", "-c", "64"]
    found = [run_cli(*arguments, *more) for more in ((), ("--no-mmap",))]
    texts = [json.loads(done.stdout.splitlines()[-1])["token_ids"] for done in found]
    assert texts[0] == texts[1] and len(texts[0]) == 4
    done = run_cli(*arguments, "--no-mmap", "--memory", "1GiB")
    assert done.returncode == 2 and "leave out --no-mmap" in done.stderr + done.stdout


def test_what_is_no_budget(artifacts: dict[str, Path]) -> None:
    done = run_cli("run", str(artifacts["dense"]), "text", "--memory", "much")
    assert done.returncode == 2 and "--memory" in done.stderr and "16GiB" in done.stderr


def test_routing_of_a_model_without_experts(artifacts: dict[str, Path], tmp_path: Path) -> None:
    done = run_cli("run", str(artifacts["dense"]), "text", "-n", "1", "--record-routing", str(tmp_path / "r"))
    assert done.returncode == 2 and "no experts" in done.stderr and done.stdout == ""  # before anything is generated


def test_loading_under_a_budget(artifacts: dict[str, Path]) -> None:
    budget = resident_bytes() + 256 * MIB  # this process has run other tests
    with stratum.load(artifacts["experts"]) as model, stratum.load(artifacts["experts"], memory=budget) as bounded:
        wanted = model.generate("abc", max_tokens=5, temperature=0).token_ids
        assert bounded.generate("abc", max_tokens=5, temperature=0).token_ids == wanted
        assert bounded.session.streamer is not None
    with pytest.raises(DiagnosticError):
        stratum.load(artifacts["experts"], memory=resident_bytes() // 2)


def test_a_directory_is_built_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time under a budget: the compiler never enters this process; its warnings and faults do."""
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path / "cache"))
    directory = write_model(tmp_path / "model", QWEN3_MOE)
    code = (
        "import sys, stratum\n"
        "stages = []\n"
        "with stratum.load(sys.argv[1], memory='1GiB', threads=1, progress=lambda s, *a: stages.append(s)) as model:\n"
        "    print(len(model.generate('abc', max_tokens=3).token_ids), sorted(set(stages)))\n"
        "assert 'codegen.build' not in sys.modules and 'passes.pass_manager' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ") and "weights" in done.stdout
    (directory / "config.json").write_text("{}")
    failed = run_cli("run", str(directory), "abc", "--memory", "1GiB", "-q")
    assert failed.returncode == 2 and "config.json" in failed.stderr and "Traceback" not in failed.stderr


def test_a_trace_shows_reads(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with stratum.load(artifacts["experts"], memory=resident_bytes() + 256 * MIB, threads=1) as model:
        with model.profile() as profile:
            assert model.generate("abc", max_tokens=2, temperature=0).token_ids
        profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    reads = [event for event in events if event.get("cat") == "read"]
    assert reads and all(event["args"]["bytes"] > 0 and event["dur"] >= 0 for event in reads)
    assert any("experts" in event["name"] for event in reads)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert all(tracks[event["tid"]].startswith("reads ") for event in reads)


def test_bench_under_a_budget(artifacts: dict[str, Path]) -> None:
    words = ["bench", str(artifacts["experts"]), "-p", "8", "-n", "4", "-r", "1", "-t", "1", "--no-calibration"]
    done = run_cli(*words, "--memory", "1GiB")
    assert done.returncode == 0, done.stderr
    assert "pp8" in done.stdout and "GB/s" in done.stderr
