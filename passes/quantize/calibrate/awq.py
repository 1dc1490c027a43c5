"""Activation-aware scaling (AWQ, arXiv:2306.00978): columns that are often large are made larger before rounding.

    scaling = find_scaling(func, read, sequences, roles, formats)
    scaling.apply(name, w)                     # what is to be stored in place of the tensor, before rounding

Weights that share an input are multiplied by a factor for each column, and what makes the input is divided by it, so
that the model stays the same: the gain of the norm in front; the rows of `up` in front of `down`; the rows of `v`
in front of `o` (the same factor for all heads that share them). The factors are the mean sizes of the input to a power
between 0 and 1: that of ten powers, 0 (no scaling) among them, with which rounding to the nearest loses least of the
products. Inputs that cannot be divided are left alone: `Scaling.skipped` says why.
The scaled weights are then rounded by `awq_clip`.
Where a product that keeps its floats reads the input too (a router), factors are powers of two and change no bit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ir.core import Op, Value
from ir.formats import GroupedIntFormat
from ir.ops.attention import CombineOp
from ir.ops.builtin import FuncOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, MulOp, ReshapeOp, SiluOp
from ir.ops.tensor_constant import ConstantOp
from passes.analysis.constants import constant_leaves, is_constant_expression
from passes.quantize.calibrate.executor import LayerwiseForward, Product, is_streamed, weight_names
from passes.quantize.rounding import quantize_rows

POWERS = tuple(i / 10 for i in range(10))
_ROWS = 512  # of an input, that losses are measured with
Key = tuple[Value, int]  # an input, and the expert it belongs to (-1: all)


@dataclass(frozen=True)
class Fold:
    """What can be divided so that the input of `products` is: a norm's gain, or the rows of a product's weights.

    `rows` is the product whose rows make the input, by way of `bias` maybe; `repeat` (heads, query heads a kv head,
    width) where several columns of the input come from one row.
    """

    products: tuple[Op, ...]
    gain: str = ""
    rows: Op | None = None
    bias: str = ""
    repeat: tuple[int, int, int] | None = None


@dataclass
class Scaling:
    """Factors by tensor: `columns` [k] multiply, `rows` [n] divide. `skipped`: reason -> how many inputs."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    inputs: int = 0

    def apply(self, name: str, w: np.ndarray) -> np.ndarray:
        """f32: the tensor with its factors."""
        w = np.asarray(w, np.float32)
        if name in self.columns:
            w = w * self.columns[name]
        if name in self.rows:
            w = w / (self.rows[name][:, None] if w.ndim == 2 else self.rows[name])
        return w

    def changes(self, name: str) -> bool:
        """Whether a tensor is stored otherwise than it was."""
        return name in self.columns or name in self.rows

    def arrays(self) -> dict[str, np.ndarray]:
        """The factors by kind and name, and how many inputs there are: what `from_arrays` takes."""
        found = {f"{kind} {name}": s for kind in ("columns", "rows") for name, s in getattr(self, kind).items()}
        return {"inputs": np.array([self.inputs], np.int64), **found}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], skipped: dict[str, int]) -> Scaling:
        """The scaling that gave the arrays."""
        scaling = Scaling(skipped=skipped)
        for key, s in arrays.items():
            kind, _, name = key.partition(" ")
            if kind == "inputs":
                scaling.inputs = int(s[0])
            else:
                getattr(scaling, kind)[name] = s
        return scaling


def find_scaling(
    func: FuncOp,
    read: Callable[[str], np.ndarray],
    sequences: np.ndarray,
    roles: Mapping[str, str],
    formats: Mapping[str, GroupedIntFormat],
    tell: Callable[[int, int], None] | None = None,
) -> Scaling:
    """Runs the float model once over int32 [count, length]. `formats` are those that weights will be rounded to."""
    folds, skipped = find_folds(func)
    search = _Search(folds, formats)
    forward = LayerwiseForward(func, read, sequences, roles)
    forward.run_products(search.visit, tell)
    scaling = Scaling(skipped=skipped)
    for key, powers in search.losses.items():
        _set_factors(scaling, folds[key[0]], key, search, powers, read)
    return scaling


