"""Plans that are executed: the same bits whatever they say, what cannot be done is named, and the plan of `run` is the
one that `plan` prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stratum
from hw_targets.target import ComputeUnit, MemoryTier, Storage, StoragePoint, Target
from ir.diagnostics import DiagnosticError
from passes.place.machine import machine_of
from passes.place.pins import parse_pin
from passes.place.placement import Degrees, ExpertCache, Placed, Placement
from passes.place.problem import Problem
from passes.place.problem import Session as Asked
from passes.place.solve import NoFit, solve
from runtime import Session, open_artifact
from runtime.await_info import AwaitInfo
from runtime.eviction import POLICIES
from runtime.manifest import KVInfo, Manifest, PieceInfo, ProgramInfo, TargetInfo, WeightsInfo
from runtime.stream_plan import StreamPlan
from stratum import memory_plan, planning, process_account
from stratum.cli import main
from stratum.memory_plan import DoesNotFit, plan_memory
from stratum.planning import PlanRequest, make_plan
from stratum.stream_placement import budget_of, parts_of_pieces, stays_of, stream_for, stream_of_placement
from tests.plain_code import plain_code
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, VOCAB, write_model

MIB = 1 << 20
PAGE = 4096
# Wide enough for dense pieces of their own: of attention, of the MLP, and one that holds a little of both.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64}  # fmt: skip
FAMILIES = {
    "llama": {**LLAMA, **WIDE, "tie_word_embeddings": True},
    "qwen3_moe": {**QWEN3_MOE, **WIDE, "moe_intermediate_size": 128},
}
HOST = Target(
    "host", "a host", "x86_64-unknown-linux-gnu", "x86-64", frozenset(),
    units=(ComputeUnit("cores", "cpu", "dram", cores=2, peak=(("f32", 1e11), ("bf16", 2e11)), source="test"),),
    tiers=(MemoryTier("dram", 64 << 30, read_bandwidth=3e10, source="test"),),
    storage=(Storage("ssd", 1 << 40, (StoragePoint(1 << 20, 1, 1e9),), "test", tier="dram"),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def stated_host(monkeypatch: pytest.MonkeyPatch) -> None:
    load = planning.load_target
    monkeypatch.setattr(planning, "load_target", lambda name: HOST if name == "host" else load(name))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("placed")
    with plain_code():
        return {
            name: stratum.build(write_model(folder / name, family), folder / f"{name}.stratum")
            for name, family in FAMILIES.items()
        }


@pytest.fixture(scope="module")
def planned(built: dict[str, Path]) -> dict[str, Placement]:
    with patch.object(planning, "load_target", lambda name: HOST):
        return {
            name: make_plan(
                PlanRequest(str(path), context=64, budgets=(("memory", "512MiB"),), what_if=False)
            ).placement
            for name, path in built.items()
        }


def logits(path: Path, plan: StreamPlan | None) -> np.ndarray:
    """Of a prompt and two tokens behind it."""
    ids = np.random.default_rng(3).integers(0, VOCAB, 24)
    with Session(path, threads=1, max_context=64, stream=plan) as session:
        found = [session.step(ids[:22].tolist(), list(range(22)), [0] * 22, [21])]
        found += [session.step([int(ids[at])], [at], [0], [0]) for at in (22, 23)]
    return np.concatenate(found)


@pytest.fixture(scope="module")
def expected(built: dict[str, Path]) -> dict[str, np.ndarray]:
    return {name: logits(path, None) for name, path in built.items()}


@st.composite
def edits(draw: st.DrawFn, placement: Placement) -> Placement:
    """The plan with other decisions, layer by layer."""
    groups = []
    scope = draw(st.sampled_from(("global", "layer")))
    slots = draw(st.integers(2, 4))
    for group in placement.groups:
        for layer in group.layers and ("0", "1"):
            mode = draw(st.sampled_from(("resident", "streamed")))
            if group.group == "experts":
                mode = "cached" if scope == "layer" else draw(st.sampled_from(("resident", "streamed", "cached")))
            count = (slots if scope == "layer" else draw(st.integers(2, 4))) if mode == "cached" else 0
            tier = "dram" if mode == "resident" else "ssd"
            groups.append(dataclasses.replace(group, layers=layer, mode=mode, tier=tier, slots=count))
        if not group.layers:
            tier = draw(st.sampled_from(("dram", "ssd")))
            mode = "streamed" if tier == "ssd" and group.group == "head" else "resident"
            groups.append(dataclasses.replace(group, tier=tier, mode=mode))
    session = dataclasses.replace(
        placement.session, depth=draw(st.integers(1, 4)), chunk=draw(st.sampled_from((1, 7, 512)))
    )
    cache = ExpertCache("dram", 0, 0, scope, draw(st.sampled_from(POLICIES)), 0.0, "drawn")
    return dataclasses.replace(placement, groups=tuple(groups), session=session, expert_cache=cache)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)))
def test_the_same_bits_under_every_plan(
    built: dict[str, Path], planned: dict[str, Placement], expected: dict, data: st.DataObject, name: str
) -> None:
    placement = data.draw(edits(planned[name]))
    placement = Placement.from_json(placement.to_json())
    manifest = open_artifact(built[name]).manifest
    made = stream_of_placement(manifest, placement, 512 * MIB, baseline=80 * MIB)
    for number, (group, layer) in enumerate(parts_of_pieces(manifest)):
        entry = next(g for g in placement.groups if g.group == group and g.layers in (str(layer), ""))
        if group not in ("experts", "embedding"):
            assert (number in made.stream.resident) == (entry.mode == "resident")
    np.testing.assert_array_equal(logits(built[name], made.stream), expected[name])


def changed(placement: Placement, group: str, **changes: object) -> Placement:
    groups = [dataclasses.replace(g, **changes) if g.group == group else g for g in placement.groups]  # type: ignore[arg-type]
    return dataclasses.replace(placement, groups=tuple(groups))


REFUSED: list[tuple[str, Callable[[Placement], Placement]]] = [
    ("experts 0-1 computed by cores and gpu", lambda p: changed(p, "experts", mode="split", rest_unit="gpu")),
    ("attention 0-1 resident on ssd", lambda p: changed(p, "attention", tier="ssd")),
    ("says nothing of attention 1", lambda p: changed(p, "attention", layers="0")),
    ("'x' are no layers", lambda p: changed(p, "attention", layers="x")),
    ("2 devices", lambda p: dataclasses.replace(p, degrees=Degrees(tensor=2))),
    ("2 micro-batches", lambda p: dataclasses.replace(p, session=dataclasses.replace(p.session, micro_batches=2))),
    ("context of 9999", lambda p: dataclasses.replace(p, session=dataclasses.replace(p.session, context=9999))),
    ("bytes for experts 0-1", lambda p: changed(p, "experts", mode="cached", tier="ssd", slots=0)),
    ("policy 'random'", lambda p: dataclasses.replace(
        p, expert_cache=ExpertCache("dram", 8, 0, "global", "random", 0.0, "drawn"))),
    ("different slots", lambda p: dataclasses.replace(
        changed(p, "experts", layers="0", mode="cached", slots=2), expert_cache=ExpertCache(
            "dram", 8, 0, "layer", "lru", 0.0, "drawn"),
        groups=(*changed(p, "experts", layers="0", mode="cached", slots=2).groups,
                Placed("experts", "1", "ssd", "cached", "cores", "bf16", 0, 3)))),
    ("the plan is for rtx-4090", lambda p: dataclasses.replace(p, target="rtx-4090")),
    ("caches in several formats", lambda p: dataclasses.replace(p, kv=(
        *p.kv, dataclasses.replace(p.kv[0], tier="ssd", format="q8_sym<group=row, scale=f16>")))),
    ("the plan is for other", lambda p: dataclasses.replace(p, model="other")),
    ("the plan is for w8a8", lambda p: dataclasses.replace(p, recipe="w8a8")),
]  # fmt: skip


@pytest.mark.parametrize(("said", "edit"), REFUSED, ids=[said for said, _ in REFUSED])
def test_what_cannot_be_executed_is_named(
    built: dict[str, Path], planned: dict[str, Placement], said: str, edit: Callable[[Placement], Placement]
) -> None:
    manifest = open_artifact(built["qwen3_moe"]).manifest
    with pytest.raises(DiagnosticError, match=said):
        stream_of_placement(manifest, edit(planned["qwen3_moe"]), 512 * MIB, baseline=80 * MIB, where="plan.json")


def test_a_plan_that_does_not_fit_says_what_takes_the_room(
    built: dict[str, Path], planned: dict[str, Placement]
) -> None:
    manifest = open_artifact(built["llama"]).manifest
    with pytest.raises(DoesNotFit, match="MiB are the process") as caught:
        stream_of_placement(manifest, planned["llama"], 90 * MIB, baseline=80 * MIB)
    made = stream_of_placement(manifest, planned["llama"], caught.value.minimum + MIB, baseline=80 * MIB)
    assert made.stream.budget_bytes > 90 * MIB


def test_plan_then_run(
    built: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes from one command to the other; what was edited is what is executed."""
    monkeypatch.setattr(process_account, "resident_bytes", lambda: 120 * MIB)  # a worker has run many tests before
    path, file = str(built["qwen3_moe"]), tmp_path / "plan.json"
    assert main(["plan", path, "--ctx", "64", "--memory", "512MiB", "--quick", "-o", str(file)]) == 0
    plain = ["run", path, "some text", "-n", "4", "--json", "-t", "1", "-c", "64", "--temp", "0"]
    texts = []
    capsys.readouterr()
    for options in ([], ["--plan", str(file)], ["--memory", "400MiB", "--plan", str(file)]):
        assert main([*plain, *options]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        texts.append(next(e for e in events if e.get("event") == "done")["token_ids"])
        chosen = next(e for e in events if e.get("event") == "chosen")["streaming"]
    assert texts[0] == texts[1] == texts[2]
    assert chosen["budget_bytes"] == 400 * MIB
    raw = json.loads(file.read_text())
    for group in raw["groups"]:
        if group["group"] == "attention":
            group |= {"mode": "streamed", "tier": "ssd"}
    file.write_text(json.dumps(raw))
    assert main([*plain, "--plan", str(file)]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    edited = next(e for e in events if e.get("event") == "chosen")["streaming"]
    assert len(edited["resident"]) < len(chosen["resident"])
    assert main(["bench", path, "--plan", str(file), "-p", "0", "-n", "2", "-r", "1", "--no-calibration", "-q"]) == 0
    assert main([*plain, "--plan", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_budget_is_the_plans_own(planned: dict[str, Placement]) -> None:
    assert abs(budget_of(planned["llama"]) - 512 * MIB) <= 256


def sketch(problem: Problem) -> Manifest:
    """An artifact with one piece for each part of each layer, in the order of a token."""
    pieces = [PieceInfo("rows", 0, 8 * MIB, PAGE, "embed_tokens")]
    names = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj", "experts": "mlp.experts"}
    order = [(n, part) for part in problem.parts() for n in part.layers]
    for layer, part in sorted(order, key=lambda item: (item[0], list(names).index(item[1].group))):
        unit = -(-part.expert_bytes // PAGE) * PAGE
        nbytes = unit * part.experts or -(-part.nbytes // PAGE) * PAGE
        kind = "experts" if part.experts else "dense"
        end = pieces[-1].offset + pieces[-1].bytes
        pieces.append(PieceInfo(kind, end, nbytes, unit, f"layers.{layer}.{names[part.group]}"))
    head = next(part for part in problem.parts() if part.group == "head")
    pieces.append(PieceInfo("dense", pieces[-1].offset + pieces[-1].bytes, head.nbytes // PAGE * PAGE, 0, "lm_head"))
    awaits = tuple(AwaitInfo(n, (n - 1,) if n > 1 else ()) for n in range(1, len(pieces)))
    programs = (ProgramInfo("prefill", "stratum_step_prefill", 512, 1 << 20, (), awaits),)
    weights = WeightsInfo("w", pieces[-1].offset + pieces[-1].bytes, (), tuple(pieces))
    shape = problem.shape
    top_k = max((x.mlp.top_k for x in shape.layers), default=0)
    return Manifest("", {"name": shape.name}, 100, 4096, "bf16", TargetInfo("host", "", "", ()), programs,
                    KVInfo(1, 1, 1, "bf16", 4, 16), weights, {}, {}, top_k)  # fmt: skip


def executable(placement: Placement) -> object:
    """What of a plan is executed, all computed figures left out."""
    cache = placement.expert_cache
    kept = (cache.slots, cache.nbytes, cache.scope, cache.policy) if cache is not None else None
    return placement.groups, placement.kv, placement.session, placement.tiers[0].capacity, kept


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("context", [None, 64])
def test_run_makes_the_plan_that_plan_prints(
    built: dict[str, Path], name: str, context: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, under every budget: the same entries, and the same pieces, window, slots and KV cache executed."""
    monkeypatch.setattr(process_account, "resident_bytes", lambda: 40 * MIB)
    monkeypatch.setattr(memory_plan, "drive_of", lambda path: "ssd")
    manifest, file = open_artifact(built[name]).manifest, tmp_path / "plan.json"
    least = process_account.foreseen_bytes(manifest) // MIB
    seen = set()
    for budget in range(least + 34, least + 46, 3):
        asked = PlanRequest(str(built[name]), context=context, budgets=(("memory", f"{budget}MiB"),), what_if=False)
        try:
            ran = memory_plan.plan_for(built[name], budget * MIB, context)
        except DoesNotFit as fault:
            with pytest.raises(NoFit) as refused:
                make_plan(asked)
            assert dict(refused.value.least) == {"dram": fault.minimum}
            continue
        planned = make_plan(asked).placement
        assert ran.placement is not None and executable(planned) == executable(ran.placement)
        file.write_text(planned.to_json())
        assert (again := stream_for(built[name], file)).stream == ran.stream and again.kv_bytes == ran.kv_bytes
        assert make_plan(dataclasses.replace(asked, plan=file, budgets=())).placement == planned
        seen.add((len(ran.stream.resident), ran.stream.expert_bytes))
    assert len(seen) > 1


def test_entries_for_single_pieces(built: dict[str, Path], planned: dict[str, Placement]) -> None:
    """One that names pieces is about those alone, and one that names what is not there is refused."""
    manifest, placement = open_artifact(built["llama"]).manifest, planned["llama"]
    whole = stays_of(manifest, placement).resident
    one = Placed("mlp", "1", "ssd", "streamed", "cores", "bf16", 1 << 20, pieces="mlp.down_proj")
    numbers = [n for n, piece in enumerate(manifest.weights.pieces) if piece.origin == "layers.1.mlp.down_proj"]
    assert len(numbers) == 1 and numbers[0] in whole
    fewer = stays_of(manifest, dataclasses.replace(placement, groups=(*placement.groups, one))).resident
    assert set(whole) - set(fewer) == set(numbers)
    wrong = dataclasses.replace(placement, groups=(*placement.groups, dataclasses.replace(one, pieces="mlp.up")))
    with pytest.raises(DiagnosticError, match=r"names 'mlp.up' of mlp 1(.|\n)*mlp.down_proj"):
        stays_of(manifest, wrong)


@pytest.mark.parametrize("model", ["TinyLlama-1.1B-Chat-v1.0", "OLMoE-1B-7B-0924"])
@pytest.mark.parametrize("budget", [640, 1024, 3072])
def test_pieces_are_chosen_no_worse_than_the_program_solves_parts(model: str, budget: int) -> None:
    """In steps of one token, in the same room: bytes of dense weights each step, and bytes of experts kept."""
    from frontends.shape_library import load_shape
    from passes.place.formats import formats_of

    shape = load_shape(model)
    machine = machine_of(HOST, budgets={"dram": budget * MIB})
    pin = parse_pin("kv=dram", shape, machine)
    problem = Problem(shape, machine, formats_of("w4a8-g32"), Asked(context=64, prompt=32, generate=32), (pin,))
    manifest = sketch(problem)
    try:
        solved = solve(problem).placement
    except NoFit:
        with pytest.raises(DoesNotFit):
            plan_memory(manifest, budget * MIB, baseline=MIB, context=64)
        return
    if solved.expert_cache is not None:
        solved = dataclasses.replace(solved, expert_cache=dataclasses.replace(solved.expert_cache, scope="global"))
    stays = stays_of(manifest, solved)
    pieces = manifest.weights.pieces
    used = next(tier for tier in solved.tiers if tier.name == "dram")
    other = used.activations + used.kv
    ours = plan_memory(manifest, budget * MIB - other + 24 * MIB + 11 * MIB, baseline=0, context=64).stream

    def read(resident: tuple[int, ...]) -> int:
        return sum(p.bytes for n, p in enumerate(pieces) if p.kind == "dense" and n not in resident)

    slack = min(p.bytes for p in pieces if p.kind == "dense")
    assert read(ours.resident) <= read(stays.resident) + slack
    if read(ours.resident) == read(stays.resident):
        assert ours.expert_bytes >= 0.97 * stays.expert_bytes
