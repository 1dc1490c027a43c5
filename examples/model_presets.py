"""Shapes of the checkpoints make_model.py can write: a config.json's fields, and the tensors a model with them has.

A preset is a family (`model_type`) and its fields in the spelling used before transformers v5, with `rope_theta` and
`rope_scaling` apart. `spelled` gives them in the spelling asked for; `tensor_shapes` lists every tensor of the
checkpoint, in file order, under the names `transformers` saves. Sizes named after a published model are that model's.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fields = dict[str, Any]  # a config.json's content

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)

_COMMON: Fields = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_dropout": 0.0,
}
_ROUTING: Fields = {"num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.01}
_QWEN: Fields = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
_OF_FAMILY: dict[str, Fields] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"sliding_window": None},
    "qwen2": {**_QWEN, "tie_word_embeddings": True},
    "qwen3": {**_QWEN, "attention_bias": False, "tie_word_embeddings": True},
    "mixtral": {**_ROUTING, "num_local_experts": 8, "sliding_window": None, "router_jitter_noise": 0.0},
    "qwen3_moe": {
        **_ROUTING,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {
        **_ROUTING,
        "attention_bias": False,
        "num_experts": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
    },
}


def _sizes(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, positions: int,
    **other: object,
) -> Fields:  # fmt: skip
    """The fields that every family has a size in, and `other` ones."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        **other,
    }


_LLAMA3_ROPE: Fields = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (family, fields that differ from the tiny model of the family); the comments name the published models
# fmt: off
_PUBLISHED: dict[str, tuple[str, Fields]] = {
    # TinyLlama 1.1B
    "llama-1.1b": ("llama", _sizes(32000, 2048, 5632, 22, 32, 4, 64, 2048, rms_norm_eps=1e-05)),
    # Llama 3.1 8B
    "llama-8b": ("llama", _sizes(128256, 4096, 14336, 32, 32, 8, 128, 131072, rms_norm_eps=1e-05,
        rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE)),
    # Mistral 7B v0.1
    "mistral-7b": ("mistral", _sizes(32000, 4096, 14336, 32, 32, 8, 128, 32768, rms_norm_eps=1e-05,
        sliding_window=4096)),
    # Qwen2 0.5B
    "qwen2-0.5b": ("qwen2", _sizes(151936, 896, 4864, 24, 14, 2, 64, 32768, rope_theta=1000000.0,
        max_window_layers=24)),
    # Qwen3 0.6B
    "qwen3-0.6b": ("qwen3", _sizes(151936, 1024, 3072, 28, 16, 8, 128, 40960, rope_theta=1000000.0,
        max_window_layers=28)),
    # Mixtral 8x7B
    "mixtral-8x7b": ("mixtral", _sizes(32000, 4096, 14336, 32, 32, 8, 128, 32768,
        rms_norm_eps=1e-05, rope_theta=1000000.0)),
    # Qwen3 30B-A3B
    "qwen3-30b-a3b": ("qwen3_moe", _sizes(151936, 2048, 6144, 48, 32, 4, 128, 40960,
        rope_theta=1000000.0, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)),
    # OLMoE 1B-7B
    "olmoe-1b-7b": ("olmoe", _sizes(50304, 2048, 1024, 16, 16, 16, 128, 4096, rms_norm_eps=1e-05,
        num_experts=64, num_experts_per_tok=8)),
}
# fmt: on
PRESETS = (*_PUBLISHED, *(f"tiny-{family}" for family in FAMILIES))

# Sizes every family divides or multiplies by; anything but a positive int here would give a checkpoint nobody loads.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)


