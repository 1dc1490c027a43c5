"""tensor.*: one token and many, odd sizes, broadcast biases, all float elements."""

from __future__ import annotations

import numpy as np

from ir.attributes import SymbolRef
from ir.types import Layout, SymbolicDim
from tests.samples.base import BF16, F16, F32, I32, ROWS, TOKENS, Fault, Sample, fault, ints, normal, packed, sample, t
from tests.samples.quant import Q3, Q4, Q4_ZP

_WEIGHT = normal(3, 5, element=BF16)
_EXPERTS = {f"experts.{i}.up": normal(4, 2, seed=str(i), element=BF16) for i in range(3)}

SAMPLES = (
    Sample(
        "tensor.constant", "bf16", (), (), {"symbol": SymbolRef("model.norm.weight")},
        result_types=(t(3, 5, element=BF16),), weights={"model.norm.weight": _WEIGHT},
    ),
    Sample(
        "tensor.constant", "quoted_name", (), (), {"symbol": SymbolRef("a/b c")},
        result_types=(t(3, 5, element=BF16),), weights={"a/b c": _WEIGHT},
    ),
    Sample(
        "tensor.constant_stack", "three", (), (), {"symbol": SymbolRef("experts.*.up"), "count": 3},
        result_types=(t(3, 4, 2, element=BF16),), weights=_EXPERTS,
    ),
    Sample(
        "tensor.constant_stack", "some", (), (), {"symbol": SymbolRef("experts.*.up"), "count": 2, "members": (0, 2)},
        result_types=(t(2, 4, 2, element=BF16),), weights=_EXPERTS,
    ),
    sample("tensor.concat", "axis0", normal(2, 3), normal(4, 3, seed="b"), normal(1, 3), axis=0),
    sample("tensor.concat", "axis1_stacked", normal(2, 3, 5), normal(2, 4, 5), axis=1),
    sample("tensor.concat", "one", normal(7), axis=0),
    sample("tensor.concat", "symbols", normal(2, 3), normal(4, 3), types=(t(TOKENS, 3), t(TOKENS * 2, 3)), axis=0),
    sample("tensor.concat", "low_bit", packed(normal(2, 32), Q4_ZP), packed(normal(3, 32), Q4_ZP), axis=0),
    sample("tensor.concat", "low_bit_stacked", packed(normal(2, 3, 8), Q3), packed(normal(2, 4, 8), Q3), axis=1),
    sample("tensor.slice", "low_bit", packed(normal(2, 5, 32), Q4), axis=1, start=1, size=3),
    sample("tensor.reshape", "low_bit", packed(normal(2, 5, 32), Q4), shape=(10, 32)),
    sample("tensor.layout", "low_bit", packed(normal(5, 32), Q4), layout=Layout(16, 4)),
    sample("tensor.slice", "middle", normal(3, 10), types=(t(TOKENS, 10),), axis=1, start=4, size=3),
    sample("tensor.slice", "whole", normal(1, 5, element=BF16), axis=1, start=0, size=5),
    sample("tensor.reshape", "heads", normal(3, 12), types=(t(TOKENS, 12),), shape=(TOKENS, 3, 4)),
    sample("tensor.reshape", "pairs", normal(3, 2, 5), types=(t(TOKENS, 2, 5),), shape=(TOKENS * 2, 5)),
    sample("tensor.reshape", "static", normal(4, 6), shape=(24,)),
    sample("tensor.cast", "f32_bf16", normal(3, 5), to=BF16),
    sample("tensor.cast", "bf16_f32", normal(3, 5, element=BF16), to=F32),
    sample("tensor.cast", "f16_f32", normal(1, element=F16), to=F32),
    sample("tensor.cast", "ties_to_even", np.array([1.00390625, 1.01171875, -1.00390625], np.float32), to=BF16),
    sample("tensor.layout", "bf16", normal(64, 6, element=BF16), layout=Layout(16, 2)),
    sample("tensor.layout", "padded", normal(5, 3), layout=Layout(16)),
    sample("tensor.layout", "experts", normal(2, 8, 4, element=BF16), layout=Layout(4, 2, interleave=2)),
    sample(
        "tensor.embed", "bf16", ints(4, 0, 4), normal(5, 6, element=BF16),
        types=(t(TOKENS, element=I32), t(5, 6, element=BF16)),
    ),
    sample("tensor.embed", "one_token", ints(2), normal(3, 1)),
    sample("tensor.gather_rows", "last_only", normal(4, 3), ints(3), types=(t(TOKENS, 3), t(ROWS, element=I32))),
    sample("tensor.gather_rows", "repeated", normal(4, 3), ints(3, 0, 0, 2, 1)),
    sample("tensor.add", "residual", normal(3, 5), normal(3, 5, seed="b")),
    sample("tensor.add", "bias", normal(3, 5), normal(5), types=(t(TOKENS, 5), t(5))),
    sample("tensor.add", "bias_first", normal(5), normal(1, 5)),
    sample("tensor.add", "bf16", normal(2, 7, element=BF16), normal(2, 7, seed="b", element=BF16)),
    sample("tensor.mul", "gate", normal(3, 5), normal(3, 5, seed="b")),
    sample("tensor.mul", "gain", normal(2, 3, 5), normal(3, 5)),
    sample("tensor.silu", "many", normal(3, 5)),
    sample("tensor.silu", "extremes", np.array([-200.0, -1e-30, 0.0, 200.0], np.float32)),
    sample("tensor.silu", "bf16", normal(1, 7, element=BF16)),
    sample("tensor.clip", "both_sides", normal(3, 5, scale=3.0), low=-1.5, high=2.0),
    sample("tensor.clip", "point", normal(4), low=0.0, high=0.0),
    sample("tensor.swiglu", "many", normal(3, 10), types=(t(TOKENS, 10),)),
    sample("tensor.swiglu", "one", normal(1, 2, element=BF16)),
)  # fmt: skip


