"""Second-order rounding of a matrix: GPTQ (arXiv:2210.17323), with scales and codes then improved together.

    curvature = Curvature.of(gram(x))                    # x f32 [rows, k]: what the weight multiplies
    packed = gptq(format, w, curvature)                  # PackedArray [n, k]

Minimises sum over rows of |x (value - w)|^2 = (value - w) H (value - w)^T with H = x^T x: columns are rounded one after
another, and what is lost in one is made up for in those behind it. Every group gets the scale (and zero point) that
loses least among a grid of candidates, counting a column as much as its error cannot be made up for; then scales are
fitted to the codes by least squares, and single codes moved, in turn. A row that ends no better than rounded to nearest
with least squared error keeps that: a result is never worse by this measure. Columns stay in order.

Takes integer formats of 2 to 8 bits with one level of scales. Raises DiagnosticError for weights that are no finite
numbers or too large for the scales, by row and column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats import GroupedIntFormat, PackedArray
from passes.quantize.calibrate.gptq_kernels import choose_candidates, descend, over_rows, round_columns
from passes.quantize.rounding import quantize_rows

DAMPING = 0.01  # of the mean of the diagonal, added to it
_BLOCK = 128  # columns between two updates of those behind them
_CANDIDATES = 20
_ROUNDS = 1  # of fitting scales and moving codes
_SWEEPS = 3
_FIT_ROWS = 256  # rows whose scales are fitted at a time
# How far below the largest value scales are tried, by bits: fewer levels clip more.
_LOWEST_RATIO = {2: 0.4, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}


def gram(x: np.ndarray) -> np.ndarray:
    """f64 [k, k]: the products of all pairs of columns of x f32 [rows, k]."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], 1024):
        part = x[start : start + 1024]
        total += part.T @ part
    return total


@dataclass(frozen=True, eq=False)
class Curvature:
    """`h` f32 [k, k], damped and scaled to a mean diagonal of about one; `u` f32, upper, with u^T u = h^-1."""

    h: np.ndarray
    u: np.ndarray

    @staticmethod
    def of(gram: np.ndarray, damping: float = DAMPING) -> Curvature | None:
        """The curvature of a matrix of sums; None when it says nothing (all zero) or is no number."""
        mean = float(np.mean(np.diag(gram)))
        if not np.isfinite(mean) or mean <= 0 or not np.isfinite(gram).all():
            return None
        h = gram / mean
        h[np.diag_indices_from(h)] += damping
        # h = r r^T with r upper, from the factor of h with rows and columns reversed; then u = r^-1.
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
        return Curvature(h.astype(np.float32), inverse_upper(r).astype(np.float32))

    @property
    def nbytes(self) -> int:
        return self.h.nbytes + self.u.nbytes


