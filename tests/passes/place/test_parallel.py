"""Many devices, formats, machines and the routing model."""

from __future__ import annotations

import dataclasses

import pytest

import hw_targets
from frontends.shape_library import load_shape
from hw_targets.target import Fabric
from ir.diagnostics import DiagnosticError
from passes.place.formats import LADDER, formats_of, next_down
from passes.place.machine import machine_of, main_tier
from passes.place.parallel import all_reduce_seconds, search, spreads, together
from passes.place.problem import Session, Slo
from passes.place.routing_model import distinct_experts, fading_hit_rate, hit_rate
from tests.passes.place.machines import MIB, dense, sparse, target

USE = Session(context=512, batch=8, prompt=128, generate=64, chunk=128)


def test_all_reduce_against_measured() -> None:
    # NCCL, 8 H100: microsoft/apex_plus, profile/comm/H100-SXM-80GB/all_reduce.csv (KiB, seconds).
    fabric = hw_targets.load("8xh100").fabric("hbm")
    for kib, seconds in ((8192, 80e-6), (16384, 122e-6), (65536, 325e-6), (131072, 597e-6)):
        assert all_reduce_seconds(fabric, 8, kib * 1024) == pytest.approx(seconds, rel=0.1)
    slow = Fabric("f", "hbm", bandwidth=1e9, latency_seconds=1e-6)
    assert all_reduce_seconds(slow, 2, 1e9) == pytest.approx(1.000002)
    assert all_reduce_seconds(slow, 64, 1.0) == pytest.approx(12e-6, rel=1e-3)  # a tree for what is small


def test_671_billion_parameters_on_64_devices() -> None:
    shape, machine = load_shape("DeepSeek-V3"), hw_targets.load("64xh100")
    found = search(shape, machine, formats_of("fp8"), dataclasses.replace(USE, batch=256, context=4096))
    assert found is not None and found.degrees.devices == 64 and found.total <= found.room
    assert found.degrees.expert > 1  # whole experts spread over devices
    ways = list(spreads(shape, machine, formats_of("fp8"), USE))
    assert len(ways) > 20 and len({w.degrees for w in ways}) == len(ways)
    # Nothing is lost: the weights of all devices together are at least the model.
    nbytes = sum(formats_of("fp8").nbytes(t) * n for x, n in shape.kinds() for t in shape.tensors(x))
    assert min(dict(w.holds)["weights"] * 64 for w in ways) >= nbytes


def test_degrees_shorten_or_widen() -> None:
    shape, machine = dense(8), target(gpus=4, vram=256 * MIB)
    ways = {w.degrees: w for w in spreads(shape, machine, formats_of(""), USE)}
    by = {(d.tensor, d.pipeline, d.data): w for d, w in ways.items()}
    assert by[4, 1, 1].total < by[1, 1, 4].total  # copies of weights cost memory
    assert by[1, 4, 1].total < by[1, 1, 4].total
    assert all(w.decode.seconds > 0 and w.decode.bound for w in ways.values())
    fastest = search(shape, machine, formats_of(""), USE)
    assert fastest is not None and fastest.objective == min(w.objective for w in ways.values() if w.total <= w.room)
    late = search(shape, machine, formats_of(""), USE, Slo(tpot=fastest.decode.seconds / 1e3))
    assert late is None
    assert search(shape, target(gpus=1), formats_of(""), USE) is None
    most = search(shape, machine, formats_of(""), USE, any_batch=True)
    assert most is not None and most.tokens_per_second >= fastest.tokens_per_second
    assert search(sparse(4), machine, formats_of(""), USE) is not None


def test_vocabulary_and_experts_are_cut_apart_from_products() -> None:
    shape, machine = load_shape("Qwen3-235B-A22B"), hw_targets.load("64xh100")
    use = dataclasses.replace(USE, batch=1, context=4096, prompt=512, chunk=512)
    found = search(shape, machine, formats_of("fp8"), use)
    ways = {w.degrees: w for w in spreads(shape, machine, formats_of("fp8"), use)}
    assert (
        found is not None and found.degrees.expert == 8 < found.degrees.devices
    )  # within a node, not over all of them
    apart = dataclasses.replace(found.degrees, expert=64)
    assert ways[apart].total < found.total and ways[apart].prefill.seconds > found.prefill.seconds
    staged = next(d for d in ways if d.pipeline == 4 and d.tensor == 8 and d.vocabulary == 32)
    for fewer in (8, 1):  # cut over the stages as well less of it lies on each device
        assert ways[staged].total < ways[dataclasses.replace(staged, vocabulary=fewer)].total


