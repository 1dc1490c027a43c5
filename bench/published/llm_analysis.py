"""The roofline of llm-analysis (cli99/llm-analysis), its pieces priced by our cost model on our target.

    found = infer(LLAMA_7B, a100(), prompt=512, generate=32)
    found.decode_seconds         # 0.006730704805422467

Which bytes and FLOP it counts is written anew from its formulas, of its first release and of the one in January 2024
that its page about Llama 2 is from. Attention and MLP each last as long as the longer of their arithmetic and of their
weights and activations; norms and embeddings as long as their bytes; the head as long as its arithmetic; decoding also
reads and writes the whole cache. What a count of FLOP or bytes lasts is `hw_targets.cost_model.price` on `a100-80gb`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import hw_targets
from bench.published.ours import ideal
from hw_targets.cost_model import Work, price
from hw_targets.target import Target

LINK_BYTES = 300e9  # NVLink of an A100 in one direction, and the least time of a message, as its machine file has them
MESSAGE_SECONDS = 8e-6


@dataclass(frozen=True)
class Model:
    """As its files describe models. `inner` is the width of the MLP; gated ones have three matrices."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 32000
    kv_heads: int = 0
    inner: int = 0
    gated: bool = False

    @property
    def attention_elements(self) -> int:
        return 2 * self.hidden**2 * (self.heads + (self.kv_heads or self.heads)) // self.heads

    @property
    def mlp_elements(self) -> int:
        return (3 if self.gated else 2) * self.hidden * (self.inner or 4 * self.hidden)


LLAMA_7B = Model(32, 4096, 32)
LLAMA_13B = Model(40, 5120, 40)
LLAMA_65B = Model(80, 8192, 64)
LLAMA_2_70B = Model(80, 8192, 64, kv_heads=8, inner=28672, gated=True)


@dataclass(frozen=True)
class Inference:
    """Seconds of the prompts and of a token after each; bytes; FLOP of the prompts."""

    prefill_seconds: float
    decode_seconds: float
    weight_bytes: float
    kv_bytes: float
    prefill_flops: float


def a100(flops_efficiency: float = 1.0, memory_efficiency: float = 1.0) -> Target:
    """Our A100 with these shares of its peaks, and kernels that start at once."""
    target = ideal(hw_targets.load("a100-80gb"))
    shares = {"efficiency": (("f16", flops_efficiency),), "bandwidth_efficiency": memory_efficiency}
    units = tuple(dataclasses.replace(u, **shares) if u.kind == "gpu" else u for u in target.units)
    return dataclasses.replace(target, units=units)


def infer(
    m: Model,
    target: Target,
    *,
    prompt: int,
    generate: int,
    batch: int = 1,
    tensor: int = 1,
    weight_bits: int = 16,
) -> Inference:
    """`batch` sequences on `tensor` GPUs, activations and embeddings in 16 bits. Several GPUs: the later release."""
    kv = 2.0 * batch * (prompt + generate) * m.hidden * (m.kv_heads or m.heads) / m.heads * 2 * m.layers
    forward = _first_release if tensor == 1 else _later_release
    times = [forward(m, target, batch, rows, weight_bits, tensor) for rows in (prompt, 1)]
    weights = (m.attention_elements + m.mlp_elements) * m.layers * weight_bits / 8 + m.hidden * m.vocab * 2
    rows = batch * prompt
    layer = 2 * rows * (m.attention_elements + m.mlp_elements) + 4 * rows * prompt * m.hidden
    total = float(layer * m.layers + 2 * rows * m.hidden * m.vocab)
    return Inference(times[0], times[1] + _lasts(target, 0, 2 * kv / tensor), weights, kv, total)


def _lasts(target: Target, flops: float, nbytes: float) -> float:
    """Seconds of a piece of work on the GPU."""
    unit = target.unit("gpu")
    assert unit is not None
    return price(Work(float(flops), "f16", (("hbm", float(nbytes)),) if nbytes else ()), unit, target).seconds


def _first_release(m: Model, target: Target, batch: int, rows: int, weight_bits: int, tensor: int) -> float:
    h, bits = m.hidden, weight_bits / 8
    assert batch == tensor == 1 and not m.gated
    scores = 2 * m.heads * rows**2
    attention = _lasts(
        target, 8 * rows * h**2 + 4 * rows**2 * h, m.attention_elements * bits + (5 * rows * h + scores) * 2
    )
    mlp = _lasts(target, 16 * rows * h**2, m.mlp_elements * bits + 9 * rows * h * 2)
    norms = _lasts(target, 0, 2 * rows * h * 4)  # in 32 bits
    ends = _lasts(target, 0, h * m.vocab * 2) + _lasts(target, 2 * rows * m.vocab * h, 0)
    return (attention + mlp + norms) * m.layers + ends


def _later_release(m: Model, target: Target, batch: int, length: int, weight_bits: int, tensor: int) -> float:
    """Two GPUs share products and norms; its arithmetic of an MLP has two matrices also where its bytes have three."""
    h, bits, rows, inner = m.hidden, weight_bits / 8, batch * length, m.inner or 4 * m.hidden
    flops = 2 * rows * m.attention_elements + 4 * rows * length * h
    attention = _lasts(target, flops / tensor, (m.attention_elements * bits + 3 * rows * h * 2) / tensor)
    mlp = _lasts(target, 4 * rows * h * inner / tensor, (m.mlp_elements * bits + rows * inner * 2) / tensor)
    norm = _lasts(target, 0, rows * h * 4 / tensor)
    told = max(2 * rows * h * 2 * (tensor - 1) / tensor / LINK_BYTES, MESSAGE_SECONDS)
    ends = _lasts(target, 0, h * m.vocab * 2) + told + _lasts(target, 2 * rows * m.vocab * h / tensor, 0)
    return (attention + mlp + 2 * norm + 2 * told) * m.layers + ends
