"""The clipping of AWQ (arXiv:2306.00978): for each group of weights the scale with which its products lose least.

    grams = group_grams(x, format.group)          # x f32 [rows, k]: what the weight multiplies
    packed = round_clipped(format, w, grams)      # PackedArray [n, k]

A group of g columns adds x_g (value - w)_g to an output; the sum of its square over the rows x is d G d^T with
d = value - w and G = x_g^T x_g. Rounding by itself weighs all columns of a group alike. Here scales below that of the
largest weight, which clip it, are tried on each group of each row by what they lose in this measure. Then, beyond what
AWQ does, single codes are moved and the scale is fitted to them while that loses less in the same measure. What ends no
better than rounded to nearest with least squared error keeps that: no group is ever worse by this measure.
Takes what `gptq.check_format` takes, and refuses as `gptq` does.
"""

from __future__ import annotations

import numpy as np

from ir.core import Value
from ir.formats import GroupedIntFormat, PackedArray
from passes.quantize.calibrate.executor import Product
from passes.quantize.calibrate.gptq import candidates, check_format, round_scales, unpacked
from passes.quantize.calibrate.gptq_kernels import descend, over_rows
from passes.quantize.rounding import quantize_rows

_DAMPING = 0.01  # of the mean of a diagonal, added to it
_PART = 1024  # rows of activations at a time
_ROUNDS = 2  # of moving codes and fitting scales
_SWEEPS = 2  # over the columns of a group


def group_grams(x: np.ndarray, size: int) -> np.ndarray:
    """f64 [k / size, size, size]: the products of all pairs of columns of each group of x f32 [rows, k]."""
    groups = x.shape[1] // size
    total = np.zeros((groups, size, size))
    for start in range(0, x.shape[0], _PART):
        part = x[start : start + _PART].reshape(-1, groups, size).transpose(1, 0, 2)
        total += part.transpose(0, 2, 1) @ part
    return total


def divided(grams: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """`grams` of inputs that are divided by the factors `columns` [k]."""
    if columns is None:
        return grams
    inverse = (1 / columns.astype(np.float64)).reshape(grams.shape[0], -1)
    return grams * inverse[:, :, None] * inverse[:, None, :]


class GroupGrams:
    """Sums of the inputs of products; an expert with few rows of its own (fewer than k / `enough`) gets as many of all
    tokens as are missing."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self._all: tuple[Value, int, np.ndarray] | None = None  # of the input that experts share, a token

    def of(self, product: Product, source: str, size: int) -> np.ndarray | None:
        """f64 [groups, size, size]; None where `source` says that there are no rows."""
        if source == "none":
            return None
        rows, k = product.x.shape
        sums = group_grams(product.x, size)
        if source == "shared" and product.shared is not None:
            if self._all is None or self._all[:2] != (product.source, size):
                shared = np.ascontiguousarray(product.shared, np.float32)
                self._all = (product.source, size, group_grams(shared, size) / len(shared))
            sums += self._all[2] * (max(1, k // self.enough) - rows)
        return sums


def round_clipped(format: GroupedIntFormat, w: np.ndarray, grams: np.ndarray) -> PackedArray:
    """w f32 [n, k] in `format`, `grams` [groups, g, g] of what it multiplies; see the module docstring."""
    check_format(format)
    w = np.ascontiguousarray(w, np.float32)
    found = unpacked(format, quantize_rows(format, w, "mse"))
    size = w.shape[1] // found.scales.shape[1]
    for at, gram in enumerate(grams):
        mean = float(np.trace(gram)) / size
        if not np.isfinite(mean) or mean <= 0:
            continue  # nothing is known of these columns
        columns = slice(at * size, (at + 1) * size)
        start = found.codes[:, columns].astype(np.float32), found.scales[:, at], found.zeros[:, at]
        group = _Group(format, w[:, columns], gram / mean, *start)
        scales, zeros = candidates(format, group.w)
        scales = round_scales(format, scales)
        for i in range(scales.shape[1]):
            group.round(scales[:, i], zeros[:, i])
        for _ in range(_ROUNDS):
            group.move()
            group.offer(group.codes, group.fitted(), group.zeros)
        found.codes[:, columns] = group.codes.astype(np.uint8)
        found.scales[:, at], found.zeros[:, at] = group.scales, group.zeros
    zeros = found.zeros.astype(np.uint8) if format.zero_point else None
    return PackedArray.assemble(format, w.shape, found.codes, found.scales.astype(format.scale.dtype), zeros)


class _Group:
    """The best codes f32 [n, g], scales and zero points [n] of one group of columns so far."""

    def __init__(
        self,
        format: GroupedIntFormat,
        w: np.ndarray,
        gram: np.ndarray,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray,
    ) -> None:
        self.format, self.w = format, np.ascontiguousarray(w)
        self.high = np.float32((1 << format.bits) - 1)
        self.gram = (gram + _DAMPING * np.eye(gram.shape[0])).astype(np.float32)
        self.codes, self.scales, self.zeros = codes.copy(), scales.copy(), zeros.copy()
        self.loss = self._loss(codes, scales, zeros)

    def _error(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        return (codes - zeros[:, None]) * scales[:, None] - self.w

    def _loss(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """f64 [n]."""
        d = self._error(codes, scales, zeros)
        return np.einsum("rg,rg->r", d @ self.gram, d, dtype=np.float64)

    def offer(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> None:
        """Takes the rows that lose less than the best so far."""
        loss = self._loss(codes, scales, zeros)
        better = loss < self.loss
        for mine, other in ((self.codes, codes), (self.scales, scales), (self.zeros, zeros)):
            mine[better] = other[better]
        self.loss = np.where(better, loss, self.loss)

    def move(self) -> None:
        """Offers the codes that are found by moving single ones while that loses less."""
        gradient = self._error(self.codes, self.scales, self.zeros) @ self.gram
        codes = self.codes.astype(np.uint8)
        scales, zeros = (np.repeat(part[:, None], codes.shape[1], axis=1) for part in (self.scales, self.zeros))

        def some(rows: slice) -> None:
            descend(gradient[rows], self.gram, scales[rows], zeros[rows], self.high, codes[rows], _SWEEPS)

        over_rows(codes.shape[0], some)
        self.offer(codes.astype(np.float32), self.scales, self.zeros)

    def round(self, scales: np.ndarray, zeros: np.ndarray) -> None:
        """Offers the nearest codes under scales that the format holds."""
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        codes = np.clip(np.rint(self.w * inverse[:, None]) + zeros[:, None], 0, self.high)
        self.offer(codes, scales, zeros)

    def fitted(self) -> np.ndarray:
        """The scales that lose least with the codes as they are; as they were where the format cannot hold them."""
        levels = self.codes - self.zeros[:, None]
        spread = levels @ self.gram
        below = np.einsum("rg,rg->r", spread, levels, dtype=np.float64)
        above = np.einsum("rg,rg->r", spread, self.w, dtype=np.float64)
        with np.errstate(over="ignore"):
            scales = np.divide(above, below, out=self.scales.astype(np.float64), where=below > 0)
            rounded = scales.astype(self.format.scale.dtype).astype(np.float32)
        return np.where(np.isfinite(rounded), rounded, self.scales)
