"""Small files for the tests of the frontends: safetensors written byte by byte, configs, whole model directories."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from frontends.huggingface import expected_weights

NUMPY_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
PACKED_DTYPES = {
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# What each family needs beyond SIZES, in the spelling since transformers v5.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0},
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model; a change to None leaves the field out."""
    fields = {"model_type": family, **SIZES, **FAMILIES.get(family, {}), **changes}
    return {name: value for name, value in fields.items() if value is not None}


def raw_safetensors(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header text; `length` lies about its length."""
    encoded = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_bytes(tensors: Mapping[str, np.ndarray | tuple[str, tuple[int, ...]]]) -> bytes:
    """A well-formed file. A tensor is an array, or (dtype, shape) for zeros of any dtype of one or more bytes."""
    known = {**NUMPY_DTYPES, **PACKED_DTYPES, "F64": np.dtype("<f8")}
    names = {dtype: name for name, dtype in known.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            dtype, shape, part = names[tensor.dtype], tensor.shape, tensor.tobytes()
        else:
            dtype, shape = tensor
            part = bytes(int(np.prod(shape)) * known[dtype].itemsize)
        header[name] = entry(dtype, list(shape), len(data), len(data) + len(part))
        data += part
    return raw_safetensors(json.dumps(header), data)


def random_tensors(config: Mapping[str, Any], dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """An array for every tensor that a model with this config needs."""
    tensors = {}
    for name, spec in expected_weights(config).items():
        rng = np.random.default_rng([seed, *name.encode()])
        scale = 0.3 if len(spec.shape) == 1 else 1.5 / np.sqrt(spec.shape[-1])
        offset = 1.0 if spec.role == "norm" else 0.0
        tensors[name] = (rng.standard_normal(spec.shape) * scale + offset).astype(NUMPY_DTYPES[dtype])
    return tensors


def write_model(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Any] | None = None, dtype: str = "F32"
) -> Path:
    """A model directory with one weight file; random weights unless `tensors` is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    content = random_tensors(config, dtype) if tensors is None else tensors
    (directory / "model.safetensors").write_bytes(safetensors_bytes(content))
    return directory


def write_shards(directory: Path, parts: Mapping[str, Mapping[str, Any]]) -> Path:
    """Weight files by name, and the index that names them."""
    directory.mkdir(parents=True, exist_ok=True)
    placement = {}
    for file, tensors in parts.items():
        (directory / file).write_bytes(safetensors_bytes(tensors))
        placement.update(dict.fromkeys(tensors, file))
    write_index(directory, placement)
    return directory


def write_index(directory: Path, placement: Mapping[str, Any]) -> None:
    """model.safetensors.index.json."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": placement})
    (directory / "model.safetensors.index.json").write_text(text)
