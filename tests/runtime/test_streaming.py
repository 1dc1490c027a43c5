"""Running with part of the weights on disk: the same bits under every plan, bounded memory; plans, routers as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import open_artifact
from runtime.errors import RuntimeDiagnostic
from runtime.eviction import POLICIES
from runtime.manifest_reader import manifest_digest, parse_manifest
from runtime.piece_info import PieceInfo
from runtime.stream_plan import StreamPlan, least_expert_bytes
from tests.runtime.streamed_models import FAMILIES, assert_same, batches, least_plan, logits, opened
from tests.stratum.tiny_model import QWEN3_MOE

pytestmark = pytest.mark.slow


def pinned_experts(data: st.DataObject, pieces: Sequence[PieceInfo]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Some experts of a model, maybe none, and their bytes."""
    layers = [piece for piece in pieces if piece.kind == "experts"]
    entries = [(layer, expert) for layer, piece in enumerate(layers) for expert in range(piece.count)]
    chosen = data.draw(st.lists(st.sampled_from(entries), unique=True)) if entries else []
    return tuple(chosen), sum(layers[layer].place(expert)[1] for layer, expert in chosen)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 3))
def test_the_same_bits_under_every_plan(
    streamed: dict[str, Path], expected: dict, data: st.DataObject, name: str, seed: int
) -> None:
    path = streamed[name]
    pieces = open_artifact(path).manifest.weights.pieces
    others = [n for n, piece in enumerate(pieces) if piece.kind != "experts"]
    scope = data.draw(st.sampled_from(("global", "layer")))
    least = least_plan(path, resident=tuple(data.draw(st.lists(st.sampled_from(others), unique=True))), scope=scope)
    total = sum(piece.bytes for piece in pieces)
    pinned, pinned_bytes = pinned_experts(data, pieces) if scope == "global" else ((), 0)
    plan = least_plan(
        path,
        resident=least.resident,
        scope=scope,
        window_bytes=least.window_bytes + data.draw(st.integers(0, total)),
        expert_bytes=least.expert_bytes + pinned_bytes + data.draw(st.integers(0, total)),
        pinned=pinned,
        rows_bytes=data.draw(st.sampled_from((4096, 1 << 20))),
        policy=data.draw(st.sampled_from(POLICIES)),
        step_tokens=data.draw(st.sampled_from((1, 7, 512))),
        threads=data.draw(st.integers(1, 3)),
        request_bytes=data.draw(st.sampled_from((4096, 1 << 20))),
        guesses=data.draw(st.sampled_from((0, 2, 16))),
        short_tokens=data.draw(st.sampled_from((0, 1, 16))),
        short_bytes=data.draw(st.integers(0, total)),
    )
    with opened(path, plan, threads=1 + seed % 2) as session:
        assert_same(logits(session, batches(seed)), expected[name, seed])
        assert session.streamer is not None
        kept = sum(pieces[n].bytes for n in plan.resident)
        most = kept + plan.window_bytes + plan.expert_bytes + plan.short_bytes + plan.rows_bytes + 64 * 4096
        assert session.streamer.memory_bytes() <= most
        assert session.streamer.most_window_bytes <= plan.window_bytes


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_plan_with_all_in_memory_reads_once(streamed: dict[str, Path], name: str) -> None:
    pieces = open_artifact(streamed[name]).manifest.weights.pieces
    resident = tuple(n for n, piece in enumerate(pieces) if piece.kind != "experts")
    experts = sum(piece.bytes for piece in pieces if piece.kind == "experts")
    with opened(streamed[name], least_plan(streamed[name], resident=resident, expert_bytes=experts)) as session:
        assert session.streamer is not None
        logits(session, batches(0))
        before = session.streamer.report()
        assert before.read_bytes <= sum(piece.bytes for piece in pieces)
        session.release(0)
        session.release(1)
        logits(session, batches(0))
        since = session.streamer.report().since(before)
        assert since.read_bytes == 0 and since.hit_rate in (0.0, 1.0)


