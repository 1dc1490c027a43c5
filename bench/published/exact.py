"""Points that must come out to the digits: other systems' own models, sizes, replayed traces; and theory, nearly so."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import hw_targets
from bench.published import flexgen, llm_analysis
from bench.published.flexgen import GIB, Policy, predict
from bench.published.llm_analysis import LLAMA_2_70B, LLAMA_7B, LLAMA_13B, LLAMA_65B, a100
from bench.published.ours import Case, ideal
from bench.published.points import Point, published
from frontends.shape_library import load_shape
from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.expert_cache import expected_hit_rate, replay
from hw_targets.routing import MIXED, RoutingTrace, read_trace
from passes.place.formats import formats_of
from passes.place.parts import parts_of

TRACE = Path(__file__).parents[2] / "tests" / "data" / "routing" / "qwen.route.csv.gz"
MIB = 1 << 20


def _flexgen() -> Iterator[Point]:
    thirty = predict("opt-30b", Policy(wg=0.2, wc=0.8, cc=1.0, hc=1.0), gpu_batch=48, batches=3, prompt=512)
    long = predict("opt-30b", Policy(wg=0.04, wc=0.96, cc=1.0, hc=1.0), gpu_batch=20, batches=4, prompt=1024)
    large = predict("opt-175b", Policy(wc=0.5, hc=1.0), gpu_batch=32, batches=8, prompt=512)
    small = predict("opt-6.7b", Policy(wg=1.0, cg=1.0, hg=1.0), gpu_batch=2, batches=1, prompt=512)
    found = predict("opt-175b", Policy(wg=0.0184, wc=0.4679, hc=1.0), gpu_batch=1, batches=432, prompt=512)
    model = flexgen.model("opt-30b")
    rows: list[tuple[str, str, tuple[float, ...], tuple[float, ...], str, int]] = [
        ("P023", "OPT-30B, 48x3, prompts of 512: prefill", published("P023"), (thirty.prefill_seconds,), "s", 7),
        ("P040", "the same: GPU at its peak, prefill and decode", (18.769, 12.870),
         (thirty.gpu_prefill / GIB, thirty.gpu_decode / GIB), "GiB", 5),
        ("P041", "the same: CPU at its peak, prefill and decode", (140.831, 144.512),
         (thirty.cpu_prefill / GIB, thirty.cpu_decode / GIB), "GiB", 6),
        ("P044", "OPT-30B: weights of all layers", published("P044"), (model.layer_bytes * model.layers / GIB,),
         "GiB", 5),
        ("P028", "OPT-30B, 20x4, prompts of 1024: rate", published("P028"), (long.tokens_per_second,), "tok/s", 4),
        ("P030", "the same: decode", published("P030"), (long.decode_seconds,), "s", 7),
        ("P031", "OPT-175B, 32x8, prompts of 512: rate", published("P031"), (large.tokens_per_second,), "tok/s", 5),
        ("P033", "the same: decode", published("P033"), (large.decode_seconds,), "s", 8),
        ("P037", "OPT-6.7B, 2x1, all on the GPU: rate", published("P037"), (small.tokens_per_second,), "tok/s", 5),
        ("P038", "the same: prefill", published("P038"), (small.prefill_seconds,), "s", 4),
        ("P043", "OPT-175B, 1x432, the policy its search found: rate", published("P043"), (found.tokens_per_second,),
         "tok/s", 2),
    ]  # fmt: skip
    for i, what, theirs, ours, unit, digits in rows:
        yield Point((i,), "exact", f"FlexGen's model: {what}", theirs, lambda ours=ours: ours, unit, digits)


def _llm_analysis() -> Iterator[Point]:
    seven = llm_analysis.infer(LLAMA_7B, a100(), prompt=512, generate=32)
    thirteen = llm_analysis.infer(LLAMA_13B, a100(0.7, 0.9), prompt=512, generate=32)
    wide = llm_analysis.infer(LLAMA_65B, a100(), prompt=512, generate=32, weight_bits=4)
    two = llm_analysis.infer(LLAMA_2_70B, a100(0.7, 0.9), prompt=512, generate=512, batch=32, tensor=2)
    rate = 32 * 512 / (two.prefill_seconds + 512 * two.decode_seconds)
    rows: list[tuple[str, str, tuple[float, ...], tuple[float, ...], str, int]] = [
        ("P073", "LLaMA-7B, A100 at its peaks: decode", published("P073"), (seven.decode_seconds * 1e3,), "ms", 14),
        ("P074", "the same: prompt of 512", published("P074"), (seven.prefill_seconds * 1e3,), "ms", 14),
        ("P075", "the same: weights, cache of 544 tokens", (13147045888, 285212672),
         (seven.weight_bytes, seven.kv_bytes), "B", 14),
        ("P078", "LLaMA-13B at 0.7 and 0.9 of the peaks: decode", published("P078"), (thirteen.decode_seconds * 1e3,),
         "ms", 14),
        ("P080", "LLaMA-65B in 4 bits: weights", published("P080"), (wide.weight_bytes,), "B", 14),
        ("P088", "Llama-2-70B, two A100 at 0.7 and 0.9 of the peaks, 32 sequences: rate", published("P088"), (rate,),
         "tok/s", 6),
    ]  # fmt: skip
    for i, what, theirs, ours, unit, digits in rows:
        yield Point((i,), "exact", f"llm-analysis: {what}", theirs, lambda ours=ours: ours, unit, digits)


def _kv(model: str) -> float:
    """Bytes that a token adds to the cache in 16 bits."""
    return 2.0 * load_shape(model).kv_elements_per_token()


def _weights_on_a_device(attention_ways: int) -> float:
    """GiB of Llama-3-70B's layers on one of two devices: its MLP cut in two, its attention in `attention_ways`."""
    parts = parts_of(load_shape("Llama-3.1-70B"), formats_of("", "f16"))
    ways = {"attention": attention_ways, "mlp": 2}
    return sum(p.nbytes * p.count / ways[p.group] for p in parts if p.group in ways) / GIB


