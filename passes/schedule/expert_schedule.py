"""Decoding a mixture of experts whose experts do not all fit: a cache of them, and a plan of what is fetched when.

For each layer, in this order:

    early fetches for a later layer         experts that a predictor names
    attention, then the router
    late fetches of this layer              what the cache lacks and nobody foresaw
    the chosen experts one by one           those that are there first, those still coming last, in order of arrival

What a cache lacks is known only when the model runs, so a fetch is conditional: `rank` r of cache `NAME.late` takes
place when r experts or more are missing (`ir.ops.plan_stream.PrefetchOp`). The plan is proven for the worst case, in
which all are; the simulator plays the outcomes it is given (`hw_targets.expert_outcomes`).

How early, `distance` says: 1, before the layer in front of it, with the gate of the next layer asked on this layer's
input (Fate, arXiv:2502.12224); 0, before its own attention, when the router stands in front of that (SmallThinker,
arXiv:2507.20984); more, from what was used before (history, popularity). A wrong guess is read all the same, and the
room of its slot is the cache's: `hw_targets.expert_outcomes` counts both.

All are read in the order in which they were asked for: early fetches stand before the late ones of the same layer, so
more of them is not always better; `choose_ahead` finds how many are best on given misses.
The room of the cache is `cache_bytes`, of which the fetches of a layer take their part; the rest is at home in the
tier.
`stand_ins` > 0 lets as many missing experts of a layer be replaced by copies of `stand_in_bytes` in fewer bits (HOBBIT,
arXiv:2411.01433): cache `NAME.low` says how many are, and those are not among `NAME.late`. That changes what is
computed, is done only when asked for, and `warnings` says so. A replay with `hw_targets.expert_cache.StandIns` counts
both as `run --stand-ins` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hw_targets.cost_model import Work
from hw_targets.expert_outcomes import EARLY, LATE, LOW, StepTimes, from_misses, simulate_steps
from hw_targets.plan_demands import Prices
from hw_targets.simulator import Simulator
from hw_targets.target import Target
from ir.core import Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.ops.builtin import FuncOp
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter


@dataclass(frozen=True)
class ExpertLayer:
    """`attention` and `router` of one step, `expert` the work of one chosen expert; `dense` lies in the unit's tier.

    A layer without experts has `top_k` 0. `expert_bytes` are those of one expert.
    """

    name: str
    attention: Work
    dense: tuple[Piece, ...] = ()
    router: Work | None = None
    expert: Work | None = None
    top_k: int = 0
    expert_bytes: int = 0


@dataclass(frozen=True)
class ExpertProblem:
    """`home` and `over` say where experts are and which link or storage brings them to `tier`, in requests of `block`
    bytes of which `depth` are in flight; `ahead` experts of a layer are foreseen at most, `distance` layers with
    experts before it."""

    unit: str
    tier: str
    layers: tuple[ExpertLayer, ...]
    home: str
    over: str
    cache_bytes: int
    ahead: int = 0
    distance: int = 1
    block: int = 0
    depth: int = 1
    stand_ins: int = 0
    stand_in_bytes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The layers with experts: the order of misses in `hw_targets.expert_outcomes`."""
        return tuple(layer.name for layer in self.layers if layer.top_k)

    @property
    def token_cycle_bytes(self) -> int:
        """Bytes of the experts that one token asks for in all layers."""
        return sum(layer.top_k * layer.expert_bytes for layer in self.layers)

    @property
    def least_cache_bytes(self) -> int:
        """Room for the fetches alone: of one layer late, of it and those up to `distance` behind it early."""
        most = 0
        layers = [layer for layer in self.layers if layer.top_k]
        for number, layer in enumerate(layers):
            foreseen = layers[max(number, self.distance) : number + self.distance + 1]  # the first ones by nobody
            early = sum(min(self.ahead, x.top_k) * x.expert_bytes for x in foreseen)
            most = max(most, early + layer.top_k * layer.expert_bytes + self.replaced(layer) * self.stand_in_bytes)
        return most

    def replaced(self, layer: ExpertLayer) -> int:
        """The most stand-ins of a layer."""
        return min(self.stand_ins, layer.top_k)


def warnings(problem: ExpertProblem) -> list[Diagnostic]:
    """What a user should know: the cliff of caches smaller than one token's experts, and stand-ins."""
    found = []
    if problem.cache_bytes < problem.token_cycle_bytes:
        message = (
            f"the expert cache of {problem.cache_bytes} bytes is smaller than what one token asks for "
            f"({problem.token_cycle_bytes}): least recently used over all layers would never hit"
        )
        hint = "give each layer its own slots, or another policy, or a larger cache"
        found.append(Diagnostic("warning", message, notes=(Diagnostic("hint", hint),)))
    if problem.stand_ins:
        message = f"up to {problem.stand_ins} missing experts of each layer are computed from copies in fewer bits"
        found.append(Diagnostic("warning", f"{message}: tokens differ from those of the whole model"))
    return found


