"""What a model loses when one group of weights is stored in one format: measured, or estimated from the weights.

    table = SensitivityTable(path)                            # kept on disk line by line: a killed run goes on
    measure(products, read, tokens, candidates, table)        # with tokens: Kullback-Leibler divergence of the logits
    estimate(products, read, candidates, table)               # without: error of the weights, see `loss_prior`

The loss of a pair (group, candidate) is the mean divergence KL(model || model with this one group in that format), in
nats per token, over the given tokens. Where so many runs of the model would take too long, it is measured with one
candidate in the middle and scaled by the relative error of the product's output, |y - y'|^2 / |y|^2, which is measured
for every candidate (the divergence grows with the square of a small perturbation). Losses of several groups add up
nearly: each is small and their directions are unrelated.

`estimate` knows no activations: it expects inputs of independent elements whose sizes are the gains of the norm in
front, and multiplies the relative error of the output by what that costs on average in this part of a model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import F32, PlainFormat
from ir.ops.builtin import FuncOp
from ir.ops.norm import RmsNormOp
from passes.quantize.forward import Factors, Forward, ProductOp, constant_value
from passes.quantize.loss_prior import PRIOR
from passes.quantize.rounding import quantize_rows
from passes.quantize.sensitivity_table import Candidate, Entry, SensitivityTable
from passes.quantize.weight_groups import WeightGroup, expert_name

MAX_DIRECT_FLOPS = 2e13  # above, one candidate of each group is run through the model, not all
MAX_FLOPS = 6e13  # of these runs; what takes more gets fewer sequences
Products = Sequence[tuple[ProductOp, WeightGroup]]
Tell = Callable[[int, int], None]  # pairs done, pairs in all


# -- with activations ------------------------------------------------------------------------------------------------


def measure(
    func: FuncOp,
    products: Products,
    read: Callable[[str], np.ndarray],
    tokens: np.ndarray,
    candidates: Sequence[Candidate],
    table: SensitivityTable,
    *,
    row_step: int = 1,
    max_direct_flops: float = MAX_DIRECT_FLOPS,
    by_expert: bool = False,
    tell: Tell | None = None,
) -> None:
    """Fills `table` for every pair that fits, from the int32 `tokens` [sequences, length]; what it knows is kept.

    `func` is the one that `products` are in. `by_expert`: what is known of stacks without their experts is not enough.
    """
    by_op = dict(products)
    missing = {g.name: _missing(g, candidates, table, by_expert) for g in by_op.values()}
    total = sum(len(m) for m in missing.values())
    if not total:
        return
    counts = [
        sum(c.fits(g) for c in candidates) for _, g in products
    ]  # not what is missing: a resumed run decides alike
    direct = tokens.size * _flops_behind(products, counts) <= max_direct_flops
    forward = Forward(func, read, tokens, row_step=row_step)
    base = log_softmax(_finite_logits(forward, by_op))
    done = 0
    for visit in forward.products():
        group = by_op.get(visit.op)
        wanted = missing[group.name] if group is not None else []
        if group is None or not wanted:
            continue
        exact = visit.factors.product()
        apart: dict[Candidate, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        if direct:
            for candidate in wanted:
                y, error = _lowered(visit.factors, candidate, exact)
                loss = divergence(base, visit.logits_with(y))
                split = _by_expert(visit.factors, y - exact)
                table.add([Entry(group.name, str(candidate), error, loss, "measured", *split)])
                done += 1
                if tell is not None:
                    tell(done, total)
            continue
        errors = {}
        for candidate in wanted:
            y, errors[candidate] = _lowered(visit.factors, candidate, exact)
            apart[candidate] = _by_expert(visit.factors, y - exact)
        middle = sorted(wanted, key=lambda c: (errors[c], str(c)))[len(wanted) // 2]
        loss = divergence(base, visit.logits_with(_lowered(visit.factors, middle, exact)[0]))
        gain = loss / errors[middle] if errors[middle] else 0.0
        table.add(
            [
                Entry(group.name, str(c), e, gain * e, "measured" if c is middle else "scaled", *apart[c])
                for c, e in errors.items()
            ]
        )
        done += len(wanted)
        if tell is not None:
            tell(done, total)


def _finite_logits(forward: Forward, groups: Mapping[ProductOp, WeightGroup]) -> np.ndarray:
    """The logits. Raises DiagnosticError when some are not finite, naming the weights where that begins."""
    with np.errstate(all="ignore"):
        logits = forward.run()
        if np.isfinite(logits).all():
            return logits
        for visit in forward.products():
            where = groups[visit.op].name if visit.op in groups else str(visit.op.location.origin)
            if not np.isfinite(visit.factors.w).all():
                raise DiagnosticError(
                    "the weights hold NaN or infinite numbers", where=where, expected="finite numbers"
                )
            if not np.isfinite(visit.factors.x).all():
                message = "what these weights multiply is not finite"
                hint = "tensors in front of them (the embedding table, norms) hold NaN or infinite numbers"
                raise DiagnosticError(message, where=where, expected="finite numbers", hint=hint)
    raise DiagnosticError("the logits of the model are not finite", expected="finite numbers")


def affordable_sequences(products: Products, length: int, limit: float = MAX_FLOPS) -> int:
    """How many sequences of `length` tokens `measure` may run through all that is behind each product; at least 1."""
    return max(1, int(limit // (length * _flops_behind(products, [1] * len(products)))))


def _flops_behind(products: Products, counts: Sequence[int]) -> float:
    """For one token, of running the model from each product on as many times as `counts` says."""
    sizes = [2.0 * g.count * _share_used(g) for _, g in products]
    return sum(count * sum(sizes[at:]) for at, count in enumerate(counts)) or 1.0


def _share_used(group: WeightGroup) -> float:
    """Of the experts' weights a token uses few; a guess of two is enough for a limit."""
    return min(1.0, 2.0 / group.shape[0]) if len(group.shape) == 3 else 1.0