def _stack_fault(message: str, symbol: str, *shape: int, members: tuple[int, ...] = ()) -> Fault:
    attributes = {"symbol": SymbolRef(symbol), "count": 2, "members": members}
    return Fault("tensor.constant_stack", (), message, attributes, result_types=(t(*shape),))


FAULTS = (
    _stack_fault("expected one '*'", "a", 2, 3),
    _stack_fault("expected a tensor whose first dimension is count = 2, got", "*", 3, 2),
    _stack_fault("expected 2 ascending members of tensor.constant_stack, got [3, 1]", "*", 2, 3, members=(3, 1)),
    _stack_fault("expected 2 ascending members of tensor.constant_stack, got [1]", "*", 2, 3, members=(1,)),
    fault("tensor.concat", "one operand or more, got none", axis=0),
    fault("tensor.concat", "0 <= axis < 2, got axis = 2", t(2, 3), t(2, 3), axis=2),
    fault("tensor.concat", "operands 0 and 1 to agree off axis 0", t(2, 3), t(2, 4), axis=0),
    fault("tensor.concat", "elements of operands 0 and 1 to match, got f32 and bf16", t(2), t(2, element=BF16), axis=0),
    fault("tensor.concat", "add up, got tokens and 4", t(TOKENS), t(4), axis=0),
    fault(
        "tensor.concat",
        "whole rows of a low-bit tensor, got axis = 1",
        t(2, 32, element=Q4),
        t(2, 32, element=Q4),
        axis=1,
    ),
    fault(
        "tensor.slice", "whole rows of a low-bit tensor, got axis = 1", t(2, 64, element=Q4), axis=1, start=0, size=32
    ),
    fault(
        "tensor.reshape",
        "expected whole rows of q4_sym<group=32, scale=f16> to stay",
        t(2, 64, element=Q4),
        shape=(4, 32),
    ),
    fault("tensor.slice", "inside of 0 .. 10, got start = 8, size = 3", t(10), axis=0, start=8, size=3),
    fault("tensor.slice", "a known size along axis 0, got tokens", t(TOKENS), axis=0, start=0, size=1),
    fault("tensor.reshape", "as many elements before as after", t(TOKENS, 6), shape=(TOKENS, 5)),
    fault("tensor.reshape", "one symbolic dimension at most", t(TOKENS, ROWS), shape=(ROWS, TOKENS)),
    fault("tensor.cast", "a cast to f32, bf16 or f16, got to = i32", t(3), to=I32),
    fault("tensor.cast", "expected x of f32, bf16 or f16", t(3, element=I32), to=F32),
    fault("tensor.layout", "w of rank 2 or 3", t(3), layout=Layout(4)),
    fault("tensor.layout", "w of known size", t(TOKENS, 3), layout=Layout(4)),
    fault("tensor.layout", "multiple of interleave = 2, got 5", t(5, 3), layout=Layout(4, 1, interleave=2)),
    fault("tensor.layout", "positive rows", t(5, 3), layout=Layout(0)),
    fault("tensor.embed", "expected ids of i32", t(3), t(5, 6)),
    fault("tensor.embed", "expected table of rank 2", t(3, element=I32), t(6)),
    fault("tensor.gather_rows", "expected rows of rank 1", t(3, 4), t(2, 2, element=I32)),
    fault("tensor.add", "elements of a and b to match, got f32 and bf16", t(3), t(3, element=BF16)),
    fault("tensor.add", "trailing dimensions", t(3, 4), t(3)),
    fault("tensor.mul", "trailing dimensions", t(TOKENS, 4), t(SymbolicDim("rows"), 4)),
    fault("tensor.silu", "expected x of f32, bf16 or f16", t(3, element=I32)),
    fault("tensor.clip", "low <= high, got low = 1.0, high = -1.0", t(3), low=1.0, high=-1.0),
    fault("tensor.swiglu", "last dimension of x to be a multiple of 2, got 5", t(3, 5)),
)