def test_nodes_that_cannot_talk_have_copies() -> None:
    one = hw_targets.load("h100-sxm{nodes=4}")
    ways = [w.degrees for w in spreads(dense(8), one, formats_of(""), USE)]
    assert {d.data for d in ways} == {4}
    joined = dataclasses.replace(one, fabrics=(Fabric("net", "hbm", "cluster", bandwidth=5e10, latency_seconds=5e-6),))
    assert {d.tensor for d in (w.degrees for w in spreads(dense(8), joined, formats_of(""), USE))} >= {1, 2}


def test_copies_that_share_a_layer_talk() -> None:
    shape = dense(8)
    assert together(shape, target(), 4) == ()
    ((name, seconds),) = together(shape, target(gpus=4), 4)
    assert name == "all-reduce" and seconds > 17 * 4e-6  # two a layer and one of the head, tree of latencies
    ((_, more),) = together(shape, target(gpus=4), 4000, passes=2)
    assert more > seconds


def test_copies_become_one_machine() -> None:
    machine = machine_of(target(gpus=4, vram=64 * MIB, link=1e7))
    assert machine.room_of("vram") == 256 * MIB
    unit = machine.unit("gpu")
    assert unit.peak_of("bf16", 1) == 4e12 and machine.target.tiers[0].read_bandwidth == 4e9
    link = machine.target.link_between("dram", "vram")
    assert link is not None and link.rate() == 4e7
    assert machine_of(target(gpus=4), tensor=1).room_of("vram") == 64 * MIB
    assert machine.way("ssd", "vram") == (("ssd", "dram"), ("dram", "vram"))
    assert machine_of(target(), budgets={"dram": 5}).room_of("dram") == 5
    assert main_tier(target()) == "dram"
    with pytest.raises(DiagnosticError, match="did you mean 'dram'"):
        machine_of(target(), budgets={"drum": 5})
    with pytest.raises(DiagnosticError, match="describes instructions, not a machine"):
        machine_of(hw_targets.load("x86-64-v4"))


def test_formats_follow_recipes() -> None:
    shape = load_shape("Llama-3.1-8B")
    layer = shape.layers[0]
    low = formats_of("w4a8-g32,kv8")
    bits = {t.role: 8 * low.nbytes(t) / t.elements for t in (*shape.tensors(layer), *shape.outer_tensors())}
    assert bits["mlp.up"] == 4.5 and bits["head"] == 6.5 and bits["embedding"] == 16 and bits["vector"] == 32
    assert low.kv_bytes(layer) == 2 * 8 * (128 + 2)
    assert low.element(shape.tensors(layer)[0]) == "i8" and formats_of("").element(shape.tensors(layer)[0]) == "bf16"
    sizes = [sum(formats_of(name).nbytes(t) for t in shape.tensors(layer)) for name in LADDER]
    assert sizes == sorted(sizes, reverse=True)
    down = next_down(low)
    assert down is not None and down.name == "w3,kv8"
    assert next_down(formats_of("w2a8")) is None and next_down(formats_of("nf4")) is None


def test_routing_model() -> None:
    rates = [hit_rate(128, 8, slots) for slots in range(129)]
    assert rates[7] == 0.0 and rates[128] == 1.0 and rates == sorted(rates)
    assert hit_rate(128, 8, 32, batch=4) == fading_hit_rate(128, 8, 32, batch=4) == 0.25
    fading = [fading_hit_rate(128, 8, slots) for slots in range(129)]
    assert fading[0] == 0.0 and fading[128] == 1.0 and fading == sorted(fading)
    assert fading[4] > 0.2 and fading[32] > rates[32] + 0.05
    # Public trace of Qwen3-30B-A3B, 48 layers of 128 experts, 6 used: hits while decoding, global LRU, by MiB.
    for mib, rate in ((1000, 0.377), (2000, 0.565), (3000, 0.706), (4000, 0.803)):
        assert hit_rate(128, 6, round(mib / 48 / 2.7247)) == pytest.approx(rate, abs=0.08)
    assert distinct_experts(64, 8, 1) == pytest.approx(8) and distinct_experts(64, 8, 1000) == pytest.approx(64)
