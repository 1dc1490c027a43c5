"""Routing: which experts a token meets, and the order that groups tokens by expert.

moe.route     softmax over the experts, the top_k largest, lower number first on ties
moe.dispatch  counting sort of the (token, choice) pairs by the places of their experts
"""

from __future__ import annotations

from codegen.kernels.call import Argument, EmitContext, KernelSpec, SizeArgument, emitter, rows_of, structure_key
from codegen.kernels.math import exp
from codegen.kernels.rowwise import LANES, element_of, width_of
from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import F32, I32
from ir.ops.builtin import FuncOp
from ir.ops.moe import DispatchOp, RouteOp
from ir.types import ScalarType

MASKED = -3e38  # a logit that no expert has
LOWEST = float("-inf")


@emitter(RouteOp)
def emit_route(op: RouteOp, context: EmitContext) -> KernelSpec:
    """Tokens are shared among the threads."""
    arguments: list[Argument] = [op.logits, op.ids, op.weights, SizeArgument(rows_of(op.logits.type))]
    return KernelSpec(f"route_top{op.top_k}", structure_key(op), arguments, (1, 2), lambda name: _build_route(name, op))


def _build_route(name: str, op: RouteOp) -> FuncOp:
    experts = width_of(op.logits)
    padded = -(-experts // LANES) * LANES
    k = KernelBuilder(name)
    logits, ids, weights = k.buffer("logits", element_of(op.logits)), k.buffer("ids", I32), k.buffer("weights", F32)
    rows = k.size("rows")
    kept = k.scratch(padded, F32)  # logits; those of experts that are chosen become LOWEST
    first, last = k.thread_share(rows)

    def load(row: Expr, start: int, outside: float) -> Expr:
        """16 logits; lanes past the last expert read as `outside`."""
        if start + LANES <= experts:
            return logits.load(row * experts + start, LANES).cast(F32)
        mask = k.lanes_below(experts - start, LANES)
        return k.select(mask, logits.load(row * experts + start, LANES, mask).cast(F32), outside)

    with k.loop(first, last) as row:
        largest = load(row.i, 0, MASKED)
        for start in range(LANES, padded, LANES):
            largest = largest.max(load(row.i, start, MASKED))
        top = largest.reduce("max")
        total = k.f32(0.0, LANES)
        for start in range(0, padded, LANES):
            logit = load(row.i, start, MASKED)
            kept.store(start, logit.max(MASKED))
            total = total + exp(k, logit - top)
        denominator = total.reduce("add")
        chosen = k.f32(0.0)
        for choice in range(op.top_k):
            # By logit: probabilities that differ may round to the same number, or to none.
            with k.loop(0, experts, 1, [k.f32(LOWEST), k.constant(ScalarType(I32), 0)]) as loop:
                best, at = loop.carried
                here = kept.load(loop.i)
                better = here.compare("gt", best)  # strictly: the lower number wins a tie
                loop.carry(k.select(better, here, best), k.select(better, loop.i.from_index(), at))
            best, at = loop.results
            kept.store(at.to_index(), k.f32(LOWEST))
            probability = exp(k, best - top) / denominator
            weights.store(row.i * op.top_k + choice, probability)
            ids.store(row.i * op.top_k + choice, at)
            chosen = chosen + probability
        if op.normalize:
            for choice in range(op.top_k):
                place = row.i * op.top_k + choice
                weights.store(place, weights.load(place) / chosen)
    return k.finish()


@emitter(DispatchOp)
def emit_dispatch(op: DispatchOp, context: EmitContext) -> KernelSpec:
    """One thread sorts; the others go on to the barrier."""
    arguments: list[Argument] = [op.ids, op.order, op.offsets, SizeArgument(rows_of(op.order.type))]
    return KernelSpec(
        f"dispatch_{op.num_experts}", structure_key(op), arguments, (1, 2), lambda name: _build_dispatch(name, op)
    )


def _build_dispatch(name: str, op: DispatchOp) -> FuncOp:
    experts = op.num_experts
    k = KernelBuilder(name)
    ids, order, offsets = k.buffer("ids", I32), k.buffer("order", I32), k.buffer("offsets", I32)
    pairs = k.size("pairs")
    next_row = k.scratch(experts, I32)
    place_of = k.scratch(experts, I32) if op.places else None

    def group(pair: Expr) -> Expr:
        """The group of a pair's expert."""
        expert = ids.load(pair).to_index()
        return expert if place_of is None else place_of.load(expert).to_index()

    with k.when(k.thread_id().compare("eq", 0)):
        zero = k.constant(ScalarType(I32), 0)
        if place_of is not None:
            for number, place in enumerate(op.places):
                place_of.store(number, k.constant(ScalarType(I32), place))
        with k.loop(0, experts) as expert:
            next_row.store(expert.i, zero)
        with k.loop(0, pairs) as pair:
            met = group(pair.i)
            next_row.store(met, next_row.load(met) + 1)
        with k.loop(0, experts, 1, [zero]) as expert:
            start = expert.carried[0]
            offsets.store(expert.i, start)
            following = start + next_row.load(expert.i)
            next_row.store(expert.i, start)
            expert.carry(following)
        offsets.store(experts, expert.results[0])
        with k.loop(0, pairs) as pair:
            met = group(pair.i)
            row = next_row.load(met)
            order.store(row.to_index(), pair.i.from_index())
            next_row.store(met, row + 1)
    return k.finish()
