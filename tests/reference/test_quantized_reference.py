"""Quantized weights against the packages that define their formats: transformers and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends import quantized_files as files
from tests.frontends.test_quantized_weights import FP8, NAME, open_layer

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("block", [(32, 32), (40, 24), (128, 128)])
def test_fp8_blocks_equal_transformers(block: tuple[int, int], tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    make = files.fp8(block=block, leaf="weight_scale_inv")
    tensors = make(np.random.default_rng(2), 80, 96).tensors
    weight = torch.from_numpy(tensors["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(tensors["weight_scale_inv"])
    wanted = fp8._dequantize_fp8_weight(weight, scale, list(block), torch.float32).numpy()
    with open_layer(tmp_path, {**FP8, "weight_block_size": list(block)}, tensors) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(NAME), wanted)


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = files.mxfp4()(np.random.default_rng(2), 48, 96).tensors
    parts = [torch.from_numpy(tensors[leaf]) for leaf in ("weight_blocks", "weight_scales")]
    # transformers transposes what it makes, for its experts multiply from the other side
    wanted = mxfp4.convert_moe_packed_tensors(*(part[None] for part in parts), dtype=torch.float32)[0].T.numpy()
    with open_layer(tmp_path, {"quant_method": "mxfp4"}, tensors) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(NAME), wanted)


INTEGERS: list[dict[str, Any]] = [
    {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("weights", INTEGERS, ids=str)
def test_packed_integers_equal_compressed_tensors(weights: dict[str, Any], tmp_path: Path) -> None:
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    schemes = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(3)
    half = 1 << (weights["num_bits"] - 1)
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=schemes.QuantizationArgs(type="int", **weights))
    state = {"weight": torch.randn(64, 96), "weight_scale": torch.rand(64, 3) * 0.3 + 0.2}
    if not weights["symmetric"]:
        state["weight_zero_point"] = torch.randint(-half, half, (64, 3), dtype=torch.int8)
    packed = compressor.compress(state, scheme)
    wanted = compressor.decompress(dict(packed), scheme)["weight"].numpy()
    tensors = {leaf: tensor.contiguous().numpy() for leaf, tensor in packed.items()}
    with open_layer(tmp_path, files.compressed_settings(**weights), tensors) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(NAME), wanted)