def _layer_flops() -> float:
    """TFLOP of the products of a layer of GPT-3 175B (OPT has its shape) over 2048 tokens."""
    parts = parts_of(load_shape("opt-175b"), formats_of("", "f16"))
    return 2048 * sum(p.flops_per_token for p in parts if p.group in ("attention", "mlp")) / 1e12


def _swap_seconds() -> float:
    """11 GB out and others in, over a link of 20 GB/s."""
    target = hw_targets.load("a100-80gb{pcie.bandwidth=20GB/s,pcie.efficiency=1}")
    return sum(transfer_time(target, a, b, 11e9)[1] for a, b in (("hbm", "dram"), ("dram", "hbm")))


def _narrow_ratio() -> float:
    shape = load_shape("Llama-2-7b-hf")
    tensor = shape.tensors(shape.layers[0])[0]
    return 2 * tensor.elements / formats_of("w4a16-g128").nbytes(tensor)


def _sizes() -> Iterator[Point]:
    for i, model, digits in (("P282", "DeepSeek-V3", 5), ("P283", "Llama-3.1-405B", 6), ("P284", "Qwen2.5-72B", 6)):
        yield Point(
            (i,), "exact", f"{model}: cache of a token", published(i), lambda m=model: (_kv(m) / 1e3,), "kB", digits
        )
    yield Point(
        ("P280",), "exact", "Yi-34B: cache of 50 000 tokens", published("P280"),
        lambda: (_kv("Yi-34B-200K") * 50_000 / GIB,), "GiB", 2,
    )  # fmt: skip
    yield Point(
        ("P281",), "exact", "11 GB out and in over 20 GB/s", published("P281"), lambda: (_swap_seconds(),), "s", 2
    )
    yield Point(("P072",), "exact", "GPT-3 175B: a layer over 2048 tokens", published("P072"),
                lambda: (_layer_flops(),), "TFLOP", 1)  # fmt: skip
    for i, which, ways, what in (("P321", 3, 2, "cut in two"), ("P322", 3, 1, "MLP cut in two, attention whole")):
        yield Point(
            (i,), "exact", f"Llama3-70B on two GPUs, {what}: layers on each", published(i, which=which),
            lambda w=ways: (_weights_on_a_device(w),), "GiB", 3,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _trace() -> RoutingTrace:
    return read_trace(TRACE)


def _replayed(mib: int) -> tuple[float, float]:
    found = replay(_trace(), mib * MIB)
    return 100 * found.hit_rate, 100 * found.decode_hit_rate


def _cycle(top_k: int) -> float:
    """MiB of the experts that one token of gpt-oss-120b uses, in its 4-bit floats."""
    parts = parts_of(load_shape("gpt-oss-120b"), formats_of("mxfp4"))
    return sum(p.expert_bytes * top_k * p.count for p in parts if p.experts) / MIB


def _below_cycle(mib: int, top_k: int) -> float:
    slots = int(mib * top_k * 36 / _cycle(top_k))
    return 100 * expected_hit_rate(experts=128, top_k=top_k, layers=36, slots=slots)


def _caches() -> Iterator[Point]:
    for i, mib in (("P224", 500), ("P220", 1000), ("P222", 3000), ("P223", 4000)):
        theirs = (*published(i), *published(i, which=1))
        yield Point((i,), "exact", f"recorded routing of Qwen3-30B-A3B, LRU of {mib} MiB: hits, of decode", theirs,
                    lambda m=mib: _replayed(m), "%", 5 if mib != 4000 else 4)  # fmt: skip
    yield Point(
        ("P233",), "exact", "the same on the phone, 4000 MiB", published("P233"), lambda: _replayed(4000)[:1], "%", 3
    )
    yield Point(
        ("P232",), "exact", "gpt-oss-120b, LRU of 750 MiB, below one token's experts: hits, of decode", (0.0, 0.0),
        lambda: (_below_cycle(750, 2),) * 2, "%", 3,
    )  # fmt: skip
    yield Point(
        ("P240",), "exact", "gpt-oss-120b, four experts a token, LRU of 1500 MiB: read for a token", published("P240"),
        lambda: (_cycle(4) * (1 - _below_cycle(1500, 4) / 100),), "MiB", 3,
    )  # fmt: skip
    yield Point(
        ("P337",), "exact", "8 experts chosen uniformly, 4 slots: hits", published("P337"),
        lambda: (100 * expected_hit_rate(experts=8, top_k=1, layers=1, slots=4, scope="layer", router=MIXED),), "%", 3,
    )  # fmt: skip


def _long_prompt(tokens: int) -> float:
    """Seconds of a prompt by the page's formula: 34e9 weights, 60 layers, attention as if 4096 wide."""
    target = ideal(hw_targets.load("a100-80gb"))
    unit = target.unit("gpu")
    assert unit is not None
    flops = tokens * (2 * 34e9 + 2 * 60 * tokens * 4096)
    return price(Work(flops, "bf16"), unit, target).seconds


def _theory() -> Iterator[Point]:
    yi = "a100-80gb{hbm=100GB,hbm.read=2TB/s}"
    for i, prompt in (("P275", 50_000), ("P276", 4000)):
        case = Case("Yi-34B-200K", yi, dtype="bf16", prompt=prompt, generate=1, chunk=2000)
        why = "attention of all its 56 heads of 128; the page's formula has a width of 4096" if i == "P275" else ""
        what = f"Yi-34B, A100 at its peaks: prompt of {prompt}"
        yield Point((i,), "theory", f"{what}, its own formula", published(i), lambda n=prompt: (_long_prompt(n),), "s")
        yield Point((i,), "theory", f"{what}, our count", published(i),
                    lambda c=case: (c.first_token(peak=True) / 1e3,), "s", why=why)  # fmt: skip
    for i, prompt in (("P277", 50_000), ("P278", 4000)):
        case = Case("Yi-34B-200K", yi, dtype="bf16", prompt=prompt - 125, generate=250, chunk=2000)
        yield Point((i,), "theory", f"Yi-34B, A100 at its peaks: 250 tokens after {prompt}", published(i),
                    lambda c=case: (250 * c.step(peak=True),), "s")  # fmt: skip
    yield Point(("P274",), "theory", "16 bits over 4 bits and a 16-bit scale for each 128", published("P274"),
                lambda: (_narrow_ratio(),), "x")  # fmt: skip


def points() -> Iterator[Point]:
    """All exact points, and those of theory."""
    for part in (_flexgen, _llm_analysis, _sizes, _caches, _theory):
        yield from part()
