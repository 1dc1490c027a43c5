"""The roofline of llm-analysis in closed form, written anew from its formulas (cli99/llm-analysis, first release).

    found = infer(LLAMA_7B, prompt=512, generate=32)
    found.decode_seconds         # 0.006730704805422467

Twelve h^2 parameters a layer and one table of embeddings. Attention and MLP each last as long as the longer of their
arithmetic and of their weights and activations; norms and embeddings as long as their bytes; the head as long as its
arithmetic; decoding also reads and writes the whole cache. The machine is one A100 of 80 GB, 312 TFLOP/s and 2039 GB/s,
times efficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS, BANDWIDTH = 312e12, 2039e9


@dataclass(frozen=True)
class Model:
    layers: int
    hidden: int
    heads: int
    vocab: int = 32000


LLAMA_7B = Model(32, 4096, 32)
LLAMA_13B = Model(40, 5120, 40)
LLAMA_65B = Model(80, 8192, 64)


@dataclass(frozen=True)
class Inference:
    """Seconds of a prompt and of a token after it; bytes; FLOP of the prompt."""

    prefill_seconds: float
    decode_seconds: float
    weight_bytes: float
    kv_bytes: float
    prefill_flops: float


def infer(
    m: Model,
    *,
    prompt: int,
    generate: int,
    weight_bits: int = 16,
    flops_efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
) -> Inference:
    """One sequence on one GPU, activations and embeddings in 16 bits."""
    flops, bandwidth = FLOPS * flops_efficiency, BANDWIDTH * memory_efficiency
    kv = 2.0 * (prompt + generate) * m.hidden * 2 * m.layers
    times = (_forward(m, prompt, weight_bits, flops, bandwidth), _forward(m, 1, weight_bits, flops, bandwidth))
    weights = 12 * m.hidden**2 * m.layers * weight_bits / 8 + m.hidden * m.vocab * 2
    layer = 24 * prompt * m.hidden**2 + 4 * prompt**2 * m.hidden
    total = float(layer * m.layers + 2 * prompt * m.hidden * m.vocab)
    return Inference(times[0], times[1] + 2 * kv / bandwidth, weights, kv, total)


def _forward(m: Model, rows: int, weight_bits: int, flops: float, bandwidth: float) -> float:
    h = m.hidden
    scores = 2 * m.heads * rows**2
    attention = max(
        (8 * rows * h**2 + 4 * rows**2 * h) / flops,
        (4 * h**2 * weight_bits / 8 + (5 * rows * h + scores) * 2) / bandwidth,
    )
    mlp = max(16 * rows * h**2 / flops, (8 * h**2 * weight_bits / 8 + 9 * rows * h * 2) / bandwidth)
    norms = 2 * rows * h * 4 / bandwidth  # in 32 bits
    return (attention + mlp + norms) * m.layers + h * m.vocab * 2 / bandwidth + 2 * rows * m.vocab * h / flops
