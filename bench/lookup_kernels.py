"""Products of one row with 1, 2 and 3 bit weights: by lookup in tables of sums of activations, and by byte products.

    python -m bench.lookup_kernels                      # 2048x5632, 5632x2048, 2048x2048; one and two threads; a table
    python -m bench.lookup_kernels --bits 2 --megabytes 64 --rounds 5

The second way is what products with low-bit weights do (`codegen.kernels.packed`). The first one (T-MAC,
arXiv:2407.00088) is built here for comparison: four neighbouring int8 activations have 16 sums, one for each choice of
them; a code of b bits is b planes, and 4 bits of a plane of a row choose the sum of these columns. 32 rows make one
register, whose halves of 16 bits are shifted to the next four columns and looked up by one permutation of words; sums
are kept positive, so that two of them are added as one number of 32 bits without a carry between them. Both ways give
the same bits, which is checked. Activations are int8 in groups of 128, weights have f16 scales in groups of 32.

What the lookups need besides, the making of the tables in every step, is not timed; the sums that byte products begin
with are not either. `cache` times a matrix again and again, `memory` many matrices one after another. Rounds of both
ways alternate and the best of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codegen.kernels.decode import WeightDecoder
from codegen.kernels.packed import Activations, multiply_packed
from codegen.packed_strips import PackedStrips
from codegen.packed_weights import matrix_pieces
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import BF16, F16, F32, I8, I32, U8, GroupedIntFormat, PackedArray
from ir.ops.builtin import FuncOp
from ir.types import Layout, VectorType
from tests.codegen.harness import aligned, host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels

SHAPES = ((2048, 5632), (5632, 2048), (2048, 2048))  # (rows, columns) of the weights
GROUP, X_GROUP = 32, 128
QUAD = 4  # activations of a table
TABLES = GROUP // QUAD  # of a group
LANES, ROWS = 16, 32  # of a register of words, and the rows in its halves
BIAS = QUAD * 127  # makes sums of four int8 positive


@dataclass(frozen=True)
class Case:
    """A matrix of random weights and a row of random activations, with what both kernels read of them."""

    n: int
    k: int
    bits: int
    vectors: int  # registers of rows that share the tables of a group
    packed: PackedArray
    x: np.ndarray  # int8 [k]
    x_scales: np.ndarray  # f32 [k / X_GROUP]

    @property
    def strips(self) -> PackedStrips:
        format = self.packed.format
        assert isinstance(format, GroupedIntFormat)
        return PackedStrips(self.n, self.k, Layout(32, 4), format)

    @property
    def group_bytes(self) -> int:
        """Of a strip for lookups: scales, then for each 32 rows two registers a plane."""
        return self.vectors * (ROWS * 2 + self.bits * 128)

    @property
    def group_sums(self) -> np.ndarray:
        """i32 [k / GROUP]"""
        return self.x.reshape(-1, GROUP).astype(np.int32).sum(axis=1, dtype=np.int32)


def make_case(n: int, k: int, bits: int, vectors: int) -> Case:
    random = np.random.default_rng(bits)
    values = random.standard_normal((n, k), np.float32)
    x = random.integers(-127, 128, k).astype(np.int8)
    scales = random.uniform(0.5, 2.0, k // X_GROUP).astype(np.float32)
    return Case(n, k, bits, vectors, GroupedIntFormat(bits, GROUP, False, F16).pack(values, "nearest"), x, scales)


# -- byte products -----------------------------------------------------------------------------------------------------


def byte_kernel(case: Case) -> FuncOp:
    """run(x, scales, starts, w, y, matrices, bytes to the next)"""
    w = case.strips
    k = KernelBuilder(f"bytes_{case.n}x{case.k}_{case.bits}")
    x, scales, starts = k.buffer("x", I8), k.buffer("scales", F32), k.buffer("starts", I32)
    weights, y = k.buffer("w", U8), k.buffer("y", F32)
    matrices, stride = k.size("matrices"), k.size("stride")
    decoder, rows = WeightDecoder(k, w), Activations(x, scales, starts, X_GROUP)
    first, last = k.thread_share(w.strips)
    with k.loop(0, matrices) as matrix, k.loop(first, last) as strip:
        source = weights.at(matrix.i * stride + strip.i * w.strip_bytes)
        (sums,) = multiply_packed(k, rows, [k.index(0)], [(source, j) for j in range(w.vectors)], w, decoder)
        for j, value in enumerate(sums):
            y.store(strip.i * w.layout.rows + j * LANES, value)
    return k.finish()


def byte_operands(case: Case) -> list[np.ndarray]:
    pieces = matrix_pieces(case.packed, case.strips, case.strips.strips)
    weights = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
    starts = -WeightDecoder.bias_of(case.strips) * case.group_sums
    return [case.x, case.x_scales, starts.astype(np.int32), weights]


# -- lookups -----------------------------------------------------------------------------------------------------------


def lookup_kernel(case: Case) -> FuncOp:
    """run(tables, scales, starts, w, y, matrices, bytes to the next)"""
    k = KernelBuilder(f"lookups_{case.n}x{case.k}_{case.bits}_{case.vectors}")
    tables, scales, starts = k.buffer("tables", BF16), k.buffer("scales", F32), k.buffer("starts", I32)
    weights, y = k.buffer("w", U8), k.buffer("y", F32)
    matrices, stride = k.size("matrices"), k.size("stride")
    strip_bytes = case.k // GROUP * case.group_bytes
    rows, zeros = ROWS * case.vectors, [k.f32(0.0, LANES)] * (2 * case.vectors)
    together = X_GROUP // GROUP
    first, last = k.thread_share(case.n // rows)
    with k.loop(0, matrices) as matrix, k.loop(first, last) as strip:
        source = weights.at(matrix.i * stride + strip.i * strip_bytes)
        with k.loop(0, case.k // X_GROUP, 1, zeros) as outer:
            with k.loop(0, together, 1, zeros) as inner:
                group = outer.i * together + inner.i
                place = source.at(group * case.group_bytes)
                inner.carry(*_group(k, case, tables.at(group * (TABLES * 16)), starts, group, place, inner.carried))
            factor = k.splat(scales.load(outer.i), LANES)
            outer.carry(*(k.fma(v, factor, s) for v, s in zip(inner.results, outer.carried, strict=True)))
        for j, value in enumerate(outer.results):
            y.store(strip.i * rows + j * LANES, value)
    return k.finish()


def _group(
    k: KernelBuilder, case: Case, tables: Buffer, starts: Buffer, group: Expr, place: Buffer, sums: Sequence[Expr]
) -> list[Expr]:
    """Adds one group of all rows of a strip."""
    words = VectorType(LANES, I32)
    table = [tables.load(16 * t, 16) for t in range(TABLES)]
    start = k.splat(starts.load(group), LANES)
    codes = place.at(case.vectors * ROWS * 2)
    made = list(sums)
    for v in range(case.vectors):
        total: Expr | None = None
        for plane in reversed(range(case.bits)):
            total = total.shifted_left(1) if total is not None else None
            for half in range(2):
                at = ((v * case.bits + plane) * 2 + half) * 64
                index = codes.load(at, 64).bitcast(words)
                for quad in range(TABLES // 2):
                    chosen = index.shifted_right(QUAD * quad) if quad else index
                    found = k.lookup(table[half * (TABLES // 2) + quad], chosen).bitcast(words)
                    total = found if total is None else total + found
        assert total is not None
        for h, part in enumerate((total & 0xFFFF, total.shifted_right(16) & 0xFFFF)):
            if case.bits == 1:  # -1 and 1: two steps apart
                part = part.shifted_left(1)
            scale = place.at((v * ROWS + h * LANES) * 2).view(F16).load(0, LANES).cast(F32)
            made[2 * v + h] = k.fma((part + start).cast(F32), scale, made[2 * v + h])
    return made


def lookup_operands(case: Case) -> list[np.ndarray]:
    """Tables, scales, starts and weights."""
    quads = case.x.reshape(-1, QUAD).astype(np.int32)
    chosen = (np.arange(16)[:, None] >> np.arange(QUAD)) & 1
    tables = (quads @ chosen.T + BIAS).astype(np.uint16).view(BF16.dtype)
    lift = 2 if case.bits == 1 else 1
    biased = ((1 << case.bits) - 1) * TABLES * BIAS * lift
    starts = -biased - WeightDecoder.bias_of(case.strips) * case.group_sums
    n, k, v = case.n, case.k, case.vectors
    codes = case.packed.code_array().reshape(n // (ROWS * v), v, 2, LANES, k // GROUP, 2, 4, QUAD)
    planes = np.stack([(codes >> p) & 1 for p in range(case.bits)])  # p, strip, v, half word, lane, group, half, s, j
    weight = (1 << np.arange(16).reshape(4, QUAD)).astype(np.uint16)
    halves = (planes * weight).sum(axis=(-2, -1), dtype=np.uint16)
    registers = halves.transpose(1, 5, 2, 0, 6, 4, 3)  # strip, group, v, plane, half, lane, half word
    flat = np.ascontiguousarray(registers).reshape(n // (ROWS * v), k // GROUP, -1).view(np.uint8)
    scales = case.packed.scales.reshape(n // (ROWS * v), v * ROWS, k // GROUP).transpose(0, 2, 1)
    joined = np.concatenate([np.ascontiguousarray(scales).view(np.uint8), flat], axis=2)
    return [tables, case.x_scales, starts.astype(np.int32), joined.reshape(-1)]


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One kernel with its operands: `seconds(...)` is that of one matrix."""

    kernels: NativeKernels
    name: str
    operands: list[np.ndarray]
    weights: np.ndarray  # copies, one after another
    y: np.ndarray

    def seconds(self, matrices: int, stride: int, threads: int) -> float:
        arguments = [*self.operands[:3], self.weights, self.y, matrices, stride]
        begin = time.perf_counter()
        self.kernels.run(self.name, *arguments, threads=threads)
        return (time.perf_counter() - begin) / matrices


