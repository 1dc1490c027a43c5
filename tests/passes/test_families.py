"""The CPU pipelines on the graphs that the frontends make of every model family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontends.config_reader import ConfigReader
from frontends.huggingface import read_model_config
from frontends.safetensors_header import TensorInfo
from frontends.step import StepBuilder
from ir.ops.builtin import ModuleOp
from passes import PassManager
from passes.clone import clone
from passes.pipelines import cpu_f32_pipeline, cpu_pipeline
from tests.passes.step_graphs import random_weights, run_step

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "F32"),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "BF16"),
    ("mistral", {"sliding_window": 3, "head_dim": 16}, "F16"),
    ("qwen2", {"tie_word_embeddings": True}, "BF16"),
    ("qwen3", {"head_dim": 16}, "BF16"),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "BF16"),
    ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1]}, "F32"),
    ("olmoe", {**EXPERTS, "clip_qkv": 0.7, "num_key_value_heads": 4}, "F32"),
]
IDS = [f"{family}-{dtype}" for family, _, dtype in CASES]


def imported(name: str, changes: dict[str, Any], dtype: str) -> ModuleOp:
    """The step function of the family, its constants stored as `dtype`."""
    fields = {**SMALL, **changes, "model_type": name}
    family, config = read_model_config(ConfigReader(fields, "config.json"))
    dry = StepBuilder(config)
    family.build(dry)
    tensors = {
        w.name: TensorInfo(w.name, dtype, w.shape, 0, Path("model.safetensors"), 0) for w in dry.weights.values()
    }
    return family.build(StepBuilder(config, tensors))


def kernels(module: ModuleOp) -> Counter[str]:
    """What is left to run, by fused kind or op name; weights and states are no kernels."""
    found: Counter[str] = Counter()
    for op in module.function("step").block.ops:
        weight = op.name.startswith(("tensor.constant", "tensor.layout", "kv.state", "func."))
        if not weight and not (op.name in ("tensor.concat", "tensor.cast") and "tokens" not in str(op.results[0].type)):
            found[op.attributes.get("kind", op.name)] += 1
    return found


@pytest.mark.parametrize(("family", "changes", "dtype"), CASES, ids=IDS)
def test_the_pipelines_keep_what_the_model_computes(family, changes, dtype):
    module = imported(family, changes, dtype)
    weights = random_weights(module)
    expected = run_step(module, weights)
    for pipeline, tolerance in ((cpu_f32_pipeline(), 1e-5), (cpu_pipeline(), 0.1)):
        changed = clone(module)
        assert isinstance(changed, ModuleOp)
        PassManager(pipeline).run(changed)
        found = run_step(changed, weights)
        scale = float(np.abs(expected).max())
        assert np.abs(found - expected).max() < tolerance * scale


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_dense_layer_is_six_kernels(name):
    module = imported(name, {}, "BF16")
    PassManager(cpu_pipeline()).run(module)
    assert kernels(module) == {
        "elementwise": 1,  # embedding and its cast
        "attn.rope_table": 1,
        "gemm": 2 * 4 + 1,  # qkv, output, gate and up, down; the head
        "rope_append": 2,
        "attention": 2,
        "tensor.gather_rows": 1,
    }


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_layer_of_experts_is_ten_kernels(name):
    experts = {"num_local_experts": 4} if name == "mixtral" else {"num_experts": 4}
    module = imported(name, {**experts, "num_experts_per_tok": 2}, "BF16")
    PassManager(cpu_pipeline()).run(module)
    assert kernels(module) == {
        "elementwise": 1 + 2 * 2,  # norm and its cast; sum of the experts and residual
        "attn.rope_table": 1,
        "gemm": 2 * 3 + 1,  # qkv, output, gate and up of the experts; the head
        "rope_append": 2,
        "attention": 2,
        "gemm.matmul": 2,  # the router
        "moe.route": 2,
        "moe.dispatch": 2,
        "moe.grouped_gemm": 2,
        "tensor.gather_rows": 1,
    }


def test_no_cast_of_a_weight_is_left_where_the_checkpoint_is_narrow():
    module = imported("llama", {"tie_word_embeddings": True}, "BF16")
    PassManager(cpu_pipeline()).run(module)
    outside = [op for op in module.function("step").block.ops if op.name == "tensor.cast"]
    gains = [op for op in outside if op.results[0].type.rank == 1]
    assert outside == gains and len(gains) == 2 * 2 + 1
