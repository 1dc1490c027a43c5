"""Elementary functions of kernels over all of f32, against float64: the bounds that their docstrings give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels import math as kernel_math
from codegen.kernels.rope import sin_cos
from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import F32, F64
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels

TARGETS: dict[str, tuple[str, ...]] = {"host": (), "sse": ("avx", "fma", "f16c")}
# Every 4099th float, all exponents and signs, infinities and NaN: the stride is prime, so no pattern is missed.
BITS = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
ALL = np.concatenate([BITS.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 88, -88])])
ALL = ALL[: len(ALL) // 16 * 16]
SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 127.5, -126.5, -200, 1e30, -3e38, 3e38, 1, -1, 0.5, 2, 3])

Function = Callable[[KernelBuilder, Expr], Expr]
FUNCTIONS: dict[str, tuple[Function, Callable[[np.ndarray], np.ndarray]]] = {
    "exp2": (kernel_math.exp2, np.exp2),
    "exp": (kernel_math.exp, np.exp),
    "sigmoid": (kernel_math.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (kernel_math.silu, lambda x: x / (1 + np.exp(-x))),
    "clip": (lambda k, x: kernel_math.clip(k, x, -2.0, 3.0), lambda x: np.clip(x, -2, 3)),
}


def function_kernel(name: str, lanes: int) -> FuncOp:
    k = KernelBuilder(f"{name}_{lanes}")
    x, y, count = k.buffer("x", F32), k.buffer("y", F32), k.size("count")
    with k.loop(0, count, lanes) as loop:
        y.store(loop.i, FUNCTIONS[name][0](k, x.load(loop.i, lanes)))
    return k.finish()


def sin_cos_kernel() -> FuncOp:
    k = KernelBuilder("sin_cos")
    x, sines, cosines, count = k.buffer("x", F64), k.buffer("s", F32), k.buffer("c", F32), k.size("count")
    with k.loop(0, count, 16) as loop:
        sine, cosine = sin_cos(k, x.load(loop.i, 16))
        sines.store(loop.i, sine)
        cosines.store(loop.i, cosine)
    return k.finish()


KERNELS = [*(function_kernel(name, lanes) for name in FUNCTIONS for lanes in (1, 16)), sin_cos_kernel()]


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    with native_kernels(KERNELS, host_target(TARGETS[request.param])) as loaded:
        yield loaded


def values(kernels: NativeKernels, name: str, x: np.ndarray = ALL) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel gives, what float64 says) for x."""
    got = np.zeros_like(x)
    kernels.run(f"{name}_16", x, got, len(x))
    with np.errstate(all="ignore"):
        return got.astype(np.float64), FUNCTIONS[name][1](x.astype(np.float64))


def error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(got - want)


