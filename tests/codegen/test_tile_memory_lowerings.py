"""Memory, loops, branches and threads of the tile level as native code, against arrays and the tile interpreter."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.tile_builder import KernelBuilder
from ir.formats import BF16, F16, F32, F64, I8, I32, I64, U8, PlainFormat
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel
from ir.types import ScalarType
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels

TARGETS: dict[str, tuple[str, ...]] = {"host": (), "avx2": ("avx512",), "sse": ("avx", "fma", "f16c")}
FORMATS = (F32, BF16, F16, F64, I8, U8, I32, I64)
VECTORS = (2, 4, 8, 16)


def copy(element: PlainFormat, lanes: int) -> FuncOp:
    """y[1 + i] = x[1 + i]: whole vectors at places that are aligned to an element only."""
    k = KernelBuilder(f"copy_{element}_{lanes}")
    x, y, count = k.buffer("x", element), k.buffer("y", element), k.size("blocks")
    with k.loop(0, count) as block:
        y.store(block.i * lanes + 1, x.load(block.i * lanes + 1, lanes))
    return k.finish()


def masked(element: PlainFormat, lanes: int) -> FuncOp:
    """loaded[i] = x[i] where the mask holds, else 0; stored[i] = x[i] where the mask holds, else left alone."""
    k = KernelBuilder(f"masked_{element}_{lanes}")
    x, loaded, stored, mask = k.buffer("x", element), k.buffer("l", element), k.buffer("s", element), k.buffer("m", I32)
    count = k.size("blocks")
    with k.loop(0, count) as block:
        at = block.i * lanes
        chosen = mask.load(at, lanes).compare("ne", 0)
        value = x.load(at, lanes, chosen)
        loaded.store(at, value)
        stored.store(at, x.load(at, lanes), chosen)
    return k.finish()


def gathered(element: PlainFormat, lanes: int) -> FuncOp:
    """y[i] = x[index[i]]."""
    k = KernelBuilder(f"gathered_{element}_{lanes}")
    x, index, y, count = k.buffer("x", element), k.buffer("index", I32), k.buffer("y", element), k.size("blocks")
    with k.loop(0, count) as block:
        y.store(block.i * lanes, x.gather(index.load(block.i * lanes, lanes)))
    return k.finish()


def tail(element: PlainFormat) -> FuncOp:
    """y = x of `n` elements, the last vector masked; prefetches far outside of both."""
    k = KernelBuilder(f"tail_{element}")
    x, y, n = k.buffer("x", element), k.buffer("y", element), k.size("n")
    with k.loop(0, n, 16) as loop:
        mask = k.lanes_below(n - loop.i, 16)
        x.prefetch(loop.i + (1 << 40))
        x.prefetch(loop.i - (1 << 40))
        y.store(loop.i, x.load(loop.i, 16, mask), mask)
    return k.finish()


def views() -> FuncOp:
    """Pairs of bf16 swapped through scratch memory that is seen as i32, from element 2 on."""
    k = KernelBuilder("views")
    x, y, n = k.buffer("x", BF16), k.buffer("y", BF16), k.size("n")
    scratch = k.scratch(4, BF16)
    with k.loop(0, n, 2) as loop:
        pair = x.at(2).at(loop.i)
        scratch.store(2, pair.load(1))
        scratch.store(3, pair.load(0))
        y.view(I32).at(1).store(loop.i // 2, scratch.view(I32).load(1))
    return k.finish()


def loops() -> FuncOp:
    """Fibonacci numbers by exchanged carried values, counters of nested loops added up; bounds from outside."""
    k = KernelBuilder("loops")
    out, lower, upper, step = k.buffer("out", I64), k.size("lower"), k.size("upper"), k.size("step")
    one = k.constant(ScalarType(I64), 1)
    with k.loop(lower, upper, step, [one, one, k.index(0)]) as outer:
        a, b, total = outer.carried
        with k.loop(0, outer.i, 2, [total]) as inner:
            inner.carry(inner.carried[0] + inner.i * outer.i)
        outer.carry(b, a + b, inner.results[0])
    out.store(0, outer.results[0])
    out.store(1, outer.results[1])
    with k.loop(0, outer.results[2]) as count:  # an index reaches memory as a count
        out.store(2, out.load(2) + 1)
        with k.when(count.i.compare("ge", 5000)):
            out.store(3, one)
    return k.finish()


def branches() -> FuncOp:
    """Nested conditions, a loop inside of one, stores after both."""
    k = KernelBuilder("branches")
    x, out, n = k.buffer("x", I32), k.buffer("out", I32), k.size("n")
    with k.loop(0, n) as loop:
        value = x.load(loop.i)
        with k.when(value.compare("gt", 0)):
            with k.when((value & 1).compare("eq", 0)), k.loop(0, value.to_index()):
                out.store(loop.i, out.load(loop.i) + 2)
            with k.when(value.compare("eq", 7)):
                out.store(loop.i, value * 100)
        out.store(loop.i, out.load(loop.i) + 1)
    return k.finish()


def shares(unit: int) -> FuncOp:
    """Counts how often an item is anybody's, and whose it is."""
    k = KernelBuilder(f"shares_{unit}")
    times, owner, n = k.buffer("times", I32), k.buffer("owner", I32), k.size("n")
    first, last = k.thread_share(n, unit)
    with k.loop(first, last) as item:
        times.store(item.i, times.load(item.i) + 1)
        owner.store(item.i, k.thread_id().from_index())
    return k.finish()


