"""Plans under a budget for a recorded routing: the policy that does best on it, experts pinned where that is best."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratum
from hw_targets.expert_cache import ON_LINE, choose_policy
from hw_targets.routing.synthetic import Router, synthetic_trace
from ir.diagnostics import DiagnosticError
from passes.place.placement import ExpertCache
from runtime.errors import RuntimeDiagnostic
from runtime.process_memory import resident_bytes
from runtime.stream_plan import least_expert_bytes
from stratum.host_placement import place_on_host
from stratum.host_planning import hits_of, with_best_policy
from stratum.memory_plan import plan_memory
from stratum.stream_placement import stream_of_placement
from tests.stratum.test_memory import MIB, manifest

EXPERTS, LAYERS = 16, 3
MODEL = manifest([3], EXPERTS, 400, LAYERS, 10)
BASELINE = 20 * MIB


@settings(deadline=None, max_examples=30)
@given(exponent=st.sampled_from((0.0, 0.6, 1.4)), seed=st.integers(0, 9), budget=st.integers(60, 140))
def test_the_policy_that_does_best_on_a_trace_is_planned_and_can_run(exponent: float, seed: int, budget: int) -> None:
    """It does no worse than the default on the part of the trace that policies are judged by."""
    trace = synthetic_trace(Router(exponent), experts=EXPERTS, top_k=2, layers=LAYERS, tokens=96, seed=seed)
    given = place_on_host(MODEL, budget * MIB, baseline=BASELINE, context=256)
    chosen = with_best_policy(MODEL, given, trace)
    if given.expert_cache is None:
        assert chosen == given
        return
    assert chosen.expert_cache is not None and chosen.expert_cache.policy in ON_LINE
    made = stream_of_placement(MODEL, chosen, budget * MIB, baseline=BASELINE)
    plan = made.stream
    assert (plan.policy, plan.pinned) == (chosen.expert_cache.policy, chosen.expert_cache.pinned)
    assert plan.pinned_bytes(MODEL) + least_expert_bytes(MODEL) <= plan.expert_bytes
    assert 0.0 < hits_of(chosen.expert_cache, plan, trace) <= 1.0


def test_popular_experts_are_pinned_where_that_is_best() -> None:
    """Half of the cache, with the latest in the other half: better on this trace than any policy by itself."""
    trace = synthetic_trace(Router(0.6), experts=EXPERTS, top_k=2, layers=LAYERS, tokens=96, seed=1)
    cache = ExpertCache("dram", 24, 24 * 400 * 4096, "global", "lrfu", 0.0, "")
    given = dataclasses.replace(place_on_host(MODEL, 100 * MIB, baseline=BASELINE, context=256), expert_cache=cache)
    found = with_best_policy(MODEL, given, trace).expert_cache
    assert found is not None and (found.policy, len(found.pinned)) == ("lru", 12)
    rates = {name: result.decode_hit_rate for name, result in choose_policy(trace, 24, scopes=("global",)).candidates}
    assert rates["half pinned, lru"] == max(rates.values()) > max(rates[policy] for policy in ON_LINE)
    for slots in (2, 3):  # a token has two experts, for which one that is pinned must leave room
        small = dataclasses.replace(given, expert_cache=dataclasses.replace(cache, nbytes=slots * 400 * 4096))
        found = with_best_policy(MODEL, small, trace).expert_cache
        assert found is not None and len(found.pinned) <= slots - 2 and found.policy in ON_LINE


def test_an_edited_plan_pins_experts(moe_artifact: Path, tmp_path: Path) -> None:
    """Executed as written, with the same tokens; what does not exist is refused."""
    budget = resident_bytes() + 256 * MIB
    with stratum.load(moe_artifact, threads=1) as model:
        wanted = model.generate("abc", max_tokens=5, temperature=0).token_ids
        whole = model.session.manifest
    made = plan_memory(whole, budget, baseline=resident_bytes(), context=64)
    assert made.placement is not None
    unit = next(piece.unit for piece in whole.weights.pieces if piece.kind == "experts")
    groups = tuple(
        dataclasses.replace(g, mode="cached", tier="dram", slots=3) if g.group == "experts" else g
        for g in made.placement.groups
    )
    cache = ExpertCache("dram", 6, 6 * unit, "global", "lfu", 0.0, "", pinned=((0, 1), (1, 2)))
    plan = tmp_path / "plan.json"
    plan.write_text(dataclasses.replace(made.placement, groups=groups, expert_cache=cache).to_json())
    with stratum.load(moe_artifact, memory=budget, plan=str(plan), threads=1) as model:
        streamer = model.session.streamer
        assert streamer is not None and streamer.plan.pinned == ((0, 1), (1, 2)) and streamer.plan.policy == "lfu"
        assert model.generate("abc", max_tokens=5, temperature=0).token_ids == wanted
        assert streamer.cache is not None and streamer.cache.resident()[:2] == [(0, 1), (1, 2)]
    written = json.loads(plan.read_text())
    written["expert_cache"]["pinned"] = [[0, 99]]
    plan.write_text(json.dumps(written))
    with pytest.raises((DiagnosticError, RuntimeDiagnostic), match="pins experts that do not exist"):
        stratum.load(moe_artifact, memory=budget, plan=str(plan), threads=1)
