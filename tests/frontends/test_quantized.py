"""Quantized checkpoints are refused by the name of their scheme, from the config or from the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontends.huggingface import import_model
from frontends.quantized import refuse_quantized
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import config_of, write_model

WHERE = Path("model")


def _tensors(**dtypes: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    prefix = "model.layers.0.mlp.up_proj."
    return {prefix + leaf: TensorInfo(prefix + leaf, d, s, 0, WHERE, 0) for leaf, (d, s) in dtypes.items()}


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ (4-bit, quantization_config in config.json)"),
        ({"quant_method": "awq", "bits": 4}, "AWQ (4-bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 (quantization_config"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "brand-new"}, "an unknown scheme, 'brand-new'"),
        ({"something": 1}, "an unknown scheme, 'None'"),
        ("strange", "an unknown scheme, 'strange'"),
    ],
)
def test_scheme_of_the_config(settings: Any, scheme: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        refuse_quantized({"quantization_config": settings}, {}, WHERE)
    text = str(caught.value)
    assert f"model: error: the checkpoint is quantized with {scheme}" in text
    assert "expected: weights in F32, F16 or BF16" in text


@pytest.mark.parametrize(
    ("tensors", "scheme"),
    [
        (_tensors(qweight=("I32", (4, 64)), qzeros=("I32", (1, 8)), g_idx=("I32", (32,))), "GPTQ"),
        (_tensors(qweight=("I32", (4, 64)), qzeros=("I32", (1, 8))), "GPTQ"),
        (_tensors(qweight=("I32", (32, 8)), qzeros=("I32", (1, 8))), "AWQ"),
        (_tensors(qweight=("I32", (32, 8))), "GPTQ or AWQ"),
        (_tensors(weight=("F8_E4M3", (4, 4)), weight_scale_inv=("F32", (1, 1))), "FP8"),
        (_tensors(weight=("F8_E5M2", (4, 4))), "FP8"),
        ({"q.weight.quant_state.bitsandbytes__nf4": TensorInfo("q", "U8", (9,), 9, WHERE, 0)}, "bitsandbytes"),
        (_tensors(SCB=("F32", (4,)), weight=("I8", (4, 4))), "bitsandbytes"),
        (_tensors(weight_packed=("I32", (4, 4)), weight_scale=("F16", (4, 1))), "compressed-tensors"),
        (_tensors(weight=("I8", (4, 4)), weight_scale=("F32", (4, 1))), "compressed-tensors"),
        (_tensors(gate_up_proj_blocks=("U8", (4, 4)), gate_up_proj_scales=("U8", (4,))), "MXFP4"),
    ],
)
def test_scheme_of_the_tensors(tensors: dict[str, TensorInfo], scheme: str) -> None:
    with pytest.raises(DiagnosticError, match=f"is quantized with {scheme} \\(tensor "):
        refuse_quantized({}, tensors, WHERE)


def test_plain_checkpoints_pass() -> None:
    refuse_quantized({"quantization_config": None}, _tensors(weight=("BF16", (4, 4)), bias=("F32", (4,))), WHERE)


def test_import_stops_at_either_sign(tmp_path: Path) -> None:
    config = config_of("llama")
    labelled = write_model(tmp_path / "a", {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(DiagnosticError, match="quantized with GPTQ"):
        import_model(labelled)
    name = "model.layers.0.mlp.up_proj.qweight"
    unlabelled = write_model(tmp_path / "b", config, {name: ("I32", (2, 24)), "model.norm.weight": np.zeros(16, "<f4")})
    with pytest.raises(DiagnosticError, match=f"quantized with GPTQ or AWQ \\(tensor {name}\\)"):
        import_model(unlabelled)
