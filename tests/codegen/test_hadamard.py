"""The rotation of a row in a kernel: the bits of `ir.kv_low_bit.rotate`, for blocks below a register, of some
registers, of more than registers hold, and for several blocks in a row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from codegen.kernels.hadamard import rotate_row, rotate_stored
from codegen.tile_builder import KernelBuilder
from ir.formats import F32
from ir.kv_low_bit import rotate
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels

SHAPES = [(8, 1), (8, 2), (24, 4), (16, 16), (96, 32), (128, 128), (256, 128), (256, 256), (2048, 1024)]


def rotation(width: int, block: int, in_place: bool) -> FuncOp:
    k = KernelBuilder(f"rotate_{width}_{block}_{'in_place' if in_place else 'apart'}")
    x, y, rows = k.buffer("x", F32), k.buffer("y", F32), k.size("rows")
    with k.loop(0, rows) as row:
        source, target = x.at(row.i * width), y.at(row.i * width)
        if in_place:
            with k.loop(0, width) as at:
                target.store(at.i, source.load(at.i))
            rotate_stored(k, target, width, block)
        else:
            rotate_row(k, lambda column, lanes, mask: source.load(column, lanes, mask), target, width, block)
    return k.finish()


KERNELS = {(*shape, in_place): rotation(*shape, in_place) for shape in SHAPES for in_place in (False, True)}


@pytest.fixture(scope="module", params=[(), ("avx", "fma", "f16c")], ids=["host", "sse"])
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    with native_kernels(list(KERNELS.values()), host_target(request.param)) as loaded:
        yield loaded


def test_the_bits_of_the_definition(kernels: NativeKernels) -> None:
    for (width, block, _), kernel in KERNELS.items():
        x = np.random.default_rng(width + block).standard_normal((3, width)).astype(np.float32)
        y = np.zeros_like(x)
        kernels.run(kernel.sym_name, x, y, 3)
        assert y.tobytes() == rotate(x, block).tobytes(), (width, block)


@pytest.mark.parametrize("key", [(24, 4, True), (256, 128, False), (256, 256, True)], ids=str)
def test_in_the_interpreter(key: tuple[int, int, bool]) -> None:
    width, block, _ = key
    x = np.random.default_rng(7).standard_normal((2, width)).astype(np.float32)
    y = np.zeros_like(x)
    interpret_kernel(KERNELS[key], [x.reshape(-1), y.reshape(-1), 2])
    assert y.tobytes() == rotate(x, block).tobytes()
