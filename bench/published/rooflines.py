"""Points whose machine and work are known: ours at the stated peaks and as planned, beside what was measured.

A row of the tables below is (id, case, what is measured, why it is not met). Nothing is fitted to a row: efficiencies
stand in the files of the machines, each from one figure of one source, and hold for all rows on the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import hw_targets
from bench.published.ours import Case, ideal
from bench.published.points import Point, published, table
from hw_targets.cost_model import Work, price
from passes.place.parallel import all_reduce_seconds

Entry = tuple[str, Case, str, str]

L7, L13, L70, L8, O30, O66, O175 = (
    "Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Llama-3.1-8B", "opt-30b", "opt-66b", "opt-175b",
)  # fmt: skip
FP8 = "w8a8,kv8"  # eight bits; floats and integers of eight bits have one peak
Q4 = "w4a16-g32"  # 4.5 bits, as Q4_0 has
H200_PAIR = "8xh100{hbm=141GB,hbm.read=4.8TB/s}"
A100_40_PAIR = "8xa100-80gb{hbm=40GB,hbm.read=1555GB/s}"
RTX_3090_TI = "rtx-3090{vram.read=1008GB/s}"
L40S = "a6000{vram.read=864GB/s,gpu.peak.i8=733TOP/s,gpu.peak.f16=362TFLOP/s}"
RTX_5090 = "rtx-4090{vram=32GB,vram.read=1792GB/s}"
DDR5_5600 = "i9-13900k{dram.read=89.6GB/s}"
WITHOUT_AMX = "cores.peak.bf16=140.8GFLOP/s,cores.peak.i8=140.8GFLOP/s"
KT = f"xeon-6454s-4090{{{WITHOUT_AMX}}}"
KT_TWO_SOCKETS = f"xeon-6454s-4090{{dram=1TiB,dram.read=614.4GB/s,cores.cores=64,{WITHOUT_AMX}}}"
YI = "a100-80gb{hbm=100GB,hbm.read=2TB/s}"

ON_CPU = ("weights=resident", "attention=gpu", "mlp=gpu", "head=gpu", "kv=gpu", "experts=cpu")
_KERNELS = "dozens of small kernels a layer; ours has six"
_PAIR = "what GPUs lose that work together beside all-reduces is not known to us"
_LONG = "long answers: its attention over 8-bit caches does not read at the memory's speed; ours is planned to"
_KV4 = "its attention expands 4-bit caches by arithmetic that we plan as free"
_EXPAND = "it expands 4-bit weights by kernels of their own on the GPU; a plan of ours reads them as they are"
_WAITS = "each layer's copy, from memory that is not pinned, is waited for; ours is planned beside the layer before"
_TURNS = "copies of weights and attention of the cores take turns there, as it seems; ours overlap"
_MAPPED = "it reads the drive through a memory map, at a third of its rate"
_FASTER = "attention of the cores is faster there than by the constant we took"
# What attention beside the cache on a CPU reads in these systems, by the constant that FlexGen fitted: 12.3 GB/s.
A6000 = "a6000{cores.bandwidth_efficiency=0.06}"
T4 = "t4-gcp{cores.bandwidth_efficiency=0.096}"


def _tensorrt() -> Iterator[Entry]:
    yield "P302", Case(L7, "a100-80gb", prompt=128, generate=1), "first token", _KERNELS
    yield "P303", Case(L7, "a100-80gb", prompt=2048, generate=1), "first token", ""
    yield "P305", Case(L70, "8xa100-80gb", tensor=4, prompt=2048, generate=1), "first token", ""
    yield "P306", Case("falcon-180B", "8xa100-80gb", tensor=8, prompt=2048, generate=1), "first token", ""
    yield "P308", Case(L70, "8xh100", FP8, tensor=4, prompt=2048, generate=1), "first token", ""
    for i, batch, prompt, generate in (("P289", 112, 128, 2048), ("P290", 80, 2048, 128), ("P291", 48, 2048, 2048)):
        yield i, Case(L7, "h100-sxm", FP8, batch=batch, prompt=prompt, generate=generate), "generation", ""
    yield "P294", Case(L70, "8xh100", FP8, tensor=2, batch=96, prompt=2048, generate=128), "generation", ""
    yield "P298", Case(L7, "a100-80gb", batch=52, prompt=2048, generate=128), "generation", ""
    yield "P299", Case(L70, "8xa100-80gb", tensor=4, batch=1280, prompt=128, generate=128), "generation", ""
    yield "P300", Case(L70, "8xa100-80gb", tensor=4, batch=240, prompt=128, generate=2048), "generation", _PAIR
    for i, model, batch, prompt, generate, why in (
        ("P310", L13, 1024, 128, 128, ""), ("P311", L13, 128, 128, 2048, _LONG), ("P312", L13, 64, 2048, 128, ""),
        ("P315", L70, 64, 2048, 128, ""), ("P319", L70, 96, 128, 4096, _LONG),
    ):  # fmt: skip
        yield i, Case(model, "h200-sxm", FP8, batch=batch, prompt=prompt, generate=generate), "generation", why
    yield "P314", Case(L70, H200_PAIR, FP8, tensor=2, batch=512, prompt=128, generate=2048), "generation", _PAIR


def _other_gpus() -> Iterator[Entry]:
    yield "P084", Case(L13, A100_40_PAIR, tensor=2, prompt=512, generate=10), "first token", _PAIR
    for i, model, batch, target in (
        ("P325", L7, 190, "a100-80gb"), ("P326", L13, 128, "a100-80gb"), ("P328", L70, 96, "a100-80gb"),
        ("P329", "Qwen2.5-72B", 32, "a100-80gb"), ("P330", L8, 128, L40S),
    ):  # fmt: skip
        yield i, Case(model, target, "w4a8-g32,kv4", batch=batch, prompt=1024, generate=512), "generation", _KV4
    yield "P334", Case(L8, "a100-80gb", batch=288, prompt=1024, generate=512), "generation", "its batch is not stated"
    yield "P359", Case(L13, "rtx-4090", Q4, prompt=64, generate=128), "decode", ""
    yield "P360", Case(L7, RTX_3090_TI, Q4, prompt=64, generate=128), "decode", ""
    yield "P096", Case(L7, RTX_3090_TI, Q4, prompt=1, generate=128), "decode", ""
    products = "a prompt's products at a third of the peak; the file states nothing for them"
    for i, chunk in (("P104", 256), ("P105", 512)):
        yield i, Case(L7, RTX_3090_TI, Q4, prompt=1024, chunk=chunk, generate=1), "prefill", products
    yield "P253", Case("Qwen3-30B-A3B", RTX_5090, Q4, prompt=512, generate=256), "decode", ""
    moved = ("weights=gpu", "attention=resident", "head=resident", "kv=gpu", "experts=streamed")
    dispatch = "the host waits for each layer's choice before it copies; 4.7 of 25.6 GB/s are used"
    yield "P255", Case("Qwen3-30B-A3B", RTX_5090, Q4, moved, prompt=512, generate=256), "decode", dispatch


def _hosts() -> Iterator[Entry]:
    for i, model, target, recipe, why in (
        ("P110", L8, "m1-max", Q4, ""), ("P113", L7, "m2-ultra", Q4, "its 4-bit kernels reach less than f16 ones here"),
        ("P114", L7, "m2-ultra", "", ""),
    ):  # fmt: skip
        yield i, Case(model, target, recipe, prompt=64, generate=128), "decode", why
    yield "P108", Case(L7, "m4-pro{unified.read=153.6GB/s}", Q4, prompt=1, generate=128), "decode", ""
    yield "P112", Case(L7, "rtx-3090{vram.read=560GB/s}", Q4, prompt=1, generate=128), "decode at peak", ""
    yield "P215", Case("Qwen3-30B-A3B", DDR5_5600, Q4, (), prompt=64, generate=128, dtype="f32"), "decode", ""
    small = Case("SmallThinker-21B-A3B", DDR5_5600, Q4, (), prompt=64, generate=128, dtype="f32")
    yield "P208", small, "decode", ""
    arm = "phone-ufs4{{dram=16GB,dram.read={}GB/s}}"
    yield "P210", dataclasses.replace(small, target=arm.format(34.1)), "decode", ""
    yield "P211", dataclasses.replace(small, target=arm.format(17.1)), "decode", ""
    deepseek = Case("DeepSeek-V3", KT, Q4, ON_CPU, prompt=500, generate=300, dtype="bf16")
    yield "P118", deepseek, "decode", ""
    yield "P119", deepseek, "prefill", "its kernels of that time reach half of what the cores could without AMX"
    yield "P120", dataclasses.replace(deepseek, top_k=6), "decode", ""
    yield "P124", dataclasses.replace(deepseek, top_k=6, target=KT_TWO_SOCKETS), "decode", "memory of the other socket"
    fiddler = Case("Mixtral-8x7B-v0.1", "t4-gcp{vram=24GB}", "", ("attention=gpu", "experts=split", "kv=gpu"))
    yield "P206", fiddler, "decode at peak", ""


def streamed(home: str, kv: str) -> tuple[str, ...]:
    cache = ("kv=dram", "kv=cores") if kv == "cores" else (f"kv={kv}",)
    return ("attention=streamed", "mlp=streamed", f"attention={home}", f"mlp={home}", "attention=gpu", "mlp=gpu",
            "head=gpu", *cache)  # fmt: skip


def _offloading() -> Iterator[Entry]:
    for i, model, batch, recipe, home, kv, why in (
        ("P046", O30, 48, Q4, "dram", "gpu", _EXPAND), ("P047", O66, 24, Q4, "dram", "gpu", _EXPAND),
        ("P048", O175, 16, Q4, "dram", "gpu", _EXPAND), ("P049", O30, 200, "", "dram", "cores", ""),
        ("P051", O175, 64, "", "nvme", "cores", _MAPPED), ("P053", O66, 96, Q4, "dram", "cores", ""),
        ("P054", O175, 40, Q4, "dram", "cores", _EXPAND), ("P056", O66, 16, Q4, "dram", "gpu", ""),
        ("P058", L70, 96, Q4, "dram", "gpu", ""), ("P059", O30, 96, "", "dram", "cores", ""),
        ("P060", O66, 40, "", "dram", "cores", _TURNS), ("P061", O175, 32, "", "nvme", "cores", ""),
        ("P063", O30, 128, Q4, "dram", "cores", _FASTER), ("P064", O66, 64, Q4, "dram", "cores", ""),
        ("P065", O175, 24, Q4, "dram", "cores", _TURNS), ("P066", "bloom-176b", 24, Q4, "dram", "cores", _TURNS),
    ):  # fmt: skip
        together = next(n for n in (96, 64, 50, 48, 40, 32, 24, 16) if batch % n == 0)
        yield i, Case(model, A6000, recipe, streamed(home, kv), batch=batch, prompts=together), "generation", why
    gpu = Case("opt-6.7b", "t4-gcp", batch=4, prompt=256, prompts=4)
    yield "P013", gpu, "generation", ""
    yield "P014", dataclasses.replace(gpu, recipe=Q4 + ",kv4", batch=128, prompts=64), "generation", _EXPAND
    half = ("attention=streamed", "mlp=streamed", "attention=gpu", "mlp=gpu", "head=gpu", "layers.0-47.weights=dram",
            "layers.48-95.weights=ssd")  # fmt: skip
    yield "P003", Case(O175, "t4-gcp", "", (*half, "kv=ssd"), batch=256, prompts=32, micro_batches=8), "generation", ""
    yield (
        "P017",
        Case(O175, "t4-gcp", "", (*half, "kv=ssd"), batch=512, prompt=256, prompts=64, micro_batches=8),
        "generation",
        "",
    )
    low = Case(O175, "t4-gcp", Q4 + ",kv4", streamed("dram", "dram"), batch=288, prompt=256, prompts=32)
    yield "P018", low, "generation", _EXPAND
    thirty = Case(O30, "t4-gcp", "kv4", streamed("dram", "dram"), batch=512, prompts=32)
    yield "P005", thirty, "generation", _EXPAND
    yield "P008", Case(O30, "t4-gcp", "", streamed("dram", "gpu"), batch=8, prompts=8), "generation", _WAITS
    yield "P010", Case("opt-6.7b", "t4-gcp", "", streamed("dram", "gpu"), batch=16, prompts=16), "generation", _WAITS


def _measured(case: Case, what: str, peak: bool) -> float:
    kind = what.removesuffix(" at peak")
    if kind == "first token":
        return case.first_token(peak=peak)
    return {"generation": case.generation, "prefill": case.prefill, "decode": case.decode}[kind](peak=peak)


def _models() -> Iterator[Point]:
    for i, case, what, why in (*_tensorrt(), *_other_gpus(), *_hosts(), *_offloading()):
        row = table()[i]
        yield Point(
            (i,), "roofline", f"{row.system}: {row.model}, {row.precision}, {row.hardware.partition(' (')[0]}: {what}",
            published(i), lambda c=case, w=what: (_measured(c, w, True),), row.unit, rate=row.unit.startswith("tok"),
            planned=None if what.endswith("at peak") else lambda c=case, w=what: (_measured(c, w, False),), why=why,
        )  # fmt: skip


def _product_seconds(m: int, k: int, n: int, peak: bool) -> float:
    found = hw_targets.load("v100-dgx2{gpu.peak.f16=112TFLOP/s}")
    target = ideal(found) if peak else found
    unit = target.unit("gpu")
    assert unit is not None
    nbytes = 2.0 * (m * k + k * n + m * n)
    return price(Work(2.0 * m * k * n, "f16", (("hbm", nbytes),), launches=1), unit, target).seconds


def _all_reduce(kib: int, peak: bool) -> float:
    fabric = hw_targets.load("8xh100").fabric("hbm")
    assert fabric is not None
    if peak:
        fabric = dataclasses.replace(fabric, efficiency=None)
    return all_reduce_seconds(fabric, 8, kib * 1024)


def _flash(lanes: int) -> float:
    """MiB a second of reads of 4 MiB, so many at once."""
    rate = hw_targets.load("phone-ufs4").storage[0].read_rate(4 << 20, lanes)
    return (rate or 0.0) / (1 << 20)


def _parts() -> Iterator[Point]:
    """Single products, messages and reads."""
    for i, shape in (("P343", (1024, 4096, 4096)), ("P344", (2048, 32768, 768))):
        why = "the best product of its file; the stated efficiency is that of a common one" if i == "P344" else ""
        yield Point(
            (i,), "roofline", f"V100-PCIE-16GB, f16: product of {shape[0]} x {shape[1]} x {shape[2]}", published(i),
            lambda s=shape: (1e6 * _product_seconds(*s, True),), "us",
            planned=lambda s=shape: (1e6 * _product_seconds(*s, False),), why=why,
        )  # fmt: skip
    for i, kib in (("P347", 8192), ("P348", 16384), ("P350", 65536), ("P351", 131072)):
        yield Point(
            (i,), "roofline", f"8 H100: all-reduce of {kib} KiB", published(i),
            lambda k=kib: (1e6 * _all_reduce(k, True),), "us", planned=lambda k=kib: (1e6 * _all_reduce(k, False),),
        )  # fmt: skip
    for i, lanes in (("P242", 1), ("P244", 4), ("P246", 32)):
        yield Point(
            (i,), "roofline", f"phone: reads of 4 MiB, {lanes} at once", published(i), lambda n=lanes: (_flash(n),),
            "MiB/s", rate=True, planned=lambda n=lanes: (_flash(n),),
        )  # fmt: skip


def _read(target: str, nbytes: float, peak: bool) -> float:
    """Passes a second of a GPU over so many bytes of its memory."""
    found = hw_targets.load(target)
    found = ideal(found) if peak else found
    unit = found.unit("gpu")
    assert unit is not None
    return 1.0 / price(Work(traffic=((unit.tier, nbytes),)), unit, found).seconds


def cores(count: int, *, peak: bool) -> float:
    """Tokens a second of LLaMA-7B in 4.5 bits by so many cores."""
    found = hw_targets.load("i9-13900k")
    unit = (ideal(found) if peak else found).unit("cores")
    assert unit is not None
    parts = Case(L7, "i9-13900k", Q4, (), dtype="f32").problem().parts()
    nbytes = float(sum(p.nbytes * p.count for p in parts if p.group != "embedding"))
    flops = float(sum(p.flops_per_token * p.count for p in parts))
    work = Work(flops, "f32", (("dram", nbytes),), threads=count, rows=1.0)
    return 1.0 / price(work, unit, found).seconds


def _tokens() -> Iterator[Point]:
    """Decoding where only the bytes of a model are known, or only some cores take part."""
    yield Point(
        ("P111",), "roofline", "llama.cpp: 27B in IQ4_NL, 16.34 GB, Apple M1 Max: decode", published("P111"),
        lambda: (_read("m1-max", 16.34e9, True),), "tok/s", rate=True,
        planned=lambda: (_read("m1-max", 16.34e9, False),),
    )  # fmt: skip
    for i, count in (("P098", 2), ("P099", 4)):
        yield Point(
            (i,), "roofline", f"llama.cpp: LLaMA-7B Q4_0, {count} cores of an i9-13900K: decode", published(i),
            lambda n=count: (cores(n, peak=True),), "tok/s", rate=True, planned=lambda n=count: (cores(n, peak=False),),
        )  # fmt: skip


def points() -> Iterator[Point]:
    """All rooflines."""
    yield from _tokens()
    yield from _models()
    yield from _parts()
