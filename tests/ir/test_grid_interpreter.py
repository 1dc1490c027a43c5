"""The interpreter of grids: what it computes, and that it finds what threads must not do to each other.

Every bad kernel has a good twin that differs in the fault only, so that what is found is the fault.
"""

from __future__ import annotations

import numpy as np
import pytest

from ir import parse, verify
from ir.diagnostics import DiagnosticError
from ir.grid_banks import extra_passes
from ir.grid_interpreter import GridReport, interpret_grid
from ir.interpreter import Environment
from ir.tile_memory_model import KernelFault
from tests.samples import all_samples
from tests.samples.base import Stored, run_on_a_warp, run_sample

PRELUDE = """
  %zero = tile.constant {value = 0} : () -> index
  %one = tile.constant {value = 1} : () -> index
  %eight = tile.constant {value = 8} : () -> index
  %yes = tile.constant {value = 1} : () -> i1
  %me = tile.thread_id : () -> index
  %all = tile.num_threads : () -> index
  %block = grid.block_id : () -> index
  %first = tile.mul %block, %all : (index, index) -> index
  %mine = tile.add %first, %me : (index, index) -> index
"""
BARRIER = "  tile.barrier : () -> ()\n"


def run(body: str, blocks: int = 2, threads: int = 32, x: np.ndarray | None = None) -> tuple[np.ndarray, GridReport]:
    """y [blocks * threads] after a kernel on x, which counts up."""
    text = f"func @k(%x: buffer<f32>, %y: buffer<f32>, %n: index) {{{PRELUDE}{body}\n  return\n}}\n"
    module = parse(text)
    verify(module)
    x = np.arange(8 * blocks * threads, dtype=np.float32) if x is None else x
    y = np.full(blocks * threads, np.nan, np.float32)
    return y, interpret_grid(module.function("k"), [x, y, len(y)], blocks=blocks, threads=threads)


MIRROR = """
  %s = grid.shared {size = 32, element = f32} : () -> buffer<f32, shared>
  %v = tile.load %x, %mine : (buffer<f32>, index) -> f32
  tile.store %s, %me, %v : (buffer<f32, shared>, index, f32) -> ()
  tile.barrier : () -> ()
  %back = tile.sub %all, %me : (index, index) -> index
  %at = tile.sub %back, %one : (index, index) -> index
  %w = tile.load %s, %at : (buffer<f32, shared>, index) -> f32
  tile.store %y, %mine, %w : (buffer<f32>, index, f32) -> ()
"""


def test_blocks_have_their_own_shared_memory() -> None:
    y, report = run(MIRROR)
    np.testing.assert_array_equal(y, [*range(31, -1, -1), *range(63, 31, -1)])
    assert report.shared_bytes == 128


def test_a_missing_barrier_is_found() -> None:
    with pytest.raises(KernelFault, match=r"thread \d+ of block 0 reads shared memory .* written by another without"):
        run(MIRROR.replace(BARRIER, ""))


def test_a_write_after_a_read_needs_a_barrier() -> None:
    again = "  tile.store %s, %me, %w : (buffer<f32, shared>, index, f32) -> ()\n"
    with pytest.raises(KernelFault, match=r"writes shared memory .* read by another without a barrier between"):
        run(MIRROR + again)
    run(MIRROR + BARRIER + again)


def test_two_threads_that_write_one_element() -> None:
    with pytest.raises(KernelFault, match=r"writes argument 1 at byte \d+, written by another"):
        run(MIRROR.replace("tile.store %y, %mine", "tile.store %y, %first"))


def test_a_barrier_orders_no_blocks() -> None:
    """One block writes what the other reads: only the end of the launch orders that."""
    text = """
  %v = tile.load %x, %mine : (buffer<f32>, index) -> f32
  tile.store %y, %mine, %v : (buffer<f32>, index, f32) -> ()
  tile.barrier : () -> ()
  %w = tile.load %y, %me : (buffer<f32>, index) -> f32
"""
    with pytest.raises(KernelFault, match=r"thread 0 of block 1 reads argument 1 at byte 0, written by another"):
        run(text)
    run(text, blocks=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("%s, %me, %v", "%s, %mine, %v"), r"thread 0 of block 1: write of bytes 128\.\.132 of shared memory"),
        (("tile.load %x, %mine", "tile.load %x, %far"), r"read of bytes 4096\.\.4100 of argument 0, outside"),
    ],
)
def test_accesses_out_of_bounds(change: tuple[str, str], message: str) -> None:
    text = "  %far = tile.constant {value = 1024} : () -> index\n" + MIRROR
    run(text, x=np.zeros(1024, np.float32))
    with pytest.raises(KernelFault, match=message):
        run(text.replace(*change), x=np.zeros(1024, np.float32))


def test_a_vector_lies_on_a_multiple_of_its_size() -> None:
    text = """
  %at = tile.mul %mine, %eight : (index, index) -> index
  %v = tile.load %x, %at {lanes = 4} : (buffer<f32>, index) -> vector<4 x f32>
"""
    run(text)
    with pytest.raises(KernelFault, match=r"read of 16 bytes at byte 4 of argument 0, which is no multiple of 16"):
        run(text.replace("tile.load %x, %at", "tile.load %x, %one"))