def _missing(
    group: WeightGroup, candidates: Sequence[Candidate], table: SensitivityTable, by_expert: bool
) -> list[Candidate]:
    """The candidates of a group that have to be measured."""
    apart = by_expert and len(group.shape) == 3
    found = []
    for candidate in candidates:
        entry = table.get(group, candidate)
        if candidate.fits(group) and (entry is None or (apart and not entry.experts)):
            found.append(candidate)
    return found


def _by_expert(factors: Factors, off: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(squared error of a row of each expert, rows of each); nothing of a plain product."""
    if factors.offsets is None:
        return (), ()
    starts = factors.offsets.tolist()
    squares = np.add.reduceat(np.append(np.square(off, dtype=np.float64).sum(axis=1), 0.0), starts[:-1])
    uses = [float(b - a) for a, b in itertools.pairwise(starts)]
    return tuple(float(s) / u if u else 0.0 for s, u in zip(squares.tolist(), uses, strict=True)), tuple(uses)


def _lowered(factors: Factors, candidate: Candidate, exact: np.ndarray) -> tuple[np.ndarray, float]:
    """(the rounded product, its squared error relative to `exact`)."""
    y = lowered_product(factors, candidate)
    off = y - exact
    return y, float(np.vdot(off, off)) / (float(np.vdot(exact, exact)) or 1.0)


def lowered_product(factors: Factors, chosen: Candidate | Sequence[Candidate]) -> np.ndarray:
    """f32 [m, n]: the product when both factors are rounded to the formats of the candidate, or of each expert's.

    Of stacked matrices one is rounded at a time, and only those of experts that have rows.
    """
    width = factors.x.shape[1]
    if isinstance(chosen, Candidate):
        x = round_values(factors.x, chosen.activations_for(width), "nearest")
        if factors.offsets is None:
            return Factors(x, round_values(factors.w, chosen.weights, chosen.rounding)).product()
        chosen = [chosen] * len(factors.w)
    assert factors.offsets is not None
    y = np.zeros((factors.x.shape[0], factors.w.shape[1]), np.float32)
    for expert, (matrix, one) in enumerate(zip(factors.w, chosen, strict=True)):
        rows = slice(int(factors.offsets[expert]), int(factors.offsets[expert + 1]))
        if rows.start < rows.stop:
            x = round_values(factors.x[rows], one.activations_for(width), "nearest")
            y[rows] = Factors(x, round_values(matrix, one.weights, one.rounding)).product()
    return y


def round_values(values: np.ndarray, format: Any, rounding: str) -> np.ndarray:
    """f32: what `values` [rows, k] are after having been stored in the format."""
    if isinstance(format, PlainFormat):
        return np.asarray(values if format == F32 else format.pack(values), np.float32)
    return format.unpack(quantize_rows(format, values, rounding))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """f32 [rows, vocabulary], normalized."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def divergence(base: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL(p || q) in nats: p by its log-probabilities [rows, vocabulary], q by its logits."""
    total = 0.0
    for start in range(0, base.shape[0], 256):
        p, q = base[start : start + 256], log_softmax(logits[start : start + 256])
        total += float((np.exp(p, dtype=np.float64) * (p - q)).sum())
    return max(0.0, total / max(1, base.shape[0]))


class WholeModel:
    """The model over a batch of tokens, to compare assignments of a format to every group."""

    def __init__(
        self,
        func: FuncOp,
        products: Products,
        read: Callable[[str], np.ndarray],
        tokens: np.ndarray,
        *,
        row_step: int = 1,
    ) -> None:
        self._groups = dict(products)
        self._forward = Forward(func, read, tokens, row_step=row_step)
        self._base = log_softmax(_finite_logits(self._forward, self._groups))

    def loss(self, assignment: Mapping[str, Candidate]) -> float:
        """Mean KL divergence in nats per token of the model whose groups, or experts, are stored so; others stay in
        f32."""

        def answer(op: ProductOp, factors: Factors) -> np.ndarray | None:
            group = self._groups.get(op)
            if group is None:
                return None
            if group.name in assignment:
                return lowered_product(factors, assignment[group.name])
            return lowered_product(factors, [assignment[expert_name(group.name, e)] for e in range(group.shape[0])])

        return divergence(self._base, self._forward.run(answer))


# -- without ---------------------------------------------------------------------------------------------------------


def estimate(
    products: Products,
    read: Callable[[str], np.ndarray],
    candidates: Sequence[Candidate],
    table: SensitivityTable,
    *,
    by_expert: bool = False,
    tell: Tell | None = None,
) -> None:
    """Fills `table` without any text, for every pair that fits; what it knows is kept."""
    total, done = len(products) * len(candidates), 0
    for op, group in products:
        wanted = _missing(group, candidates, table, by_expert)
        if wanted:
            gains = _input_gains(op, read, group.shape[-1])
            matrices = constant_value(op.w, read).reshape(-1, *group.shape[-2:])
            if not all(np.isfinite(m).all() for m in matrices):
                raise DiagnosticError(
                    "the weights hold NaN or infinite numbers", where=group.name, expected="finite numbers"
                )
            size = math.fsum(_weighted(m, gains) for m in matrices) or 1.0
            entries = []
            for candidate in wanted:
                errors = [
                    _weighted(round_values(m, candidate.weights, candidate.rounding) - np.asarray(m, np.float32), gains)
                    for m in matrices
                ]
                error = math.fsum(errors) / size
                prior = PRIOR.get(group.parts[0], PRIOR["attention.q"])
                stacked = len(group.shape) == 3
                apart = (tuple(errors), (1.0,) * len(errors)) if stacked else ((), ())
                entries.append(Entry(group.name, str(candidate), error, prior * error, "estimated", *apart))
            table.add(entries)
        done += len(candidates)
        if tell is not None:
            tell(done, total)


def _weighted(matrix: np.ndarray, gains: np.ndarray) -> float:
    """Sum of squares of [n, k], each column times its gain."""
    return float((matrix.astype(np.float64) ** 2).sum(axis=0) @ gains**2)


def _input_gains(op: ProductOp, read: Callable[[str], np.ndarray], k: int) -> np.ndarray:
    """f64 [k]: how large the inputs of a product are beside one another: by the gains of the norm in front, else 1."""
    maker = op.operands[0].defining_op()
    if isinstance(maker, RmsNormOp):
        name = _constant_name(maker.operands[1])
        if name is not None:
            return read(name).astype(np.float64).reshape(k)
    return np.ones(k)


def _constant_name(value: Value) -> str | None:
    """The constant behind a value, casts in between."""
    op = value.defining_op()
    while op is not None and op.name == "tensor.cast":
        op = op.operands[0].defining_op()
    return op.attributes["symbol"].name if op is not None and op.name == "tensor.constant" else None
