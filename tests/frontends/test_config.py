"""config.json: both spellings, what each family makes of its fields, and every value that must be refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from frontends.config import ModelConfig, MoeConfig
from frontends.config_reader import ConfigReader
from frontends.huggingface import read_model_config
from ir.attributes import Rope
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import FAMILIES, config_of


def _config(family: str, **changes: Any) -> ModelConfig:
    return read_model_config(ConfigReader(config_of(family, **changes), "config.json"))[1]


def _warnings(family: str, **changes: Any) -> list[str]:
    fields = ConfigReader(config_of(family, **changes), "config.json")
    read_model_config(fields)
    return [*fields.warnings, *fields.unknown()]


def _refused(family: str, **changes: Any) -> str:
    with pytest.raises(DiagnosticError) as caught:
        _config(family, **changes)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_all_families_share(family: str) -> None:
    config = _config(family)
    assert (config.family, config.vocab_size, config.hidden_size, config.num_layers) == (family, 40, 16, 2)
    assert (config.num_heads, config.num_kv_heads, config.ffn_size, config.max_context) == (4, 2, 24, 64)
    assert config.head_dim == (8 if "qwen3" in family else 4)
    assert config.rope.dim == config.head_dim
    assert config.norm_eps == (1e-5 if family in ("mixtral", "olmoe") else 1e-6)
    assert not config.tied
    assert not _warnings(family)


OLD = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "transformers_version": "4.40.0", "use_cache": True,
    "attention_dropout": 0.0, "pretraining_tp": 1, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
}  # fmt: skip
NEW = {
    "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "transformers_version": "5.0.0", "bos_token_id": 1,
    "eos_token_id": [2], "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
}  # fmt: skip


def test_both_spellings_of_llama_mean_the_same() -> None:
    assert _config("llama", **OLD) == _config("llama", **NEW)
    assert _config("llama", **OLD).rope == Rope(dim=4, theta=500000.0, scaling="linear", factor=2.0)
    assert _config("llama", **OLD).dtype == "bfloat16"
    assert _config("llama", **OLD).eos_ids == (2,)
    assert not _warnings("llama", **OLD)
    assert not _warnings("llama", **NEW)


def test_both_names_of_the_number_of_experts() -> None:
    for family in ("mixtral", "qwen3_moe", "olmoe"):
        old = _config(family, num_local_experts=None, num_experts=4)
        assert old == _config(family, num_experts=None, num_local_experts=4)
        text = _refused(family, num_experts=4, num_local_experts=8)
        assert "fields 'num_experts' and 'num_local_experts' disagree: 4 and 8" in text


def test_what_absent_fields_mean() -> None:
    assert _config("llama", num_key_value_heads=None).num_kv_heads == 4
    assert _config("mistral", num_key_value_heads=None, num_attention_heads=8).num_kv_heads == 8
    assert _config("mixtral").rope.theta == 1e6
    assert _config("mistral").rope.theta == 1e4
    assert _config("qwen3", head_dim=None).head_dim == 128
    assert _config("llama", max_position_embeddings=None).max_context == 2048
    assert _config("qwen3_moe", head_dim=None).head_dim == 4
    assert _config("llama", hidden_act=None) == _config("llama", hidden_act="silu") == _config("llama")


def test_biases() -> None:
    def biases(family: str, **changes: Any) -> tuple[bool, bool, bool]:
        config = _config(family, **changes)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("llama") == (False, False, False)
    assert biases("llama", attention_bias=True) == (True, True, False)
    assert biases("llama", mlp_bias=True) == (False, False, True)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3", attention_bias=True) == (True, True, False)
    assert biases("qwen3_moe", attention_bias=True) == (True, True, False)
    assert biases("olmoe", attention_bias=True) == (True, True, False)


def test_windows() -> None:
    def windows(family: str, **changes: Any) -> tuple[int, ...]:
        return _config(family, num_hidden_layers=3, **changes).windows

    full, sliding = "full_attention", "sliding_attention"
    assert windows("llama") == (0, 0, 0)
    assert windows("mistral", sliding_window=8) == (8, 8, 8)
    assert windows("mistral", sliding_window=None) == (4096, 4096, 4096)  # absent
    assert _config_with_null("mistral", "sliding_window").windows == (0, 0)
    assert windows("mistral", sliding_window=8, layer_types=[sliding] * 3) == (8, 8, 8)
    assert windows("mixtral") == (0, 0, 0)
    assert windows("mixtral", sliding_window=5) == (5, 5, 5)
    on = {"use_sliding_window": True, "sliding_window": 6}
    assert windows("qwen2", sliding_window=6, max_window_layers=1) == (0, 0, 0)
    assert windows("qwen2", **on, max_window_layers=2) == (0, 0, 6)
    assert windows("qwen2", **on) == (0, 0, 0)  # the first 28 layers have none
    assert windows("qwen3", **on, layer_types=[sliding, full, sliding]) == (6, 0, 6)
    assert windows("qwen3_moe", **on) == (6, 6, 6)
    assert windows("qwen3_moe", sliding_window=6) == (0, 0, 0)
    assert "'max_window_layers' is ignored" in _warnings("qwen3_moe", **on, max_window_layers=2)[0]


def _config_with_null(family: str, name: str) -> ModelConfig:
    return read_model_config(ConfigReader({**config_of(family), name: None}, "config.json"))[1]


def test_experts() -> None:
    def moe(family: str, **changes: Any) -> MoeConfig | None:
        return _config(family, num_hidden_layers=4, **changes).moe

    assert moe("llama") is None
    assert moe("mixtral") == MoeConfig(4, 2, 24, True, (True,) * 4)
    assert moe("olmoe") == MoeConfig(4, 2, 24, False, (True,) * 4)
    assert moe("olmoe", norm_topk_prob=True) == MoeConfig(4, 2, 24, True, (True,) * 4)
    assert moe("qwen3_moe") == MoeConfig(4, 2, 12, False, (True,) * 4)
    chosen = moe("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True)
    assert chosen == MoeConfig(4, 2, 12, True, (False, True, False, False))
    assert _config("olmoe").clip_qkv == 8.0
    assert _config("olmoe", clip_qkv=None).clip_qkv == 0.0


def test_token_ids() -> None:
    config = _config("llama", bos_token_id=1, eos_token_id=[2, 5, 2], pad_token_id=-1)
    assert (config.bos_ids, config.eos_ids, config.pad_ids) == ((1,), (2, 5), ())


NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "max_position_embeddings", "head_dim")  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, 1 << 40, 10**400, 2.0, "2", True, [2], {}, float("inf"), float("nan")])
def test_hostile_numbers_are_refused(name: str, value: Any) -> None:
    start = time.process_time()
    text = _refused("llama", **{name: value})
    assert time.process_time() - start < 1
    assert text.startswith(f"config.json: error: field '{name}' is ")
    assert "expected: a whole number in " in text


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"vocab_size": None}, "field 'vocab_size' is missing"),
        ("llama", {"rms_norm_eps": 0}, "field 'rms_norm_eps' is 0\nexpected: a number in 1e-12 .. 1"),
        ("llama", {"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' is nan"),
        ("llama", {"rms_norm_eps": "1e-6"}, "field 'rms_norm_eps' is '1e-6'"),
        ("llama", {"num_attention_heads": 3}, "there are 3 query heads for 2 key-value heads"),
        ("llama", {"hidden_size": 18}, "hidden_size 18 is no multiple of 4 heads"),
        ("llama", {"hidden_size": 12}, "the head width is 3\nexpected: an even width"),
        ("llama", {"hidden_size": 4}, "hidden_size 4 makes 4 heads of width 1"),
        ("llama", {"hidden_size": 1 << 20}, "makes 4 heads of width 262144"),
        ("llama", {"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu'\nexpected: 'silu'"),
        ("llama", {"hidden_act": 1}, "field 'hidden_act' is 1"),
        ("llama", {"tie_word_embeddings": "yes"}, "field 'tie_word_embeddings' is 'yes'\nexpected: true or false"),
        ("llama", {"attention_bias": 1}, "field 'attention_bias' is 1"),
        ("llama", {"eos_token_id": "</s>"}, "field 'eos_token_id' is '</s>'"),
        ("llama", {"eos_token_id": [1.5]}, "field 'eos_token_id' is [1.5]"),
        ("llama", {"sliding_window": 8}, "field 'sliding_window' = 8 changes the model"),
        ("llama", {"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' = 0.5 changes the model"),
        ("llama", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' = 30.0 changes the model"),
        ("llama", {"attention_multiplier": 1}, "'attention_multiplier' = 1 changes the model"),
        ("llama", {"num_experts": 8}, "field 'num_experts' = 8 changes the model"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' = ['full_attention', 'slid"),
        ("mistral", {"attention_bias": True}, "'attention_bias' = true changes the model"),
        ("mistral", {"sliding_window": 0}, "field 'sliding_window' is 0"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "'layer_types' asks for full_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "field 'layer_types' is a list of 1\nexpected: a list of 2"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "'layer_types' holds 'linear_attention'"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "but 'use_sliding_window' is false"),
        ("mixtral", {"num_experts_per_tok": 5}, "every token goes to 5 experts, but there are 4"),
        ("mixtral", {"num_experts_per_tok": 0}, "field 'num_experts_per_tok' is 0"),
        ("qwen3_moe", {"num_local_experts": 1 << 20}, "field 'num_local_experts' is 1048576"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "field 'mlp_only_layers' is [2]\nexpected: a list of layers in 0 .. 1"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "field 'mlp_only_layers' is '0'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "field 'decoder_sparse_step' is 0"),
        ("qwen3_moe", {"n_shared_experts": 1}, "'n_shared_experts' = 1 changes the model"),
        ("olmoe", {"clip_qkv": -1}, "field 'clip_qkv' is -1"),
        ("olmoe", {"head_dim": 8}, "4 heads of width 8 do not make up hidden_size 16"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM for model_type 'llama'"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "expected: a list of names"),
        ("qwen4", {}, "family 'qwen4' is not known; did you mean 'qwen"),
        ("gpt2", {}, "expected: one of llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe"),
        ("mistral3", {"text_config": {"model_type": "mistral"}}, "wraps a text model (text_config, of type 'mistral')"),
        ("x" * 5000, {}, "is not known"),
    ],
)
def test_bad_configs_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    text = _refused(family, **changes)
    assert text.startswith("config.json: error: ")
    assert message in text
    assert len(text) < 1200


def test_model_type_is_needed() -> None:
    with pytest.raises(DiagnosticError, match="field 'model_type' is missing"):
        read_model_config(ConfigReader({}, "config.json"))


def test_neutral_values_of_foreign_fields_pass_in_silence() -> None:
    neutral = {"layer_types": ["full_attention"] * 2, "mlp_only_layers": [],
               "partial_rotary_factor": 1.0, "attn_logit_softcapping": 0.0, "n_shared_experts": 0,
               "use_sliding_window": False, "pretraining_tp": 1}  # fmt: skip
    assert _config("llama", **neutral) == _config("llama")
    assert not _warnings("llama", **neutral)


def test_unknown_fields_are_said() -> None:
    (line,) = _warnings("mixtral", num_local_expert=4)
    assert line == (
        "config.json: field 'num_local_expert' = 4 is not known and was ignored; did you mean 'num_experts'?"
    ) or line.startswith("config.json: field 'num_local_expert' = 4 is not known and was ignored")
    assert _warnings("llama", auto_map={"AutoModel": "x.py"})[0].startswith("config.json: field 'auto_map' = ")


def test_many_unknown_fields_take_little_time() -> None:
    start = time.process_time()
    lines = _warnings("llama", **{f"{'x' * 200}{i}": i for i in range(5000)})
    assert time.process_time() - start < 5
    assert len(lines) == 21
    assert lines[-1] == "config.json: 4980 more fields are not known and were ignored"


def test_config_file_is_bounded(tmp_path: Path) -> None:
    from frontends.config import open_config

    with pytest.raises(DiagnosticError, match=r"has no config\.json"):
        open_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"x": "y" * (1 << 20)}))
    with pytest.raises(DiagnosticError, match="expected: at most 1048576 bytes"):
        open_config(tmp_path)
