"""The compressed-tensors layout of quantized weights: pack-quantized, and int-quantized for 8 bits.

    parts = layout_parts(packed)                   # {"weight_packed": int32, "weight_scale": ..., "weight_shape": ...}
    packed = packed_of(format, parts)              # the inverse
    settings = quantization_config(formats, linears)

The integers are signed, code - 2**(bits - 1), and stored with that offset; codes are packed densely along a row, zero
points along the rows (https://github.com/neuralmagic/compressed-tensors). 8 bits: P.weight int8 and zero points int8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from frontends.quantized.words import dense_words, unpack_dense
from ir.formats import GroupedIntFormat, PackedArray
from ir.formats.bit_packing import pack_codes


def layout_parts(packed: PackedArray) -> dict[str, np.ndarray]:
    """The tensors of a matrix [n, k] by their last name part, in order."""
    format: GroupedIntFormat = packed.format
    n, k = packed.shape
    if format.bits == 8:
        parts = {"weight": _signed(packed.code_array()), "weight_scale": packed.scales}
        if format.zero_point:
            parts["weight_zero_point"] = _signed(packed.zero_array())
        return parts
    parts = {"weight_packed": _words(packed.codes, dense_words(k, format.bits)), "weight_scale": packed.scales}
    if format.zero_point:
        zeros = pack_codes(np.ascontiguousarray(packed.zero_array().T), format.bits)
        parts["weight_zero_point"] = np.ascontiguousarray(_words(zeros, dense_words(n, format.bits)).T)
    parts["weight_shape"] = np.array([n, k], np.int64)
    return parts


def packed_of(format: GroupedIntFormat, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> PackedArray:
    """The matrix that `layout_parts` gave. Raises KeyError, ValueError or DiagnosticError for parts of another."""
    n, k = shape
    zeros = None
    if format.bits == 8:
        codes = _unsigned(parts["weight"])
        zeros = _unsigned(parts["weight_zero_point"]) if format.zero_point else None
    else:
        codes = np.ascontiguousarray(unpack_dense(parts["weight_packed"], k, format.bits))
        if format.zero_point:
            words = np.ascontiguousarray(parts["weight_zero_point"].T)
            zeros = np.ascontiguousarray(unpack_dense(words, n, format.bits).T)
    return PackedArray.assemble(format, shape, codes, parts["weight_scale"], zeros)


def part_shapes(format: GroupedIntFormat, shape: tuple[int, int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor that `layout_parts` gives, in its order."""
    n, k = shape
    groups = format.groups(k)
    eight = format.bits == 8
    parts: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    if eight:
        parts["weight"] = (np.dtype(np.int8), (n, k))
    else:
        parts["weight_packed"] = (np.dtype(np.int32), (n, dense_words(k, format.bits)))
    parts["weight_scale"] = (format.scale.dtype, (n, groups))
    if format.zero_point:
        of_eight = (np.dtype(np.int8), (n, groups))
        packed = (np.dtype(np.int32), (dense_words(n, format.bits), groups))
        parts["weight_zero_point"] = of_eight if eight else packed
    if not eight:
        parts["weight_shape"] = (np.dtype(np.int64), (2,))
    return parts


def _signed(codes: np.ndarray) -> np.ndarray:
    return (codes ^ np.uint8(128)).view(np.int8)


def _unsigned(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8) ^ np.uint8(128)


def _words(rows: np.ndarray, words: int) -> np.ndarray:
    """u8 [n, bytes] filled up to int32 [n, words]."""
    data = np.zeros((rows.shape[0], words * 4), np.uint8)
    data[:, : rows.shape[1]] = rows
    return data.view("<i4")


# -- settings --------------------------------------------------------------------------------------------------------


def quantization_config(formats: Mapping[str, GroupedIntFormat], linears: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json: a group for each format. `linears` are all weights that products have."""
    kinds = sorted(set(formats.values()), key=lambda f: (-f.bits, f.group, f.zero_point, str(f)))
    floats = [name for name in linears if name not in formats]
    targets = _targets(formats, floats)
    groups = {}
    for number, kind in enumerate(kinds):
        groups[f"group_{number}"] = {
            "targets": targets[kind],
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": not kind.zero_point,
                "strategy": "group" if kind.group else "channel",
                "group_size": kind.group or None,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "observer": "mse",
                "observer_kwargs": {},
            },
            "input_activations": None,
            "output_activations": None,
            "format": _layout_name(kind),
        }
    names = {_layout_name(kind) for kind in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_module(name) for name in floats],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _layout_name(format: GroupedIntFormat) -> str:
    return "int-quantized" if format.bits == 8 else "pack-quantized"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _targets(formats: Mapping[str, GroupedIntFormat], floats: Iterable[str]) -> dict[GroupedIntFormat, list[str]]:
    """Regular expressions of modules by format: numbers stand for all layers and experts where that says the same."""
    meant: dict[str, set[GroupedIntFormat | None]] = {}
    for name in (*formats, *floats):
        meant.setdefault(_pattern(name), set()).add(formats.get(name))
    targets: dict[GroupedIntFormat, dict[str, None]] = {}
    for name, kind in formats.items():
        pattern = _pattern(name)
        text = pattern if len(meant[pattern]) == 1 else re.escape(_module(name))
        targets.setdefault(kind, {})[f"re:^{text}$"] = None
    return {kind: list(found) for kind, found in targets.items()}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(_module(name)))