class ModelRequestError(ValueError):
    """What was asked for cannot be written: an unknown preset or field, sizes that contradict each other, no room."""


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a checkpoint.

    Attributes:
        role: "matrix", "embedding", "norm" or "bias"; decides the distribution of its values.
    """

    name: str
    shape: tuple[int, ...]
    role: str


def config_fields(preset: str, overrides: Mapping[str, object] | None = None) -> Fields:
    """The fields of a preset, a family's tiny model, or an existing config.json, with `overrides` put in.

    Args:
        preset: a name in `PRESETS`, a family in `FAMILIES` (the same as its tiny preset), or a config.json's path.
        overrides: fields in either spelling; `head_dim` follows hidden_size / num_attention_heads unless given.
    Raises:
        ModelRequestError: for an unknown preset or field, or sizes that contradict each other.
    """
    overrides = _older_spelling(dict(overrides or {}))
    if preset in FAMILIES or preset in PRESETS:
        family, fields = _PUBLISHED.get(preset, (preset.removeprefix("tiny-"), {}))
        fields = {"model_type": family, **_COMMON, **_OF_FAMILY[family], **fields}
    elif preset.endswith(".json") and Path(preset).is_file():
        fields = _read_config(Path(preset))
    else:
        raise ModelRequestError(
            f"unknown preset {preset!r}{_nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}, "
            f"a family ({', '.join(FAMILIES)}), or the path of a config.json"
        )
    experts = "num_local_experts" if fields["model_type"] == "mixtral" else "num_experts"
    for other in ("num_experts", "num_local_experts"):
        if other in overrides and other != experts:
            overrides[experts] = overrides.pop(other)
    for name in overrides:
        if name not in fields or name == "model_type":
            raise ModelRequestError(
                f"{fields['model_type']} has no config field {name!r} to set{_nearest(name, fields)}"
            )
    fields |= overrides
    _check_sizes(fields)
    if {"hidden_size", "num_attention_heads"} & set(overrides) and "head_dim" not in overrides:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    _check_heads(fields)
    return fields


def spelled(fields: Fields, style: str, dtype: str) -> Fields:
    """A config.json's content in the spelling of transformers before v5 ("v4") or since ("v5").

    v4 has `torch_dtype`, `rope_theta` and `rope_scaling`; v5 has `dtype`, one `rope_parameters`, `layer_types` where
    the family may alternate windows, and calls Qwen3-MoE's expert count `num_local_experts`.
    """
    content = {"architectures": [ARCHITECTURES[str(fields["model_type"])]], **fields}
    if style == "v4":
        return {**content, "torch_dtype": dtype, "transformers_version": "4.57.0"}
    theta, scaling = content.pop("rope_theta"), content.pop("rope_scaling")
    content["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if fields["model_type"] == "qwen3_moe":
        content["num_local_experts"] = content.pop("num_experts")
    if "max_window_layers" in fields:
        content["layer_types"] = [
            "sliding_attention"
            if fields["use_sliding_window"] and layer >= fields["max_window_layers"]
            else "full_attention"
            for layer in range(fields["num_hidden_layers"])
        ]
    return {**content, "dtype": dtype, "transformers_version": "5.0.0"}


def tensor_shapes(fields: Fields) -> list[TensorShape]:
    """Every tensor of a checkpoint with these fields, in the order it is written."""
    hidden, vocab = fields["hidden_size"], fields["vocab_size"]
    tensors = [TensorShape("model.embed_tokens.weight", (vocab, hidden), "embedding")]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors.append(TensorShape(f"{prefix}.input_layernorm.weight", (hidden,), "norm"))
        tensors += _attention(fields, f"{prefix}.self_attn")
        tensors.append(TensorShape(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm"))
        tensors += _feed_forward(fields, prefix, layer)
    tensors.append(TensorShape("model.norm.weight", (hidden,), "norm"))
    if not fields["tie_word_embeddings"]:
        tensors.append(TensorShape("lm_head.weight", (vocab, hidden), "matrix"))
    return tensors


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> list[TensorShape]:
    weight = TensorShape(f"{name}.weight", (rows, columns), "matrix")
    return [weight, TensorShape(f"{name}.bias", (rows,), "bias")] if bias else [weight]


def _attention(fields: Fields, prefix: str) -> list[TensorShape]:
    family, hidden, width = fields["model_type"], fields["hidden_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * width, fields["num_key_value_heads"] * width
    bias = bool(fields.get("attention_bias", False))
    input_bias = bias or family == "qwen2"
    tensors = [
        *_linear(f"{prefix}.q_proj", queries, hidden, input_bias),
        *_linear(f"{prefix}.k_proj", keys, hidden, input_bias),
        *_linear(f"{prefix}.v_proj", keys, hidden, input_bias),
        *_linear(f"{prefix}.o_proj", hidden, queries, bias),
    ]
    if family in ("qwen3", "qwen3_moe"):  # one norm over each head
        tensors += [TensorShape(f"{prefix}.{name}.weight", (width,), "norm") for name in ("q_norm", "k_norm")]
    if family == "olmoe":  # one norm over all heads together
        tensors += [
            TensorShape(f"{prefix}.q_norm.weight", (queries,), "norm"),
            TensorShape(f"{prefix}.k_norm.weight", (keys,), "norm"),
        ]
    return tensors


def _feed_forward(fields: Fields, prefix: str, layer: int) -> list[TensorShape]:
    family, hidden = fields["model_type"], fields["hidden_size"]
    if family == "mixtral":
        block, inner, count = f"{prefix}.block_sparse_moe", fields["intermediate_size"], fields["num_local_experts"]
        names = ("w1", "w3", "w2")
    elif family == "olmoe" or (
        family == "qwen3_moe"
        and layer not in fields["mlp_only_layers"]
        and (layer + 1) % fields["decoder_sparse_step"] == 0
    ):
        block, count = f"{prefix}.mlp", fields["num_experts"]
        inner = fields["intermediate_size" if family == "olmoe" else "moe_intermediate_size"]
        names = ("gate_proj", "up_proj", "down_proj")
    else:
        block, inner, bias = f"{prefix}.mlp", fields["intermediate_size"], bool(fields.get("mlp_bias", False))
        return [
            *_linear(f"{block}.gate_proj", inner, hidden, bias),
            *_linear(f"{block}.up_proj", inner, hidden, bias),
            *_linear(f"{block}.down_proj", hidden, inner, bias),
        ]
    tensors = _linear(f"{block}.gate", count, hidden)
    for expert in range(count):
        gate, up, down = (f"{block}.experts.{expert}.{name}" for name in names)
        tensors += [*_linear(gate, inner, hidden), *_linear(up, inner, hidden), *_linear(down, hidden, inner)]
    return tensors


def _older_spelling(fields: Fields) -> Fields:
    """The v5 names of rope and of the dtype turned into the v4 ones; a dtype is refused, it is an option of its own."""
    for name in ("dtype", "torch_dtype", "architectures"):
        if name in fields:
            raise ModelRequestError(f"{name!r} is not a field to set: use the dtype option and the preset")
    if "rope_parameters" in fields:
        rope = fields.pop("rope_parameters")
        if not isinstance(rope, dict):
            raise ModelRequestError(f"rope_parameters must be an object, not {rope!r}")
        rope = dict(rope)
        if "rope_theta" in rope:
            fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return fields


def _read_config(path: Path) -> Fields:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelRequestError(f"{path} is not JSON: {error}") from error
    family = content.get("model_type") if isinstance(content, dict) else None
    if family not in FAMILIES:
        raise ModelRequestError(f"{path}: model_type is {family!r}; known families: {', '.join(FAMILIES)}")
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "layer_types"):
        content.pop(name, None)
    if "num_experts" in _OF_FAMILY[family] and "num_local_experts" in content:
        content["num_experts"] = content.pop("num_local_experts")
    fields = {**_COMMON, **_OF_FAMILY[family], **_older_spelling(content)}
    if fields["num_key_value_heads"] is None or "num_key_value_heads" not in content:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if content.get("head_dim") is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return fields


def _check_sizes(fields: Fields) -> None:
    for name in _SIZES:
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelRequestError(f"{name} must be a positive whole number, not {value!r}")
    count = fields.get("num_experts", fields.get("num_local_experts", 0))
    if count and fields["num_experts_per_tok"] > count:
        raise ModelRequestError(f"num_experts_per_tok {fields['num_experts_per_tok']} is more than the {count} experts")


def _check_heads(fields: Fields) -> None:
    heads, groups, width = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
    if heads % groups:
        raise ModelRequestError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if width < 2 or width % 2:
        raise ModelRequestError(f"head_dim must be even for rotary positions, but is {width}")
    if fields["model_type"] == "olmoe" and heads * width != fields["hidden_size"]:
        raise ModelRequestError(
            f"olmoe needs num_attention_heads x head_dim = hidden_size, but {heads} x {width} is "
            f"not {fields['hidden_size']}"
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
