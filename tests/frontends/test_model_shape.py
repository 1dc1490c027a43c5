"""Shapes against published parameter counts, against the importer's own list of tensors, and on bad configs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.huggingface import expected_weights
from frontends.model_shape import ModelShape
from frontends.shape_families import FAMILIES, shape_of
from frontends.shape_library import load_shape, shape_names
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, GroupedIntFormat, NumberFormat
from ir.parse_value import parse_format
from tests.frontends.model_files import FAMILIES as IMPORTED
from tests.frontends.model_files import config_of, write_model

# Parameters as the hub counts them in the safetensors files of these models.
PARAMETERS = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "Yi-34B-200K": 34_388_917_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "opt-6.7b": 6_658_473_984,
    "opt-30b": 29_974_540_288,
    "gpt-j-6b": 6_050_882_784,
    "falcon-7b": 6_921_720_704,
    "falcon-180B": 179_522_565_120,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-27b-it": 27_009_346_304,
}
# Bytes that a token adds to a 16-bit cache, as papers state them.
KV_BYTES = {"DeepSeek-V3": 70_272, "Qwen2.5-72B": 327_680, "Llama-3.1-405B": 516_096, "Yi-34B-200K": 245_760}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_published_parameters(name: str, count: int) -> None:
    assert load_shape(name).parameters() == count


@pytest.mark.parametrize(("name", "nbytes"), KV_BYTES.items())
def test_published_kv_bytes(name: str, nbytes: int) -> None:
    shape = load_shape(name)
    assert 2 * shape.kv_elements_per_token() == nbytes
    assert 2 * shape.kv_elements(1000) == 1000 * nbytes  # no windows


def test_active_parameters() -> None:
    assert round(load_shape("Mixtral-8x7B-v0.1").active_parameters() / 1e9, 1) == 12.7  # 12.9 with all embeddings
    assert round(load_shape("DeepSeek-V3").active_parameters() / 1e9, 1) == 36.6
    dense = load_shape("Llama-3.1-8B")
    assert dense.active_parameters() == dense.parameters() - dense.vocab * dense.hidden + dense.hidden


@pytest.mark.parametrize("family", IMPORTED)
def test_agrees_with_the_importer(family: str) -> None:
    config = config_of(family, tie_word_embeddings=False)
    expected = sum(math.prod(spec.shape) for spec in expected_weights(config).values())
    assert shape_of(config, "config.json").parameters() == expected


def test_both_spellings() -> None:
    old = config_of("qwen3_moe", num_local_experts=None, num_experts=4, torch_dtype="float16")
    new = config_of("qwen3_moe", dtype="float16")
    assert shape_of(old, "a") == shape_of(new, "b")
    assert shape_of(new, "b").dtype == "f16"
    wrapped = {"model_type": "some_vision_model", "text_config": config_of("qwen3_moe")}
    assert shape_of(wrapped, "c").layers == shape_of(new, "b").layers


def test_windows_bound_the_cache() -> None:
    shape = load_shape("gemma-3-27b-it")
    local = sum(1 for layer in shape.layers if layer.attention.window)
    assert (local, len(shape.layers)) == (52, 62)
    per_layer = shape.layers[0].kv_elements_per_token
    assert shape.kv_elements(100_000) == per_layer * (10 * 100_000 + 52 * 1024)
    assert shape.kv_elements(1024) == 1024 * shape.kv_elements_per_token()


def test_groups_share_layers() -> None:
    shape = load_shape("deepseek-ai/DeepSeek-V3")
    assert [count for _, count in shape.groups()] == [3, 58]
    assert len({id(layer) for layer in shape.layers}) == 2
    roles = {t.role: t for t in shape.tensors(shape.layers[-1])}
    assert (roles["experts.down"].copies, roles["experts.down"].used, roles["shared.up"].copies) == (256, 8, 1)


def test_latent_attention_costs_more_pairs_and_less_cache() -> None:
    attention = load_shape("DeepSeek-V3").layers[0].attention
    assert attention.flops_per_pair(absorbed=True) == 2 * 128 * (512 + 64 + 512)
    assert attention.flops_per_pair(absorbed=False) == 2 * 128 * (192 + 128)
    assert attention.kv_elements == 576


def test_bytes_come_from_the_format() -> None:
    tensor = next(t for t in load_shape("Qwen3-30B-A3B").tensors(load_shape("Qwen3-30B-A3B").layers[0]) if t.copies > 1)
    low = parse_format("q4_sym<group=32, scale=f16>")
    assert isinstance(low, GroupedIntFormat)
    formats: tuple[NumberFormat, ...] = (BF16, low)
    assert [tensor.nbytes(f) * 8 / tensor.elements for f in formats] == [16.0, 4.5]


def test_every_name_of_the_list_loads() -> None:
    names = shape_names()
    assert len(names) >= 25 and names == sorted(names, key=str.lower)
    for name in names:
        assert load_shape(name).name == name
        assert load_shape(name.rpartition("/")[2].upper()).name == name


def test_directory_reads_headers_only(tmp_path: Path) -> None:
    write_model(tmp_path, config_of("llama", tie_word_embeddings=False), dtype="F16")
    for file in tmp_path.glob("*.safetensors"):
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        with file.open("r+b") as out:  # the weights become a hole that no one needs to read
            out.truncate(header)
            out.truncate(len(data))
    shape = load_shape(tmp_path)
    assert (shape.dtype, shape.warnings, shape.name) == ("f16", (), tmp_path.name)


def test_other_parameters_than_described_are_told(tmp_path: Path) -> None:
    write_model(tmp_path, config_of("llama", tie_word_embeddings=False))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    (warning,) = load_shape(tmp_path).warnings
    assert "config.json describes" in warning


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(DiagnosticError, match=r"did you mean 'Llama-3\.1-8B'"):
        load_shape("Lama-3.1-8B")
    with pytest.raises(DiagnosticError, match="nobody described the shape of model_type 'qwen9'"):
        shape_of({"model_type": "qwen9"}, "config.json")


FIELD_NAMES = st.sampled_from(
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
     "num_experts", "n_routed_experts", "num_experts_per_tok", "vocab_size", "layer_types", "mlp_only_layers",
     "sliding_window", "ffn_dim", "n_embd", "kv_lora_rank", "q_lora_rank", "first_k_dense_replace"]
)  # fmt: skip
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 70), st.floats(), st.text(max_size=3),
                   st.lists(st.integers(), max_size=3), st.integers(1, 64))  # fmt: skip


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(FIELD_NAMES, VALUES, max_size=5))
@settings(max_examples=150, deadline=None)
def test_hostile_fields_end_in_a_shape_or_a_diagnostic(family: str, changes: dict[str, Any]) -> None:
    base = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "ffn_dim": 8,
            "num_attention_heads": 4, "n_embd": 16, "n_layer": 2, "n_head": 4}  # fmt: skip
    try:
        shape = shape_of({**base, **changes, "model_type": family}, "config.json")
    except DiagnosticError:
        return
    assert isinstance(shape, ModelShape)
    assert 0 < shape.active_parameters() <= shape.parameters() + shape.vocab * shape.hidden
    assert shape.kv_elements(10) > 0
