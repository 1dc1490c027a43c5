"""Reservations and the KV cache: demand paging, what is resident, what is given back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic
from runtime.kv_cache import KVCache
from runtime.manifest import KVInfo
from runtime.memory import PAGE_BYTES, Reservation


def test_a_reservation_costs_nothing_until_touched() -> None:
    memory = Reservation(1 << 36, what="the test")  # 64 GiB, more than the machine has
    assert memory.committed_bytes() == 0
    memory.view()[0] = 1
    memory.view()[1 << 35] = 1
    assert memory.committed_bytes() == 2 * PAGE_BYTES
    assert memory.address % PAGE_BYTES == 0
    memory.close()


@given(st.integers(0, 10 * PAGE_BYTES), st.integers(0, 10 * PAGE_BYTES))
def test_discard_gives_back_whole_pages_only(offset: int, length: int) -> None:
    memory = Reservation(20 * PAGE_BYTES, what="the test")
    memory.view()[:] = 255
    given_back = memory.discard(offset, length)
    content = memory.view().copy()
    assert np.all(content[:offset] == 255) and np.all(content[offset + length :] == 255)
    assert int(np.count_nonzero(content == 0)) == given_back
    assert given_back % PAGE_BYTES == 0 and given_back > length - 2 * PAGE_BYTES
    memory.close()


def test_impossible_reservation() -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"cannot reserve \d+ bytes of memory for the moon"):
        Reservation(1 << 55, what="the moon")
    with pytest.raises(RuntimeDiagnostic, match="cannot reserve"):
        Reservation(1 << 70, what="the moon")


def test_address_space_limit_is_a_diagnostic(artifact_path: Path) -> None:
    script = """
import resource, sys
from runtime import RuntimeDiagnostic
from runtime.memory import Reservation
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    Reservation(4 << 30, what="the KV cache")
except RuntimeDiagnostic as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "cannot reserve 4294967296 bytes of memory for the KV cache" in done.stdout, done.stderr
    assert "ulimit -v" in done.stdout


LLAMA = KVInfo(layers=3, num_kv_heads=4, head_dim=64, format="bf16", bytes_per_position=3 * 4 * 64 * 2 * 2, block=16)


def test_capacity_is_a_multiple_of_64() -> None:
    for asked, capacity in [(1, 64), (64, 64), (65, 128), (2048, 2048)]:
        cache = KVCache(LLAMA, asked, 2)
        assert cache.capacity == capacity
        assert cache.reserved_bytes == LLAMA.bytes_per_position * capacity * 2
        cache.close()


def test_rings_of_a_low_bit_cache_are_reserved_too() -> None:
    ring = 3 * 17 * 4096  # 34 blocks of 16 positions for each of 12 heads
    info = replace(LLAMA, format="q4_sym<group=row, scale=f16>, recent=16", bytes_per_slot=ring, recent=16, ring=544)
    cache = KVCache(info, 64, 2)
    assert cache.reserved_bytes == 2 * (info.bytes_per_position * 64 + ring)
    assert cache.release(1) == cache.reserved_bytes // 2
    cache.close()


def test_release_frees_one_slot_of_every_layer() -> None:
    cache = KVCache(LLAMA, 128, 3)
    slot_bytes = 4 * 64 * 2 * 2 * 128  # one slot in one layer: 128 KiB
    content = cache.reservation.view().reshape(3, 3, slot_bytes)  # [layer, slot, bytes]
    content[:] = 7
    assert cache.committed_bytes() == cache.reserved_bytes
    assert cache.release(1) == 3 * slot_bytes
    assert cache.committed_bytes() == cache.reserved_bytes - 3 * slot_bytes
    assert np.all(content[:, 1] == 0) and np.all(content[:, [0, 2]] == 7)
    del content
    cache.close()


def test_a_cache_beyond_the_address_space() -> None:
    with pytest.raises(RuntimeDiagnostic, match="the KV cache for 65536 sequences of 1048576 positions takes"):
        KVCache(LLAMA, 1 << 20, 1 << 16)
