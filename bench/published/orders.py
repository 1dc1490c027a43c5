"""Points where only the order can be asked for: sizes differ from what we describe, or only a comparison is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import hw_targets
from bench.published.ours import Case
from bench.published.points import Point, published
from bench.published.rooflines import (
    A6000,
    DDR5_5600,
    L7,
    L13,
    L70,
    O30,
    O66,
    O175,
    Q4,
    RTX_3090_TI,
    RTX_5090,
    cores,
    streamed,
)
from frontends.shape_library import load_shape
from passes.place.expert_options import option_with
from passes.place.formats import formats_of
from passes.place.parallel import search
from passes.place.placement import Degrees
from passes.place.problem import Session
from passes.place.routing_model import fixed_share, hit_rate, inclusion

Figures = tuple[float, ...]
_MEETING = "a layer in which GPU and cores meet loses more there than the latency of the link, which is what we plan"


def _layers_on_gpu() -> Figures:
    """With the first n of 32 layers on the GPU and the cache in memory; then the head too; then everything."""
    found = []
    for n in (20, 30, 31, 32, 33):
        pins = [
            "weights=resident",
            f"layers.0-{min(n, 32) - 1}.weights=gpu",
            "kv=cores",
            f"head={'gpu' if n > 32 else 'cpu'}",
        ]
        if n < 32:
            pins += [f"layers.{n}-31.weights=cpu", f"layers.{n}-31.kv=cpu"]
        found.append(Case(L7, RTX_3090_TI, Q4, tuple(pins), prompt=1, generate=128).decode())
    return (*found, Case(L7, RTX_3090_TI, Q4, prompt=1, generate=128).decode())


def _part_of_mixtral() -> Figures:
    """28 of 32 layers on the GPU; all by the cores."""
    target = "rtx-3090{vram=26GB}"
    most = ("weights=resident", "layers.0-27.weights=gpu", "layers.28-31.weights=cpu", "head=cpu", "kv=cores")
    none = ("weights=resident", "attention=cpu", "experts=cpu", "head=cpu", "kv=cores")
    return tuple(Case("Mixtral-8x7B-v0.1", target, Q4, pins, prompt=64, generate=128).decode() for pins in (most, none))


def _small_gpu() -> Figures:
    """12 GB: 30 of 48 layers there; all but the experts there."""
    target = "rtx-3090{vram=12GB,vram.read=360GB/s,dram=24GB,dram.reserve=2GB}"
    layers = ("weights=resident", "layers.0-29.weights=gpu", "layers.30-47.weights=cpu", "head=gpu",
              "layers.0-29.kv=gpu", "layers.30-47.kv=cpu")  # fmt: skip
    experts = ("weights=resident", "attention=gpu", "experts=cpu", "head=gpu", "kv=gpu")
    return tuple(
        Case("Qwen3-30B-A3B", target, Q4, pins, prompt=64, generate=128).decode() for pins in (layers, experts)
    )


def _moe_gen(phase: str) -> Figures:
    """DeepSeek in 8 bits, both Mixtrals in 16: every expert moved for each pass, the same number of sequences."""
    pins = ("experts=streamed", "experts=gpu", "attention=gpu", "kv=gpu", "attention=streamed", "mlp=gpu", "head=gpu")
    target = "a6000{vram=24GB,dram=1TB}"
    cases = (("DeepSeek-V3", "w8a8"), ("Mixtral-8x22B-v0.1", ""), ("Mixtral-8x7B-v0.1", ""))
    found = (Case(m, target, r, pins, dtype="bf16", batch=64, prompt=512, generate=256) for m, r in cases)
    return tuple(c.decode() if phase == "decode" else c.prefill() for c in found)


def _ways_of_mixtral() -> Figures:
    """Seconds of a few requests to Mixtral on eight H100, its experts cut eight ways and whole on one device each."""
    target, shape = hw_targets.load("8xh100"), load_shape("Mixtral-8x7B-v0.1")
    session = Session(context=2048, batch=4, prompt=1024, generate=256, chunk=1024)
    found = []
    for expert in (1, 8):
        spread = search(shape, target, formats_of("", "f16"), session, fixed=Degrees(8, 1, expert, 1, 8))
        assert spread is not None
        found.append(spread.objective)
    return tuple(found)


def _near_the_cache() -> Figures:
    """A 13B model after long prompts, batch 64: cache on a drive and moved to the GPU; attention in the drive."""
    weights = ("weights=resident", "weights=gpu")
    moved = Case(L13, "a6000", "", (*weights, "kv=nvme"), batch=64, prompt=1024, generate=1024, micro_batches=8)
    inside = dataclasses.replace(moved, target="instinfer-csd", pins=(*weights, "kv=flash", "kv=csd"), micro_batches=1)
    return moved.decode(), inside.decode()


def _placed(way: str, ratio: float) -> float:
    """Tokens a second of the experts of Qwen3-Next alone, `ratio` of them on the GPU, the others with the cores.

    uniform, random: as many in every layer, whichever; front: the first layers whole; frequency: the most popular of
    mixed requests; dynamic: the most popular of this session.
    """
    case = Case("Qwen3-Next-80B-A3B", "xeon-6454s-4090{vram=96GB,vram.read=4032GB/s}", "w8a8", ())
    problem = case.problem()
    part = next(p for p in problem.parts() if p.experts)
    popular = {"frequency": _mixed_share, "dynamic": hit_rate}.get(way, fixed_share)
    problem = dataclasses.replace(problem, popular=popular)

    def seconds(slots: int) -> float:
        mode, home, count = ("split", "dram", slots) if slots < part.experts else ("cached", "dram", part.experts)
        option = option_with(problem, part, mode, "gpu", home, max(1, count))
        assert option is not None
        return option.decode.waited

    none, every = seconds(1), seconds(part.experts)
    if way == "front":
        return 1.0 / (ratio * every + (1.0 - ratio) * none)
    return 1.0 / seconds(round(ratio * part.experts))


def _mixed_share(experts: int, top_k: int, slots: int, batch: int = 1) -> float:
    """Of requests of many users with popular experts of their own, what the most popular ones of all serve."""
    chances = inclusion(experts, top_k, 0.6)
    return sum(chances[:slots]) / top_k if slots < experts else 1.0


def _sweep(way: str, *percent: int) -> Figures:
    return tuple(_placed(way, p / 100) for p in percent)


def _ways(percent: int, *ways: str) -> Figures:
    return tuple(_placed(way, percent / 100) for way in ways)


def _offloaded(*cases: tuple[str, int, str, str, str]) -> Figures:
    return tuple(
        Case(model, A6000, recipe, streamed(home, kv), batch=batch, prompts=16).generation()
        for model, batch, recipe, home, kv in cases
    )


def _served() -> Figures:
    cases = (("Llama-2-7b-hf", 190), ("Llama-2-13b-hf", 128), ("Llama-2-70b-hf", 96), ("Qwen2.5-72B", 32))
    return tuple(
        Case(m, "a100-80gb", "w4a8-g32,kv4", batch=b, prompt=1024, generate=512).generation() for m, b in cases
    )


def _chunks() -> Figures:
    return tuple(Case(L7, RTX_3090_TI, Q4, prompt=1024, generate=1, chunk=n).prefill() for n in (256, 512))


def _arm_and_x86() -> Figures:
    """SmallThinker-21B-A3B by memory bandwidth: two channels of DDR5-5600, RK3588, Raspberry Pi 5."""
    targets = (DDR5_5600, "phone-ufs4{dram=16GB,dram.read=34.1GB/s}", "phone-ufs4{dram=16GB,dram.read=17.1GB/s}")
    case = Case("SmallThinker-21B-A3B", "", Q4, (), prompt=64, generate=128, dtype="f32")
    return tuple(dataclasses.replace(case, target=target).decode() for target in targets)


def _experts_moved() -> Figures:
    pins = ("weights=gpu", "attention=resident", "head=resident", "kv=gpu")
    return tuple(
        Case("Qwen3-30B-A3B", RTX_5090, Q4, (*pins, f"experts={how}"), prompt=512, generate=256).decode()
        for how in ("resident", "streamed")
    )


def _tables() -> Iterator[Point]:
    low = ((O30, 48, Q4, "dram", "gpu"), (O66, 24, Q4, "dram", "gpu"), (O175, 16, Q4, "dram", "gpu"))
    low_moved = ((O66, 96, Q4, "dram", "cores"), (O175, 40, Q4, "dram", "cores"))
    whole = ((O30, 96, "", "dram", "cores"), (O66, 40, "", "dram", "cores"), (O175, 32, "", "nvme", "cores"))
    zero = ((L70, 96, Q4, "dram", "gpu"), (O66, 16, Q4, "dram", "gpu"))
    zero_moved = ((O30, 128, Q4, "dram", "cores"), (O66, 64, Q4, "dram", "cores"), (O175, 24, Q4, "dram", "cores"))
    rows: tuple[tuple[tuple[str, ...], str, Callable[[], Figures]], ...] = (
        (("P090", "P091", "P092", "P093", "P094", "P096"),
         "LLaMA-7B Q4_0: 20, 30, 31, 32 layers, then the head, then the cache on a GPU", _layers_on_gpu),
        (("P098", "P099"), "the same by 2 and 4 cores", lambda: tuple(cores(n, peak=False) for n in (2, 4))),
        (("P104", "P105"), "the same, prompt of 1024 in chunks of 256 and 512", _chunks),
        (("P046", "P047", "P048"), "FlexGen, 4 bits: OPT-30B, 66B, 175B on the host", lambda: _offloaded(*low)),
        (("P053", "P054"), "FlexGen, 4 bits, cache on the host: OPT-66B, 175B", lambda: _offloaded(*low_moved)),
        (("P059", "P060", "P061"), "ZeRO, 16 bits: OPT-30B, 66B on the host, 175B on disk", lambda: _offloaded(*whole)),
        (("P058", "P056"), "ZeRO, 4 bits: LLaMA2-70B and OPT-66B", lambda: _offloaded(*zero)),
        (("P063", "P064", "P065"), "ZeRO, 4 bits, cache on host: OPT-30B, 66B, 175B", lambda: _offloaded(*zero_moved)),
        (("P325", "P326", "P328", "P329"), "QServe: Llama-2-7B, 13B, 70B, Qwen1.5-72B", _served),
        (("P253", "P255"), "Qwen3-30B-A3B: experts on the GPU, and all moved there", _experts_moved),
        (("P208", "P210", "P211"), "SmallThinker-21B-A3B: DDR5, RK3588, Raspberry Pi 5", _arm_and_x86),
    )  # fmt: skip
    for ids, what, ours in rows:
        yield Point(ids, "order", what, published(*ids), ours, "tok/s")
    yield Point(
        ("P115",), "order", "Mixtral-8x7B: 28 of 32 layers on a GPU, none", (24.0, 5.0), _part_of_mixtral, "tok/s"
    )
    yield Point(("P117",), "order", "Qwen3-30B-A3B on 12 GB: whole layers there, all but experts there",
                (29.41, 26.64), _small_gpu, "tok/s")  # fmt: skip
    trio = ("P200", "P202", "P203")
    for which, phase in enumerate(("prefill", "decode")):
        yield Point(trio, "order", f"MoE-Gen, {phase}: DeepSeek-R1, Mixtral-8x22B, 8x7B", published(*trio, which=which),
                    lambda p=phase: _moe_gen(p), "tok/s")  # fmt: skip
    yield Point(("P356", "P357"), "order", "Mixtral on eight H100: experts cut, experts whole",
                published("P356", "P357"), _ways_of_mixtral, "s")  # fmt: skip
    yield Point(("P266",), "order", "13B, cache on a drive: attention on the GPU, attention in the drive", (1.0, 11.1),
                _near_the_cache, "x")  # fmt: skip


def _placements() -> Iterator[Point]:
    """Qwen3-Next of KTransformers: more experts on the GPU, and which ones."""
    sweeps: dict[str, dict[int, str]] = {
        "random": {20: "P145", 40: "P155", 50: "P160", 80: "P175", 100: "P185"},
        "uniform": {0: "P136", 20: "P146", 30: "P151", 50: "P161", 60: "P166", 70: "P171", 80: "P176", 100: "P186"},
        "front": {0: "P137", 40: "P157", 50: "P162", 60: "P167", 70: "P172", 100: "P187"},
        "frequency": {10: "P143", 60: "P168", 70: "P173", 80: "P178", 100: "P188"},
        "dynamic": {10: "P144", 30: "P154", 40: "P159", 70: "P174", 90: "P184", 100: "P189"},
    }
    for way, found in sweeps.items():
        yield Point(
            tuple(found.values()), "order", f"experts on the GPU, {way}: {', '.join(map(str, found))} %",
            published(*found.values()), lambda w=way, p=tuple(found): _sweep(w, *p), "tok/s", tie=0.08,
        )  # fmt: skip
    for percent in sorted({p for found in sweeps.values() for p in found}):
        ways = {way: found[percent] for way, found in sweeps.items() if percent in found}
        if len(ways) > 1:
            yield Point(
                tuple(ways.values()), "order", f"{percent} % of the experts on the GPU: {', '.join(ways)}",
                published(*ways.values()), lambda p=percent, w=tuple(ways): _ways(p, *w), "tok/s", tie=0.08,
                why=_MEETING if percent == 50 else "",
            )  # fmt: skip


def points() -> Iterator[Point]:
    """All orders."""
    yield from _tables()
    yield from _placements()