def inverse_upper(r: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, by halves."""
    k = r.shape[0]
    if k <= 64:
        return np.triu(np.linalg.inv(np.triu(r)))
    half = k // 2
    out = np.zeros_like(r)
    out[:half, :half] = inverse_upper(r[:half, :half])
    out[half:, half:] = inverse_upper(r[half:, half:])
    out[:half, half:] = -(out[:half, :half] @ r[:half, half:]) @ out[half:, half:]
    return out


@dataclass(eq=False)
class Rounded:
    """A matrix in codes u8 [n, k] under scales f32 [n, groups] (numbers that the format's scales hold) and zeros."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self) -> np.ndarray:
        """f32 [n, k]."""
        group = self.codes.shape[1] // self.scales.shape[1]
        levels = self.codes.reshape(*self.scales.shape, group).astype(np.float32) - self.zeros[..., None]
        return (levels * self.scales[..., None]).reshape(self.codes.shape)

    def take(self, rows: np.ndarray, other: Rounded) -> None:
        """Replaces rows by those of `other`."""
        for name in ("codes", "scales", "zeros"):
            getattr(self, name)[rows] = getattr(other, name)[rows]

    def copy(self) -> Rounded:
        return Rounded(self.codes.copy(), self.scales.copy(), self.zeros.copy())


def gptq(format: GroupedIntFormat, w: np.ndarray, curvature: Curvature) -> PackedArray:
    """w f32 [n, k] in `format`, such that its products lose little; see the module docstring."""
    check_format(format)
    w = np.ascontiguousarray(w, np.float32)
    nearest = quantize_rows(format, w, "mse")
    best = unpacked(format, nearest)
    error = weighted_error(w, best.values(), curvature.h)
    found = _second_order(format, w, curvature)
    for round_ in range(_ROUNDS + 1):
        if round_:
            _fit_scales(format, w, curvature.h, found)
        _move_codes(format, w, curvature.h, found)
        now = weighted_error(w, found.values(), curvature.h)
        better = now < error
        best.take(better, found)
        error = np.where(better, now, error)
    zeros = best.zeros.astype(np.uint8) if format.zero_point else None
    return PackedArray.assemble(format, w.shape, best.codes, best.scales.astype(format.scale.dtype), zeros)


def check_format(format: object) -> None:
    """Raises DiagnosticError unless `gptq` can round to the format."""
    if not isinstance(format, GroupedIntFormat) or format.channel is not None or format.bits < 2:
        raise DiagnosticError(
            f"weights cannot be calibrated for {format}",
            expected="integers of 2 to 8 bits with one level of scales: q4_sym<group=128, scale=f16>, q4_zp<...>",
        )


def weighted_error(w: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """f64 [n]: (values - w) h (values - w)^T of every row."""
    d = values - w
    return np.einsum("rk,rk->r", d @ h, d, dtype=np.float64)


def unpacked(format: GroupedIntFormat, packed: PackedArray) -> Rounded:
    """The codes, scales and zero points of a matrix as floats."""
    scales = packed.scales.astype(np.float32)
    middle = np.float32(format.offset)
    zeros = packed.zero_array().astype(np.float32) if format.zero_point else np.full(scales.shape, middle, np.float32)
    return Rounded(packed.code_array(), scales, zeros)


# -- columns one after another ---------------------------------------------------------------------------------------


def _second_order(format: GroupedIntFormat, w: np.ndarray, curvature: Curvature) -> Rounded:
    n, k = w.shape
    groups = format.groups(k)
    group = k // groups
    u, high = curvature.u, np.float32((1 << format.bits) - 1)
    found = Rounded(np.zeros((n, k), np.uint8), np.zeros((n, groups), np.float32), np.zeros((n, groups), np.float32))
    left = w.copy()  # what is still to be rounded, errors of the columns in front added
    weights = 1 / np.square(np.diag(u))
    for start in range(0, k, group):
        at, stop = start // group, start + group
        _choose_scales(format, left[:, start:stop], weights[start:stop], found, at)
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            block = np.ascontiguousarray(left[:, first:last])
            errors, codes = np.empty_like(block), np.empty(block.shape, np.uint8)
            scales = np.broadcast_to(found.scales[:, at : at + 1], block.shape)
            zeros = np.broadcast_to(found.zeros[:, at : at + 1], block.shape)
            factor = np.ascontiguousarray(u[first:last, first:last])

            def some(
                rows: slice,
                block: np.ndarray = block,
                factor: np.ndarray = factor,
                scales: np.ndarray = scales,
                zeros: np.ndarray = zeros,
                codes: np.ndarray = codes,
                errors: np.ndarray = errors,
            ) -> None:
                args = (np.ascontiguousarray(scales[rows]), np.ascontiguousarray(zeros[rows]), high)
                round_columns(block[rows], factor, *args, codes[rows], errors[rows])

            over_rows(n, some)
            found.codes[:, first:last] = codes
            left[:, last:] -= errors @ u[first:last, last:]
    return found


def _choose_scales(format: GroupedIntFormat, values: np.ndarray, weights: np.ndarray, found: Rounded, at: int) -> None:
    """The scale and zero point of group number `at`, from the candidates for `values` [n, group]."""
    values = np.ascontiguousarray(values)
    scales, zeros = candidates(format, values)
    scales = round_scales(format, scales)
    best = np.zeros(values.shape[0], np.int32)
    weight, high = weights.astype(np.float32), np.float32((1 << format.bits) - 1)

    def some(rows: slice) -> None:
        choose_candidates(values[rows], weight, scales[rows], zeros[rows], high, best[rows])

    over_rows(values.shape[0], some)
    every = np.arange(values.shape[0])
    found.scales[:, at], found.zeros[:, at] = scales[every, best], zeros[every, best]


def candidates(format: GroupedIntFormat, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, zeros) f32 [n, candidates] to try on a group `values` [n, g]."""
    lowest = _LOWEST_RATIO[format.bits]
    high = (1 << format.bits) - 1
    if format.zero_point:
        ratios = np.linspace(1, lowest, 6, dtype=np.float32)
        below, above = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
        low, top = (r.reshape(-1) for r in np.meshgrid(ratios, ratios, indexing="ij"))
        low, top = below[:, None] * low, above[:, None] * top
        scales = (top - low) / np.float32(high)
        rounded = round_scales(format, scales)
        zeros = np.rint(np.divide(-low, rounded, out=np.zeros_like(low), where=rounded != 0))
        return scales, np.clip(zeros, 0, high).astype(np.float32)
    # Of the two signs, one puts the largest value on the outermost code, which the other side does not have.
    widest = format.offset / max(1, format.offset - 1)
    ratios = np.linspace(1.02 * widest, lowest, _CANDIDATES, dtype=np.float32)
    ratios = np.concatenate([ratios, -ratios]) / np.float32(format.offset)
    scales = np.abs(values).max(axis=1)[:, None] * ratios
    return scales, np.full(scales.shape, format.offset, np.float32)


def round_scales(format: GroupedIntFormat, scales: np.ndarray) -> np.ndarray:
    """f32: the nearest numbers that the format's scales hold. Raises DiagnosticError for those too large."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(format.scale.dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(rounded))[0])
        raise DiagnosticError(
            f"row {row} needs a scale of {scales[row, column]:.3g}, which {format.scale} cannot hold",
            expected="smaller weights, or scale=f32",
        )
    return rounded


# -- scales and codes in turn ----------------------------------------------------------------------------------------


def _fit_scales(format: GroupedIntFormat, w: np.ndarray, h: np.ndarray, found: Rounded) -> None:
    """Scales that lose least with the codes as they are: least squares, one small system a row."""
    n, k = w.shape
    groups = found.scales.shape[1]
    width = k // groups
    for first in range(0, n, _FIT_ROWS):
        rows = slice(first, min(first + _FIT_ROWS, n))
        levels = found.codes[rows].reshape(-1, groups, width).astype(np.float32) - found.zeros[rows][..., None]
        count = levels.shape[0]
        system = np.empty((count, groups, groups))
        for g in range(groups):
            spread = (levels[:, g] @ h[g * width : (g + 1) * width]).reshape(count, groups, width)
            system[:, g] = np.einsum("rgw,rgw->rg", spread, levels)
        right = np.einsum("rgw,rgw->rg", (w[rows] @ h).reshape(count, groups, width), levels)
        old = found.scales[rows].astype(np.float64)
        rest = right - np.einsum("rgh,rh->rg", system, old)
        ridge = 1e-6 * np.trace(system, axis1=1, axis2=2) / groups + 1e-30
        system += ridge[:, None, None] * np.eye(groups)
        fitted = old + np.linalg.solve(system, rest[..., None])[..., 0]
        with np.errstate(over="ignore"):
            rounded = fitted.astype(np.float32).astype(format.scale.dtype).astype(np.float32)
        # what the scales cannot hold stays as it was, and so does the sign
        keep = ~np.isfinite(rounded) | (np.sign(rounded) != np.sign(old))
        found.scales[rows] = np.where(keep, found.scales[rows], rounded)


def _move_codes(format: GroupedIntFormat, w: np.ndarray, h: np.ndarray, found: Rounded) -> None:
    """Codes moved one at a time while that loses less."""
    width = w.shape[1] // found.scales.shape[1]
    high = np.float32((1 << format.bits) - 1)
    gradient = (found.values() - w) @ h

    def some(rows: slice) -> None:
        scales, zeros = (np.repeat(part[rows], width, axis=1) for part in (found.scales, found.zeros))
        descend(gradient[rows], h, scales, zeros, high, found.codes[rows], _SWEEPS)

    over_rows(w.shape[0], some)
