"""The machines that are shipped: they load, say where their figures come from, and are plausible."""

import dataclasses

import pytest

import hw_targets
from hw_targets import Target, cost_model
from hw_targets.cost_model import Work, price

MACHINES = [name for name in hw_targets.names()[1:] if hw_targets.load(name).is_machine]
WIDTHS = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16, "f8": 8, "i8": 8, "f4": 4, "i4": 4}

# What the documents say, written down a second time: (machine, unit, element, FLOP/s of one copy).
PEAKS = [
    ("t4-gcp", "gpu", "f16", 65e12),
    ("v100-dgx2", "gpu", "f16", 125e12),
    ("a100-40gb", "gpu", "bf16", 312e12),
    ("8xa100-80gb", "gpu", "i8", 624e12),
    ("rtx-3090", "gpu", "f16", 71e12),
    ("a6000", "gpu", "f16", 154.8e12),
    ("rtx-4090", "gpu", "f16", 165.2e12),
    ("h100-sxm", "gpu", "f16", 989.4e12),
    ("64xh100", "gpu", "f8", 1978.9e12),
    ("h200-sxm", "gpu", "bf16", 989.4e12),
    ("gh200", "gpu", "bf16", 989.4e12),
    ("b200", "gpu", "f4", 9e15),
    ("mi300x", "gpu", "f8", 2614.9e12),
    ("sn40l", "rdu", "bf16", 638e12),
    ("m1-max", "gpu", "f32", 10.4e12),
    ("i9-13900k", "cores", "f32", 8 * 172.8e9),
    ("epyc-9654", "cores", "i8", 96 * 307.2e9),
]
# (machine, tier, bytes of one copy, bytes/s of one copy)
TIERS = [
    ("t4-gcp", "vram", 16e9, 320e9),
    ("t4-gcp", "dram", 208 * 2**30, 128e9),
    ("v100-dgx2", "hbm", 32e9, 900e9),
    ("a100-40gb", "hbm", 40e9, 1555e9),
    ("a100-80gb", "hbm", 80e9, 2039e9),
    ("rtx-3090", "vram", 24e9, 936e9),
    ("rtx-4090", "vram", 24e9, 1008e9),
    ("a6000", "vram", 48e9, 768e9),
    ("8xh100", "hbm", 80e9, 3.35e12),
    ("h200-sxm", "hbm", 141e9, 4.8e12),
    ("b200", "hbm", 180e9, 8e12),
    ("gh200", "dram", 480e9, 512e9),
    ("mi300x", "hbm", 192e9, 5.3e12),
    ("m1-max", "unified", 64e9, 400e9),
    ("m2-ultra", "unified", 192e9, 800e9),
    ("m4-pro", "unified", 48e9, 273e9),
    ("m4-max", "unified", 128e9, 546e9),
    ("ddr4-desktop", "dram", 32 * 2**30, 51.2e9),
    ("i9-13900k", "dram", 64 * 2**30, 102.4e9),
    ("epyc-9654", "dram", 768 * 2**30, 460.8e9),
    ("cxl-server", "cxl", 2**40, 104e9),
    ("sn40l", "ddr", 1.5e12, 200e9),
]


def machine(name: str) -> Target:
    return hw_targets.load(name)


def _rate(target: Target, tier: str) -> float:
    found = target.tier(tier)
    assert found is not None and found.read_bandwidth is not None
    return found.read_bandwidth


def test_there_are_many_and_of_every_kind():
    assert len(MACHINES) >= 25
    kinds = {u.kind for name in MACHINES for u in machine(name).units}
    assert kinds == {"cpu", "gpu", "near-memory"}
    assert {machine(n).nodes for n in ("8xh100", "64xh100")} == {1, 8}
    assert not hw_targets.load("aarch64").is_machine


@pytest.mark.parametrize("name", MACHINES)
def test_figures_have_sources_and_are_plausible(name):
    t = machine(name)
    assert t.name == name and t.description and t.units and t.tiers
    for unit in t.units:
        assert unit.source and unit.peak and unit.cores
        rates = {element: unit.peak_of(element) or 0.0 for element, _ in unit.peak}
        assert min(rates.values()) > 1e10 and max(rates.values()) < 1e17
        for wide in rates:  # a narrower element is never slower
            assert all(rates[e] >= rates[wide] for e in rates if WIDTHS[e] < WIDTHS[wide]), f"{unit.name}: {rates}"
        assert unit.power_watts is None or 0.5 <= unit.power_watts <= 2000
        assert unit.launch_seconds is None or 1e-8 < unit.launch_seconds < 1e-4
        if unit.kind == "gpu":
            assert unit.arch
    for tier in t.tiers:
        assert tier.source and tier.capacity_bytes and tier.read_bandwidth
        assert 1e5 < tier.capacity_bytes < 4e12 and 1e10 < tier.read_bandwidth < 1e14
        assert tier.reserve_bytes < tier.capacity_bytes / 2
    for link in t.links:
        slowest = min(_rate(t, end) for end in (link.from_tier, link.to_tier))
        assert link.source and link.bandwidth and link.bandwidth <= slowest, link.name
    for fabric in t.fabrics:
        assert fabric.source and fabric.bandwidth and fabric.bandwidth < _rate(t, fabric.tier)
    for drive in t.storage:
        rate = drive.read_rate()
        assert drive.source and rate and 1e8 < rate < 2e10
        assert rate < _rate(t, drive.tier)
        assert (drive.read_rate(4096, 1) or rate) < rate
    assert (t.source != "") == (t.power_watts is not None)


