"""FlexGen's own cost model (experimental/cost_model.py), its pieces priced by our cost model on the T4 as it sees it.

    found = predict("opt-30b", Policy(wg=0.2, wc=0.8, cc=1.0, hc=1.0), gpu_batch=48, batches=3, prompt=512, generate=32)
    found.tokens_per_second      # 7.1357

A layer's weights, cache and hidden states lie on GPU, CPU and disk in given fractions. In prefill a layer lasts as long
as the slowest of loading, storing and computing; in decode loading to the GPU comes before the slowest of the rest. The
constants were fitted by its authors (FMInference/FlexLLMGen) to a T4 in a cloud: `t4()` is a target with them, in which
what has a rate of its own is a unit, a tier or a drive of its own. Numbers have 16 bits, a GB is 2^30 B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from frontends.shape_library import load_shape
from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.memory import Link, MemoryTier, Storage, StoragePoint
from hw_targets.target import ComputeUnit, Target

GIB = float(1 << 30)


@dataclass(frozen=True)
class Policy:
    """Fractions of weights (w), cache (c) and hidden states (h) on GPU (g) and CPU (c); the rest is on disk."""

    wg: float = 0.0
    wc: float = 0.0
    cg: float = 0.0
    cc: float = 0.0
    hg: float = 0.0
    hc: float = 0.0

    @property
    def wn(self) -> float:
        return 1.0 - self.wg - self.wc

    @property
    def cn(self) -> float:
        return 1.0 - self.cg - self.cc

    @property
    def hn(self) -> float:
        return 1.0 - self.hg - self.hc


@dataclass(frozen=True)
class Model:
    """What FlexGen knows of a model: layers, width, heads and the bytes of a layer's products."""

    layers: int
    hidden: int
    heads: int
    layer_bytes: float


@lru_cache(maxsize=8)
def model(name: str) -> Model:
    """A model of the built-in list; biases and norms are nothing to FlexGen."""
    shape = load_shape(name)
    layer = shape.layers[0]
    products = sum(t.elements for t in shape.tensors(layer) if t.is_product)
    return Model(len(shape.layers), shape.hidden, layer.attention.heads, 2.0 * products)


@lru_cache(maxsize=1)
def t4() -> Target:
    """The machine with the constants of its fit. The GPU has a rate for each kind of product and phase; hidden states
    come back to memory faster than the cache, and are written to disk faster."""
    flops = {
        "prompt products": 21.24e12,
        "prompt attention": 9.97e12,
        "step products": 4.3e12,
        "step attention": 0.079e12,
    }
    units = [ComputeUnit(name, "gpu", "vram", peak=(("f16", rate),)) for name, rate in flops.items()]
    units.append(ComputeUnit("cores", "cpu", "dram", cores=1, peak=(("f16", 0.0123e12),)))
    tiers = tuple(MemoryTier(name, capacity_bytes=1 << 40) for name in ("vram", "dram", "dram hidden"))
    links = tuple(
        Link(name, tier, "vram", bandwidth=12.89 * GIB, back_bandwidth=back * GIB)
        for name, tier, back in (("cache link", "dram", 0.97), ("hidden link", "dram hidden", 4.82))
    )
    drives = tuple(
        Storage(name, tier="dram", points=(StoragePoint(1 << 20, 1, read * GIB, write * GIB),))
        for name, read, write in (
            ("disk", 0.473, 0.746),
            ("disk hidden", 0.473, 2.015),
            ("disk again", 0.95 * 0.473, 2.015),
        )
    )
    return Target("flexgen-t4", "", "", "", frozenset(), units=tuple(units), tiers=tiers, links=links, storage=drives)


@dataclass(frozen=True)
class Prediction:
    """Seconds of all layers, and bytes at the peak of each phase."""

    tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    gpu_prefill: float
    gpu_decode: float
    cpu_prefill: float
    cpu_decode: float
    disk: float


def predict(name: str, p: Policy, *, gpu_batch: int, batches: int, prompt: int, generate: int = 32) -> Prediction:
    """What FlexGen's model says of a policy for a built-in model."""
    m, block = model(name), gpu_batch * batches
    prefill = _prefill_layer(m, p, block, prompt) * m.layers
    decode = _decode_layer(m, p, block, gpu_batch, prompt, generate) * (generate - 1) * m.layers
    gpu_prefill, gpu_decode = _gpu_peaks(m, p, block, gpu_batch, prompt, generate)
    cpu_prefill, cpu_decode = _cpu_peaks(m, p, block, gpu_batch, prompt, generate)
    length, h = prompt + generate, m.hidden
    disk = m.layer_bytes * m.layers * p.wn + 2 * prompt * h * block * p.hn + 4 * length * h * block * m.layers * p.cn
    rate = block * generate / (prefill + decode)
    return Prediction(rate, prefill, decode, gpu_prefill, gpu_decode, cpu_prefill, cpu_decode, disk)


