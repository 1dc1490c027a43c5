"""Quantized checkpoints for tests, written from the descriptions of their formats.

Every function makes random codes, scales and zero points, packs them one element at a time as the format says, and
gives the tensors of one linear layer together with the float32 matrix that they stand for, computed from the codes.
Nothing here uses the code that reads such checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from frontends.huggingface import expected_weights
from tests.frontends.model_files import random_tensors, write_model

Maker = Callable[[np.random.Generator, int, int], "Layer"]


@dataclass(frozen=True)
class Layer:
    """`tensors` by their last name part, "qweight" and so on; `floats` f32 [n, k]."""

    tensors: dict[str, np.ndarray]
    floats: np.ndarray


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, count] of codes to int32 [rows, ceil(count * bits / 32)]: code i at the bits from i * bits on."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint64)
    for i in range(count):
        word, bit = divmod(i * bits, 32)
        shifted = codes[:, i].astype(np.uint64) << np.uint64(bit)
        words[:, word] |= shifted & np.uint64(0xFFFFFFFF)
        if bit + bits > 32:
            words[:, word + 1] |= shifted >> np.uint64(32)
    return words.astype(np.uint32).view(np.int32)


def pack_whole(codes: np.ndarray, bits: int) -> np.ndarray:
    """Like `pack_bits`, but no code crosses from one word to the next."""
    per_word = 32 // bits
    rows, count = codes.shape
    words = np.zeros((rows, -(-count // per_word)), np.uint32)
    for i in range(count):
        words[:, i // per_word] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % per_word))
    return words.view(np.int32)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[rows, count] of 4 bit codes to int32 [rows, count / 8]: nibble i of a word holds column order[i]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Scales over a wide range, some of them zero or below zero."""
    values = np.exp(rng.normal(-3, 1.5, shape)) * rng.choice([1, 1, 1, -1], shape)
    return np.where(rng.random(shape) < 0.05, 0, values).astype(dtype)


def grouped(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """f32 [n, k]: scale * (code - zero), with zeros and scales [n, groups] and the group of each column."""
    wide = scales.astype(np.float64)[:, groups] * (codes.astype(np.float64) - zeros.astype(np.float64)[:, groups])
    return wide.astype(np.float32)


def act_ordered(index: np.ndarray) -> np.ndarray:
    """The groups of columns in the order of their activations, which layers of one input share."""
    return np.random.default_rng(len(index)).permutation(index)


def gptq(
    *,
    bits: int = 4,
    group: int = 8,
    symmetric: bool = False,
    version: int = 1,
    act_order: bool = False,
    g_idx: bool = True,
    dtype: Any = np.float16,
) -> Maker:
    """`group` 0 is one group a row."""

    def make(rng: np.random.Generator, n: int, k: int) -> Layer:
        size = group or k
        index = np.arange(k) // size
        order = act_ordered(index) if act_order else index
        count = int(index[-1]) + 1
        codes = rng.integers(0, 1 << bits, (n, k))
        zeros = rng.integers(0, 1 << bits, (n, count)) if not symmetric else np.full((n, count), 1 << (bits - 1))
        scales = random_scales(rng, (n, count), dtype)
        stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
        tensors = {
            "qweight": np.ascontiguousarray(pack_bits(codes, bits).T),
            "qzeros": pack_bits(stored.T, bits),
            "scales": np.ascontiguousarray(scales.T),
        }
        if g_idx:
            tensors["g_idx"] = order.astype(np.int32)
        return Layer(tensors, grouped(codes, zeros, scales, order))

    return make


def awq(*, group: int = 8, dtype: Any = np.float16) -> Maker:
    """`group` 0 is one group a row."""

    def make(rng: np.random.Generator, n: int, k: int) -> Layer:
        index = np.arange(k) // (group or k)
        count = int(index[-1]) + 1
        codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, count))
        scales = random_scales(rng, (n, count), dtype)
        tensors = {
            "qweight": pack_awq(codes.T),
            "qzeros": pack_awq(zeros.T),
            "scales": np.ascontiguousarray(scales.T),
        }
        return Layer(tensors, grouped(codes, zeros, scales, index))

    return make


