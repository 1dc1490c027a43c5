"""Caches of experts: what a policy and a size would have done on a routing trace, bounds, and which to choose."""

from hw_targets.expert_cache.policies import ON_LINE, POLICIES
from hw_targets.expert_cache.replay import SCOPES, ReplayResult, replay

__all__ = ["ON_LINE", "POLICIES", "SCOPES", "ReplayResult", "replay"]
