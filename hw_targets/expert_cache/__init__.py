"""Caches of experts: what a policy and a size would have done on a routing trace, bounds, and which to choose."""

from hw_targets.expert_cache.choose import (
    CacheWarning,
    PolicyChoice,
    cache_warnings,
    choose_policy,
    hit_curve,
    knee,
    popular_entries,
)
from hw_targets.expert_cache.expected import RouterFit, expected_hit_rate, fit_router
from hw_targets.expert_cache.policies import ON_LINE, POLICIES
from hw_targets.expert_cache.replay import SCOPES, ReplayResult, StandIns, replay

__all__ = [
    "ON_LINE",
    "POLICIES",
    "SCOPES",
    "CacheWarning",
    "PolicyChoice",
    "ReplayResult",
    "RouterFit",
    "StandIns",
    "cache_warnings",
    "choose_policy",
    "expected_hit_rate",
    "fit_router",
    "hit_curve",
    "knee",
    "popular_entries",
    "replay",
]