def _moves(*pieces: tuple[str, str, float]) -> float:
    """Seconds of (from, to, bytes) one after the other."""
    return sum(transfer_time(t4(), source, goal, nbytes)[1] for source, goal, nbytes in pieces if nbytes)


def _computes(*pieces: tuple[str, float]) -> float:
    """Seconds of (unit, FLOP) one after the other."""
    found = 0.0
    for name, flops in pieces:
        unit = t4().unit(name)
        assert unit is not None
        found += price(Work(flops, "f16"), unit, t4()).seconds if flops else 0.0
    return found


def _prefill_layer(m: Model, p: Policy, block: int, s: int) -> float:
    h, hidden = m.hidden, 2 * s * m.hidden * block
    cache = 4 * (s + 1) * h * block
    load = _moves(("dram", "vram", m.layer_bytes * (p.wc + p.wn)), ("dram hidden", "vram", hidden * (p.hc + p.hn)))
    store = _moves(("vram", "dram", cache * (p.cc + p.cn)), ("vram", "dram hidden", hidden * (p.hc + p.hn)))
    read = _moves(("disk", "dram", m.layer_bytes * p.wn), ("disk hidden", "dram", hidden * p.hn))
    write = _moves(("dram", "disk", cache * p.cn), ("dram", "disk hidden", hidden * p.hn))
    compute = _computes(("prompt products", block * 24 * s * h**2), ("prompt attention", 4 * block * s**2 * h))
    return max(load + read, store + write, compute)


def _decode_layer(m: Model, p: Policy, block: int, gpu_batch: int, s: int, n: int) -> float:
    h, hidden = m.hidden, 2 * m.hidden * block
    seen = 4 * block * (s + n / 2) * h
    load = _moves(("dram", "vram", m.layer_bytes * (p.wc + p.wn)), ("dram hidden", "vram", hidden * (p.hc + p.hn)))
    store = _moves(("vram", "dram hidden", hidden * (p.hc + p.hn)))
    read = _moves(
        ("disk", "dram", seen * p.cn),
        ("disk hidden", "dram", hidden * p.hn),
        ("disk again", "dram", m.layer_bytes * p.wn),
    )
    write = _moves(("dram", "disk again", 4 * block * h * p.cn), ("dram", "disk hidden", hidden * p.hn))
    small, narrow = max(0.0, math.log2(64 / gpu_batch)), max(0.0, math.log2(4096 / h))
    share = max(0.1, 1 + 0.0168 * small * narrow - 0.0328 * small - 0.0621 * narrow)  # of the cores, in small batches
    compute = _computes(
        ("step products", block * 24 * h**2), ("step attention", seen * p.cg), ("cores", seen * (p.cc + p.cn) / share)
    )
    return load + max(store, read, write, compute)


def _gpu_peaks(m: Model, p: Policy, block: int, gpu_batch: int, s: int, n: int) -> tuple[float, float]:
    h, w, length = m.hidden, m.layer_bytes, s + n
    cache = 4 * length * h * block * m.layers * p.cg
    inner = 26 * gpu_batch * s * h + 2 * gpu_batch * m.heads * s**2  # qkv, scores, values, output, both of the MLP
    prefill = w * m.layers * p.wg + 2 * s * h * block * p.hg + cache
    prefill += 2 * w * (1 - p.wg) + 2 * s * h * gpu_batch * (1 - p.hg) + inner
    inner = 22 * gpu_batch * h + gpu_batch * p.cg * (4 * h + 4 * length * h + 2 * m.heads * length)
    decode = w * m.layers * p.wg + 2 * h * block * p.hg + cache
    decode += 2 * w * (1 - p.wg) + 2 * h * gpu_batch * (1 - p.hg) + 4 * gpu_batch * length * h * p.cg + inner
    return prefill, decode


def _cpu_peaks(m: Model, p: Policy, block: int, gpu_batch: int, s: int, n: int) -> tuple[float, float]:
    h, w, length = m.hidden, m.layer_bytes, s + n
    prefill = w * m.layers * p.wc + 2 * s * h * block * p.hc + 4 * s * h * block * m.layers * p.cc
    prefill += w * (1 - p.wg) + 2 * s * h * gpu_batch * (1 - p.hg)
    decode = w * m.layers * p.wc + 2 * h * block * p.hc + 4 * length * h * block * m.layers * p.cc
    decode += w * p.wn + 4 * h * gpu_batch * p.hn + 8 * length * h * gpu_batch * p.cn
    return prefill, decode + 2 * m.heads * length * gpu_batch + 2 * h * gpu_batch
