"""The points: a published figure, ours for the same thing, and how near the two must be.

Kinds: `exact` (to the digits published), `roofline` (ideal over published is the efficiency stated beside it, and never
above 1), `order` (ours are in the order of the published ones). Each carries its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hw_targets
from bench.published import flexgen, llm_analysis
from bench.published.flexgen import GIB, OPT_6_7B, OPT_30B, OPT_175B, Policy, Prediction
from bench.published.ours import bytes_per_second, phases
from frontends.shape_library import load_shape
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.options import option_with
from passes.place.parallel import all_reduce_seconds
from passes.place.problem import Problem, Session
from passes.place.routing_model import hit_rate

FLEXGEN = "FMInference/FlexLLMGen: experimental/cost_model.py"
ANALYSIS = "cli99/llm-analysis: examples/llama/outputs_infer*"
TRT = "NVIDIA/TensorRT-LLM: docs/source/performance.md"
BENCH = "ggml-org/llama.cpp: examples/llama-bench/README.md"
ZERO = "microsoft/DeepSpeedExamples: inference/huggingface/zero_inference/README.md"
APEX = "microsoft/apex_plus: profile/comm/H100-SXM-80GB/all_reduce.csv"
KT = "kvcache-ai/ktransformers: doc/en/kt-kernel/experts-sched-Tutorial.md"
GPU = ("weights=gpu", "kv=gpu")
Figures = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Point:
    """`ours()` gives what to compare with `published`; `digits` are significant, `efficiency` is the stated one."""

    ids: str
    kind: str
    what: str
    published: tuple[float, ...]
    ours: Figures
    unit: str
    source: str
    digits: int = 0
    efficiency: float = 0.0
    slack: float = 0.03


def holds(point: Point, found: tuple[float, ...]) -> bool:
    """Whether our figures agree with the published ones, in the sense of the point's kind."""
    pairs = list(zip(found, point.published, strict=True))
    if point.kind == "exact":
        return all(f"{a:.{point.digits}g}" == f"{b:.{point.digits}g}" for a, b in pairs)
    if point.kind == "roofline":
        ratios = [best / seen for best, seen in pairs]
        return all(0.0 < r <= 1.0 and abs(r - point.efficiency) <= point.slack for r in ratios)
    return all((a < b) == (x < y) for a, x in pairs for b, y in pairs if x != y)


def _flexgen(model: flexgen.Model, policy: Policy, gpu_batch: int, batches: int, prompt: int) -> Prediction:
    return flexgen.predict(model, policy, gpu_batch=gpu_batch, batches=batches, prompt=prompt, generate=32)


def _exact_flexgen() -> Iterator[Point]:
    thirty = _flexgen(OPT_30B, Policy(wg=0.2, wc=0.8, cc=1.0, hc=1.0), 48, 3, 512)
    short = _flexgen(OPT_30B, Policy(wg=0.1, wc=0.9, cc=1.0, hc=1.0), 160, 2, 256)
    long = _flexgen(OPT_30B, Policy(wg=0.04, wc=0.96, cc=1.0, hc=1.0), 20, 4, 1024)
    large = _flexgen(OPT_175B, Policy(wc=0.5, hc=1.0), 32, 8, 512)
    large_short = _flexgen(OPT_175B, Policy(wc=0.5, hc=1.0), 64, 8, 256)
    small = _flexgen(OPT_6_7B, Policy(wg=1.0, cg=1.0, hg=1.0), 2, 1, 512)
    found = _flexgen(OPT_175B, Policy(wg=0.0184, wc=0.4679, hc=1.0), 1, 432, 512)
    found_30 = _flexgen(OPT_30B, Policy(wg=0.1243, wc=0.7781, cc=1.0, hc=1.0), 32, 5, 512)
    rows: list[tuple[str, str, tuple[float, ...], tuple[float, ...], str, int]] = [
        ("", "OPT-30B, 48x3, prompts of 512: rate", (7.1357,), (thirty.tokens_per_second,), "tok/s", 5),
        ("P023", "the same: prefill", (210.6704,), (thirty.prefill_seconds,), "s", 7),
        ("", "the same: decode", (435.0937,), (thirty.decode_seconds,), "s", 7),
        ("P040", "the same: GPU at its peak, prefill and decode", (18.769, 12.870),
         (thirty.gpu_prefill / GIB, thirty.gpu_decode / GIB), "GiB", 5),
        ("P041", "the same: CPU at its peak, prefill and decode", (140.831, 144.512),
         (thirty.cpu_prefill / GIB, thirty.cpu_decode / GIB), "GiB", 6),
        ("P044", "OPT-30B: weights of all layers", (55.125,), (OPT_30B.layer_bytes * 48 / GIB,), "GiB", 5),
        ("", "OPT-30B, 160x2, prompts of 256: rate", (12.971,), (short.tokens_per_second,), "tok/s", 5),
        ("P028", "OPT-30B, 20x4, prompts of 1024: rate", (3.622,), (long.tokens_per_second,), "tok/s", 4),
        ("P030", "the same: decode", (466.9295,), (long.decode_seconds,), "s", 7),
        ("P031", "OPT-175B, 32x8, prompts of 512: rate", (0.15438,), (large.tokens_per_second,), "tok/s", 5),
        ("P033", "the same: decode", (50886.937,), (large.decode_seconds,), "s", 8),
        ("", "OPT-175B, 64x8, prompts of 256: rate", (0.30212,), (large_short.tokens_per_second,), "tok/s", 5),
        ("P037", "OPT-6.7B, 2x1, all on the GPU: rate", (60.848,), (small.tokens_per_second,), "tok/s", 5),
        ("P038", "the same: prefill", (0.6488,), (small.prefill_seconds,), "s", 4),
        ("P043", "OPT-175B, 1x432, the policy its search found: rate", (0.17,), (found.tokens_per_second,), "tok/s", 2),
        ("", "OPT-30B, 32x5, the policy its search found: rate", (7.09,), (found_30.tokens_per_second,), "tok/s", 3),
    ]  # fmt: skip
    for ids, what, published, ours, unit, digits in rows:
        yield Point(ids, "exact", what, published, lambda ours=ours: ours, unit, FLEXGEN, digits)