@pytest.mark.parametrize(
    ("stride", "width", "extra"),
    [
        *((4, 4, 0), (8, 4, 1), (128, 4, 31), (0, 4, 0), (2, 2, 0), (8, 8, 0)),
        *((16, 16, 0), (32, 16, 4), (128, 16, 28), (144, 16, 0)),
    ],
)
def test_passes_of_a_warp_through_shared_memory(stride: int, width: int, extra: int) -> None:
    """Threads `stride` bytes apart. One word for all is no conflict; a row of 128 bytes and 16 more is none either."""
    lanes = np.arange(32)
    assert extra_passes(lanes * stride, width, lanes) == extra
    assert extra_passes(lanes[:0], width, lanes[:0]) == 0
    two = np.concatenate([lanes, lanes]) * stride
    assert extra_passes(two, width, np.arange(64)) == 2 * extra  # two warps


def test_a_run_counts_its_bank_conflicts() -> None:
    text = """
  %s = grid.shared {size = 1024, element = f32} : () -> buffer<f32, shared>
  %t = tile.constant {value = 32} : () -> index
  %at = tile.mul %me, %t : (index, index) -> index
  %v = tile.load %x, %mine : (buffer<f32>, index) -> f32
  tile.store %s, %at, %v : (buffer<f32, shared>, index, f32) -> ()
"""
    assert run(text)[1].bank_conflicts == 2 * 31
    assert run(text.replace("value = 32", "value = 31"))[1].bank_conflicts == 0


HALF = """
  %c = tile.compare %me, %eight {predicate = "lt"} : (index, index) -> i1
  tile.if %c ({ ^():
    BODY
    tile.yield : () -> ()
  }, { ^():
    tile.yield : () -> ()
  }) : (i1) -> ()
"""


def test_a_barrier_that_not_all_reach() -> None:
    text = HALF.replace("BODY", "tile.barrier : () -> ()")
    message = r"tile\.barrier, op 0 of its block is not reached by thread 8 of block 0, but by others of its block"
    with pytest.raises(KernelFault, match=message):
        run(text)
    run(text, threads=8)
    run(text.replace("compare %me", "compare %block"))  # whole blocks may go another way


def test_a_shuffle_that_not_all_reach() -> None:
    text = "  %v = tile.load %x, %mine : (buffer<f32>, index) -> f32\n"
    text += HALF.replace("BODY", "%t = grid.shuffle %v {mask = 1} : (f32) -> f32")
    with pytest.raises(KernelFault, match=r"not reached by thread 8 of block 0, but by others of its warp"):
        run(text)
    run(text.replace("compare %me", "compare %block"))
    with pytest.raises(KernelFault, match=r"needs blocks of whole warps, got 16 threads"):
        run(text, threads=16)


