"""einsum.*: the steps of a cascade of einsums for one query row of attention (FuseMax, arXiv:2406.10491).

`contract` and `reduce` traverse a rank and finish with it; `map` works point by point. A cascade's cost in passes over
a rank is how often a finished traversal must be followed by another one of the same rank. `fold` makes one traversal
explicit: it meets a rank block by block and carries running values along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.core import Region
from ir.diagnostics import DiagnosticSink
from ir.formats import F32, I1
from ir.op_def import InferenceError, Op, attr, expect, operand, region, register_op, result
from ir.ops import checks
from ir.ops.fused import yielded_types
from ir.sizes import dim_size, num_elements
from ir.traits import HasRecursiveEffects, IsolatedFromAbove, Pure
from ir.types import Dim, SymbolicDim, TensorType, Type

BLOCK = "block"  # the symbolic dimension of a block of a folded rank; the last block may be shorter
LOWEST = float(np.finfo(np.float32).min)


def parse_spec(spec: str, num_inputs: int) -> tuple[list[str], str]:
    """("cd", "d"), "c" of "cd,d->c". Raises InferenceError when the text does not fit `num_inputs` operands."""
    left, arrow, right = spec.partition("->")
    inputs = left.split(",")
    letters = all(c.isalpha() and c.islower() for c in "".join(inputs) + right)
    distinct = all(len(set(part)) == len(part) for part in [*inputs, right])
    well_formed = arrow == "->" and letters and distinct and len(inputs) == num_inputs
    expect(well_formed, f"expected a spec like 'cd,d->c' for {num_inputs} operands, got {spec!r}")
    expect(set(right) <= set("".join(inputs)), f"expected every rank of the result on the left, got {spec!r}")
    return inputs, right


def _bind_ranks(names: str, type: TensorType, what: str, bound: dict[str, Dim]) -> None:
    expect(len(names) == type.rank, f"expected {what} of rank {len(names)} for ranks {names!r}, got {type}")
    for rank, dim in zip(names, type.shape, strict=True):
        if rank in bound:
            checks.same(f"rank {rank} of the operands", bound[rank], dim)
        bound[rank] = dim


def _f32_tensor(type: Type, name: str) -> TensorType:
    found = checks.tensor(type, name)
    expect(found.element == F32, f"expected {name} of f32, got {found}")
    return found


@register_op
class ContractOp(Op):
    """Sum of products over the ranks that the result lacks, in the notation of Einstein.

    Example:
        %s = einsum.contract %k, %q {spec = "cd,d->c"} : (tensor<ctx x 16 x f32>, tensor<16 x f32>) -> tensor<ctx x f32>
    """

    name = "einsum.contract"
    traits = (Pure,)
    a = operand("f32 tensor")
    b = operand("f32 tensor")
    spec = attr(str, "ranks of a, b and the result, one letter each: 'cd,d->c'")
    y = result("f32")

    @staticmethod
    def infer_types(a: Type, b: Type, *, spec: str) -> TensorType:
        inputs, output = parse_spec(spec, 2)
        bound: dict[str, Dim] = {}
        _bind_ranks(inputs[0], _f32_tensor(a, "a"), "a", bound)
        _bind_ranks(inputs[1], _f32_tensor(b, "b"), "b", bound)
        return TensorType(tuple(bound[rank] for rank in output), F32)

    @staticmethod
    def reference(a: np.ndarray, b: np.ndarray, *, spec: str) -> np.ndarray:
        return np.asarray(np.einsum(spec, a.astype(np.float64), b.astype(np.float64))).astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        ranks: dict[str, Dim] = {}
        for names, value in zip(parse_spec(self.spec, 2)[0], (self.a, self.b), strict=True):
            ranks |= dict(zip(names, value.type.shape, strict=True))
        return 2 * num_elements(TensorType(tuple(ranks.values()), F32), sizes)


@register_op
class ReduceOp(Op):
    """The largest element, or the sum, over the ranks that the result lacks.

    Example:
        %m = einsum.reduce %s {op = "max", spec = "c->"} : (tensor<ctx x f32>) -> tensor<f32>
    """

    name = "einsum.reduce"
    traits = (Pure,)
    x = operand("f32 tensor")
    op = attr(str, "max or sum")
    spec = attr(str, "ranks of x and of the result, one letter each: 'c->'")
    y = result("f32")

    @staticmethod
    def infer_types(x: Type, *, op: str, spec: str) -> TensorType:
        inputs, output = parse_spec(spec, 1)
        expect(op in ("max", "sum"), f"expected op max or sum, got {op!r}")
        bound: dict[str, Dim] = {}
        _bind_ranks(inputs[0], _f32_tensor(x, "x"), "x", bound)
        in_order = [rank for rank in inputs[0] if rank in output]
        expect(in_order == list(output), f"expected the ranks of the result in the order of x, got {spec!r}")
        return TensorType(tuple(bound[rank] for rank in output), F32)

    @staticmethod
    def reference(x: np.ndarray, *, op: str, spec: str) -> np.ndarray:
        (names,), output = parse_spec(spec, 1)
        axes = tuple(i for i, rank in enumerate(names) if rank not in output)
        wide = x.astype(np.float64)
        reduced = wide.max(axis=axes) if op == "max" else wide.sum(axis=axes)
        return np.asarray(reduced).astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return num_elements(self.x.type, sizes)


MAP_ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "exp": 1, "mask": 2}


def _apply(op: str, xs: Sequence[np.ndarray]) -> np.ndarray:
    match op:
        case "add":
            return xs[0] + xs[1]
        case "sub":
            return xs[0] - xs[1]
        case "mul":
            return xs[0] * xs[1]
        case "div":
            return xs[0] / xs[1]
        case "max":
            return np.maximum(xs[0], xs[1])
        case "exp":
            return np.exp(xs[0])
        case "mask":
            return np.where(xs[1].astype(bool), xs[0], -np.inf)
    raise ValueError(f"no map {op!r}")


@register_op
class MapOp(Op):
    """A function of one point: add, sub, mul, div, max, exp, or mask (x where the mask is true, else -inf).

    Operands have one shape; those of rank 0 are the same at every point.

    Example:
        %t = einsum.map %s, %m {op = "sub"} : (tensor<ctx x f32>, tensor<f32>) -> tensor<ctx x f32>
    """

    name = "einsum.map"
    traits = (Pure,)
    xs = operand("f32 tensors; the second of mask is i1", variadic=True)
    op = attr(str, "add, sub, mul, div, max, exp or mask")
    y = result("f32")

    @staticmethod
    def infer_types(*xs: Type, op: str) -> TensorType:
        expect(op in MAP_ARITY, f"expected op among {', '.join(MAP_ARITY)}, got {op!r}")
        expect(len(xs) == MAP_ARITY[op], f"expected {MAP_ARITY[op]} operands of {op}, got {len(xs)}")
        shape: tuple[Dim, ...] = ()
        for i, x in enumerate(xs):
            found = checks.tensor(x, f"operand {i}")
            wanted = I1 if op == "mask" and i == 1 else F32
            expect(found.element == wanted, f"expected operand {i} of {op} of {wanted}, got {found}")
            fits = not shape or not found.shape or found.shape == shape
            expect(fits, f"expected operands of one shape or of rank 0, got {', '.join(map(str, xs))}")
            shape = shape or found.shape
        return TensorType(shape, F32)

    @staticmethod
    def reference(*xs: np.ndarray, op: str) -> np.ndarray:
        return np.asarray(_apply(op, [x.astype(np.float64) for x in xs])).astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return num_elements(self.y.type, sizes)


@register_op
class FoldOp(Op):
    """One traversal of the rank `rank`, `block` points at a time, running values carried from block to block.

    `carry` has one word per running value, which starts at the identity of that reduction: "sum" at 0, "max" at the
    lowest finite f32 (finite, so that a block of nothing but -inf leaves differences of maxima defined). The region
    takes the running values, then one argument per operand: a block [block, ...] of an operand whose first dimension
    is the rank, the whole of any other. It yields the new running values; the last ones are the results.

    Example:
        %l = einsum.fold %x {rank = "ctx", block = 64, carry = ["sum"]} ({
          ^(%sum: tensor<f32>, %b: tensor<block x f32>):
            %s = einsum.reduce %b {op = "sum", spec = "c->"} : (tensor<block x f32>) -> tensor<f32>
            %n = einsum.map %sum, %s {op = "add"} : (tensor<f32>, tensor<f32>) -> tensor<f32>
            tensor.yield %n : (tensor<f32>) -> ()
        }) : (tensor<ctx x f32>) -> tensor<f32>
    """

    name = "einsum.fold"
    traits = (IsolatedFromAbove, HasRecursiveEffects)
    xs = operand("tensors; those whose first dimension is `rank` are met block by block", variadic=True)
    rank = attr(str, "name of the symbolic dimension that is traversed")
    block = attr(int, "points per block")
    carry = attr(tuple, "one of 'max' and 'sum' per running value: where it starts")
    body = region("(running values, operands' blocks) -> running values")
    outputs = result("the last running values", variadic=True)

    @classmethod
    def inferred_types(
        cls, operand_types: Sequence[Type], attributes: dict[str, Any], regions: Sequence[Region] = ()
    ) -> tuple[Type, ...]:
        carry, rank, block = attributes["carry"], attributes["rank"], attributes["block"]
        yielded = yielded_types(cls.name, regions)
        arguments = tuple(a.type for a in regions[0].block.arguments)
        known = all(c in ("max", "sum") for c in carry)
        fits = known and len(carry) == len(yielded)
        expect(fits, f"expected max or sum for each of {len(yielded)} yielded values, got carry = {list(carry)}")
        expect(block >= 1, f"expected block >= 1, got {block}")
        blocks = [cls.block_type(t, rank) for t in operand_types]
        expect(blocks != list(operand_types), f"expected an operand whose first dimension is {rank}, got none")
        wanted = (*yielded, *blocks)
        texts = [", ".join(map(str, types)) for types in (wanted, arguments)]
        expect(wanted == arguments, f"expected block arguments ({texts[0]}), got ({texts[1]})")
        for type in yielded:
            expect(_f32_tensor(type, "a running value").static, f"expected running values of known size, got {type}")
        return yielded

    @staticmethod
    def block_type(type: Type, rank: str) -> TensorType:
        """The type of the block argument for an operand of type `type`."""
        found = checks.tensor(type, "an operand")
        if found.shape and found.shape[0] == SymbolicDim(rank):
            return found.with_shape(SymbolicDim(BLOCK), *found.shape[1:])
        return found

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        folded = [self.block_type(x.type, self.rank) != x.type for x in self.xs]
        extent = next(len(value) for value, cut in zip(values, folded, strict=True) if cut)
        running: tuple[Any, ...] = tuple(
            np.full([dim_size(d, {}) for d in checks.tensor(r.type, "a running value").shape], start, np.float32)
            for r, start in zip(self.results, [LOWEST if c == "max" else 0.0 for c in self.carry], strict=True)
        )
        for start in range(0, extent, self.block):
            met = [
                value[start : start + self.block] if cut else value for value, cut in zip(values, folded, strict=True)
            ]
            running = tuple(context.run_region(self.body, (*running, *met)))
        return running

    def verify(self, diag: DiagnosticSink) -> None:
        try:
            self.inferred_types([x.type for x in self.xs], self.attributes, self.regions)
        except InferenceError as error:
            diag.error(self.location, str(error))

    def flops(self, sizes: dict[str, int]) -> int:
        inner = sizes | {BLOCK: self.block}
        rounds = -(-sizes[self.rank] // self.block)
        return rounds * sum(op.flops(inner) for op in self.body.block.ops if isinstance(op, Op))