def _exact_analysis() -> Iterator[Point]:
    seven = llm_analysis.infer(llm_analysis.LLAMA_7B, prompt=512, generate=32)
    thirteen = llm_analysis.infer(
        llm_analysis.LLAMA_13B, prompt=512, generate=32, flops_efficiency=0.7, memory_efficiency=0.9
    )
    wide = llm_analysis.infer(llm_analysis.LLAMA_65B, prompt=512, generate=32, weight_bits=4)
    rows: list[tuple[str, str, tuple[float, ...], tuple[float, ...], str]] = [
        ("P073", "LLaMA-7B, A100 at its peaks: decode", (6.730704805422467,), (seven.decode_seconds * 1e3,), "ms"),
        ("P074", "the same: prompt of 512", (22.407014939885368,), (seven.prefill_seconds * 1e3,), "ms"),
        ("P075", "the same: weights, cache of 544, FLOP of the prompt", (13147045888, 285212672, 6868726448128),
         (seven.weight_bytes, seven.kv_bytes, seven.prefill_flops), "B, B, FLOP"),
        ("P078", "LLaMA-13B at 0.7 and 0.9 of the peaks: decode, prompt", (14.38337208991216, 61.38395353600637),
         (thirteen.decode_seconds * 1e3, thirteen.prefill_seconds * 1e3), "ms"),
        ("P080", "LLaMA-65B in 4 bits: weights, decode", (32736542720, 17.467243372492797),
         (wide.weight_bytes, wide.decode_seconds * 1e3), "B, ms"),
    ]  # fmt: skip
    for ids, what, published, ours, unit in rows:
        yield Point(ids, "exact", what, published, lambda ours=ours: ours, unit, ANALYSIS, 14)


def _kv(model: str) -> float:
    return 2.0 * load_shape(model).kv_elements_per_token()


def _exact_sizes() -> Iterator[Point]:
    paper = "Insights into DeepSeek-V3; bytes a token in 16 bits"
    rows = (("P282", "DeepSeek-V3", 70272), ("P283", "Llama-3.1-405B", 516096), ("P284", "Qwen2.5-72B", 327680),
            ("P280", "Yi-34B-200K", 245760))  # fmt: skip
    for ids, model, nbytes in rows:
        yield Point(ids, "exact", f"{model}: cache", (nbytes,), lambda m=model: (_kv(m),), "B", paper, 9)
    cache = "Yi-34B: cache of 50 000 tokens in 1e9 B; 250 tokens at 50 000 and 4 000, reading 68 GB and 11 GB at 2 TB/s"
    yield Point(
        "P277, P278", "exact", cache, (12.288, 9.875, 8.5),
        lambda: (_kv("Yi-34B-200K") * 50_000 / 1e9, 250 * (68 + 11) / 2000, 250 * 68 / 2000), "GB, s, s",
        "arXiv 2405.08944; printed there as 9.8 and 8.5", 5,
    )  # fmt: skip
    yield Point(
        "P274", "exact", "16 bits over 4 bits and a 16-bit scale for each 128", (3.88,), lambda: (_ratio(),), "x",
        "IST-DASLab/marlin: README.md; printed there as 3.87", 3,
    )  # fmt: skip
    yield Point(
        "P337", "exact", "8 experts chosen uniformly, 4 slots: hits", (0.5,), lambda: (hit_rate(8, 2, 4, 2),), "share",
        "theory", 3,
    )  # fmt: skip


