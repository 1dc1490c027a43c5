"""The cache on a GPU: memory behind exactly the granules that the positions of each slot lie in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cuda.device import open_device
from runtime.cuda.driver import OutOfDeviceMemory
from runtime.cuda.kv import TILE, GpuKV, capacity_of
from runtime.cuda.program import KVPlan, KVPlane
from runtime.errors import RuntimeDiagnostic
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status

planes = st.builds(KVPlane, st.just("plane"), st.integers(1, 3), st.integers(1, 300), st.sampled_from([0, 0, 48]))
plans = st.builds(KVPlan, st.integers(1, 3), st.lists(planes, min_size=1, max_size=3).map(tuple))


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(1, 300), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=6))
def test_every_position_has_memory(plan: KVPlan, context: int, steps: list[tuple[int, int]]) -> None:
    """After any order of growing (0: releasing) slots: what is needed is there, zeroed, and nothing else is."""
    granule = 1 << 12
    driver = EmulatedDriver(granule=granule)
    device = open_device(driver=driver)
    stream = device.new_stream()
    kv = GpuKV(device, stream, plan, 3, context)
    held = [0, 0, 0]
    for slot, asked in steps:
        positions = min(asked, context)
        if positions == 0:
            kv.release(slot)
            held[slot] = 0
        else:
            kv.ensure(slot, positions)
            held[slot] = max(held[slot], min(kv.capacity, -(-positions // TILE) * TILE))
        device.synchronize(stream)
        needed: set[int] = set()
        for layer in range(plan.layers):
            for number, plane in enumerate(plan.planes):
                base, room = kv.address(layer, number), plane.positions or kv.capacity
                for s in range(3):
                    for head in range(plane.heads if held[s] else 0):
                        start = base + (s * plane.heads + head) * room * plane.bytes
                        nbytes = (plane.positions or held[s]) * plane.bytes
                        found = driver.memory.view(start, nbytes, "a row", kinds=("reserved",))
                        assert not found.any()
                        first, end = start - kv.address(0, 0), start - kv.address(0, 0) + nbytes
                        needed |= set(range(first // granule, (end - 1) // granule + 1))
        assert kv.committed_bytes() == len(needed) * granule == device.used_bytes()
    kv.close()
    kv.close()
    device.free_stream(stream)
    device.close()
    assert driver.leaks() == []


def test_all_or_nothing() -> None:
    driver = EmulatedDriver(granule=1 << 12)
    device = open_device(driver=driver)
    kv = GpuKV(device, device.new_stream(), KVPlan(4, (KVPlane("keys", 1, 64),)), 1, 256)
    kv.ensure(0, 64)
    before = kv.committed_bytes()
    driver.plant("cuMemCreate", Status.CUDA_ERROR_OUT_OF_MEMORY, skip=2)
    with pytest.raises(OutOfDeviceMemory, match="no room for the KV cache"):
        kv.ensure(0, 256)
    assert kv.committed_bytes() == before
    kv.ensure(0, 256)
    assert kv.committed_bytes() == kv.needed_bytes(256) == 4 * before
    assert kv.release(0) == 4 * before and kv.release(0) == 0


def test_sizes_that_no_gpu_has() -> None:
    device = open_device(driver=EmulatedDriver())
    plan = KVPlan(1 << 16, (KVPlane("keys", 1 << 16, 1 << 20),))
    with pytest.raises(RuntimeDiagnostic, match="of addresses"):
        GpuKV(device, device.new_stream(), plan, 4, 1 << 20)
    assert capacity_of(KVPlan(1, (), 48), 100) == 192