# -- where factors can go --------------------------------------------------------------------------------------------


def find_folds(func: FuncOp) -> tuple[dict[Value, Fold], dict[str, int]]:
    """(fold by input, reason why there is none -> number of inputs)."""
    inputs: dict[Value, list[Op]] = {}
    for op in func.block.ops:
        if is_streamed(op):
            inputs.setdefault(op.operands[0], []).append(op)
    folds: dict[Value, Fold] = {}
    skipped: dict[str, int] = {}
    for x, products in inputs.items():
        found = _fold(x, products)
        if isinstance(found, str):
            skipped[found] = skipped.get(found, 0) + 1
        else:
            folds[x] = found
    return folds, skipped


def _fold(x: Value, products: list[Op]) -> Fold | str:
    made = x.defining_op()
    if any(user not in products for user in x.users):
        return "the input is read by more than products"
    if isinstance(made, RmsNormOp):
        leaves = constant_leaves(made.gain)
        if is_constant_expression(made.gain) and len(leaves) == 1 and isinstance(leaves[0], ConstantOp):
            return Fold(tuple(products), gain=leaves[0].symbol.name)
    if isinstance(made, MulOp):
        sides = [v for v in made.operands if not isinstance(v.defining_op(), SiluOp)]
        if len(sides) == 1:
            return _rows(products, sides[0])
    if isinstance(made, ReshapeOp) and isinstance(combine := made.operands[0].defining_op(), CombineOp):
        append = combine.cache.defining_op()
        if isinstance(append, KVAppendOp) and isinstance(split := append.v.defining_op(), ReshapeOp):
            _, heads, width = combine.o.type.shape
            kv_heads = append.v.type.shape[1]
            return _rows(products, split.operands[0], (kv_heads, heads // kv_heads, width))
    return "what makes the input cannot be scaled"


def _rows(products: list[Op], value: Value, repeat: tuple[int, int, int] | None = None) -> Fold | str:
    """A fold into the rows of the product that makes `value`, which nobody else reads."""
    bias = ""
    made = value.defining_op()
    if isinstance(made, AddOp) and len(value.users) == 1:
        constants = [v for v in made.operands if is_constant_expression(v)]
        leaves = constant_leaves(constants[0]) if len(constants) == 1 else []
        if len(leaves) == 1 and isinstance(leaves[0], ConstantOp):
            bias = leaves[0].symbol.name
            value = next(v for v in made.operands if v is not constants[0])
            made = value.defining_op()
    if made is None or not is_streamed(made) or len(value.users) != 1:
        return "what makes the input cannot be scaled"
    return Fold(tuple(products), rows=made, bias=bias, repeat=repeat)


# -- which factors ---------------------------------------------------------------------------------------------------


class _Search:
    """Losses of all powers by input, added up over the products that read it."""

    def __init__(self, folds: Mapping[Value, Fold], formats: Mapping[str, GroupedIntFormat]) -> None:
        self.folds, self.formats = folds, formats
        self.sizes: dict[Key, np.ndarray] = {}
        self.losses: dict[Key, dict[str, np.ndarray]] = {}  # role -> [powers + 1], the last what there is to lose
        self.exact = {x for x, fold in folds.items() if self._keeps_floats(fold)}

    def _keeps_floats(self, fold: Fold) -> bool:
        """Whether a tensor that is stored in floats gets factors, beside the gain."""
        changed = [name for op in (*fold.products, *((fold.rows,) if fold.rows else ())) for name in weight_names(op)]
        return bool(fold.bias) or any(name not in self.formats for name in changed)

    def visit(self, product: Product) -> None:
        fold, format = self.folds.get(product.source), self.formats.get(product.name)
        if fold is None or format is None:
            return
        own = product.expert is not None and product.shared is None
        key = (product.source, product.expert if own and product.expert is not None else -1)
        if key not in self.sizes:
            x = product.x if product.shared is None else product.shared
            self.sizes[key] = _typical_sizes(x, fold.repeat)
        if len(product.x) and np.any(self.sizes[key]):
            losses = self.losses.setdefault(key, {}).setdefault(product.role, np.zeros(len(POWERS) + 1))
            losses += _losses(product, format, self.sizes[key], product.source in self.exact)


def _typical_sizes(x: np.ndarray, repeat: tuple[int, int, int] | None) -> np.ndarray:
    """f32 [k]: mean |x| of each column, the same for columns that come from one row."""
    sizes = np.abs(x).mean(axis=0, dtype=np.float64) if len(x) else np.zeros(x.shape[1])
    if repeat is not None:
        kv_heads, group, width = repeat
        by_head = sizes.reshape(kv_heads, group, width).mean(axis=1, keepdims=True)
        sizes = np.broadcast_to(by_head, (kv_heads, group, width)).reshape(-1)
    return sizes.astype(np.float32)


def factors(sizes: np.ndarray, power: float, exact: bool) -> np.ndarray:
    """f32 [k] around one; 1 for columns that are always zero."""
    floor = max(float(sizes.max()) * 1e-4, 1e-30)
    s = np.maximum(sizes, floor).astype(np.float64) ** power
    s /= np.sqrt(s.max() * s.min())
    if exact:
        s = np.exp2(np.rint(np.log2(s)))
    return np.where(sizes > 0, s, 1.0).astype(np.float32)


def _losses(product: Product, format: GroupedIntFormat, sizes: np.ndarray, exact: bool) -> np.ndarray:
    """f64 [powers + 1]: squared error of the products with each power, and their size."""
    w = product.read()
    step = -(-len(product.x) // _ROWS)
    x = product.x[::step]
    found = []
    for power in POWERS:
        s = factors(sizes, power, exact)
        rounded = format.unpack(quantize_rows(format, w * s, "mse")) / s
        found.append(float(np.square(x @ (rounded - w).T).sum(dtype=np.float64)))
    return np.array([*found, float(np.square(x @ w.T).sum(dtype=np.float64))])


def _set_factors(
    scaling: Scaling,
    fold: Fold,
    key: Key,
    search: _Search,
    losses: Mapping[str, np.ndarray],
    read: Callable[[str], np.ndarray],
) -> None:
    """The factors of the best power, on both sides of one input."""
    source, expert = key
    total = sum(part[:-1] / max(part[-1], 1e-30) for part in losses.values())
    s = factors(search.sizes[key], POWERS[int(np.argmin(total))], source in search.exact)
    scaling.inputs += 1
    if fold.gain:
        gain = read(fold.gain)
        kept = (gain.astype(np.float32) / s).astype(gain.dtype).astype(np.float32)
        # the factor that the stored gain stands for, so that nothing is lost by rounding it
        fits = np.isfinite(kept) & (kept != 0)
        s = np.where(fits, gain.astype(np.float32) / np.where(fits, kept, 1), 1).astype(np.float32)
        scaling.rows[fold.gain] = s
    else:
        assert fold.rows is not None
        row_factors = s
        if fold.repeat is not None:
            row_factors = np.ascontiguousarray(s.reshape(fold.repeat)[:, 0]).reshape(-1)
        for name in _of_expert(weight_names(fold.rows), expert):
            scaling.rows[name] = row_factors
        if fold.bias:
            scaling.rows[fold.bias] = row_factors
    for op in fold.products:
        scaling.columns.update(dict.fromkeys(_of_expert(weight_names(op), expert), s))


def _of_expert(names: tuple[str, ...], expert: int) -> tuple[str, ...]:
    return names if expert < 0 else names[expert : expert + 1]