def _ratio() -> float:
    shape = load_shape("Llama-2-7b-hf")
    tensor = shape.tensors(shape.layers[0])[0]
    return 2 * tensor.elements / formats_of("w4a16-g128").nbytes(tensor)


def _first_token(model: str, target: str, tensor: int, recipe: str = "") -> tuple[float]:
    found = phases(model, target, recipe, pins=GPU, tensor=tensor, roofline=True, prompt=2048, chunk=2048, generate=1)
    return (found.prefill.seconds * 1e3,)


def _step(model: str, target: str, recipe: str, pins: tuple[str, ...] = GPU, dtype: str = "f16") -> tuple[float]:
    return (phases(model, target, recipe, pins=pins, roofline=True, dtype=dtype).decode.seconds * 1e3,)


def _all_reduce(kib: int) -> tuple[float]:
    """At the stated bandwidth of the links and no share of it lost."""
    fabric = hw_targets.load("8xh100").fabric("hbm")
    assert fabric is not None
    return (all_reduce_seconds(dataclasses.replace(fabric, efficiency=None), 8, kib * 1024) * 1e6,)


def _rooflines() -> Iterator[Point]:
    rows: tuple[tuple[str, str, float, Figures, str, float, float], ...] = (
        ("P303", "LLaMA-7B, A100: first token after 2048", 133,
         lambda: _first_token("Llama-2-7b-hf", "a100-80gb", 1), TRT, 0.68, 0.03),
        ("P305", "LLaMA-70B, 4 A100: first token after 2048", 377,
         lambda: _first_token("Llama-2-70b-hf", "8xa100-80gb", 4), TRT, 0.61, 0.03),
        ("P306", "Falcon-180B, 8 A100: first token after 2048", 509,
         lambda: _first_token("falcon-180B", "8xa100-80gb", 8), TRT, 0.58, 0.03),
        ("P111", "27B in IQ4_NL, 16.34 GB, M1 Max: decode", 1e3 / 14.29,
         lambda: (16.34e12 / bytes_per_second("m1-max", "unified"),), "ggml-org/llama.cpp: issue 27525", 0.58, 0.03),
        ("P114", "LLaMA-7B in f16, M2 Ultra: decode", 1e3 / 41.02,
         lambda: _step("Llama-2-7b-hf", "m2-ultra", ""), "ggml-org/llama.cpp: discussion 4167", 0.69, 0.03),
        ("P359", "Llama-2-13B in 4 bits, RTX 4090: decode", 1e3 / 108.8,
         lambda: _step("Llama-2-13b-hf", "rtx-4090", "w4a16-g32"), "mlc-ai/llm-perf-bench: pull 1", 0.82, 0.03),
    )  # fmt: skip
    for ids, what, published, ours, source, efficiency, slack in rows:
        yield Point(ids, "roofline", what, (published,), ours, "ms", source, 0, efficiency, slack)
    for ids, kib, micros in (("P347", 8192, 80), ("P348", 16384, 122), ("P350", 65536, 325), ("P351", 131072, 597)):
        what = f"all-reduce of {kib} KiB, 8 H100"
        yield Point(ids, "roofline", what, (micros,), lambda k=kib: _all_reduce(k), "us", APEX, 0, 0.89, 0.05)


def _layers_on_gpu() -> tuple[float, ...]:
    """Tokens a second with the first n of 32 layers on the GPU; the last one: all of them, the head and the cache."""
    found = []
    for n in (20, 30, 31, 32):
        pins = ["weights=resident", f"layers.0-{n - 1}.weights=gpu", f"layers.0-{n - 1}.kv=gpu", "head=cpu"]
        if n < 32:
            pins += [f"layers.{n}-31.weights=cpu", f"layers.{n}-31.kv=cpu"]
        found.append(1 / phases("Llama-2-7b-hf", "rtx-3090", "w4a16-g32", pins=tuple(pins)).decode.seconds)
    whole = phases("Llama-2-7b-hf", "rtx-3090", "w4a16-g32", pins=("weights=resident", *GPU)).decode.seconds
    return (*found, 1 / whole)


def _chunks() -> tuple[float, ...]:
    use = {"pins": ("weights=resident", *GPU), "prompt": 1024}
    return tuple(
        1024 / phases("Llama-2-7b-hf", "rtx-3090", "w4a16-g32", chunk=chunk, **use).prefill.seconds
        for chunk in (256, 512)
    )


