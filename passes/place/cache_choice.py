"""Expert caches by replay: hit rates from a trace, the policy that does best on it, and the bound that none can pass.

    rates = TraceRates(trace)                    # a `HitRate` for `Problem.cached`
    judged = judge(trace, {60: 44, 36: 4}, source="...")   # policies compared, Belady's bound, warnings at cliffs

Without a trace, `session_trace` draws one of a single conversation (Zipf 1.4), so that plans of any model have a bound.
Refuses a trace of another model: other experts, or more of them for a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from frontends.model_shape import ModelShape
from hw_targets.expert_cache import ON_LINE, ReplayResult, replay
from hw_targets.routing.trace import RoutingTrace
from ir.diagnostics import DiagnosticError
from passes.place.routing_model import SESSION_TOKENS

_LAYERS = 4  # of a drawn trace: layers are alike


@dataclass(frozen=True)
class Judged:
    """Hit rates while decoding. `rates` is ((policy, share), ...), best first; `belady` no policy can pass."""

    policy: str
    rates: tuple[tuple[str, float], ...]
    belady: float
    source: str
    warnings: tuple[str, ...] = ()


class TraceRates:
    """Hit rates of a cache with so many slots a layer, replayed once for each number of them."""

    def __init__(self, trace: RoutingTrace, policy: str = "lru", scope: str = "layer") -> None:
        self.trace, self.policy, self.scope = trace, policy, scope
        self._found: dict[int, ReplayResult] = {}
        self._by_rank: dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...], int], tuple[float, ...]] = {}

    def __call__(self, experts: int, top_k: int, slots: int, batch: int) -> float:
        return 1.0 if slots >= experts else self._replayed(slots).decode_hit_rate

    def by_rank(self, layers: tuple[int, ...], orders: tuple[tuple[int, ...], ...], slots: int) -> tuple[float, ...]:
        """Misses of decode steps by rank: `orders` has the experts of each of the layers by rank."""
        key = layers, orders, slots
        if key not in self._by_rank:
            misses = self._replayed(slots).expert_misses
            rows = [(misses[self.trace.layers.index(n)], order) for n, order in zip(layers, orders, strict=True)]
            self._by_rank[key] = tuple(float(sum(row[order[r]] for row, order in rows)) for r in range(len(orders[0])))
        return self._by_rank[key]

    def _replayed(self, slots: int) -> ReplayResult:
        if slots not in self._found:
            of_all = slots * self.trace.layer_count
            self._found[slots] = replay(self.trace, slots=of_all, policy=self.policy, scope=self.scope)
        return self._found[slots]


def check_trace(trace: RoutingTrace, shape: ModelShape) -> RoutingTrace:
    """`trace`, which must fit the model."""
    kinds = {(x.mlp.experts, x.mlp.top_k) for x, _ in shape.kinds() if x.mlp.is_moe}
    if not kinds:
        raise DiagnosticError(f"{shape.name} has no experts; a routing trace says nothing about it")
    if not any(experts == trace.expert_count and trace.top_k <= top_k for experts, top_k in kinds):
        wanted = " or ".join(f"{e} experts, {k} a token" for e, k in sorted(kinds))
        raise DiagnosticError(
            f"the trace is of {trace.model}: {trace.expert_count} experts, {trace.top_k} a token", expected=wanted
        )
    return trace


def session_trace(experts: int, top_k: int) -> RoutingTrace:
    """A drawn conversation of one user."""
    from hw_targets.routing.synthetic import SESSION, synthetic_trace

    return synthetic_trace(SESSION, experts=experts, top_k=top_k, layers=_LAYERS, tokens=SESSION_TOKENS)


def judge(trace: RoutingTrace, layers: Mapping[int, int], source: str, scope: str = "layer") -> Judged:
    """What every on-line policy reaches, and the best that hindsight would. `layers`: by the slots of a layer how many
    layers have so many; one cache for all of them (`global`) has their sum."""
    count = sum(layers.values())
    if scope == "global":
        layers = {max(1, sum(slots * n for slots, n in layers.items()) // count): count}

    def rate(policy: str) -> float:
        hits = 0.0
        for slots, n in layers.items():
            found = replay(trace, slots=slots * trace.layer_count, policy=policy, scope=scope)
            hits += n * found.decode_hit_rate
        return hits / count

    rates = {policy: rate(policy) for policy in ON_LINE}
    order = tuple(sorted(rates.items(), key=lambda item: (-round(item[1], 4), item[0] != "lru", item[0])))
    belady, fewest = rate("belady"), min(layers)
    warnings = []
    if fewest < trace.top_k:
        warnings.append(
            f"{fewest} slots a layer hold less than the {trace.top_k} experts of one token: the latest ones (lru)"
            " would hardly ever be found again"
        )
    return Judged(order[0][0], order, belady, source, tuple(warnings))