def compressed_integers(
    *,
    bits: int = 4,
    group: int = 8,
    strategy: str = "group",
    symmetric: bool = True,
    packed: bool = True,
    whole: bool = False,
    int8_zeros: bool = False,
    act_order: bool = False,
    dtype: Any = ml_dtypes.bfloat16,
) -> Maker:
    """`packed` in int32 words, with `whole` codes in each; else int8. `strategy` is group, channel or tensor."""

    def make(rng: np.random.Generator, n: int, k: int) -> Layer:
        half = 1 << (bits - 1)
        index = np.arange(k) // (group if strategy == "group" else k)
        order = act_ordered(index) if act_order else index
        shape = (1,) if strategy == "tensor" else (n, int(index[-1]) + 1)
        integers = rng.integers(-half, half, (n, k))
        zeros = np.zeros(shape, np.int64) if symmetric else rng.integers(-half, half, shape)
        scales = random_scales(rng, shape, dtype)
        pack = pack_whole if whole else pack_bits
        tensors = {"weight_scale": scales}
        if packed:
            tensors["weight_packed"] = pack(integers + half, bits)
            tensors["weight_shape"] = np.array([n, k], np.int64)
        else:
            tensors["weight"] = integers.astype(np.int8)
        if not symmetric and packed and not int8_zeros and strategy != "tensor":
            tensors["weight_zero_point"] = np.ascontiguousarray(pack((zeros + half).T, bits).T)
        elif not symmetric:
            tensors["weight_zero_point"] = zeros.astype(np.int8)
        if act_order:
            tensors["weight_g_idx"] = order.astype(np.int32)
        if strategy == "tensor":
            zeros, scales = np.broadcast_to(zeros, (n, 1)), np.broadcast_to(scales, (n, 1))
        return Layer(tensors, grouped(integers, zeros, scales, order))

    return make


def random_fp8(rng: np.random.Generator, n: int, k: int, dtype: Any = ml_dtypes.float8_e4m3fn) -> np.ndarray:
    """Every finite 8-bit float, in the given dtype."""
    numbers = np.arange(256, dtype=np.uint8).view(dtype)
    return rng.choice(numbers[np.isfinite(numbers.astype(np.float32))], (n, k))


def fp8(
    *,
    block: tuple[int, int] | None = None,
    scale_shape: str = "row",
    leaf: str = "weight_scale",
    dtype: Any = ml_dtypes.float8_e4m3fn,
    scale_dtype: Any = np.float32,
) -> Maker:
    """Scales by `block`, or "row" [n, 1], "rows" [n], "one" [1], "scalar" []; e8m0 ones as bytes with dtype u8."""

    def make(rng: np.random.Generator, n: int, k: int) -> Layer:
        weight = random_fp8(rng, n, k, dtype)
        shapes: dict[str, tuple[int, ...]] = {"row": (n, 1), "rows": (n,), "one": (1,), "scalar": ()}
        shape = (-(-n // block[0]), -(-k // block[1])) if block else shapes[scale_shape]
        if scale_dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
            exponents = rng.integers(0, 255, shape).astype(np.uint8)
            scale, value = exponents.view(scale_dtype), np.ldexp(1.0, exponents.astype(int) - 127)
        else:
            scale = np.asarray(random_scales(rng, shape, scale_dtype))
            value = scale.astype(np.float64)
        if block:
            value = value[np.arange(n) // block[0]][:, np.arange(k) // block[1]]
        elif scale_shape == "rows":
            value = value[:, None]
        limit = float(np.finfo(np.float32).max)
        floats = np.clip(weight.astype(np.float64) * value, -limit, limit).astype(np.float32)
        return Layer({"weight": weight, leaf: scale}, floats)

    return make


def mxfp4(*, blocks: bool = True, exponents: range = range(250)) -> Maker:
    """In blocks, as GPT-OSS has them, or as compressed-tensors packs them; with scales of 2**(exponent - 127)."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def make(rng: np.random.Generator, n: int, k: int) -> Layer:
        codes = rng.integers(0, 16, (n, k))
        scales = rng.choice(np.array(exponents, np.uint8), (n, k // 32))
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        scale = np.repeat(np.ldexp(1.0, scales.astype(int) - 127), 32, axis=1)
        floats = (values[codes] * scale).astype(np.float32)
        if blocks:
            return Layer({"weight_blocks": packed.reshape(n, k // 32, 16), "weight_scales": scales}, floats)
        return Layer({"weight_packed": packed, "weight_scale": scales}, floats)

    return make


def compressed_settings(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors with one group."""
    fields = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, **weights}
    group = {"targets": ["Linear"], "weights": fields, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Model:
    """Two directories of one model: `packed`, and `plain` with the floats that the packed weights stand for."""

    packed: Path
    plain: Path
    floats: Mapping[str, np.ndarray]  # of the packed weights, by name


def write_quantized(
    directory: Path, config: Mapping[str, Any], make: Maker, settings: Any, *, tables: bool = False, seed: int = 1
) -> Model:
    """A random model whose linear layers are packed, with `tables` the embedding and the head too; the rest is not."""
    rng = np.random.default_rng(seed)
    packed: dict[str, np.ndarray] = {}
    plain = random_tensors(config)
    floats = {}
    for name, spec in expected_weights(config).items():
        linear = spec.role.startswith(("attention.", "mlp.", "moe.")) and spec.role != "moe.router"
        if not linear and not (tables and spec.role in ("embedding", "head")):
            packed[name] = plain[name]
            continue
        layer = make(rng, *spec.shape)
        prefix = name.removesuffix("weight")
        packed.update({prefix + leaf: tensor for leaf, tensor in layer.tensors.items()})
        plain[name] = floats[name] = layer.floats
    labelled = {**config, "quantization_config": settings}
    return Model(
        write_model(directory / "packed", labelled, packed), write_model(directory / "plain", config, plain), floats
    )