def relay() -> FuncOp:
    """`rounds` times: every thread writes its number plus the round, then reads its neighbour's, then adds it up."""
    k = KernelBuilder("relay")
    desk, sums, rounds = k.buffer("desk", I64), k.buffer("sums", I64), k.size("rounds")
    me, others = k.thread_id(), k.num_threads()
    neighbour = (me + 1) % others
    with k.loop(0, rounds) as round_:
        desk.store(me * 8, (me + round_.i).from_index().cast(I64))
        k.barrier()
        sums.store(me * 8, sums.load(me * 8) + desk.load(neighbour * 8))
        k.barrier()
    return k.finish()


UNITS = (1, 4, 16)
KERNELS = [
    *(copy(e, lanes) for e in FORMATS for lanes in (1, *VECTORS)),
    *(masked(e, lanes) for e in FORMATS for lanes in VECTORS),
    *(gathered(e, lanes) for e in (F32, I32) for lanes in VECTORS),
    *map(tail, FORMATS), views(), loops(), branches(), *map(shares, UNITS), relay(),
]  # fmt: skip
BY_NAME = {kernel.sym_name: kernel for kernel in KERNELS}


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    with native_kernels(KERNELS, host_target(TARGETS[request.param])) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def host() -> Iterator[NativeKernels]:
    with native_kernels(KERNELS, host_target()) as loaded:
        yield loaded


def bytes_of(element: PlainFormat, count: int, seed: int = 0) -> np.ndarray:
    """Random bits: a copy must keep them all, those of NaN too."""
    raw = np.random.default_rng(seed).integers(0, 256, count * element.dtype.itemsize, np.uint8)
    return raw.view(element.dtype)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("element", FORMATS, ids=str)