def timed(kernels: NativeKernels, name: str, operands: list[np.ndarray], n: int, megabytes: int) -> Timed:
    size = operands[3].nbytes
    copies = max(1, megabytes * 1_000_000 // size)
    weights = aligned(size * copies)
    weights.reshape(copies, size)[:] = operands[3]
    small = [aligned(a.nbytes).view(a.dtype) for a in operands[:3]]
    for target, source in zip(small, operands, strict=False):
        target[:] = source.reshape(-1)
    return Timed(kernels, name, [*small, operands[3]], weights, np.zeros(n, np.float32))


def compare(case: Case, rounds: int, megabytes: int) -> list[str]:
    """Rows of the table."""
    made = {"bytes": (byte_kernel(case), byte_operands(case)), "lookups": (lookup_kernel(case), lookup_operands(case))}
    rows = []
    with native_kernels([kernel for kernel, _ in made.values()], host_target()) as kernels:
        ways = {w: timed(kernels, f.sym_name, o, case.n, megabytes) for w, (f, o) in made.items()}
        for way in ways.values():
            way.seconds(1, 0, 1)
        if not np.array_equal(ways["bytes"].y, ways["lookups"].y):
            raise SystemExit("the two ways disagree")
        for threads in (1, 2):
            best = {(w, where): np.inf for w in ways for where in ("cache", "memory")}
            for _ in range(rounds):
                for name, way in ways.items():
                    size = way.operands[3].nbytes
                    hot = way.seconds(max(1, 8_000_000 // size), 0, threads)
                    cold = way.seconds(len(way.weights) // size, size, threads)
                    best[name, "cache"] = min(best[name, "cache"], hot)
                    best[name, "memory"] = min(best[name, "memory"], cold)
            cells = [f"{case.bits}", f"{case.n}x{case.k}", f"{threads}"]
            for where in ("cache", "memory"):
                speeds = [ways[w].operands[3].nbytes / best[w, where] / 1e9 for w in ways]
                cells += [f"{speed:.1f}" for speed in speeds]
                cells.append(f"{best['bytes', where] / best['lookups', where]:.2f}")
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200, help="of matrices that are read one after another")
    parser.add_argument("--vectors", type=int, default=4, help="registers of 32 rows that share tables")
    options = parser.parse_args(arguments)
    print("GB/s of weights; the ratio is how many times faster lookups are\n")
    print("| bits | matrix | threads | cache: bytes | lookups | ratio | memory: bytes | lookups | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for bits in options.bits:
        for n, k in SHAPES:
            for row in compare(make_case(n, k, bits, options.vectors), options.rounds, options.megabytes):
                print(row, flush=True)


if __name__ == "__main__":
    main()
