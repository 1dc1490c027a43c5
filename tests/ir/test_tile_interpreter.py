"""The interpreter of kernels and programs: what it computes, and that it finds what kernels must not do.

Every bad kernel has a good twin that differs in the fault only, so that what is found is the fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ir.tile_interpreter
from ir import parse, verify
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel, interpret_program
from ir.tile_memory_model import KernelFault

PRELUDE = """
  %zero = tile.constant {value = 0} : () -> index
  %one = tile.constant {value = 1} : () -> index
  %two = tile.constant {value = 2} : () -> index
  %me = tile.thread_id : () -> index
  %all = tile.num_threads : () -> index
"""


def kernel(body: str, parameters: str = "%x: buffer<f32>, %y: buffer<f32>, %n: index") -> FuncOp:
    """A verified kernel of that body; constants zero, one, two and the thread's numbers %me, %all are there."""
    module = parse(f"func @k({parameters}) {{{PRELUDE}{body}\n  return\n}}\n")
    verify(module)
    return module.function("k")


def run(body: str, *, threads: int = 1, n: int = 8, **named: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
    interpret_kernel(kernel(body, **named), [x, y, n], threads)
    return x, y


STORE_MINE = """
  %v = tile.load %x, %me {lanes = 1} : (buffer<f32>, index) -> f32
  tile.store %y, %me, %v : (buffer<f32>, index, f32) -> ()
"""
BARRIER = "  tile.barrier : () -> ()\n"
READ_NEXT = """
  %next = tile.add %me, %one : (index, index) -> index
  %at = tile.rem %next, %all : (index, index) -> index
  %w = tile.load %y, %at : (buffer<f32>, index) -> f32
"""
STORE_NEXT = "  tile.store %x, %me, %w : (buffer<f32>, index, f32) -> ()\n"


def test_threads_share_memory_and_know_their_numbers() -> None:
    _, y = run(STORE_MINE, threads=4)
    np.testing.assert_array_equal(y, [0, 1, 2, 3, 0, 0, 0, 0])


def test_a_barrier_orders_two_phases() -> None:
    x, _ = run(STORE_MINE + BARRIER + READ_NEXT + STORE_NEXT, threads=3)
    np.testing.assert_array_equal(x[:3], [1, 2, 0])


def test_a_missing_barrier_is_found() -> None:
    with pytest.raises(KernelFault, match=r"thread \d (reads|writes) argument 1 at byte \d+, .* in this phase"):
        run(STORE_MINE + READ_NEXT + STORE_NEXT, threads=3)


def test_two_threads_that_write_one_element() -> None:
    bad = STORE_MINE.replace("tile.store %y, %me", "tile.store %y, %zero")
    with pytest.raises(KernelFault, match=r"thread \d writes argument 1 at byte 0, written by another in this phase"):
        run(bad, threads=2)
    _, y = run(bad, threads=1)
    assert y[0] == 0


def test_a_race_needs_no_difference_of_values() -> None:
    """Two threads that store the same number race all the same."""
    same = STORE_MINE.replace("%x, %me", "%x, %zero").replace("tile.store %y, %me", "tile.store %y, %zero")
    with pytest.raises(KernelFault, match="argument 1 at byte 0, written by another"):
        run(same, threads=2)


LAST_FOUR = """
  %at = tile.constant {value = 4} : () -> index
  %v = tile.load %x, %at {lanes = 4} : (buffer<f32>, index) -> vector<4 x f32>
  tile.store %y, %at, %v : (buffer<f32>, index, vector<4 x f32>) -> ()
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("value = 4", "value = 5"), r"read of bytes 20\.\.36 of argument 0, outside of 0\.\.32"),
        (("value = 4", "value = -1"), r"read of bytes -4\.\.12 of argument 0, outside of 0\.\.32"),
        (("tile.store %y, %at", "tile.store %y, %n"), r"write of bytes 32\.\.48 of argument 1, outside of 0\.\.32"),
    ],
)
def test_accesses_out_of_bounds(change: tuple[str, str], message: str) -> None:
    _, y = run(LAST_FOUR)
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 4, 5, 6, 7])
    with pytest.raises(KernelFault, match=message):
        run(LAST_FOUR.replace(*change))


def test_a_fault_of_one_thread_ends_all() -> None:
    """The others are at a barrier by then; the fault is told, not the waiting."""
    bad = STORE_MINE.replace("%x, %me", "%x, %far") + BARRIER
    far = "  %t = tile.mul %me, %n : (index, index) -> index\n  %far = tile.add %t, %zero : (index, index) -> index\n"
    with pytest.raises(KernelFault, match=r"read of bytes 32\.\.36 of argument 0, outside"):
        run(far + bad, threads=2)


ONE_ARRIVES = """
  %first = tile.compare %me, %zero {predicate = "eq"} : (index, index) -> i1
  tile.if %first ({ ^():
    tile.barrier : () -> ()
    tile.yield : () -> ()
  }, { ^():
    tile.yield : () -> ()
  }) : (i1) -> ()
"""


def test_a_barrier_that_not_all_reach() -> None:
    with pytest.raises(KernelFault) as caught:
        run(ONE_ARRIVES, threads=2)
    assert str(caught.value) == (
        "the threads of a team meet at different barriers: "
        "thread 0 at tile.barrier, op 0 of its block, thread 1 at the end"
    )
    run(ONE_ARRIVES, threads=1)


def test_threads_at_two_different_barriers() -> None:
    """As many barriers on every thread, but not the same ones: what is ordered is not what the code says."""
    other = ONE_ARRIVES.replace(
        "{ ^():\n    tile.yield : () -> ()\n  })",
        "{ ^():\n    tile.barrier : () -> ()\n    tile.yield : () -> ()\n  })",
    )
    assert other.count("tile.barrier") == 2
    with pytest.raises(KernelFault, match=r"meet at different barriers: thread 0 at tile\.barrier"):
        run(other, threads=2)


def test_a_thread_that_never_comes_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir.tile_interpreter, "BARRIER_SECONDS", 0.05)
    endless = """
  %far = tile.constant {value = 100000} : () -> index
  %rounds = tile.mul %me, %far : (index, index) -> index
  tile.for %zero, %rounds, %one ({ ^(%i: index):
    tile.yield : () -> ()
  }) : (index, index, index) -> ()
"""
    with pytest.raises(KernelFault, match=r"thread 0 waits at tile\.barrier, op 8 of its block in vain"):
        run(endless + BARRIER, threads=2)


def test_a_loop_without_a_step_is_a_fault() -> None:
    loop = (
        "  tile.for %zero, %n, %step ({ ^(%i: index):\n    tile.yield : () -> ()\n  }) : (index, index, index) -> ()\n"
    )
    with pytest.raises(KernelFault, match=r"'tile.for' expected a step above 0, got 0"):
        run("  %step = tile.constant {value = 0} : () -> index\n" + loop)
    run("  %step = tile.constant {value = 3} : () -> index\n" + loop)


def test_scratch_belongs_to_one_thread_and_one_run() -> None:
    body = """
  %s = tile.scratch {size = 1, element = f32} : () -> buffer<f32, private>
  %old = tile.load %s, %zero : (buffer<f32, private>, index) -> f32
  %v = tile.load %x, %me : (buffer<f32>, index) -> f32
  tile.store %s, %zero, %v : (buffer<f32, private>, index, f32) -> ()
  tile.barrier : () -> ()
  %mine = tile.load %s, %zero : (buffer<f32, private>, index) -> f32
  %sum = tile.add %mine, %old : (f32, f32) -> f32
  tile.store %y, %me, %sum : (buffer<f32>, index, f32) -> ()
"""
    _, y = run(body, threads=3)
    undefined = np.array([0xCBCBCBCB], np.uint32).view(np.float32)[0]
    np.testing.assert_array_equal(y[:3], np.arange(3, dtype=np.float32) + undefined)


def test_an_op_of_programs_in_a_kernel() -> None:
    with pytest.raises(DiagnosticError, match=r"'plan\.size' runs on a team of threads"):
        run('  %t = plan.size {which = "tokens"} : () -> index\n')


# -- programs

KERNELS = """
func @double(%x: buffer<f32>, %y: buffer<f32>, %n: index) {
  %one = tile.constant {value = 1} : () -> index
  %me = tile.thread_id : () -> index
  %all = tile.num_threads : () -> index
  tile.for %me, %n, %all ({ ^(%i: index):
    %v = tile.load %x, %i : (buffer<f32>, index) -> f32
    %d = tile.add %v, %v : (f32, f32) -> f32
    tile.store %y, %i, %d : (buffer<f32>, index, f32) -> ()
    tile.yield : () -> ()
  }) : (index, index, index) -> ()
  return
}
func @reverse(%x: buffer<f32>, %y: buffer<f32>, %n: index) {
  %one = tile.constant {value = 1} : () -> index
  %me = tile.thread_id : () -> index
  %all = tile.num_threads : () -> index
  tile.for %me, %n, %all ({ ^(%i: index):
    %a = tile.sub %n, %i : (index, index) -> index
    %j = tile.sub %a, %one : (index, index) -> index
    %v = tile.load %x, %j : (buffer<f32>, index) -> f32
    tile.store %y, %i, %v : (buffer<f32>, index, f32) -> ()
    tile.yield : () -> ()
  }) : (index, index, index) -> ()
  return
}
"""
PROGRAM = """
func @decode() {
  %n = plan.size {which = "tokens", scale = 2} : () -> index
  %w = plan.weight {symbol = @w, offset = 32, bytes = 32} : () -> buffer<f32>
  %b = plan.reserve {offset = 64, bytes = 32} : () -> buffer<f32>
  plan.launch %w, %b, %n {kernel = @double, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index) -> ()
  plan.barrier : () -> ()
  %out = plan.input {which = "logits"} : () -> buffer<f32>
  plan.launch %b, %out, %n {kernel = @reverse, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index) -> ()
  plan.release %b : (buffer<f32>) -> ()
  %kv = plan.kv {layer = 1, position_bytes = 16} : () -> buffer<f32>
  plan.launch %w, %kv, %n {kernel = @double, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>, index) -> ()
  plan.barrier : () -> ()
  return
}
"""


def run_program(text: str, threads: int = 2, arena_bytes: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, arena, kv cache) after the program: 4 tokens, a cache of 2 slots of 2 positions and 2 layers."""
    module = parse(KERNELS + text)
    verify(module)
    kernels = {f.sym_name: f for f in module.functions if f.sym_name != "decode"}
    weights, logits = np.arange(16, dtype=np.float32), np.zeros(8, np.float32)
    arena, kv = np.zeros(arena_bytes, np.uint8), np.zeros(2 * 2 * 2 * 2 * 2, np.float32)
    interpret_program(
        module.function("decode"), kernels, inputs={"logits": logits},
        sizes={"tokens": 4, "rows": 1, "ctx": 2, "slots": 2}, weights=weights, arena=arena, kv=kv, threads=threads,
    )  # fmt: skip
    return logits, arena.view(np.float32), kv


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_program(threads: int) -> None:
    logits, arena, kv = run_program(PROGRAM, threads)
    np.testing.assert_array_equal(logits, 2 * np.arange(15, 7, -1))
    np.testing.assert_array_equal(arena[16:24], 2 * np.arange(8, 16))
    np.testing.assert_array_equal(kv, [0] * 16 + list(2 * np.arange(8, 16)) + [0] * 8)


def changed(old: str, new: str, count: int = 1) -> str:
    assert old in PROGRAM
    return PROGRAM.replace(old, new, count)


def test_a_program_without_its_barrier() -> None:
    with pytest.raises(KernelFault, match=r"thread \d (reads|writes) arena at byte \d+, .* in this phase"):
        run_program(changed("  plan.barrier : () -> ()\n", ""))
    run_program(changed("  plan.barrier : () -> ()\n", ""), threads=1)


def test_a_buffer_is_bounded_by_its_own_bytes() -> None:
    """The arena goes on behind the buffer, and the weights behind the tensor."""
    with pytest.raises(KernelFault, match=r"write of bytes 80\.\.84 of arena, outside of 64\.\.80"):
        run_program(changed("offset = 64, bytes = 32", "offset = 64, bytes = 16"), threads=1)
    with pytest.raises(KernelFault, match=r"read of bytes 32\.\.36 of weights, outside of 16\.\.32"):
        run_program(changed("offset = 32, bytes = 32", "offset = 16, bytes = 16"), threads=1)
    with pytest.raises(KernelFault, match=r"of arena, outside of 64\.\.72"):
        run_program(PROGRAM, arena_bytes=72)


def test_a_buffer_used_after_its_release() -> None:
    release = "  plan.release %b : (buffer<f32>) -> ()\n"
    text = changed(release, "").replace("  %out = plan", release + "  %out = plan")
    with pytest.raises(KernelFault, match="launch of @reverse uses argument 0 after its release"):
        run_program(text)


def test_a_cache_of_too_few_layers() -> None:
    with pytest.raises(KernelFault, match=r"of kv cache, outside of 128\.\.128"):
        run_program(changed("layer = 1", "layer = 2"), threads=1)
