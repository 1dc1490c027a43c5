"""Machines with several units, tiers, links, drives and nodes: files, rates, overrides and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_targets
from hw_targets.memory import Link, MemoryTier, Storage, StoragePoint
from hw_targets.schema import parse_target
from ir.diagnostics import DiagnosticError

NODE = """
name = "node"
description = "two GPUs, a switch, a drive that computes"
nodes = 4
power = "3kW"
idle = "400W"
source = "datasheet"
[price]
hour = 4.5
source = "a price list of 2025"
[llvm]
triple = "x86_64-unknown-linux-gnu"
cpu = "x86-64-v4"
[[unit]]
name = "cores"
tier = "dram"
cores = 16
peak = { f32 = "50GFLOP/s", i8 = "200GOP/s" }
efficiency = 0.75
bandwidth_efficiency = 0.94
barrier = "0.3us"
source = { peak = "datasheet", efficiency = "measured", bandwidth_efficiency = "measured", barrier = "measured" }
[[unit]]
name = "gpu"
kind = "gpu"
arch = "sm_90"
tier = "hbm"
count = 2
peak = { f16 = "989TFLOP/s", f8 = "1979TFLOP/s" }
efficiency = { f16 = 0.68, f8 = 0.4 }
launch = "4us"
power = "700W"
idle = "70W"
source = "datasheet"
[[unit]]
name = "csd"
kind = "near-memory"
tier = "flash"
count = 2
[[tier]]
name = "dram"
capacity = "512GiB"
reserve = "8GiB"
read = "300GB/s"
write = "280GB/s"
read_by_threads = [
  { threads = 1, read = "20GB/s" }, { threads = 4, read = "80GB/s" }, { threads = 16, read = "300GB/s" },
]
page_fault = "0.5us"
source = "measured"
[[tier]]
name = "hbm"
count = 2
capacity = "80GB"
read = "3.35TB/s"
energy = "31.2pJ/B"
power = "90W"
source = "datasheet"
[[tier]]
name = "flash"
count = 2
capacity = "4TB"
read = "11GB/s"
source = "paper"
[[link]]
name = "pcie"
from = "dram"
to = "hbm"
count = 2
bandwidth = "63GB/s"
back = "60GB/s"
efficiency = 0.8
pageable = "12GB/s"
latency = "5us"
switch = "root"
source = "measured"
[[link]]
name = "flash-bus"
from = "flash"
to = "dram"
count = 2
duplex = false
bandwidth = "7GB/s"
switch = "root"
source = "paper"
[[switch]]
name = "root"
bandwidth = "64GB/s"
source = "PCIe 5.0 x16 upstream"
[[fabric]]
name = "nvlink"
tier = "hbm"
bandwidth = "450GB/s"
efficiency = 0.8
latency = "3us"
source = "datasheet"
[[fabric]]
name = "infiniband"
tier = "hbm"
scope = "cluster"
bandwidth = "50GB/s"
source = "datasheet"
[[storage]]
name = "nvme"
tier = "dram"
switch = "root"
capacity = "2TB"
burst = "6GB/s"
burst_bytes = "20GB"
latency = "90us"
points = [
  { block = "4KiB", depth = 1, read = "50MB/s", access = "random" },
  { block = "1MiB", depth = 1, read = "2GB/s", write = "1GB/s" },
  { block = "1MiB", depth = 8, read = "5GB/s", write = "3GB/s" },
]
source = "measured"
"""


def test_every_field_of_a_node():
    t = parse_target(NODE, "node.toml")
    cores, gpu, csd = t.units
    assert t.nodes == 4 and (t.power_watts, t.idle_watts) == (3000, 400)
    assert t.price is not None and t.price.hour == 4.5 and t.price.currency == "USD"
    assert cores.achieved_of("i8") == pytest.approx(0.75 * 16 * 200e9) and cores.barrier_seconds == pytest.approx(3e-7)
    assert cores.source == "peak: datasheet; efficiency: measured; bandwidth_efficiency: measured; barrier: measured"
    assert (gpu.cores, gpu.count, gpu.arch) == (1, 2, "sm_90")
    assert gpu.peak_of("f16") == 989e12 and gpu.achieved_of("f8") == pytest.approx(0.4 * 1979e12)
    assert gpu.efficiency_of("bf16") == 1.0 and gpu.achieved_of("bf16") is None
    assert gpu.launch_seconds == pytest.approx(4e-6) and (gpu.power_watts, gpu.idle_watts) == (700, 70)
    assert csd.cores == 1 and csd.kind == "near-memory"
    dram, hbm = t.tiers[:2]
    assert dram.usable_bytes == 504 << 30 and dram.write_rate() == 280e9 and hbm.write_rate() == 3.35e12
    assert [dram.read_rate(n) for n in (1, 2, 10, 64, None)] == pytest.approx([20e9, 40e9, 190e9, 300e9, 300e9])
    assert hbm.joules_per_byte == pytest.approx(31.2e-12) and hbm.power_watts == 90 and hbm.count == 2
    assert dram.page_fault_seconds == pytest.approx(5e-7)
    pcie = t.link_between("hbm", "dram")
    assert pcie is not None and pcie.duplex and pcie.switch == "root"
    assert [pcie.rate(x) for x in ("", "hbm", "dram")] == pytest.approx([50.4e9, 50.4e9, 48e9])
    assert pcie.rate(pinned=False) == 12e9 and pcie.latency_seconds == pytest.approx(5e-6)
    bus = t.link_between("dram", "flash")
    assert bus is not None and not bus.duplex and bus.rate("flash") == 7e9
    assert t.link_between("hbm", "flash") is None
    root = t.switch("root")
    assert root is not None and root.bandwidth == 64e9 and t.switch("other") is None
    nvlink, wide = t.fabric("hbm"), t.fabric("hbm", "cluster")
    assert nvlink is not None and nvlink.rate() == pytest.approx(360e9)
    assert wide is not None and wide.rate() == 50e9 and t.fabric("dram") is None
    drive = t.store()
    assert drive is not None and (drive.burst_bandwidth, drive.burst_bytes) == (6e9, 20 * 10**9)
    assert drive.tier == "dram" and t.store("other") is None and t.is_machine


def test_an_instruction_set_is_no_machine():
    assert not hw_targets.load("x86-64-v3").is_machine and hw_targets.load("host").is_machine


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', barrier = "measured" }', " }", r"unit\[0\]\.source\.barrier: error: missing"),
        ('barrier = "measured" }', 'barrier = " " }', r"unit\[0\]\.source\.barrier: error: missing"),
        ('barrier = "measured" }', 'barrier = "x", launch = "y" }', "there is no figure 'launch' in this table"),
        ('source = "PCIe 5.0 x16 upstream"', "", r"switch\[0\]\.source: error: missing"),
        ('idle = "400W"\nsource = "datasheet"', "", r": source: error: missing"),
        ('source = "a price list of 2025"', "", r"price\.source: error: missing|missing required field"),
        ("hour = 4.5", "hour = -1.0", r"price\.hour: error: -1\.0 is out of range"),
        ("efficiency = 0.75", "efficiency = 1.5", r"unit\[0\]\.efficiency\.f32: error: 1\.5 is not a share"),
        ("efficiency = 0.75", "efficiency = { q4 = 0.5 }", "'q4' is not an element"),
        ('peak = { f32 = "50GFLOP/s", i8 = "200GOP/s" }\n', "", r"unit\[0\]\.efficiency: error: a share of no peak"),
        ("bandwidth_efficiency = 0.94", "bandwidth_efficiency = 0", "0 is not a share"),
        ("count = 2\npeak", "count = 3\npeak", "unit gpu: error: 3 copies do not fit 2 of the tier 'hbm'"),
        ("count = 2\npeak", "count = 0\npeak", r"unit\[1\]\.count: error: 0 is not a count"),
        ("nodes = 4", "nodes = 99999999", "99999999 is not a count"),
        ("threads = 4", "threads = 1", r"read_by_threads\[1\]\.threads: error: 1"),
        ('switch = "root"\nsource = "measured"', 'switch = "hub"\nsource = "m"', "the switch 'hub' is not described"),
        ('scope = "cluster"', 'scope = "planet"', r"fabric\[1\]\.scope: error: 'planet' is not a scope"),
        ('scope = "cluster"', 'topology = "tree"', r"fabric\[1\]\.topology: error: 'tree' is not a topology"),
        ('access = "random"', 'access = "rand"', r"points\[0\]\.access: error: 'rand' is not an access"),
        ('block = "4KiB"', "block = 0", r"points\[0\]\.block: error: 0 bytes"),
        ('tier = "dram"\nswitch', 'tier = "ram"\nswitch', "storage nvme: error: the tier 'ram' is not described"),
        ('name = "infiniband"', 'name = "nvlink"', "fabrics: error: two are named 'nvlink'"),
        ('energy = "31.2pJ/B"', 'energy = "31.2pW"', "'31.2pW' is not a quantity of kind energy"),
        ('burst = "6GB/s"', 'brust = "6GB/s"', r"unknown field `brust` - at `\$\.storage\[0\]`"),
        ("duplex = false", 'duplex = "no"', r"Expected `bool`, got `str` - at `\$\.link\[1\]\.duplex`"),
    ],
)
def test_faulty_node_names_the_field(old, new, message):
    assert old in NODE
    with pytest.raises(DiagnosticError, match=message) as caught:
        parse_target(NODE.replace(old, new, 1), "node.toml")
    assert str(caught.value).startswith("node.toml")


def test_overrides_of_every_kind(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    keys = (
        "nodes=2 power=2kW gpu.count=1 hbm.count=1 pcie.count=1 gpu.launch=2us gpu.efficiency=0.5 "
        "cores.efficiency.i8=0.9 gpu.power=400W hbm.energy=10pJ/B hbm.reserve=2GB pcie.duplex=no "
        "pcie.back=10GB/s pcie.efficiency=1 "
        "root=32GB/s nvlink=900GB/s nvlink.latency=1us nvme.read=10GB/s nvme.write=6GB/s nvme.latency=50us "
        "dram.read=150GB/s dram.page_fault=1us cores.bandwidth_efficiency=0.8 cores=8 cores.barrier=1us"
    )
    t = hw_targets.load(f"{path}{{{keys}}}")
    assert t.nodes == 2 and t.power_watts == 2000 and "given on the command line" in t.source
    cores, gpu = t.units[:2]
    assert (gpu.count, gpu.launch_seconds, gpu.power_watts) == (1, pytest.approx(2e-6), 400)
    assert dict(gpu.efficiency) == {"f16": 0.5, "f8": 0.5} and dict(cores.efficiency) == {"f32": 0.75, "i8": 0.9}
    assert (cores.cores, cores.bandwidth_efficiency, cores.barrier_seconds) == (8, 0.8, pytest.approx(1e-6))
    hbm, dram = t.tier("hbm"), t.tier("dram")
    assert hbm is not None and dram is not None
    assert hbm.joules_per_byte == pytest.approx(1e-11) and hbm.reserve_bytes == 2 * 10**9
    assert dram.read_rate(4) == pytest.approx(40e9) and dram.read_rate() == 150e9
    pcie, drive, nvlink, root = t.links[0], t.storage[0], t.fabric("hbm"), t.switch("root")
    assert not pcie.duplex and pcie.rate("dram") == 10e9
    assert nvlink is not None and nvlink.bandwidth == 900e9 and root is not None and root.bandwidth == 32e9
    assert drive.read_rate() == 10e9 and drive.read_rate(4096, 1, "random") == pytest.approx(1e8)
    assert drive.write_rate() == 6e9 and drive.latency_seconds == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("pcie.duplex=maybe", "'maybe' is neither yes nor no"),
        ("gpu.efficiency=2", "2 is not a share"),
        ("gpu.peak.q4=1TFLOP/s", "'q4' is not an element"),
        ("gpu.speed=1", "gpu has no field 'speed'"),
        ("nodes=0", "0 is not a count"),
        ("nodes=1e9", "1e9 is not a count"),
        ("hbm.energy=3W", "'3W' is not a quantity of kind energy"),
        ("nvlonk=3GB/s", "has nothing named 'nvlonk'"),
    ],
)
def test_faulty_overrides_of_new_fields(tmp_path, keys, message):
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    with pytest.raises(DiagnosticError, match=message):
        hw_targets.load(f"{path}{{{keys}}}")


def test_a_drive_without_points():
    assert Storage("d").read_rate() is None and Storage("d").write_rate(4096, 1) is None
    read_only = Storage("d", points=(StoragePoint(4096, 1, 1e6),))
    assert read_only.write_rate() is None and read_only.read_rate(8192, 4) == 1e6


def test_rates_between_the_points_of_a_drive():
    points = tuple(
        StoragePoint(block, depth, rate, access=access)
        for block, depth, rate, access in (
            (4096, 1, 1e7, "random"),
            (1 << 20, 1, 1e9, "any"),
            (4096, 4, 3e7, "random"),
            (1 << 20, 4, 2e9, "any"),
            (1 << 20, 4, 3e9, "sequential"),
        )
    )
    drive = Storage("d", points=points)
    assert drive.read_rate() == 3e9 and drive.read_rate(access="random") == 2e9
    assert drive.read_rate(1 << 20, 1) == 1e9 and drive.read_rate(1 << 22, 64, "sequential") == 3e9
    assert drive.read_rate(2048, 1) == pytest.approx(5e6)  # half of a block of 4096 takes as long
    assert drive.read_rate(1 << 20, 2, "random") == pytest.approx(1.5e9)
    assert drive.read_rate(64 << 10, 1, "random") == pytest.approx(1e7 + 0.5 * (1e9 - 1e7))


def test_more_requests_at_once_are_no_slower_where_only_fewer_were_measured_with_small_blocks():
    points = ((128 << 10, 8, 1.8e9), (4 << 20, 8, 2.4e9), (4 << 20, 32, 2.2e9))
    drive = Storage("d", points=tuple(StoragePoint(block, depth, rate) for block, depth, rate in points))
    assert drive.read_rate(1 << 20, 32) == pytest.approx(drive.read_rate(1 << 20, 8)) == pytest.approx(2.16e9)
    assert drive.read_rate(128 << 10, 64) == pytest.approx(1.8e9) and drive.read_rate(4 << 20, 32) == 2.2e9
    assert drive.read_rate(64 << 10, 32) == pytest.approx(0.9e9)  # smaller than any: as long as the smallest


rates = st.floats(1e6, 1e11)


@given(st.dictionaries(st.tuples(st.integers(9, 24), st.sampled_from([1, 2, 4, 8])), rates, min_size=1), st.data())
def test_a_drive_is_exact_at_its_points_and_between_its_extremes(table, data):
    drive = Storage("d", points=tuple(StoragePoint(1 << b, d, r) for (b, d), r in table.items()))
    for (b, d), r in table.items():
        assert math.isclose(drive.read_rate(1 << b, d) or 0, r)
    block = data.draw(st.integers(1 << max(b for b, _ in table), 1 << 26))
    rate = drive.read_rate(block, data.draw(st.integers(1, 64)))
    assert rate is not None and min(table.values()) * (1 - 1e-9) <= rate <= max(table.values()) * (1 + 1e-9)


@given(st.lists(rates, min_size=1, max_size=6), st.integers(1, 40))
def test_more_threads_of_a_rising_curve_never_read_less(values, threads):
    curve = tuple((2**i, rate) for i, rate in enumerate(sorted(values)))
    tier = MemoryTier("m", read_bandwidth=max(values), read_by_threads=curve)
    fewer, more = tier.read_rate(threads), tier.read_rate(threads + 1)
    assert fewer is not None and more is not None and fewer <= more * (1 + 1e-12)


def test_a_link_without_figures():
    assert Link("x", "a", "b").rate() is None