def test_pinned_experts_are_read_first_and_stay(streamed: dict[str, Path], expected: dict) -> None:
    """The cache has room for one token's experts beside them, so that every other one comes and goes."""
    path = streamed["qwen3_moe"]
    layers = [piece for piece in open_artifact(path).manifest.weights.pieces if piece.kind == "experts"]
    pinned = tuple((1, expert) for expert in range(layers[1].count))
    least = least_plan(path)
    with opened(path, least_plan(path, expert_bytes=least.expert_bytes + layers[1].bytes, pinned=pinned)) as session:
        assert session.streamer is not None and session.streamer.cache is not None
        assert session.streamer.report().read_bytes >= layers[1].bytes
        assert_same(logits(session, batches(0)), expected["qwen3_moe", 0])
        counters = session.streamer.cache.counters
        assert counters.layer_hits[1] == counters.layer_lookups[1] > 0
        assert counters.layer_hits[0] < counters.layer_lookups[0]


def test_guesses_are_read_before_their_layer_and_change_nothing(streamed: dict[str, Path], expected: dict) -> None:
    path = streamed["qwen3_moe"]
    manifest = open_artifact(path).manifest
    pieces = manifest.weights.pieces
    dense = tuple(n for n, piece in enumerate(pieces) if piece.kind == "dense")
    some = 2 * least_expert_bytes(manifest)
    with opened(path, least_plan(path, resident=dense, expert_bytes=some, guesses=2)) as session:
        assert session.streamer is not None
        assert_same(logits(session, batches(1)), expected["qwen3_moe", 1])
        for token in range(8):
            session.step([token], [session.filled(0)], [0], [0])
        report = session.streamer.report()
        assert 0 < report.guesses_right <= report.guesses_read
        assert "of guesses were right" in str(report)
        assert session.streamer.memory_bytes() <= sum(pieces[n].bytes for n in dense) + some + (1 << 20)


def test_experts_take_what_short_steps_leave_of_the_activations(streamed: dict[str, Path], expected: dict) -> None:
    path = streamed["qwen3_moe"]
    manifest = open_artifact(path).manifest
    least = least_expert_bytes(manifest)
    with opened(path, least_plan(path, short_tokens=16, short_bytes=2 * least)) as session:
        streamer = session.streamer
        assert streamer is not None and streamer.cache is not None
        sizes = []
        for step, want in zip(batches(1), expected["qwen3_moe", 1], strict=True):
            np.testing.assert_array_equal(session.step(*step), want)
            sizes.append((len(step[0]) <= 16, streamer.cache.capacity_bytes, streamer.cache.used_bytes))
        assert {short for short, _, _ in sizes} == {True, False}
        for short, capacity, used in sizes:
            assert capacity == (3 if short else 1) * least
            assert used <= max(capacity, max(p.bytes for p in manifest.weights.pieces if p.kind == "experts"))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 3), kept=st.integers(0, 1 << 20), scope=st.sampled_from(("global", "layer")))
def test_experts_take_what_the_kv_cache_leaves(
    streamed: dict[str, Path], expected: dict, seed: int, kept: int, scope: str
) -> None:
    """Never more than what is kept for it less what it takes, and all of that once a sequence is gone."""
    path = streamed["qwen3_moe"]
    plan = least_plan(path, kv_bytes=kept, scope=scope)
    with opened(path, plan) as session:
        streamer = session.streamer
        assert streamer is not None and streamer.cache is not None
        sizes = []
        for step, want in zip(batches(seed), expected["qwen3_moe", seed], strict=True):
            np.testing.assert_array_equal(session.step(*step), want)
            lent = streamer.cache.capacity_bytes - plan.expert_bytes
            assert -2 < lent <= max(0, kept - session.memory().kv_committed)
            sizes.append(lent)
        assert sizes == sorted(sizes, reverse=True)  # sequences only grow
        for slot in (0, 1):
            session.release(slot)
        session.step([1], [0], [0], [0])
        assert streamer.cache.capacity_bytes - plan.expert_bytes >= sizes[0]