def test_threads_leave_loops_and_branches_one_by_one() -> None:
    """Thread t adds up 0 .. t - 1, and odd threads take the other sign."""
    y, _ = run("""
  %z = tile.constant {value = 0} : () -> index
  %sum = tile.for %zero, %me, %one, %z ({ ^(%i: index, %acc: index):
    %next = tile.add %acc, %i : (index, index) -> index
    tile.yield %next : (index) -> ()
  }) : (index, index, index, index) -> index
  %two = tile.constant {value = 2} : () -> index
  %odd = tile.rem %me, %two : (index, index) -> index
  %c = tile.compare %odd, %one {predicate = "eq"} : (index, index) -> i1
  %signed = tile.if %c ({ ^():
    %m = tile.sub %zero, %sum : (index, index) -> index
    tile.yield %m : (index) -> ()
  }, { ^():
    tile.yield %sum : (index) -> ()
  }) : (i1) -> index
  %f = tile.cast %signed {to = f32} : (index) -> f32
  tile.store %y, %mine, %f : (buffer<f32>, index, f32) -> ()
""")
    t = np.arange(32)
    np.testing.assert_array_equal(y, np.tile(t * (t - 1) // 2 * np.where(t % 2, -1, 1), 2))


SUM_OF_A_WARP = "\n".join(
    ["  %v0 = tile.load %x, %mine : (buffer<f32>, index) -> f32"]
    + [
        f"  %t{i} = grid.shuffle %v{i} {{mask = {16 >> i}}} : (f32) -> f32\n"
        f"  %v{i + 1} = tile.add %v{i}, %t{i} : (f32, f32) -> f32"
        for i in range(5)
    ]
    + ["  tile.store %y, %mine, %v5 : (buffer<f32>, index, f32) -> ()"]
)


def test_shuffles_add_up_a_warp() -> None:
    y, _ = run(SUM_OF_A_WARP, threads=64)
    np.testing.assert_array_equal(y, np.repeat(np.arange(128).reshape(4, 32).sum(axis=1), 32))


COPY = """
  %s = grid.shared {size = 256, element = f32} : () -> buffer<f32, shared>
  %four = tile.constant {value = 4} : () -> index
  %to = tile.mul %me, %four : (index, index) -> index
  %from = tile.mul %mine, %four : (index, index) -> index
  grid.async_copy %s, %to, %x, %from, %yes : (buffer<f32, shared>, index, buffer<f32>, index, i1) -> ()
  grid.async_commit : () -> ()
  %later = tile.add %to, %half : (index, index) -> index
  grid.async_copy %s, %later, %x, %from, %yes : (buffer<f32, shared>, index, buffer<f32>, index, i1) -> ()
  grid.async_commit : () -> ()
  grid.async_wait {pending = 1} : () -> ()
  tile.barrier : () -> ()
  %v = tile.load %s, %at : (buffer<f32, shared>, index) -> f32
  tile.store %y, %mine, %v : (buffer<f32>, index, f32) -> ()
"""
LOOK = (
    "  %half = tile.constant {value = 128} : () -> index\n  %at = tile.sub %eight, %eight : (index, index) -> index\n"
)
AHEAD = LOOK.replace("sub %eight, %eight", "add %half, %eight")
ALL_DONE = ("pending = 1", "pending = 0")


def test_copies_arrive_when_they_are_waited_for() -> None:
    y, _ = run(LOOK + COPY)
    np.testing.assert_array_equal(y, np.repeat([0, 128], 32))
    y, _ = run(AHEAD + COPY.replace(*ALL_DONE))
    np.testing.assert_array_equal(y, np.repeat([8, 136], 32))


def test_a_copy_whose_condition_fails_brings_zeros() -> None:
    y, _ = run(LOOK + COPY.replace("%x, %from, %yes", "%x, %from, %no").replace(*ALL_DONE).replace(
        "  %four", "  %no = tile.compare %me, %me {predicate = \"lt\"} : (index, index) -> i1\n  %four", 1
    ))  # fmt: skip
    np.testing.assert_array_equal(y, np.zeros(64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AHEAD + COPY, r"reads shared memory .* whose copy has not been waited for"),
        (LOOK + COPY.replace("  grid.async_wait {pending = 1} : () -> ()\n", ""), "has not been waited for"),
        (LOOK + COPY.replace(BARRIER, ""), r"reads shared memory .* written by another without a barrier"),
        (
            AHEAD + COPY.replace("  grid.async_commit : () -> ()\n", "").replace(*ALL_DONE),
            r"whose copy has not been waited for",
        ),
        (LOOK + COPY.replace("%s, %later", "%s, %to"), r"writes shared memory .* whose copy has not been waited for"),
    ],
    ids=["too early", "no wait", "no barrier", "no group", "twice to one place"],
)
def test_copies_that_are_not_waited_for(text: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        run(text)


def test_scratch_is_of_one_thread() -> None:
    y, _ = run("""
  %s = tile.scratch {size = 4, element = f32} : () -> buffer<f32, private>
  %v = tile.load %x, %mine : (buffer<f32>, index) -> f32
  tile.store %s, %one, %v : (buffer<f32, private>, index, f32) -> ()
  %w = tile.load %s, %one : (buffer<f32, private>, index) -> f32
  tile.store %y, %mine, %w : (buffer<f32>, index, f32) -> ()
""")
    np.testing.assert_array_equal(y, np.arange(64))


def test_what_runs_on_cpus_only() -> None:
    with pytest.raises(DiagnosticError, match=r"'tile\.ticket' is not run by the threads of a grid"):
        run("  %t = tile.ticket : () -> index\n")


def test_a_loop_without_a_step_is_a_fault() -> None:
    loop = (
        "  tile.for %zero, %n, %zero ({ ^(%i: index):\n    tile.yield : () -> ()\n  }) : (index, index, index) -> ()\n"
    )
    with pytest.raises(KernelFault, match=r"'tile.for' expected a step above 0, got 0"):
        run(loop)


def test_grid_ops_say_where_they_run() -> None:
    op = next(s for s in all_samples() if s.op == "grid.block_id").build()[1]
    with pytest.raises(DiagnosticError, match=r"'grid\.block_id' runs on a GPU: use ir\.grid_interpreter"):
        Environment({}, {}).run_op(op, ())


TILE_SAMPLES = [
    s for s in all_samples()
    if s.op.startswith("tile.") and s.op not in ("tile.ticket", "tile.yield", "tile.num_threads", "tile.scratch")
]  # fmt: skip


@pytest.mark.parametrize("sample", TILE_SAMPLES, ids=str)
def test_a_tile_op_means_the_same_to_all_threads(sample: object) -> None:
    """What one thread of a warp gets is what the interpreter of CPUs gives."""
    _, op = sample.build()  # type: ignore[attr-defined]
    if any(isinstance(x, Stored) for x in sample.inputs) and op.name in ("tile.offset", "tile.view"):  # type: ignore
        return  # a place, not a number: the accesses behind it are tested above
    with np.errstate(all="ignore"):
        made, meant = run_on_a_warp(op, sample.inputs), run_sample(sample)  # type: ignore[attr-defined]
    for a, b in zip(made, meant, strict=True):
        assert a.dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)
