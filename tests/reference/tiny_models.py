"""Random tiny models of every family, made and run by transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 5000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
# family, what differs from SMALL, which dtype the checkpoint is saved in
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "float32"),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, "bfloat16"),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}, "float32"),
    ("llama", {"head_dim": 16, "rope_parameters": LINEAR}, "float16"),
    ("mistral", {"sliding_window": 5, "rope_parameters": YARN}, "float32"),
    ("mistral", {"sliding_window": None, "head_dim": 16}, "float32"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "float32"),
    ("qwen2", {"tie_word_embeddings": True}, "bfloat16"),
    ("qwen3", {"head_dim": 16}, "float32"),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3,
               "max_window_layers": 2}, "float32"),
    ("mixtral", {"num_local_experts": 4}, "float32"),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 6}, "float32"),
    ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "head_dim": 8,
                   "mlp_only_layers": [1], "norm_topk_prob": True}, "float32"),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 1, "head_dim": 16,
                   "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 4}, "float32"),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "float32"),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7, "num_key_value_heads": 4,
               "norm_topk_prob": True}, "float32"),
]  # fmt: skip


def save_model(family: str, changes: dict[str, Any], dtype: str, directory: Path) -> Any:
    """A random model, its weights scaled up so that errors show, saved in `dtype`; the same model in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.4)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    # Loaded anew, because a cast of the model to bfloat16 rounds its rotary frequencies too.
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