def emit_experts(problem: ExpertProblem, name: str = "decode") -> FuncOp:
    """The plan of one step. Raises DiagnosticError when the cache has no room for the fetches of one layer."""
    if problem.cache_bytes < problem.least_cache_bytes:
        raise DiagnosticError(
            f"an expert cache of {problem.cache_bytes} bytes has no room for the experts of one layer",
            expected=f"at least {problem.least_cache_bytes} bytes in {problem.tier}",
        )
    return _Emitter(problem, StreamWriter(name)).run()


Fetched = list[tuple[Value, Value]]  # (slot, token) by rank, the first first


class _Emitter:
    def __init__(self, problem: ExpertProblem, writer: StreamWriter) -> None:
        self.problem, self.writer = problem, writer

    def run(self) -> FuncOp:
        p, writer = self.problem, self.writer
        for layer in p.layers:
            for piece in layer.dense:
                writer.segment(piece)
        cached = Piece("experts.cached", p.cache_bytes - p.least_cache_bytes, p.tier)
        sparse = [layer for layer in p.layers if layer.top_k]
        coming: dict[int, Fetched] = {}
        number = -1
        for layer in p.layers:
            number += 1 if layer.top_k else 0
            if layer.top_k and p.ahead and number + p.distance < len(sparse):
                following = sparse[number + p.distance]
                coming[number + p.distance] = self.fetch(following, EARLY, min(p.ahead, following.top_k))
            dense = [writer.segment(piece) for piece in layer.dense]
            writer.compute(p.unit, f"{layer.name}.attention", layer.attention, dense)
            if layer.top_k:
                if layer.router is not None:
                    writer.compute(p.unit, f"{layer.name}.router", layer.router, [])
                late = self.fetch(layer, LATE, layer.top_k)
                low = self.fetch(layer, LOW, p.replaced(layer))
                self.compute(layer, [coming.pop(number, []), late, low], writer.segment(cached))
        return writer.finish()

    def fetch(self, layer: ExpertLayer, when: str, count: int) -> Fetched:
        """Conditional fetches, the highest rank first: so those that take place arrive in the order of use."""
        p, writer, found = self.problem, self.writer, []
        for rank in range(count, 0, -1):
            nbytes = p.stand_in_bytes if when == LOW else layer.expert_bytes
            piece = Piece(f"{layer.name}.expert.{when}.{rank}", nbytes, p.home, p.over, "experts", p.block, p.depth)
            slot = writer.slot(p.unit, p.tier, nbytes, f"{layer.name}.{when}")
            found.append((slot, writer.fetch(p.unit, piece, slot, f"{layer.name}.{when}", rank)))
        return found[::-1]

    def compute(self, layer: ExpertLayer, fetched: Sequence[Fetched], cached: Value) -> None:
        """The chosen experts: the one that would be the last to miss comes first."""
        p, writer = self.problem, self.writer
        for rank in range(layer.top_k, 0, -1):
            mine = [one for each in fetched for one in each[rank - 1 : rank]]
            writer.wait(p.unit, *(token for _, token in mine))
            work = layer.expert if layer.expert is not None else Work()
            writer.compute(p.unit, f"{layer.name}.expert", work, [*(slot for slot, _ in mine), cached])
        writer.evict(p.unit, *(slot for each in fetched for slot, _ in each))


@dataclass(frozen=True)
class AheadChoice:
    """How many experts to fetch early. `tried` is ((ahead, mean seconds), ...)."""

    ahead: int
    times: StepTimes
    tried: tuple[tuple[int, float], ...]


def choose_ahead(
    problem: ExpertProblem,
    target: Target,
    misses: np.ndarray,
    accuracy: float,
    prices: Prices | None = None,
    *,
    absent: float | None = None,
    candidates: Sequence[int] | None = None,
    stand_ins: np.ndarray | None = None,
) -> AheadChoice:
    """The number of early fetches with the least mean time on these misses (int [steps, layers with experts]), for a
    predictor that is right in the share `accuracy`; of its wrong guesses the share `absent` is not in the cache. Those
    that the cache has no room for are left out. `stand_ins`, like `misses`: those read in fewer bits."""
    most = max((layer.top_k for layer in problem.layers), default=0)
    best: AheadChoice | None = None
    tried = []
    for ahead in candidates if candidates is not None else range(most + 1):
        one = replace(problem, ahead=ahead)
        if ahead and one.cache_bytes < one.least_cache_bytes:
            continue
        outcomes = from_misses(
            misses, one.names, ahead=ahead, accuracy=accuracy, distance=one.distance, absent=absent, stand_ins=stand_ins
        )
        times = simulate_steps(Simulator(emit_experts(one), target, prices), outcomes)
        tried.append((ahead, times.mean))
        if best is None or times.mean < best.times.mean * (1 - 1e-4):
            best = AheadChoice(ahead, times, ())
    if best is None:
        raise DiagnosticError("no number of early fetches fits the cache", expected="0 among the candidates")
    return replace(best, tried=tuple(tried))