def test_copies_keep_every_bit(kernels: NativeKernels, element: PlainFormat) -> None:
    for lanes in (1, *VECTORS):
        x, y = bytes_of(element, 66), bytes_of(element, 66, seed=1)
        want = y.copy()
        want[1:65] = x[1:65]
        kernels.run(f"copy_{element}_{lanes}", x, y, 64 // lanes)
        assert same(y, want), lanes


@pytest.mark.parametrize("element", [F32, I32], ids=str)
def test_gathers_bring_each_lane_its_element(kernels: NativeKernels, element: PlainFormat) -> None:
    x = bytes_of(element, 300)
    index = np.random.default_rng(0).integers(0, 300, 64).astype(np.int32)
    index[:2] = 0, 299
    for lanes in VECTORS:
        y, by_interpreter = bytes_of(element, 64, seed=1), bytes_of(element, 64, seed=1)
        kernels.run(f"gathered_{element}_{lanes}", x, index, y, 64 // lanes)
        interpret_kernel(BY_NAME[f"gathered_{element}_{lanes}"], [x, index, by_interpreter, 64 // lanes], 1)
        assert same(y, x[index]), lanes
        assert same(y, by_interpreter), lanes


def masks(lanes: int) -> np.ndarray:
    """All masks of few lanes; none, all, one lane, all but one and 200 others of many."""
    if lanes <= 8:
        rows = np.arange(2**lanes)[:, None] >> np.arange(lanes) & 1
    else:
        one = np.eye(lanes, dtype=int)
        some = np.random.default_rng(0).integers(0, 2, (200, lanes))
        rows = np.concatenate([np.zeros((1, lanes), int), np.ones((1, lanes), int), one, 1 - one, some])
    return rows.astype(np.int32).reshape(-1)


@pytest.mark.parametrize("element", FORMATS, ids=str)
def test_masks_decide_lane_by_lane(kernels: NativeKernels, element: PlainFormat) -> None:
    for lanes in VECTORS:
        mask = masks(lanes)
        x, stored = bytes_of(element, len(mask)), bytes_of(element, len(mask), seed=1)
        loaded = bytes_of(element, len(mask), seed=2)
        wanted = np.where(mask, x, np.zeros(1, element.dtype)), np.where(mask, x, stored)
        kernels.run(f"masked_{element}_{lanes}", x, loaded, stored, mask, len(mask) // lanes)
        assert same(loaded, wanted[0]) and same(stored, wanted[1]), lanes


@pytest.fixture(scope="module")
def page() -> Iterator[np.ndarray]:
    """The last page that may be touched: the one behind it belongs to nobody, and touching it ends the process."""
    both = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    pages = np.frombuffer(both, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    second = ctypes.c_void_p(pages.ctypes.data + mmap.PAGESIZE)
    assert libc.mprotect(second, mmap.PAGESIZE, 0) == 0
    yield pages[: mmap.PAGESIZE]
    assert libc.mprotect(second, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("element", FORMATS, ids=str)
def test_masked_lanes_touch_no_memory(kernels: NativeKernels, page: np.ndarray, element: PlainFormat) -> None:
    """Buffers that end where memory ends; prefetches that lead nowhere."""
    room = page.view(element.dtype)
    for n in (1, 2, 15, 16, 17, 31):
        source = bytes_of(element, n, seed=n)
        room[-n:] = source
        target = bytes_of(element, n + 16)
        want = np.concatenate([source, target[n:]])
        kernels.run(f"tail_{element}", room[-n:], target, n)
        assert same(target, want)
        kernels.run(f"tail_{element}", target, room[-n:], n)
        assert same(room[-n:], source)


def both(kernels: NativeKernels, name: str, *arguments: np.ndarray | int, threads: int = 1) -> list[np.ndarray]:
    """Native code and interpreter do the same to copies of the arrays; the arrays afterwards."""
    copies = [[a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2)]
    kernels.run(name, *copies[0], threads=threads)
    interpret_kernel(BY_NAME[name], copies[1], threads)
    found = [[a for a in c if isinstance(a, np.ndarray)] for c in copies]
    for native, meant in zip(*found, strict=True):
        np.testing.assert_array_equal(native, meant)
    return found[0]


def test_views_and_scratch(kernels: NativeKernels) -> None:
    x, y = np.arange(12).astype(BF16.dtype), np.zeros(12, BF16.dtype)
    _, got = both(kernels, "views", x, y, 10)
    np.testing.assert_array_equal(got.astype(int), [0, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])


@settings(max_examples=25)
@given(st.integers(-3, 9), st.integers(-3, 9), st.integers(1, 4))
def test_loops_of_any_bounds(host: NativeKernels, lower: int, upper: int, step: int) -> None:
    (out,) = both(host, "loops", np.zeros(4, np.int64), lower, upper, step)
    a, b, total = 1, 1, 0
    for i in range(lower, upper, step):
        a, b, total = b, a + b, total + sum(j * i for j in range(0, i, 2))
    assert list(out) == [a, b, total, 0]


@settings(max_examples=20)
@given(st.lists(st.sampled_from([-2, -1, 0, 1, 2, 3, 4, 7, 8]), max_size=12))
def test_branches(host: NativeKernels, values: list[int]) -> None:
    x = np.array(values, np.int32)
    _, out = both(host, "branches", x, np.full(len(x), 10, np.int32), len(x))
    assert list(out) == [701 if v == 7 else 11 + (2 * v if v > 0 and v % 2 == 0 else 0) for v in values]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("unit", UNITS)
def test_shares_are_a_partition(host: NativeKernels, unit: int, threads: int) -> None:
    for n in (0, 1, 2, 3, 15, 16, 17, 64, 100):
        times, owner = both(host, f"shares_{unit}", np.zeros(n, np.int32), np.full(n, -1, np.int32), n, threads=threads)
        assert list(times) == [1] * n
        assert list(owner) == sorted(owner) and set(owner) <= set(range(threads))
        borders = np.flatnonzero(np.diff(owner)) + 1
        assert all(border % unit == 0 for border in borders)
        sizes = np.bincount(owner, minlength=threads) if n else np.zeros(threads)
        assert sizes.max() - sizes.min() < 2 * unit  # nobody has a whole unit more than anybody else, but the rest


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_barriers_order_what_threads_write(kernels: NativeKernels, threads: int) -> None:
    rounds = 300
    desk, sums = np.zeros(8 * threads, np.int64), np.zeros(8 * threads, np.int64)
    kernels.run("relay", desk, sums, rounds, threads=threads)
    want = [sum((t + 1) % threads + r for r in range(rounds)) for t in range(threads)]
    assert list(sums[::8]) == want
    few = [np.zeros(8 * threads, np.int64), np.zeros(8 * threads, np.int64)]
    interpret_kernel(BY_NAME["relay"], [*few, 5], threads)
    assert list(few[1][::8]) == [sum((t + 1) % threads + r for r in range(5)) for t in range(threads)]
