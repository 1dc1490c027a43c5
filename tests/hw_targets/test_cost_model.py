"""Prices of single pieces of work: the slowest resource decides, faster parts never cost more, unknown is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_targets
from hw_targets.cost_model import Work, compute_rate, price, transfer_time
from hw_targets.target import ComputeUnit, Link, MemoryTier, Storage, StoragePoint, Target
from ir.diagnostics import DiagnosticError

GPU = ComputeUnit("gpu", "gpu", "hbm", peak=(("f16", 100e12), ("i8", 200e12)), efficiency=(("f16", 0.5),),
                  bandwidth_efficiency=0.8, launch_seconds=2e-6, source="test", power_watts=300.0)  # fmt: skip
CPU = ComputeUnit("cores", "cpu", "dram", cores=4, peak=(("f32", 1e11),), barrier_seconds=1e-6, source="test")
TARGET = Target(
    "test", "", "x86_64-unknown-linux-gnu", "x86-64", frozenset(), units=(GPU, CPU),
    tiers=(MemoryTier("hbm", 16 << 30, read_bandwidth=1e12),
           MemoryTier("dram", 64 << 30, read_bandwidth=50e9, read_by_threads=((1, 20e9), (4, 50e9)))),
    links=(Link("pcie", "dram", "hbm", 25e9, back_bandwidth=20e9),),
    storage=(Storage("ssd", None, (StoragePoint(1 << 20, 4, 3e9, 1e9),), "test"),),
)  # fmt: skip


def test_slowest_resource_is_the_bound() -> None:
    compute = price(Work(5e12, "f16", (("hbm", 1e9),)), GPU, TARGET)
    assert (compute.seconds, compute.bound) == (0.1, "gpu f16")
    memory = price(Work(1e9, "f16", (("hbm", 8e9),)), GPU, TARGET)
    assert (memory.seconds, memory.bound) == (0.01, "hbm read")
    streamed = price(Work(1e9, "f16", (("hbm", 8e9),), (("dram", "hbm", 8e9),)), GPU, TARGET)
    assert (round(streamed.seconds, 9), streamed.bound) == (0.32, "pcie dram->hbm")
    assert dict(streamed.parts)["hbm read"] == 0.01
    assert streamed.joules == pytest.approx(96.0)


def test_few_rows_reach_less_of_the_peak() -> None:
    slow = dataclasses.replace(GPU, few_rows_efficiency=(("f16", 0.25),))
    work = Work(5e12, "f16", (("hbm", 8e9),))
    assert price(work, slow, TARGET).seconds == pytest.approx(0.1)
    assert price(dataclasses.replace(work, rows=4), slow, TARGET).seconds == pytest.approx(0.2)
    assert price(dataclasses.replace(work, rows=64), slow, TARGET) == price(work, slow, TARGET)


def test_dispatch_comes_on_top() -> None:
    small = price(Work(1e6, "f16", (("hbm", 1e3),), launches=10), GPU, TARGET)
    assert small.bound == "dispatch"
    assert small.seconds == pytest.approx(2e-5 + 2e-8)
    assert price(Work(launches=3), CPU, TARGET).seconds == pytest.approx(3e-6)
    assert price(Work(), CPU, TARGET) == price(Work(element="bf16"), CPU, TARGET)


def test_threads_and_directions() -> None:
    one = price(Work(traffic=(("dram", 1e9),), threads=1), CPU, TARGET)
    assert one.seconds == 0.05 and price(Work(traffic=(("dram", 1e9),)), CPU, TARGET).seconds == 0.02
    assert transfer_time(TARGET, "hbm", "dram", 20e9) == ("pcie hbm->dram", 1.0)
    assert transfer_time(TARGET, "ssd", "dram", 3e9) == ("ssd read", 1.0)
    assert transfer_time(TARGET, "dram", "ssd", 3e9) == ("ssd write", 3.0)


def test_unknown_peaks_stand_in_or_are_refused() -> None:
    assert compute_rate(GPU, "i4", TARGET) == (200e12, "i8")
    assert compute_rate(GPU, "bf16", TARGET) == (50e12, "f16")
    assert compute_rate(CPU, "bf16", TARGET) == (4e11, "f32")
    with pytest.raises(DiagnosticError, match="does not state what unit gpu computes in f32"):
        compute_rate(GPU, "f32", TARGET)
    blind = dataclasses.replace(TARGET, tiers=(MemoryTier("hbm"), MemoryTier("dram")))
    with pytest.raises(DiagnosticError, match="does not state how fast tier hbm is read"):
        price(Work(traffic=(("hbm", 1.0),)), GPU, blind)
    with pytest.raises(DiagnosticError, match="no link between hbm and moon"):
        transfer_time(dataclasses.replace(TARGET, storage=()), "hbm", "moon", 1.0)


@given(st.floats(0, 1e15), st.floats(0, 1e12), st.floats(0, 1e12), st.integers(0, 100), st.floats(1.0, 10.0))
def test_more_is_never_slower(flops: float, near: float, far: float, launches: int, factor: float) -> None:
    work = Work(flops, "f16", (("hbm", near),), (("dram", "hbm", far),), launches)
    cost = price(work, GPU, TARGET)
    assert cost.seconds >= max(seconds for _, seconds in cost.parts)
    assert cost.seconds <= sum(seconds for _, seconds in cost.parts) * (1 + 1e-12)
    fast = dataclasses.replace(
        TARGET,
        tiers=tuple(dataclasses.replace(t, read_bandwidth=(t.read_bandwidth or 0) * factor) for t in TARGET.tiers),
        links=(dataclasses.replace(TARGET.links[0], bandwidth=25e9 * factor),),
    )
    assert price(work, GPU, fast).seconds <= cost.seconds


def test_memory_that_is_not_pinned() -> None:
    loose = dataclasses.replace(TARGET.links[0], pinned=False, pageable_bandwidth=10e9)
    target = dataclasses.replace(TARGET, links=(loose,))
    assert transfer_time(target, "dram", "hbm", 20e9) == ("pcie dram->hbm", 2.0)
    assert transfer_time(target, "hbm", "dram", 20e9) == ("pcie hbm->dram", 2.0)
    fast = dataclasses.replace(loose, pageable_bandwidth=90e9)  # never faster than the link
    assert transfer_time(dataclasses.replace(TARGET, links=(fast,)), "dram", "hbm", 25e9)[1] == 1.0
    unstated = dataclasses.replace(TARGET, links=(dataclasses.replace(loose, pageable_bandwidth=None),))
    with pytest.raises(DiagnosticError, match="what link pcie moves of memory that is not pinned") as refused:
        transfer_time(unstated, "dram", "hbm", 1.0)
    assert "pcie.pageable=6GB/s" in str(refused.value)
    described = hw_targets.load("a6000{pcie.pinned=no}")
    assert transfer_time(described, "dram", "vram", 10e9)[1] == 1.0