def _offloaded(recipe: str, *cases: tuple[str, str, int]) -> tuple[float, ...]:
    """Tokens a second with all layers streamed to the GPU from (model, home, batch)."""
    rates = []
    for model, home, batch in cases:
        pins = (f"attention={home}", f"mlp={home}", "attention=streamed", "mlp=streamed", "attention=gpu", "mlp=gpu",
                "head=gpu", "kv=dram")  # fmt: skip
        found = phases(model, "a6000", recipe, pins=pins, batch=batch, context=544)
        rates.append(batch / found.decode.seconds)
    return tuple(rates)


def _experts_on_gpu() -> tuple[float, ...]:
    """Tokens a second of the experts alone with more and more of them on the GPU, the others computed by the CPU."""
    machine = machine_of(hw_targets.load("xeon-6454s-4090"))
    problem = Problem(load_shape("Qwen3-30B-A3B"), machine, formats_of("w8a8"), Session(batch=1))
    part = next(p for p in problem.parts() if p.experts)
    options = [option_with(problem, part, "split", "gpu", "dram", round(1.28 * p)) for p in (20, 30, 50, 60, 70, 80)]
    return tuple(1 / o.decode.waited for o in options if o is not None)


def _served() -> tuple[float, ...]:
    cases = (("Llama-2-7b-hf", 190), ("Llama-2-13b-hf", 128), ("Llama-2-70b-hf", 96))
    pins = ("weights=resident", *GPU)
    found = (phases(m, "a100-80gb", "w4a8-g32,kv4", pins=pins, batch=b, context=1536, prompt=1024) for m, b in cases)
    return tuple(b / o.decode.seconds for o, (_, b) in zip(found, cases, strict=True))


def _experts_moved() -> tuple[float, ...]:
    base = ("kv=gpu", "attention=gpu", "attention=resident", "head=gpu", "experts=gpu")
    return tuple(
        1 / phases("Qwen3-30B-A3B", "rtx-4090", "w4a16-g32", pins=(*base, p), dtype="bf16").decode.seconds
        for p in ("experts=resident", "experts=streamed")
    )


def _orders() -> Iterator[Point]:
    four_bits = (("opt-30b", "dram", 48), ("opt-66b", "dram", 24), ("opt-175b", "dram", 16))
    sixteen = (("opt-30b", "dram", 96), ("opt-66b", "dram", 40), ("opt-175b", "nvme", 32))
    homes = (("opt-30b", "dram", 32), ("opt-30b", "nvme", 32))
    rows: tuple[tuple[str, str, tuple[float, ...], Figures, str], ...] = (
        ("P090 to P096", "LLaMA-7B Q4_0, 20, 30, 31, 32 layers and all on a GPU", (21.36, 40.04, 48.19, 54.78, 131.66),
         _layers_on_gpu, BENCH),
        ("P104, P105", "the same, prompt of 1024 in chunks of 256 and 512", (1932.43, 2254.45), _chunks, BENCH),
        ("P046 to P048", "OPT-30B, 66B, 175B in 4 bits on the host of an A6000", (21.97, 5.78, 1.5),
         lambda: _offloaded("w4a16-g32", *four_bits), ZERO),
        ("P059 to P061", "OPT-30B, 66B on the host, 175B on a drive, 16 bits", (12.32, 3.63, 0.47),
         lambda: _offloaded("", *sixteen), ZERO),
        ("P067, P068", "OPT-30B on the host and on a drive", (43, 30), lambda: _offloaded("", *homes),
         "DeepSpeed: posts/2022-09-10-zero-inference.md"),
        ("P325, P326, P328", "Llama-2-7B, 13B, 70B in W4A8KV4, A100", (2908, 1741, 419), _served,
         "mit-han-lab/qserve: README.md"),
        ("P253, P255", "Qwen3-30B-A3B in 4 bits, experts on the GPU, and all moved there", (311.24, 6.63),
         _experts_moved, "kekzl/imp: pull 1365"),
        ("P146 to P176", "20, 30, 50, 60, 70, 80 % of the experts on a GPU, the others on the CPU",
         (60.28, 62.08, 65.25, 72.8, 76.17, 79.2), _experts_on_gpu, KT),
    )  # fmt: skip
    for ids, what, published, ours, source in rows:
        yield Point(ids, "order", what, published, ours, "tok/s", source)


POINTS: tuple[Point, ...] = (*_exact_flexgen(), *_exact_analysis(), *_exact_sizes(), *_rooflines(), *_orders())
