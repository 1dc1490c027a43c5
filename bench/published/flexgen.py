"""FlexGen's own cost model in closed form, written anew from the formulas of its experimental/cost_model.py.

    found = predict(OPT_30B, Policy(wg=0.2, wc=0.8, cc=1.0, hc=1.0), gpu_batch=48, batches=3, prompt=512, generate=32)
    found.tokens_per_second      # 7.1357

A layer's weights, cache and hidden states lie on GPU, CPU and disk in given fractions. In prefill a layer lasts as long
as the slowest of loading, storing and computing; in decode loading to the GPU comes before the slowest of the rest. The
constants were fitted by its authors (FMInference/FlexLLMGen) to a T4 in a cloud. Numbers have 16 bits, a GB is 2^30 B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = float(1 << 30)
TERA = 1e12


@dataclass(frozen=True)
class Model:
    """`layers` of width `hidden` with `heads` heads and an MLP four times as wide."""

    layers: int
    hidden: int
    heads: int

    @property
    def layer_bytes(self) -> float:
        return 24.0 * self.hidden**2


OPT_6_7B = Model(32, 4096, 32)
OPT_30B = Model(48, 7168, 56)
OPT_175B = Model(96, 12288, 96)


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
class Constants:
    """Bytes/s between GPU, CPU and disk, FLOP/s of matrix products in prefill and decode; defaults: the T4 machine."""

    cpu_to_gpu: float = 12.89 * GIB
    cache_to_cpu: float = 0.97 * GIB
    hidden_to_cpu: float = 4.82 * GIB
    disk_to_cpu: float = 0.473 * GIB
    cache_to_disk: float = 0.746 * GIB
    hidden_to_disk: float = 2.015 * GIB
    to_disk_decode: float = 2.015 * GIB
    products_prefill: float = 21.24 * TERA
    products_decode: float = 4.3 * TERA
    attention_prefill: float = 9.97 * TERA
    attention_decode: float = 0.079 * TERA
    cpu: float = 0.0123 * TERA
    correction: tuple[float, float, float] = (0.0168, 0.0328, 0.0621)


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


def predict(
    m: Model, p: Policy, *, gpu_batch: int, batches: int, prompt: int, generate: int, c: Constants | None = None
) -> Prediction:
    """What FlexGen's model says of a policy."""
    c = c or Constants()
    block = gpu_batch * batches
    prefill = _prefill_layer(m, p, c, block, prompt) * m.layers
    decode = _decode_layer(m, p, c, block, gpu_batch, prompt, generate) * (generate - 1) * m.layers
    gpu_prefill, gpu_decode = _gpu_peaks(m, p, block, gpu_batch, prompt, generate)
    cpu_prefill, cpu_decode = _cpu_peaks(m, p, block, gpu_batch, prompt, generate)
    length, h = prompt + generate, m.hidden
    disk = m.layer_bytes * m.layers * p.wn + 2 * prompt * h * block * p.hn + 4 * length * h * block * m.layers * p.cn
    rate = block * generate / (prefill + decode)
    return Prediction(rate, prefill, decode, gpu_prefill, gpu_decode, cpu_prefill, cpu_decode, disk)


def _prefill_layer(m: Model, p: Policy, c: Constants, block: int, s: int) -> float:
    h, hidden = m.hidden, 2 * s * m.hidden * block
    cache = 4 * (s + 1) * h * block
    load = (m.layer_bytes * (p.wc + p.wn) + hidden * (p.hc + p.hn)) / c.cpu_to_gpu
    store = cache * (p.cc + p.cn) / c.cache_to_cpu + hidden * (p.hc + p.hn) / c.hidden_to_cpu
    read = (m.layer_bytes * p.wn + hidden * p.hn) / c.disk_to_cpu
    write = cache * p.cn / c.cache_to_disk + hidden * p.hn / c.hidden_to_disk
    compute = block * 24 * s * h**2 / c.products_prefill + 4 * block * s**2 * h / c.attention_prefill
    return max(load + read, store + write, compute)


def _decode_layer(m: Model, p: Policy, c: Constants, block: int, gpu_batch: int, s: int, n: int) -> float:
    h, hidden = m.hidden, 2 * m.hidden * block
    seen = 4 * block * (s + n / 2) * h
    load = (m.layer_bytes * (p.wc + p.wn) + hidden * (p.hc + p.hn)) / c.cpu_to_gpu
    store = hidden * (p.hc + p.hn) / c.hidden_to_cpu
    read = (seen * p.cn + hidden * p.hn) / c.disk_to_cpu + m.layer_bytes * p.wn / (0.95 * c.disk_to_cpu)
    write = (4 * block * h * p.cn + hidden * p.hn) / c.to_disk_decode
    small, narrow = max(0.0, math.log2(64 / gpu_batch)), max(0.0, math.log2(4096 / h))
    a, b, d = c.correction
    cpu = c.cpu * max(0.1, 1 + a * small * narrow - b * small - d * narrow)
    compute = block * 24 * h**2 / c.products_decode + seen * p.cg / c.attention_decode + seen * (p.cc + p.cn) / cpu
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