@pytest.mark.parametrize("name", MACHINES)
def test_every_tier_can_be_reached(name):
    """From a unit's tier each other tier and each drive is some links away: a plan could move data there."""
    t = machine(name)
    reached = {t.units[0].tier}
    for _ in t.tiers:
        for link in t.links:
            if reached & {link.from_tier, link.to_tier}:
                reached |= {link.from_tier, link.to_tier}
    assert reached == {tier.name for tier in t.tiers}
    assert all(drive.tier in reached for drive in t.storage)


@pytest.mark.parametrize(("name", "unit", "element", "rate"), PEAKS)
def test_peaks_are_those_of_the_documents(name, unit, element, rate):
    found = machine(name).unit(unit)
    assert found is not None and found.peak_of(element) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(("name", "tier", "capacity", "read"), TIERS)
def test_memories_are_those_of_the_documents(name, tier, capacity, read):
    found = machine(name).tier(tier)
    assert found is not None
    assert found.capacity_bytes == capacity and found.read_bandwidth == pytest.approx(read)


def test_faster_memories_are_the_smaller_ones():
    for name in ("a100-80gb", "h100-sxm", "sn40l", "gh200", "rtx-4090", "cxl-server"):
        tiers = sorted((t for t in machine(name).tiers if t.name != "hbm-pim"), key=lambda t: -(t.read_bandwidth or 0))
        sizes = [t.capacity_bytes or 0 for t in tiers]
        assert sizes == sorted(sizes), name


def test_compute_near_memory_reads_faster_than_what_leaves_it():
    for name, near in (
        ("instinfer-csd", "flash"),
        ("duplex-pim", "hbm-pim"),
        ("pim-gpt", "gddr6"),
        ("cambricon-llm", "flash"),
    ):
        t = machine(name)
        tier = t.tier(near)
        assert tier is not None and any(u.kind == "near-memory" and u.tier == near for u in t.units)
        outward = [x.bandwidth for x in t.links if near in (x.from_tier, x.to_tier)]
        assert outward and all((tier.read_bandwidth or 0) > (bandwidth or 0) for bandwidth in outward)


def test_constants_that_published_predictions_use():
    t4 = machine("t4-gcp")
    link, drive = t4.link_between("dram", "vram"), t4.store()
    assert link is not None and drive is not None
    assert link.rate("vram") == pytest.approx(12.89 * 2**30) and link.rate("dram") == pytest.approx(0.97 * 2**30)
    assert drive.read_rate() == pytest.approx(2.65e9)
    assert t4.units[0].achieved_of("f16") == pytest.approx(21.24e12, rel=1e-3)
    phone = machine("phone-ufs4").storage[0]
    assert phone.read_rate(4 << 20, 1) == pytest.approx(1810 * 2**20)
    assert phone.read_rate(128 << 10, 2) == pytest.approx(954 * 2**20)


def test_nodes_hold_as_many_copies_as_their_names_say():
    for name in ("8xh100", "64xh100", "8xa100-80gb"):
        t = machine(name)
        gpu, hbm, pcie = t.unit("gpu"), t.tier("hbm"), t.link_between("dram", "hbm")
        assert gpu is not None and hbm is not None and pcie is not None
        assert gpu.count == hbm.count == pcie.count == 8
        assert f"{gpu.count * t.nodes}x" == name.partition("x")[0] + "x"
        assert t.fabric("hbm") is not None and (t.fabric("hbm", "cluster") is not None) == (t.nodes > 1)


@pytest.mark.parametrize("name", MACHINES)
def test_every_unit_can_be_priced(name):
    t = machine(name)
    for unit in t.units:
        element = unit.peak[0][0]
        found = price(Work(flops=1e9, element=element, traffic=((unit.tier, 1e6),), launches=1), unit, t)
        assert 0 < found.seconds < 1 and found.bound
    for drive in t.storage:
        resource, seconds = cost_model.transfer_time(t, drive.name, drive.tier, 1e9)
        assert resource == f"{drive.name} read" and seconds > 0


def test_overrides_of_shipped_machines():
    t = hw_targets.load("8xh100{gpu.count=4 hbm.count=4 pcie.count=4 hbm=94GB nvlink=600GB/s nvme.read=3GB/s nodes=2}")
    gpu, hbm, drive = t.unit("gpu"), t.tier("hbm"), t.store()
    assert gpu is not None and hbm is not None and drive is not None
    assert gpu.count == 4 and hbm.capacity_bytes == 94 * 10**9 and t.nodes == 2
    assert drive.read_rate() == pytest.approx(3e9)
    plain = machine("8xh100").store()
    assert plain is not None and [p.block_bytes for p in drive.points] == [p.block_bytes for p in plain.points]
    assert dataclasses.replace(drive, points=plain.points, source=plain.source) == plain
