"""A context whose KV cache does not fit into the budget -> what of the cache stays, and what of the weights.

Takes an artifact, a budget and a context that `stratum.memory_plan` refused. The cache gets what two of its layers take
at that context, weights are planned in what is left as ever, and what they leave is the cache's again: a weight that
stays saves a read in every step, a layer of the cache only as long as the text is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runtime.artifact import open_artifact
from runtime.kv_cache import KVCache
from runtime.kv_stream import LAYERS_AT_ONCE
from runtime.manifest import Manifest
from runtime.stream_plan import StreamPlan
from stratum.memory_plan import Accounts, DoesNotFit, MemoryPlan, plan_for
from stratum.process_account import baseline_bytes

_STEPS = 16  # of halving what the cache may take


class KVOnDisk(Accounts):
    """Accounts in which the cache takes `kv_limit`, whatever the context."""

    kv_limit = 0

    def kv_bytes(self, context: int) -> int:
        return self.kv_limit

    def lent_kv_bytes(self, context: int) -> int:
        """None: layers come and go in all of it."""
        return 0


def plan_with_kv_on_disk(artifact: Path, budget: int, context: int | None, policy: str | None = None) -> MemoryPlan:
    """`plan_for`; a context whose cache is too large for it is planned with the cache partly on disk.

    Raises DoesNotFit where that does not fit either, or the artifact's programs do not wait for their cache.
    """
    try:
        return plan_for(artifact, budget, context, policy)
    except DoesNotFit:
        manifest = open_artifact(artifact).manifest
        if context is None or context > manifest.max_context or not waits_for_kv(manifest):
            raise
        made = plan_kv(manifest, budget, context, baseline=baseline_bytes(manifest))
        if made is None:
            raise
        return replace(made, stream=replace(made.stream, policy=policy or made.stream.policy))


def waits_for_kv(manifest: Manifest) -> bool:
    """Whether every program waits for its cache, so that layers of it may come and go."""
    waits = all(len(set(program.kv_awaits)) == manifest.kv.layers for program in manifest.programs)
    return waits and manifest.kv.layers > 0


def kv_limit(manifest: Manifest, context: int, num_slots: int, staying: int) -> int:
    """What the cache takes in memory where so many of its layers stay, of sequences of `context` positions."""
    kv = KVCache(manifest.kv, context, num_slots)
    layers = min(kv.layers, staying + LAYERS_AT_ONCE)
    limit = num_slots * (kv.hot_bytes(context) + layers * kv.layer_bytes(context) + 1)
    kv.close()
    return limit


def plan_kv(manifest: Manifest, budget: int, context: int, *, baseline: int) -> MemoryPlan | None:
    """The plan with `kv_bytes` less than the whole cache, or None where one layer of it is too much already."""
    accounts = KVOnDisk(manifest, budget, baseline, 1)
    whole = Accounts(manifest, budget, baseline, 1).kv_bytes(context)
    kv = KVCache(manifest.kv, context, 1)
    hot, layer = kv.hot_bytes(context), kv.layer_bytes(context)
    kv.close()
    for layers in range(LAYERS_AT_ONCE, 0, -1):
        least = hot + layers * layer + 1
        tokens = max(program.max_tokens for program in manifest.programs)
        while tokens >= 1:
            accounts.kv_limit = least
            found = accounts.plan(context, tokens)
            if found is not None:
                limit, stream = _grown(accounts, found, context, tokens, least, whole)
                return MemoryPlan(stream, context, limit)
            tokens //= 2
    return None


def _grown(
    accounts: KVOnDisk, found: StreamPlan, context: int, tokens: int, least: int, whole: int
) -> tuple[int, StreamPlan]:
    """The most that the cache may take without a weight less in memory."""
    low, high, best = least, max(least, whole), found
    for _ in range(_STEPS):
        accounts.kv_limit = middle = (low + high) // 2
        made = accounts.plan(context, tokens)
        if made is not None and (made.resident, made.expert_bytes, made.window_bytes) == (
            found.resident, found.expert_bytes, found.window_bytes,
        ):  # fmt: skip
            low, best = middle, made
        else:
            high = middle
    return low, best
