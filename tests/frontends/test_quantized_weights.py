"""Weights of quantized checkpoints equal, to the last bit, the floats that their formats define."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.checkpoint import open_checkpoint
from frontends.config_reader import ConfigReader
from frontends.quantized import QuantizedCheckpoint, find_settings, open_quantized
from tests.frontends import quantized_files as files
from tests.frontends.model_files import safetensors_bytes

NAME = "model.layers.0.self_attn.q_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
F8_BF16: dict[str, Any] = {"dtype": ml_dtypes.float8_e5m2, "scale_dtype": ml_dtypes.bfloat16}
# what the settings say, how the layer is stored, what it becomes
CASES: list[tuple[Any, files.Maker, str]] = [
    (GPTQ, files.gptq(), "q4_zp<group=8, scale=f16>"),
    ({**GPTQ, "checkpoint_format": "gptq_v2"}, files.gptq(version=2), "q4_zp<group=8, scale=f16>"),
    ({**GPTQ, "bits": 2}, files.gptq(bits=2), "q2_zp<group=8, scale=f16>"),
    ({**GPTQ, "bits": 3}, files.gptq(bits=3), "q3_zp<group=8, scale=f16>"),
    ({**GPTQ, "bits": 8, "desc_act": True}, files.gptq(bits=8), "q8_zp<group=8, scale=f16>"),
    ({**GPTQ, "sym": True}, files.gptq(symmetric=True), "q4_sym<group=8, scale=f16>"),
    ({**GPTQ, "sym": True, "bits": 3}, files.gptq(symmetric=True, bits=3), "q3_sym<group=8, scale=f16>"),
    ({**GPTQ, "sym": True, "bits": 8}, files.gptq(symmetric=True, bits=8), "q8_sym<group=8, scale=f16>"),
    ({**GPTQ, "sym": True}, files.gptq(), "q4_zp<group=8, scale=f16>"),  # the label is wrong, the zeros count
    ({**GPTQ, "group_size": -1}, files.gptq(group=0, g_idx=False), "q4_zp<group=row, scale=f16>"),
    ({**GPTQ, "dynamic": {"+:.*q_proj": {"bits": 8}}}, files.gptq(bits=8), "q8_zp<group=8, scale=f16>"),
    (GPTQ, files.gptq(dtype=ml_dtypes.bfloat16), "q4_zp<group=8, scale=bf16>"),
    (GPTQ, files.gptq(dtype=np.float32), "q4_zp<group=8, scale=f32>"),
    ({**GPTQ, "desc_act": True}, files.gptq(act_order=True), "q4_zp<group=8, scale=f16>"),
    (
        {**GPTQ, "desc_act": True, "sym": True},
        files.gptq(act_order=True, symmetric=True, bits=4),
        "q4_sym<group=8, scale=f16>",
    ),
    ({**GPTQ, "desc_act": True, "group_size": 40}, files.gptq(group=40, act_order=True), "f32"),
    ({**GPTQ, "group_size": 40}, files.gptq(group=40), "f32"),  # the last group is shorter
    ({**GPTQ, "group_size": 128}, files.gptq(group=128), "q4_zp<group=row, scale=f16>"),
    (AWQ, files.awq(), "q4_zp<group=8, scale=f16>"),
    ({**AWQ, "group_size": -1, "version": "GEMM"}, files.awq(group=0), "q4_zp<group=row, scale=f16>"),
    (files.compressed_settings(), files.compressed_integers(), "q4_sym<group=8, scale=bf16>"),
    (
        files.compressed_settings(symmetric=False),
        files.compressed_integers(symmetric=False, dtype=np.float16),
        "q4_zp<group=8, scale=f16>",
    ),
    (
        files.compressed_settings(symmetric=False),
        files.compressed_integers(symmetric=False, int8_zeros=True),
        "q4_zp<group=8, scale=bf16>",
    ),
    (
        files.compressed_settings(num_bits=8, strategy="channel", group_size=None),
        files.compressed_integers(bits=8, strategy="channel", dtype=np.float32),
        "q8_sym<group=row, scale=f32>",
    ),
    (files.compressed_settings(num_bits=3), files.compressed_integers(bits=3), "q3_sym<group=8, scale=bf16>"),
    (
        files.compressed_settings(num_bits=3, symmetric=False),
        files.compressed_integers(bits=3, whole=True, symmetric=False),
        "q3_zp<group=8, scale=bf16>",
    ),
    (files.compressed_settings(num_bits=6), files.compressed_integers(bits=6), "q6_sym<group=8, scale=bf16>"),
    (files.compressed_settings(num_bits=1), files.compressed_integers(bits=1), "q1_zp<group=8, scale=bf16>"),
    (
        files.compressed_settings(actorder="group"),
        files.compressed_integers(act_order=True),
        "q4_sym<group=8, scale=bf16>",
    ),
    (
        files.compressed_settings("int-quantized", num_bits=8, strategy="channel", group_size=None),
        files.compressed_integers(bits=8, packed=False, strategy="channel"),
        "q8_sym<group=row, scale=bf16>",
    ),
    (
        files.compressed_settings("int-quantized", num_bits=8, strategy="tensor", group_size=None, symmetric=False),
        files.compressed_integers(bits=8, packed=False, strategy="tensor", symmetric=False),
        "q8_zp<group=row, scale=bf16>",
    ),
    (
        files.compressed_settings("naive-quantized", symmetric=False),
        files.compressed_integers(packed=False, symmetric=False),
        "q4_zp<group=8, scale=bf16>",
    ),
    (
        files.compressed_settings("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None),
        files.fp8(scale_shape="one", scale_dtype=ml_dtypes.bfloat16),
        "f8e4m3<block=row, scale=bf16>",
    ),
    (
        files.compressed_settings("float-quantized", num_bits=8, type="float", strategy="channel", group_size=-1),
        files.fp8(),
        "f8e4m3<block=row, scale=f32>",
    ),
    (
        files.compressed_settings(
            "float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[32, 16]
        ),
        files.fp8(block=(32, 16)),
        "f8e4m3<block=32x16, scale=f32>",
    ),
    (
        files.compressed_settings("mxfp8-quantized", num_bits=8, type="float", group_size=32),
        files.fp8(block=(1, 32), scale_dtype=np.uint8),
        "f8e4m3<block=1x32, scale=f32>",
    ),
    (
        files.compressed_settings("mxfp4-pack-quantized", type="float", group_size=32),
        files.mxfp4(blocks=False),
        "mxfp4",
    ),
    (
        {**FP8, "weight_block_size": [32, 16]},
        files.fp8(block=(32, 16), leaf="weight_scale_inv"),
        "f8e4m3<block=32x16, scale=f32>",
    ),
    (
        {**FP8, "weight_block_size": [40, 40], "scale_fmt": "ue8m0"},
        files.fp8(block=(40, 40), leaf="weight_scale_inv", scale_dtype=ml_dtypes.float8_e8m0fnu),
        "f8e4m3<block=40x40, scale=f32>",
    ),
    (FP8, files.fp8(scale_shape="scalar", leaf="weight_scale_inv"), "f8e4m3<block=row, scale=f32>"),
    (FP8, files.fp8(scale_shape="scalar"), "f8e4m3<block=row, scale=f32>"),
    (FP8, files.fp8(scale_shape="rows", **F8_BF16), "f8e5m2<block=row, scale=bf16>"),
    ({"quant_method": "fbgemm_fp8"}, files.fp8(), "f8e4m3<block=row, scale=f32>"),
    (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        files.fp8(scale_shape="scalar"),
        "f8e4m3<block=row, scale=f32>",
    ),
    ({"quant_method": "mxfp4"}, files.mxfp4(), "mxfp4"),
]


def open_layer(directory: Path, quantization: Any, tensors: dict[str, Any]) -> QuantizedCheckpoint:
    """A checkpoint of one linear layer."""
    prefix = NAME.removesuffix("weight")
    named = {prefix + leaf: tensor for leaf, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(named))
    found = find_settings(ConfigReader({"quantization_config": quantization}, "config.json"))
    assert found is not None
    return open_quantized(found, open_checkpoint(directory))


@pytest.mark.parametrize(("quantization", "make", "format"), CASES)
def test_weights_are_what_the_format_defines(quantization: Any, make: files.Maker, format: str, tmp_path: Path) -> None:
    layer = make(np.random.default_rng(5), 64, 96)
    with open_layer(tmp_path, quantization, layer.tensors) as checkpoint:
        assert list(checkpoint.tensors) == [NAME]
        weight = checkpoint.quantized[NAME]
        assert str(weight.format) == format
        assert checkpoint.info(NAME).shape == (64, 96)
        np.testing.assert_array_equal(checkpoint.read(NAME), layer.floats)
        np.testing.assert_array_equal(checkpoint.read_rows(NAME, 7, 43), layer.floats[7:43])
        for part in weight.parts():
            whole = checkpoint.read(f"{NAME}.{part}")
            element, shape = weight.part_type(part)
            assert whole.shape == shape == checkpoint.info(f"{NAME}.{part}").shape and whole.dtype == element.dtype
            rows = whole.shape[0]
            cuts = [0, 0, 1, rows // 2, rows]
            pieces = [checkpoint.read_rows(f"{NAME}.{part}", a, b) for a, b in itertools.pairwise(cuts)]
            assert np.concatenate(pieces).tobytes() == whole.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    scheme=st.sampled_from(["gptq", "awq", "packed", "whole", "int8"]),
    bits=st.integers(1, 8),
    n=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from([1, 4, 8, 32]),
    symmetric=st.booleans(),
)
def test_integers_of_any_shape(
    seed: int, scheme: str, bits: int, n: int, groups: int, group: int, symmetric: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    k = groups * group
    if scheme == "gptq":
        bits = {1: 2, 5: 4, 6: 3, 7: 8}.get(bits, bits)
        n, k = n * 32, groups * max(group, 32)
        quantization: Any = {**GPTQ, "bits": bits, "group_size": k // groups, "sym": symmetric}
        make = files.gptq(bits=bits, group=k // groups, symmetric=symmetric)
    elif scheme == "awq":
        n, bits, symmetric = n * 8, 4, False
        quantization, make = {**AWQ, "group_size": group}, files.awq(group=group)
    else:
        form = "int-quantized" if scheme == "int8" else "pack-quantized"
        quantization = files.compressed_settings(form, num_bits=bits, group_size=group, symmetric=symmetric)
        make = files.compressed_integers(
            bits=bits, group=group, symmetric=symmetric, packed=scheme != "int8", whole=scheme == "whole"
        )
    layer = make(np.random.default_rng(seed), n, k)
    ambiguous = scheme == "whole" and 32 % bits and -(-k * bits // 32) == -(-k // (32 // bits))
    if ambiguous and k * bits > 32:
        return  # as many words as densely packed codes take, which is how they are read
    with open_layer(tmp_path_factory.mktemp("layer"), quantization, layer.tensors) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(NAME), layer.floats)
        first, last = n // 3, n - n // 4
        np.testing.assert_array_equal(checkpoint.read_rows(NAME, first, last), layer.floats[first:last])
