"""Policies and Belady's bound in the slots that a plan has."""

from __future__ import annotations

import pytest

from hw_targets.expert_cache import replay
from passes.place.cache_choice import judge, session_trace


def test_layers_count_with_the_slots_that_they_have() -> None:
    trace = session_trace(32, 4)
    few, many = (judge(trace, {slots: 3}, "drawn") for slots in (6, 16))
    mixed = judge(trace, {6: 1, 16: 3}, "drawn")
    for policy, rate in mixed.rates:
        assert rate == pytest.approx(dict(few.rates)[policy] / 4 + 3 * dict(many.rates)[policy] / 4)
        assert rate <= mixed.belady
    assert mixed.belady == pytest.approx(few.belady / 4 + 3 * many.belady / 4) and not mixed.warnings
    assert mixed.rates[0][0] == mixed.policy


def test_one_cache_for_all_layers_has_their_slots_together() -> None:
    trace = session_trace(32, 4)
    found = judge(trace, {6: 1, 14: 1}, "drawn", "global")
    whole = replay(trace, slots=10 * trace.layer_count, policy="belady", scope="global")
    assert found.belady == whole.decode_hit_rate
    assert (
        judge(trace, {3: 1, 16: 1}, "drawn").warnings and "3 slots a layer" in judge(trace, {3: 1}, "drawn").warnings[0]
    )
