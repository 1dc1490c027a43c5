"""Tile level: lanes compared, chosen, filled, taken out and added up."""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import F32, I1, I32
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops.tile import larger
from ir.ops.tile_types import check_arithmetic, check_lanes, element_of, lanes_of, with_element
from ir.traits import Pure
from ir.types import ScalarType, Type, VectorType

_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@register_op
class CompareOp(Op):
    """Lane by lane comparison, signed for integers. With NaN only `ne` holds.

    %m = tile.compare %a, %b {predicate = "lt"} : (index, index) -> i1
    """

    name = "tile.compare"
    traits = (Pure,)
    a = operand("left")
    b = operand("right")
    predicate = attr(str, "lt, le, eq, ne, gt or ge")
    out = result("i1, as many lanes")

    @staticmethod
    def infer_types(a: Type, b: Type, predicate: str) -> Type:
        expect(a == b, f"expected both operands of one type, got {a} and {b}")
        check_arithmetic(a)
        expect(predicate in _COMPARE, f"expected predicate one of {', '.join(_COMPARE)}, got {predicate!r}")
        return with_element(a, I1)

    @staticmethod
    def reference(a: Any, b: Any, predicate: str) -> Any:
        return _COMPARE[predicate](a, b)


@register_op
class SelectOp(Op):
    """a where the condition holds, else b, lane by lane (a scalar condition chooses whole vectors).

    %y = tile.select %m, %a, %b : (i1, f32, f32) -> f32
    """

    name = "tile.select"
    traits = (Pure,)
    condition = operand("i1")
    a = operand("where it holds")
    b = operand("elsewhere")
    out = result("type of a and b")

    @staticmethod
    def infer_types(condition: Type, a: Type, b: Type) -> Type:
        expect(a == b, f"expected both values of one type, got {a} and {b}")
        element_of(a)
        expect(element_of(condition) == I1, f"expected an i1 condition, got {condition}")
        expect(lanes_of(condition) in (1, lanes_of(a)), f"condition {condition} does not fit {a}")
        return a

    @staticmethod
    def reference(condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b).astype(np.asarray(a).dtype)[()]


@register_op
class SplatOp(Op):
    """A scalar in every lane.

    %v = tile.splat %x {lanes = 16} : (f32) -> vector<16 x f32>
    """

    name = "tile.splat"
    traits = (Pure,)
    x = operand("scalar")
    lanes = attr(int, "how many")
    out = result("vector")

    @staticmethod
    def infer_types(x: Type, lanes: int) -> Type:
        expect(not isinstance(x, VectorType), f"expected a scalar, got {x}")
        check_lanes(lanes)
        return VectorType(lanes, element_of(x))

    @staticmethod
    def reference(x: Any, lanes: int) -> Any:
        return np.full(lanes, x, np.asarray(x).dtype)


@register_op
class IotaOp(Op):
    """0, 1, 2, ... as i32 lanes.

    %v = tile.iota {lanes = 16} : () -> vector<16 x i32>
    """

    name = "tile.iota"
    traits = (Pure,)
    lanes = attr(int, "how many")
    out = result("i32 vector")

    @staticmethod
    def infer_types(lanes: int) -> Type:
        check_lanes(lanes)
        return VectorType(lanes, I32)

    @staticmethod
    def reference(lanes: int) -> Any:
        return np.arange(lanes, dtype=np.int32)


@register_op
class ExtractOp(Op):
    """One lane.

    %x = tile.extract %v {lane = 3} : (vector<16 x f32>) -> f32
    """

    name = "tile.extract"
    traits = (Pure,)
    v = operand("vector")
    lane = attr(int, "which, from 0")
    out = result("scalar")

    @staticmethod
    def infer_types(v: Type, lane: int) -> Type:
        expect(isinstance(v, VectorType), f"expected a vector, got {v}")
        expect(0 <= lane < lanes_of(v), f"expected a lane below {lanes_of(v)}, got {lane}")
        return ScalarType(element_of(v))

    @staticmethod
    def reference(v: Any, lane: int) -> Any:
        return v[lane]


@register_op
class ReduceOp(Op):
    """All lanes of an f32 vector combined by halving: lane i with lane i + n/2, and so on.

    The order is part of the meaning, so that a sum has the same bits on every target. max is `tile.max` of the two.

    %s = tile.reduce %v {kind = "add"} : (vector<16 x f32>) -> f32
    """

    name = "tile.reduce"
    traits = (Pure,)
    v = operand("f32 vector, a power of two of lanes")
    kind = attr(str, "add or max")
    out = result("f32")

    @staticmethod
    def infer_types(v: Type, kind: str) -> Type:
        expect(isinstance(v, VectorType) and element_of(v) == F32, f"expected an f32 vector, got {v}")
        expect(lanes_of(v).bit_count() == 1, f"expected a power of two of lanes, got {lanes_of(v)}")
        expect(kind in ("add", "max"), f"expected kind add or max, got {kind!r}")
        return ScalarType(F32)

    @staticmethod
    def reference(v: Any, kind: str) -> Any:
        combine = np.add if kind == "add" else larger
        while len(v) > 1:
            v = combine(v[: len(v) // 2], v[len(v) // 2 :])
        return v[0]
