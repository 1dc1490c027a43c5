"""Small machines and models for tests of placement."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from frontends.model_shape import ModelShape
from frontends.shape_families import shape_of
from hw_targets.target import ComputeUnit, Link, MemoryTier, Storage, StoragePoint, Target

MIB = 1 << 20


@st.composite
def tight_machines(draw: st.DrawFn) -> Target:
    """Machines that a model of a few layers hardly fits, or does not, with links and drives of many speeds."""
    return target(
        vram=draw(st.sampled_from([1, 2, 4, 64])) * MIB,
        dram=draw(st.sampled_from([2, 3, 5, 9, 40])) * MIB,
        gpu=draw(st.booleans()),
        link=draw(st.sampled_from([3e6, 3e7, 3e8])),
        disk=draw(st.sampled_from([5e5, 5e6, 5e7])),
    )


def target(
    *,
    vram: int = 64 * MIB,
    dram: int = 256 * MIB,
    hbm_rate: float = 1e9,
    dram_rate: float = 1e8,
    link: float = 3e7,
    disk: float = 5e6,
    gpu: bool = True,
    gpus: int = 1,
) -> Target:
    """A host with a drive, and perhaps GPUs; all of it small and slow, so that tiny models fill it."""
    cores = ComputeUnit("cores", "cpu", "dram", cores=4, peak=(("f32", 1e9), ("i8", 4e9)), source="test")
    units = [cores]
    tiers = [MemoryTier("dram", dram, read_bandwidth=dram_rate, source="test")]
    links = []
    if gpu:
        units.insert(0, ComputeUnit("gpu", "gpu", "vram", peak=(("bf16", 1e12),), launch_seconds=1e-6, count=gpus))
        tiers.insert(0, MemoryTier("vram", vram, read_bandwidth=hbm_rate, source="test", count=gpus))
        links.append(Link("pcie", "dram", "vram", link, 1e-6, "test", count=gpus))
    points = (StoragePoint(1 << 20, 4, disk, disk / 2),)
    return Target(
        "small", "", "x86_64-unknown-linux-gnu", "x86-64", frozenset(), units=tuple(units), tiers=tuple(tiers),
        links=tuple(links), storage=(Storage("ssd", 1 << 34, points, "test", tier="dram"),),
    )  # fmt: skip


def dense(layers: int = 4, hidden: int = 256, **changes: Any) -> ModelShape:
    """A llama: about 0.8 million parameters a layer at the default width."""
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 3 * hidden, "vocab_size": 1024,
    }  # fmt: skip
    return shape_of({**config, **changes}, "config.json", "dense")


def sparse(layers: int = 4, experts: int = 16, top_k: int = 2, hidden: int = 256) -> ModelShape:
    """A mixture of experts."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": hidden, "moe_intermediate_size": hidden,
        "num_experts": experts, "num_experts_per_tok": top_k, "vocab_size": 1024,
    }  # fmt: skip
    return shape_of(config, "config.json", "sparse")
