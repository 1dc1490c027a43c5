"""Which quantized checkpoints are imported, by their settings; the others are refused by the name of their scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontends.config_reader import ConfigReader
from frontends.huggingface import import_model
from frontends.quantized import find_settings, find_settings_of
from frontends.quantized.awq import read_settings as read_awq
from frontends.quantized.compressed import read_settings as read_compressed
from frontends.quantized.gptq import GPTQSettings
from frontends.quantized.gptq import read_settings as read_gptq
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import config_of, write_model
from tests.frontends.quantized_files import compressed_settings

WHERE = Path("model")


def _reader(settings: Any, name: str = "quantization_config") -> ConfigReader:
    return ConfigReader({name: settings}, "model/config.json")


def _tensors(**dtypes: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    prefix = "model.layers.0.mlp.up_proj."
    return {prefix + leaf: TensorInfo(prefix + leaf, d, s, 0, WHERE, 0) for leaf, (d, s) in dtypes.items()}


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
        ({"quant_method": "auto-round", "bits": 4}, "AutoRound"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "FP8 with experts in FP4"),
        ({"quant_method": "brand-new"}, "an unknown scheme, 'brand-new'"),
        ({"something": 1}, "an unknown scheme, 'None'"),
        ("strange", "an unknown scheme, 'strange'"),
    ],
)
def test_other_schemes_are_refused_by_name(settings: Any, scheme: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        find_settings(_reader(settings))
    text = str(caught.value)
    assert f"config.json: error: the checkpoint is quantized with {scheme} (quantization_config in config.json)" in text
    assert "or quantized with GPTQ, AWQ, compressed-tensors, FP8 or MXFP4" in text


def test_schemes_are_found_under_every_spelling() -> None:
    def scheme(settings: Any, name: str = "quantization_config") -> str | None:
        found = find_settings(_reader(settings, name))
        return found and found.scheme

    assert scheme({"quant_method": "gptq"}) == "GPTQ"
    assert scheme({"quant_method": "AWQ"}) == "AWQ"
    assert scheme({"config_groups": {}}, "compression_config") == "compressed-tensors"
    assert scheme({"quant_method": "fbgemm_fp8"}) == "FP8"
    assert scheme({"quant_method": "modelopt", "quant_algo": "FP8"}) == "FP8"
    assert scheme({"quant_method": "mxfp4"}) == "MXFP4"
    assert scheme(None) is None and scheme({}) is None
    with pytest.raises(DiagnosticError, match=r"quantized with Metal \(MLX\) \(quantization in config.json\)"):
        scheme({"group_size": 64, "bits": 4}, "quantization")


def test_settings_beside_the_config(tmp_path: Path) -> None:
    """Files of older tools count where the tensors are quantized, and are no reason to refuse a model of floats."""
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 64, "sym": False}))
    found = find_settings_of(_tensors(qweight=("I32", (4, 64)), qzeros=("I32", (1, 8))), tmp_path)
    assert found is not None and found.scheme == "GPTQ" and found.evidence == "quantize_config.json"
    assert read_gptq(found.fields) == GPTQSettings(bits=3, group=64, symmetric=False, stored=1)
    assert find_settings_of(_tensors(weight=("BF16", (4, 4))), tmp_path) is None
    (tmp_path / "quantize_config.json").unlink()
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    found = find_settings_of(_tensors(weight=("F8_E4M3", (4, 4)), weight_scale=("F32", ())), tmp_path)
    assert found is not None and found.scheme == "FP8"


@pytest.mark.parametrize(
    ("tensors", "scheme"),
    [
        (_tensors(qweight=("I32", (4, 64)), qzeros=("I32", (1, 8)), g_idx=("I32", (32,))), "GPTQ"),
        (_tensors(qweight=("I32", (4, 64)), qzeros=("I32", (1, 8))), "GPTQ"),
        (_tensors(qweight=("I32", (32, 8)), qzeros=("I32", (1, 8))), "AWQ"),
        (_tensors(qweight=("I32", (32, 8))), "GPTQ or AWQ"),
        (_tensors(weight=("F8_E4M3", (4, 4)), weight_scale_inv=("F32", (1, 1))), "FP8"),
        (_tensors(weight=("F8_E5M2", (4, 4))), "FP8"),
        (_tensors(weight_packed=("I32", (4, 4)), weight_scale=("F16", (4, 1))), "compressed-tensors"),
        (_tensors(weight=("I8", (4, 4)), weight_scale=("F32", (4, 1))), "compressed-tensors"),
        (_tensors(gate_up_proj_blocks=("U8", (4, 4)), gate_up_proj_scales=("U8", (4,))), "MXFP4"),
    ],
)
def test_tensors_without_settings(tensors: dict[str, TensorInfo], scheme: str) -> None:
    """What the numbers mean (versions, groups) is said by the settings alone."""
    with pytest.raises(DiagnosticError, match=f"quantized with {scheme} \\(tensor .*config.json does not say how"):
        find_settings_of(tensors, WHERE)


@pytest.mark.parametrize(
    "tensors",
    [
        {"q.weight.quant_state.bitsandbytes__nf4": TensorInfo("q", "U8", (9,), 9, WHERE, 0)},
        _tensors(SCB=("F32", (4,)), weight=("I8", (4, 4))),
    ],
)
def test_tensors_of_other_schemes(tensors: dict[str, TensorInfo]) -> None:
    with pytest.raises(DiagnosticError, match=r"is quantized with bitsandbytes \(tensor "):
        find_settings_of(tensors, WHERE)


def test_plain_checkpoints_pass() -> None:
    assert find_settings_of(_tensors(weight=("BF16", (4, 4)), bias=("F32", (4,))), WHERE) is None


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_a_label_does_not_convert_tensors(method: str, tmp_path: Path) -> None:
    settings = {"quant_method": method, "bits": 4, "group_size": 8}
    labelled = write_model(tmp_path, {**config_of("llama"), "quantization_config": settings})
    with pytest.raises(
        DiagnosticError, match=r"quantization_config in config.json says \w+, but no tensor is stored so"
    ):
        import_model(labelled)


def test_tensors_without_a_label_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors = {name: ("I32", (2, 24)), "model.norm.weight": np.zeros(16, "<f4")}
    with pytest.raises(DiagnosticError, match=f"quantized with GPTQ or AWQ \\(tensor {name}\\)"):
        import_model(write_model(tmp_path, config_of("llama"), tensors))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "field 'quantization_config.bits' is 5\nexpected: one of 2, 3, 4, 8"),
        ({"bits": "4"}, "field 'quantization_config.bits' is '4'"),
        ({}, "field 'quantization_config.bits' is missing"),
        ({"bits": 4, "group_size": 0}, "field 'quantization_config.group_size' is 0"),
        ({"bits": 4, "group_size": 1 << 40}, "field 'quantization_config.group_size' is 1099511627776"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "the GPTQ checkpoint is stored as 'marlin'"),
        ({"bits": 4, "is_marlin_format": True}, "the GPTQ checkpoint is stored as 'marlin'"),
        ({"bits": 4, "pack_dtype": "int16"}, "field 'quantization_config.pack_dtype' is 'int16'"),
        ({"bits": 4, "sym": "yes"}, "field 'quantization_config.sym' is 'yes'"),
    ],
)
def test_bad_gptq_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_gptq(ConfigReader(settings, "config.json", "quantization_config."))
    assert message.splitlines()[0] in str(caught.value)
    assert message.splitlines()[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "field 'quantization_config.bits' is 8"),
        ({"w_bit": 3}, "field 'quantization_config.w_bit' is 3"),
        ({"bits": 4, "w_bit": 8}, "fields 'bits' and 'w_bit' disagree"),
        ({"bits": 4, "group_size": 0}, "field 'quantization_config.group_size' is 0"),
        ({"bits": 4, "version": "gemv"}, "stored for the kernel 'gemv'"),
        ({"bits": 4, "backend": "llm-awq"}, "stored for the kernel 'llm-awq'"),
    ],
)
def test_bad_awq_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        read_awq(ConfigReader(settings, "config.json", "quantization_config."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (compressed_settings("nvfp4-pack-quantized"), "stored as 'nvfp4-pack-quantized'"),
        (compressed_settings("marlin-24"), "stored as 'marlin-24'"),
        ({**compressed_settings(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "is 'sparse-24-bitmask'"),
        ({**compressed_settings(), "transform_config": {"config_groups": {"u": {}}}}, "'transform_config' rotates"),
        ({"format": "pack-quantized"}, "compressed-tensors with 0 'config_groups'"),
        ({"config_groups": {}}, "compressed-tensors with 0 'config_groups'"),
        (compressed_settings(num_bits=9), "'config_groups.group_0.weights.num_bits' is 9"),
        (compressed_settings(type="complex"), "weights.type' is 'complex'"),
        (compressed_settings(strategy="token"), "weights.strategy' is 'token'"),
        (compressed_settings(strategy="group", group_size=None), "weights.strategy' is 'group'"),
        (compressed_settings(group_size=-5), "weights.group_size' is -5"),
        (compressed_settings(strategy="block", block_structure=[128]), "block_structure' is \\[128\\]"),
        (compressed_settings(strategy="block", block_structure="128xx"), "block_structure' is \\[128, 0, 0\\]"),
        (compressed_settings(symmetric=1), "weights.symmetric' is 1"),
    ],
)
def test_bad_compressed_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        read_compressed(ConfigReader(settings, "config.json"))
