"""A small Hugging Face directory with random weights and a byte-level tokenizer, for tests of the whole line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from frontends.huggingface import expected_weights

VOCAB = 258  # the bytes, and two special tokens
BOS, EOS = 256, 257

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of every name and shape the config asks for, scaled so that logits differ."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name, spec in expected_weights(config).items():
        values = rng.standard_normal(spec.shape, dtype=np.float32)
        scale = 3.0 / np.sqrt(spec.shape[-1]) if len(spec.shape) > 1 else 0.1
        tensors[name] = (values * scale + (1.0 if len(spec.shape) == 1 else 0.0)).astype(ml_dtypes.bfloat16)
    return tensors


def write_tokenizer(directory: Path) -> None:
    """Every byte is a token, in the byte-level spelling of GPT-2; two special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )


def write_model(directory: Path, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Writes the model; returns its directory."""
    config = config or LLAMA
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights_of(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)
    return directory
