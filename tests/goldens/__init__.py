"""Tiny random checkpoints of every family with what transformers computes from them, so that no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent
GOLDEN_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3,
                                "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7}),
}  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """Prompt `ids`, float32 logits at each of its positions, the greedy tokens that follow."""

    ids: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    @classmethod
    def load(cls, directory: Path) -> Golden:
        with np.load(directory / "golden.npz") as data:
            return cls(data["ids"], data["logits"], data["greedy"])

    def save(self, directory: Path) -> None:
        np.savez_compressed(directory / "golden.npz", ids=self.ids, logits=self.logits, greedy=self.greedy)