def wide(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def test_exp2_to_two_units_in_the_last_place(kernels: NativeKernels) -> None:
    got, want = values(kernels, "exp2")
    normal = (ALL >= -126) & (ALL < 127.5)
    units = error(got, want)[normal] / np.spacing(want[normal].astype(np.float32))
    assert normal.sum() > 400_000 and units.max() <= 2
    small = (ALL < -126) & (ALL >= -126.5)
    assert small.any() and error(got, want)[small].max() <= 2.0**-149
    assert (got[ALL < -126.5] == 0).all() and not np.signbit(got[ALL < -126.5]).any()
    assert np.isposinf(got[ALL >= 127.5]).all() and np.isnan(got[np.isnan(ALL)]).all()


def test_exp2_of_whole_numbers_is_exact(kernels: NativeKernels) -> None:
    whole = np.arange(-126, 128 - 14, dtype=np.float32)
    got, want = values(kernels, "exp2", whole)
    np.testing.assert_array_equal(got, want)


def bound(x: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The error that `exp` may have, and half a unit where f32 is subnormal."""
    return (2.0**-22 + np.abs(wide(x)) * 2.0**-23) * np.abs(want) + 2.0**-149


def test_exp(kernels: NativeKernels) -> None:
    got, want = values(kernels, "exp")
    inside = (ALL >= -87.3) & (ALL <= 88.3)
    assert (error(got, want)[inside] <= bound(ALL, want)[inside]).all()
    assert (got[ALL < -87.7] == 0).all() and np.isposinf(got[ALL > 88.4]).all() and np.isnan(got[np.isnan(ALL)]).all()


@pytest.mark.parametrize(("name", "left"), [("sigmoid", 2.0**-126), ("silu", 4e-37)])
def test_sigmoid_and_silu(kernels: NativeKernels, name: str, left: float) -> None:
    got, want = values(kernels, name)
    finite = np.isfinite(ALL)
    inside, below = finite & (ALL >= -87), finite & (ALL < -87)
    assert (error(got, want)[inside] <= bound(ALL, want)[inside]).all()
    assert error(got, want)[below].max() <= left
    assert np.isnan(got[np.isnan(ALL)]).all()


def test_special_numbers(kernels: NativeKernels) -> None:
    inf, nan = np.inf, np.nan
    wanted = {
        "exp2": [1, 1, inf, 0, nan, inf, 2**-126.5, 0, inf, 0, inf, 2, 0.5, 2**0.5, 4, 8],
        "exp": [1, 1, inf, 0, nan, inf, 0, 0, inf, 0, inf, np.e, 1 / np.e, np.e**0.5, np.e**2, np.e**3],
        "clip": [0, -0.0, 3, -2, nan, 3, -2, -2, 3, -2, 3, 1, -1, 0.5, 2, 3],
    }
    for name, want in wanted.items():
        np.testing.assert_allclose(values(kernels, name, SPECIAL)[0], want, rtol=1e-6, atol=1e-44)
    sigmoid, silu = values(kernels, "sigmoid", SPECIAL)[0], values(kernels, "silu", SPECIAL)[0]
    assert list(sigmoid[[0, 1, 2, 3, 8, 9, 10]]) == [0.5, 0.5, 1, 0, 1, 0, 1]
    assert list(silu[[0, 2, 9]]) == [0, inf, 0] and np.isnan(silu[[3, 4]]).all()  # -inf * 0 is not a number


def test_one_lane_gives_the_bits_of_sixteen(kernels: NativeKernels) -> None:
    x = ALL[::7][: len(ALL) // 7 // 16 * 16]
    for name in FUNCTIONS:
        alone, together = np.zeros_like(x), np.zeros_like(x)
        kernels.run(f"{name}_1", x, alone, len(x))
        kernels.run(f"{name}_16", x, together, len(x))
        np.testing.assert_array_equal(alone, together)


def test_the_interpreter_gives_the_same_bits() -> None:
    x = np.concatenate([SPECIAL, ALL[:: len(ALL) // 112][:112]])
    with native_kernels(KERNELS, host_target()) as kernels:
        for name in FUNCTIONS:
            native, meant = np.zeros_like(x), np.zeros_like(x)
            kernels.run(f"{name}_16", x, native, len(x))
            interpret_kernel(next(k for k in KERNELS if k.sym_name == f"{name}_16"), [x, meant, len(x)])
            np.testing.assert_array_equal(native, meant)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e3, 1e6]))
def test_sin_and_cos(kernels: NativeKernels, seed: int, largest: float) -> None:
    angles = np.random.default_rng(seed).uniform(-largest, largest, 1024)
    check_sin_cos(kernels, angles, 1e-7)


def check_sin_cos(kernels: NativeKernels, angles: np.ndarray, error: float) -> None:
    sines, cosines = np.zeros(len(angles), np.float32), np.zeros(len(angles), np.float32)
    kernels.run("sin_cos", angles, sines, cosines, len(angles))
    assert np.abs(sines - np.sin(angles)).max() <= error and np.abs(cosines - np.cos(angles)).max() <= error


def test_sin_and_cos_near_their_zeros_and_far_out(kernels: NativeKernels) -> None:
    quarters = np.arange(-4096, 4096) * (np.pi / 2)
    check_sin_cos(kernels, np.concatenate([quarters, quarters + np.pi / 4, np.nextafter(quarters, np.inf)]), 1e-7)
    check_sin_cos(kernels, np.random.default_rng(0).uniform(-(2.0**31), 2.0**31, 4096), 2e-7)
    sines, cosines = np.zeros(16, np.float32), np.zeros(16, np.float32)
    kernels.run("sin_cos", np.zeros(16), sines, cosines, 16)
    assert (sines == 0).all() and (cosines == 1).all()
