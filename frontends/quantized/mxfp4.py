"""MXFP4 checkpoints: groups of 32 four-bit floats (e2m1) under a scale that is a power of two.

A linear layer P of shape [n, k] is stored as P.weight_blocks (also P_blocks) u8 [n, k / 32, 16], two numbers a byte,
the low half first, and P.weight_scales (also P_scales) u8 [n, k / 32], the exponents with a bias of 127; the layout of
GPT-OSS. In compressed-tensors the same numbers are P.weight_packed u8 [n, k / 2] and P.weight_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frontends.config_reader import ConfigReader
from frontends.quantized.fp8 import POWERS
from frontends.quantized.source import Source
from frontends.quantized.weight import Faults, QuantizedWeight, bad, expect_shape, expect_tensor
from frontends.quantized.words import unpack_nibbles
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError
from ir.formats import MXFP4

GROUP = 32


@dataclass(frozen=True)
class MXFP4Settings:
    """There is nothing to choose."""

    def __str__(self) -> str:
        return f"groups of {GROUP} four-bit floats"


def read_settings(fields: ConfigReader) -> MXFP4Settings:
    """The settings; none of the fields changes what the tensors mean."""
    fields.value("modules_to_not_convert")
    return MXFP4Settings()


@dataclass(frozen=True, eq=False)
class MXFP4Weight(QuantizedWeight):
    """`tensors` are the numbers, two a byte, and the exponents of the scales."""

    def codes(self, first: int, last: int) -> np.ndarray:
        return unpack_nibbles(
            self.source.rows(self.tensors[0].name, first, last).reshape(last - first, self.shape[1] // 2)
        )

    def scales(self, first: int, last: int) -> np.ndarray:
        exponents = self.source.rows(self.tensors[1].name, first, last)
        return exponents.view(self.part_type("scales")[0].dtype)


def read_weights(settings: MXFP4Settings, tensors: Mapping[str, TensorInfo], source: Source) -> dict[str, MXFP4Weight]:
    """Every quantized weight by its name. Raises one DiagnosticError for all that do not fit."""
    found: dict[str, MXFP4Weight] = {}
    faults = Faults()
    for blocks in tensors.values():
        if not blocks.name.endswith("_blocks"):
            continue
        stem = blocks.name.removesuffix("_blocks")
        name = stem if stem.endswith(".weight") else stem + ".weight"
        try:
            found[name] = _weight(name, blocks, tensors.get(stem + "_scales"), source)
        except DiagnosticError as error:
            faults.add(name, error)
    faults.raise_if_any()
    return found


def _weight(name: str, blocks: TensorInfo, scales: TensorInfo | None, source: Source) -> MXFP4Weight:
    if scales is None:
        wanted = blocks.name.removesuffix("_blocks") + "_scales"
        raise DiagnosticError(f"has {blocks.name!r}, but no {wanted!r}", where=str(blocks.file), expected="both")
    expect_tensor(blocks, ("U8",), rank=3)
    n, groups, width = blocks.shape
    if width * 2 != GROUP:
        raise bad(blocks, f"has shape {list(blocks.shape)}", f"[rows, groups, {GROUP // 2}]")
    return mxfp4_weight(name, (n, groups * GROUP), blocks, scales, source)


def mxfp4_weight(
    name: str, shape: tuple[int, int], packed: TensorInfo, scales: TensorInfo, source: Source
) -> MXFP4Weight:
    """The weight, its scales checked."""
    expect_tensor(scales, POWERS)
    n, k = shape
    expect_shape(scales, (n, k // GROUP), f"one for each {GROUP} of the {k} columns")
    return MXFP4Weight(name=name, shape=shape, format=MXFP4, source=source, tensors=(packed, scales))
