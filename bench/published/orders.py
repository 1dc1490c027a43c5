"""Points where only the order can be asked for: sizes differ from what we describe, or only a comparison is known.

Most compare rows of the table of rooflines with each other, as planned (`rooflines.toml`, orders); the others are
below, and KTransformers' placements of experts in `bench.published.placements`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import hw_targets
from bench.published import placements
from bench.published.cases import entries, orders, target
from bench.published.ours import Case
from bench.published.points import Point, published, table
from bench.published.rooflines import tokens_by_cores
from frontends.shape_library import load_shape
from passes.place.formats import formats_of
from passes.place.parallel import search
from passes.place.placement import Degrees
from passes.place.problem import Session

Figures = tuple[float, ...]
Q4 = "w4a16-g32"
LAYERS = (20, 30, 31, 32)  # of LLaMA-7B on the GPU
_MAPPED = "FlexGen reads the drive through a memory map, as the row itself says"


def milliseconds_with_layers(count: int) -> float:
    """Of a token of LLaMA-7B with the first `count` of 32 layers on the GPU; 33: the head too; 34: the cache too."""
    host = target("rtx-3090-ti")
    if count > 33:
        return 1e3 / Case("Llama-2-7b-hf", host, Q4, prompt=1, generate=128).decode()
    on_gpu = min(count, 32)
    chosen = ["weights=resident", f"layers.0-{on_gpu - 1}.weights=gpu", "kv=cores"]
    chosen.append(f"head={'gpu' if count > 32 else 'cpu'}")
    if on_gpu < 32:
        chosen += [f"layers.{on_gpu}-31.weights=cpu", f"layers.{on_gpu}-31.kv=cpu"]
    return 1e3 / Case("Llama-2-7b-hf", host, Q4, tuple(chosen), prompt=1, generate=128).decode()


def _layers_on_gpu() -> Figures:
    return tuple(1e3 / milliseconds_with_layers(n) for n in (*LAYERS, 33, 34))


def _part_of_mixtral() -> Figures:
    """28 of 32 layers on the GPU; all by the cores."""
    host = "rtx-3090{vram=26GB}"
    most = ("weights=resident", "layers.0-27.weights=gpu", "layers.28-31.weights=cpu", "head=cpu", "kv=cores")
    none = ("weights=resident", "attention=cpu", "experts=cpu", "head=cpu", "kv=cores")
    return tuple(Case("Mixtral-8x7B-v0.1", host, Q4, ways, prompt=64, generate=128).decode() for ways in (most, none))


def _small_gpu() -> Figures:
    """12 GB: 30 of 48 layers there; all but the experts there."""
    host = "rtx-3090{vram=12GB,vram.read=360GB/s,dram=24GB,dram.reserve=2GB}"
    layers = (
        "weights=resident",
        "layers.0-29.weights=gpu",
        "layers.30-47.weights=cpu",
        "head=gpu",
        "layers.0-29.kv=gpu",
        "layers.30-47.kv=cpu",
    )
    experts = ("weights=resident", "attention=gpu", "experts=cpu", "head=gpu", "kv=gpu")
    return tuple(Case("Qwen3-30B-A3B", host, Q4, p, prompt=64, generate=128).decode() for p in (layers, experts))


def _moe_gen(phase: str) -> Figures:
    """DeepSeek in 8 bits, both Mixtrals in 16: every expert moved for each pass, the same number of sequences."""
    places = ("experts=streamed", "experts=gpu", "attention=gpu", "kv=gpu", "attention=streamed", "mlp=gpu", "head=gpu")
    host = "a6000{vram=24GB,dram=1TB}"
    models = (("DeepSeek-V3", "w8a8"), ("Mixtral-8x22B-v0.1", ""), ("Mixtral-8x7B-v0.1", ""))
    found = [Case(m, host, r, places, dtype="bf16", batch=64, prompt=512, generate=256) for m, r in models]
    return tuple(c.decode() if phase == "decode" else c.prefill() for c in found)


def _ways_of_mixtral() -> Figures:
    """Seconds of a few requests to Mixtral on eight H100, its experts cut eight ways and whole on one device each."""
    node, shape = hw_targets.load("8xh100"), load_shape("Mixtral-8x7B-v0.1")
    session = Session(context=2048, batch=4, prompt=1024, generate=256, chunk=1024)
    found = []
    for expert in (1, 8):
        spread = search(shape, node, formats_of("", "f16"), session, fixed=Degrees(8, 1, expert, 1, 8))
        assert spread is not None
        found.append(spread.objective)
    return tuple(found)


def _near_the_cache() -> Figures:
    """A 13B model after long prompts, batch 64: cache on a drive and moved to the GPU; attention in the drive."""
    weights = ("weights=resident", "weights=gpu")
    pinned = (*weights, "kv=nvme")
    moved = Case("Llama-2-13b-hf", "a6000", "", pinned, batch=64, prompt=1024, generate=1024, micro_batches=8)
    inside = dataclasses.replace(moved, target="instinfer-csd", pins=(*weights, "kv=flash", "kv=csd"), micro_batches=1)
    return moved.decode(), inside.decode()


def _in_the_table() -> Iterator[Point]:
    """Rows of the table of rooflines, as planned."""

    def ours(i: str) -> float:
        cores = {"P098": 2, "P099": 4}.get(i)
        return entries()[i].figure(peak=False) if cores is None else tokens_by_cores(cores, peak=False)

    for what, ids in orders().items():
        yield Point(
            ids, "order", what, published(*ids), lambda ids=ids: tuple(map(ours, ids)), table()[ids[0]].unit,
            why=_MAPPED if "P051" in ids else "",
        )  # fmt: skip


def _others() -> Iterator[Point]:
    layers = ("P090", "P091", "P092", "P093", "P094", "P096")
    what = "LLaMA-7B Q4_0: 20, 30, 31, 32 layers, then the head, then the cache on a GPU"
    yield Point(layers, "order", what, published(*layers), _layers_on_gpu, "tok/s")
    what = "Mixtral-8x7B: 28 of 32 layers on a GPU, none"
    yield Point(("P115",), "order", what, (24.0, 5.0), _part_of_mixtral, "tok/s")
    what = "Qwen3-30B-A3B on 12 GB: whole layers there, all but experts there"
    yield Point(("P117",), "order", what, (29.41, 26.64), _small_gpu, "tok/s")
    trio = ("P200", "P202", "P203")
    for which, phase in enumerate(("prefill", "decode")):
        what = f"MoE-Gen, {phase}: DeepSeek-R1, Mixtral-8x22B, 8x7B"
        yield Point(trio, "order", what, published(*trio, which=which), lambda p=phase: _moe_gen(p), "tok/s")
    both = ("P356", "P357")
    what = "Mixtral on eight H100: experts cut, experts whole"
    yield Point(both, "order", what, published(*both), _ways_of_mixtral, "s")
    what = "13B, cache on a drive: attention on the GPU, attention in the drive"
    yield Point(("P266",), "order", what, (1.0, 11.1), _near_the_cache, "x")


def points() -> Iterator[Point]:
    """All orders."""
    yield from _in_the_table()
    yield from _others()
    yield from placements.points()