# -- plans


@pytest.fixture
def plans(streamed: dict[str, Path]) -> Iterator[StreamPlan]:
    yield least_plan(streamed["qwen3_moe"])


def test_plans_are_json(plans: StreamPlan) -> None:
    assert StreamPlan.from_json(plans.to_json()) == plans
    pinning = replace(plans, pinned=((0, 1), (1, 3)))
    assert StreamPlan.from_json(pinning.to_json()) == pinning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable stream plan"),
        ("[]", "not a stream plan"),
        ('{"schema": "stratum.stream/1"}', "no 'budget_bytes' or 'resident'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "x": 1}', "unknown field 'x'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [true]}', "'resident'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": -1, "resident": []}', "'budget_bytes'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "threads": 65}', "'threads'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "policy": "fifo"}', "'policy'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "pinned": [3]}', "'pinned'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "pinned": [[0, -1]]}', "'pinned'"),
        ('{"schema": "stratum.stream/1", "budget_bytes": 1, "resident": [], "pinned": "all"}', "'pinned'"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuntimeDiagnostic, match=message):
        StreamPlan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_bytes": 0}, "a window of 0 bytes"),
        ({"expert_bytes": 4096}, "4096 bytes for experts"),
        ({"resident": (99,)}, "resident pieces that do not exist"),
        ({"resident": (2,)}, "which holds experts"),
        ({"pinned": ((0, 99),)}, "pins experts that do not exist"),
        ({"pinned": ((0, 1), (0, 1))}, "or one twice"),
        ({"pinned": ((0, 1),)}, "beside those that are pinned"),
        ({"pinned": ((0, 1),), "scope": "layer"}, "beside shares of layers"),
    ],
)
def test_plans_that_cannot_run_are_refused(streamed: dict[str, Path], changes: dict[str, object], message: str) -> None:
    path = streamed["qwen3_moe"]
    experts = [n for n, p in enumerate(open_artifact(path).manifest.weights.pieces) if p.kind == "experts"]
    if changes.get("resident") == (2,):
        changes = {"resident": (experts[0],)}
    plan = least_plan(path) if "resident" not in changes else least_plan(path, resident=(0,))
    with pytest.raises(RuntimeDiagnostic, match=message):
        opened(path, StreamPlan(**vars(plan) | changes)).close()  # type: ignore[arg-type]


# -- routers


def test_builds_say_where_routers_are(streamed: dict[str, Path]) -> None:
    """Every layer with experts, of both programs; the matrix is the one of the layer's gate."""
    raw = json.loads((streamed["qwen3_moe"] / "manifest.json").read_text())
    tensors = {t["offset"]: t["name"] for t in raw["weights"]["tensors"]}
    for program in raw["programs"].values():
        routers = [wait["router"] for wait in program["awaits"] if "router" in wait]
        assert len(routers) == QWEN3_MOE["num_hidden_layers"]
        assert [tensors[r["weights"]].split(".")[-1] for r in routers] == ["gate"] * len(routers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1 << 40}, r"router\.hidden"),
        ({"hidden": 2}, r"router\.hidden"),
        ({"weights": 1 << 40}, r"router\.weights"),
        ({"weights": 1}, r"router\.weights"),
        ({"experts": 5}, r"router\.experts"),
        ({"columns": 1 << 20}, r"router\.hidden"),
        ({"strip": 1 << 15}, r"router\.weights"),
        ({"strip": 0}, "strip"),
        ({"columns": "x"}, "columns"),
    ],
)
def test_routers_outside_of_the_artifact_are_refused(streamed: dict[str, Path], change: dict, message: str) -> None:
    raw = json.loads((streamed["qwen3_moe"] / "manifest.json").read_text())
    wait = next(w for w in raw["programs"]["decode"]["awaits"] if "router" in w)
    wait["router"] |= change
    raw["manifest_sha256"] = manifest_digest(raw)
    with pytest.raises(RuntimeDiagnostic, match=message):
        parse_manifest(json.dumps(raw).encode(), "here")
