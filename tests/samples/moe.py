"""moe.*: ties, idle experts, all tokens on one expert, top_k = experts, one token, bf16 weights."""

from __future__ import annotations

import numpy as np

from ir.ops.moe import DispatchOp
from tests.samples.base import BF16, I32, TOKENS, Sample, fault, normal, packed, sample, t
from tests.samples.quant import Q4, Q8

_TIES = np.array([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)

# label, experts, ids [tokens, top_k]
ROUTINGS = (
    ("spread", 4, ((0, 2), (3, 1), (2, 0))),
    ("one_token", 3, ((2, 0),)),
    ("all_on_one", 4, ((1,), (1,), (1,), (1,), (1,))),
    ("idle_first_and_last", 5, ((1, 3), (3, 2), (1, 2))),
    ("every_expert", 3, ((2, 0, 1), (0, 1, 2))),
    ("single_expert", 1, ((0,), (0,))),
)
_PAIRS2 = t(TOKENS * 2, element=I32)


def _arrays(experts: int, ids: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, ...]:
    chosen = np.array(ids, np.int32)
    return (chosen, *DispatchOp.reference(chosen, num_experts=experts))


def _dispatch(label: str, experts: int, ids: tuple) -> Sample:
    chosen, _, _ = _arrays(experts, ids)
    return sample("moe.dispatch", label, chosen, types=(t(TOKENS, chosen.shape[1], element=I32),), num_experts=experts)


def _grouped(label: str, experts: int, ids: tuple, gather: bool, element=BF16) -> Sample:
    chosen, order, offsets = _arrays(experts, ids)
    top_k = chosen.shape[1]
    rows = chosen.shape[0] if gather else order.size
    x, w = normal(rows, 6), normal(experts, 5, 6, element=element)
    dim = TOKENS if gather else TOKENS * top_k
    pairs, starts = t(TOKENS * top_k, element=I32), t(experts + 1, element=I32)
    types = (t(dim, 6), t(experts, 5, 6, element=element), pairs, starts)
    name = f"{label}_{'gather' if gather else 'grouped'}"
    return sample("moe.grouped_gemm", name, x, w, order, offsets, types=types, gather=top_k if gather else 0)


def _low_bit(label: str, experts: int, ids: tuple, gather: bool) -> Sample:
    """int8 rows and 4-bit experts."""
    plain = _grouped(label, experts, ids, gather)
    x, w = packed(normal(plain.inputs[0].shape[0], 32), Q8), packed(normal(experts, 5, 32), Q4)
    x_type, _, pairs, starts = plain.types
    types = (t(x_type.shape[0], 32, element=Q8), t(experts, 5, 32, element=Q4), pairs, starts)
    name = f"q8_q4_{'gather' if gather else 'grouped'}"
    return sample("moe.grouped_gemm", name, x, w, *plain.inputs[2:], types=types, **plain.attributes)


def _combine(label: str, experts: int, ids: tuple) -> Sample:
    chosen, order, _ = _arrays(experts, ids)
    tokens, top_k = chosen.shape
    types = (t(TOKENS * top_k, 5), t(TOKENS, top_k), t(TOKENS * top_k, element=I32))
    return sample("moe.combine", label, normal(order.size, 5), np.abs(normal(tokens, top_k)), order, types=types)


def _some_experts(label: str, experts: int, ids: tuple[tuple[int, ...], ...]) -> tuple[Sample, ...]:
    """Experts of odd numbers in a stack of their own, behind the others: the dispatch, both products, their rows."""
    members = [*range(0, experts, 2), *range(1, experts, 2)]
    places = tuple(members.index(e) for e in range(experts))
    chosen = np.array(ids, np.int32)
    order, offsets = DispatchOp.reference(chosen, num_experts=experts, places=places)
    tokens, first = TOKENS * chosen.shape[1], (experts + 1) // 2
    pairs, starts, y = t(tokens, element=I32), t(experts + 1, element=I32), t(tokens, 5)
    made = [
        sample(
            "moe.dispatch", f"{label}_placed", chosen, types=(t(TOKENS, chosen.shape[1], element=I32),),
            num_experts=experts, places=places,
        ),
        sample(
            "moe.join_rows", f"{label}_placed", normal(order.size, 5), normal(order.size, 5), offsets,
            types=(y, y, starts), first=first,
        ),
    ]  # fmt: skip
    for at, count in ((0, first), (first, experts - first)):
        rows, w = normal(order.size, 6), normal(count, 5, 6, element=BF16)
        types = (t(tokens, 6), t(count, 5, 6, element=BF16), pairs, starts)
        name = f"{label}_some_{at}"
        made.append(
            sample("moe.grouped_gemm", name, rows, w, order, offsets, types=types, gather=0, first=at, of=experts)
        )
    return tuple(made)


def _stand_ins(label: str, experts: int, ids: tuple) -> tuple[Sample, ...]:
    """Every second pair is computed by a stand-in: the two products, and their rows together."""
    used = np.array(ids, np.int32)
    used.reshape(-1)[::2] += experts
    order, offsets = DispatchOp.reference(used, num_experts=2 * experts)
    pairs, starts = t(TOKENS * used.shape[1], element=I32), t(2 * experts + 1, element=I32)
    rows, w = normal(order.size, 6), normal(experts, 5, 6, element=BF16)
    types = (t(TOKENS * used.shape[1], 6), t(experts, 5, 6, element=BF16), pairs, starts)
    y = t(TOKENS * used.shape[1], 5)
    return (
        sample(
            "moe.grouped_gemm", f"{label}_stand_ins", rows, w, order, offsets, types=types, gather=0, first=experts
        ),
        sample(
            "moe.join_rows", label, normal(order.size, 5), normal(order.size, 5), offsets, types=(y, y, starts),
            first=experts,
        ),
    )  # fmt: skip


SAMPLES = (
    *(
        sample(
            "moe.stand_ins",
            label,
            np.array(ids, np.int32),
            types=(t(TOKENS, len(ids[0]), element=I32),),
            num_experts=experts,
        )
        for label, experts, ids in ROUTINGS[:2]
    ),
    *(made for routing in ROUTINGS for made in _stand_ins(*routing)),
    *(made for routing in ROUTINGS[:5] for made in _some_experts(*routing)),
    sample("moe.route", "top2", normal(3, 8), types=(t(TOKENS, 8),), top_k=2, normalize=True),
    sample("moe.route", "top1", normal(1, 5), top_k=1, normalize=False),
    sample("moe.route", "ties", _TIES, top_k=2, normalize=False),
    sample("moe.route", "ties_normalized", _TIES, top_k=3, normalize=True),
    sample("moe.route", "all_experts", normal(2, 4), top_k=4, normalize=False),
    sample("moe.route", "large", normal(2, 6, scale=1e3), top_k=2, normalize=True),
    *(_dispatch(*routing) for routing in ROUTINGS),
    *(_grouped(*routing, gather) for routing in ROUTINGS for gather in (True, False)),
    *(_low_bit(*ROUTINGS[3], gather) for gather in (True, False)),
    *(_combine(*routing) for routing in ROUTINGS),
)
FAULTS = (
    fault("moe.route", "expected 1 <= top_k <= 8 experts, got top_k = 9", t(3, 8), top_k=9, normalize=True),
    fault("moe.route", "expected 1 <= top_k <= 8 experts, got top_k = 0", t(3, 8), top_k=0, normalize=True),
    fault("moe.route", "expected logits of rank 2", t(8), top_k=1, normalize=True),
    fault("moe.dispatch", "num_experts >= 1, got 0", t(3, 2, element=I32), num_experts=0),
    fault("moe.dispatch", "a known number of experts per token", t(3, TOKENS, element=I32), num_experts=4),
    fault("moe.dispatch", "places to be 0 .. 2 in some order", t(3, 2, element=I32), num_experts=3, places=(0, 2, 2)),
    fault("moe.dispatch", "places to be 0 .. 2 in some order", t(3, 2, element=I32), num_experts=3, places=(0, 1)),
    fault(
        "moe.grouped_gemm", "offsets of 5 experts + 1, got tensor<4 x i32>",
        t(TOKENS, 6), t(3, 5, 6), _PAIRS2, t(4, element=I32), gather=2, of=5,
    ),
    fault(
        "moe.grouped_gemm", "3 of 5 groups, the first in 0 .. 2, got first = 3",
        t(TOKENS, 6), t(3, 5, 6), _PAIRS2, t(6, element=I32), gather=2, first=3, of=5,
    ),
    fault(
        "moe.grouped_gemm", "k of x and w to match, got 7 and 6",
        t(TOKENS, 7), t(4, 5, 6), _PAIRS2, t(5, element=I32), gather=2,
    ),
    fault(
        "moe.grouped_gemm", "offsets of 4 experts + 1, got tensor<4 x i32>",
        t(TOKENS, 6), t(4, 5, 6), _PAIRS2, t(4, element=I32), gather=2,
    ),
    fault(
        "moe.grouped_gemm", "rows of x times gather and rows of order to match, got tokens*3 and tokens*2",
        t(TOKENS, 6), t(4, 5, 6), _PAIRS2, t(5, element=I32), gather=3,
    ),
    fault(
        "moe.grouped_gemm", "rows of x and order to match, got tokens and tokens*2",
        t(TOKENS, 6), t(4, 5, 6), _PAIRS2, t(5, element=I32), gather=0,
    ),
    fault("moe.grouped_gemm", "gather >= 0, got -1", t(3, 6), t(4, 5, 6), _PAIRS2, t(5, element=I32), gather=-1),
    fault(
        "moe.grouped_gemm", "first = 0 where there are no stand-ins, got 4",
        t(TOKENS, 6), t(4, 5, 6), _PAIRS2, t(5, element=I32), gather=2, first=4,
    ),
    fault(
        "moe.grouped_gemm", "first = 0 or 4, the stand-ins, got 3",
        t(TOKENS, 6), t(4, 5, 6), _PAIRS2, t(9, element=I32), gather=2, first=3,
    ),
    fault("moe.stand_ins", "num_experts >= 1, got 0", t(3, 2, element=I32), num_experts=0),
    fault(
        "moe.join_rows", "y and others of one type",
        t(TOKENS * 2, 6), t(TOKENS * 2, 5), t(9, element=I32), first=4,
    ),
    fault(
        "moe.join_rows", "first to be one of 4 groups but group 0, got 4",
        t(TOKENS * 2, 6), t(TOKENS * 2, 6), t(5, element=I32), first=4,
    ),
    fault("moe.combine", "rows of y and order to match, got 5 and tokens*2", t(5, 6), t(TOKENS, 2), _PAIRS2),
    fault(
        "moe.combine", "tokens * top_k of weights and rows of order to match, got tokens*3 and tokens*2",
        t(TOKENS * 2, 6), t(TOKENS, 3), _PAIRS2,
    ),
)  # fmt: skip
