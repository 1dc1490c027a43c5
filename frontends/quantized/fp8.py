"""FP8 checkpoints: matrices of 8-bit floats whose scales belong to blocks, to rows or to the whole.

A linear layer P of shape [n, k] is stored as P.weight F8_E4M3 (or F8_E5M2) [n, k] and its scales, by which the
numbers are multiplied:
- P.weight_scale_inv [n / R, k / C], rounded up, with `weight_block_size` = [R, C] (DeepSeek V3, Qwen 3 FP8), in floats
  or as powers of two (F8_E8M0); a single one without `weight_block_size`;
- P.weight_scale: one number, or one for each row (FBGEMM, ModelOpt, vLLM).

One scale for the whole matrix is imported as that scale for every row. Scales that are powers of two become float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.config_reader import ConfigReader
from frontends.quantized.source import Source
from frontends.quantized.weight import (
    QuantizedWeight,
    bad,
    expect_shape,
    expect_tensor,
    only_weight,
    part_of,
    read_modules,
)
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError
from ir.formats import F8E4M3, F8E5M2, F32, FP8Format

LEAVES = ("weight", "weight_scale_inv", "weight_scale")
ELEMENTS = {"F8_E4M3": F8E4M3, "F8_E5M2": F8E5M2}
POWERS = ("U8", "F8_E8M0")  # dtypes of scales that hold the exponents of powers of two
MAX_BLOCK = 1 << 16


@dataclass(frozen=True)
class FP8Settings:
    """`block` is (rows, columns) that share a scale, or None: a scale a row or one in all."""

    block: tuple[int, int] | None

    def __str__(self) -> str:
        return f"blocks of {self.block[0]}x{self.block[1]}" if self.block else "a scale a row or a matrix"


def read_settings(fields: ConfigReader) -> FP8Settings:
    """The validated settings."""
    block = fields.value("weight_block_size")
    return FP8Settings(None if block is None else read_block(fields, "weight_block_size", block))


def read_block(fields: ConfigReader, name: str, block: object) -> tuple[int, int]:
    """A pair of sizes out of the settings."""
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and 0 < b <= MAX_BLOCK for b in block):
        raise fields.wrong((name,), block, f"two whole numbers in 1 .. {MAX_BLOCK}: rows and columns")
    return block[0], block[1]


@dataclass(frozen=True, eq=False)
class FP8Weight(QuantizedWeight):
    """`tensors` are the numbers and their scales."""

    def codes(self, first: int, last: int) -> np.ndarray:
        codes = self.source.rows(self.tensors[0].name, first, last)
        largest = 0x7E if self.tensors[0].dtype == "F8_E4M3" else 0x7B  # of the finite numbers, without the sign
        bad_codes = (codes & 0x7F) > largest
        if bad_codes.any():
            row, column = (int(i) for i in np.argwhere(bad_codes)[0])
            message = f"row {first + row}, column {column} is no finite number"
            raise DiagnosticError(message, where=self.where, expected="finite numbers")
        return codes

    def scales(self, first: int, last: int) -> np.ndarray:
        info = self.tensors[1]
        if len(info.shape) == 2 and info.shape != (1, 1):
            values = self.source.rows(info.name, first, last)
        elif info.shape == (self.shape[0],) != (1,):
            values = self.source.rows(info.name, first, last)[:, np.newaxis]
        else:
            values = np.broadcast_to(self.source.rows(info.name).reshape(1, 1), (last - first, 1))
        return np.ascontiguousarray(powers_of_two(values) if info.dtype in POWERS else values)


def powers_of_two(exponents: np.ndarray) -> np.ndarray:
    """f32 out of E8M0, 2**(e - 127); 255 is no number."""
    values = np.ldexp(1.0, exponents.astype(np.int32) - 127)
    return np.where(exponents == 255, np.nan, values).astype(np.float32)


def read_weights(settings: FP8Settings, tensors: Mapping[str, TensorInfo], source: Source) -> dict[str, FP8Weight]:
    """Every quantized weight by its name. Raises one DiagnosticError for all that do not fit."""
    return read_modules(tensors, LEAVES, lambda prefix, module: _weight(settings, prefix, module, source), _floats)


def _floats(module: Mapping[str, TensorInfo]) -> bool:
    return only_weight(module) not in (None, *ELEMENTS)


def _weight(settings: FP8Settings, prefix: str, module: Mapping[str, TensorInfo], source: Source) -> FP8Weight:
    weight = part_of(module, prefix, "weight")
    inverse = module.get("weight_scale_inv")
    scale = inverse if inverse is not None else part_of(module, prefix, "weight_scale")
    single = scale.shape in ((), (1,), (1, 1))
    blocks = settings.block if inverse is not None and not (single and settings.block is None) else None
    if inverse is not None and not single and settings.block is None:
        raise bad(scale, f"has shape {list(scale.shape)}, but the settings have no 'weight_block_size'", "one")
    return fp8_weight(prefix + "weight", weight, scale, blocks, source)


def fp8_weight(
    name: str, weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, source: Source
) -> FP8Weight:
    """The weight, its tensors checked; without blocks there is a scale a row or one in all."""
    expect_tensor(weight, ELEMENTS)
    expect_tensor(scale, (*WEIGHT_FORMATS, *POWERS), rank=(0, 1, 2))
    n, k = weight.shape
    if block is not None:
        wanted = (-(-n // block[0]), -(-k // block[1]))
        expect_shape(scale, wanted, f"one for each block of {block[0]} rows and {block[1]} columns of [{n}, {k}]")
    elif scale.shape not in ((), (1,), (1, 1), (n,), (n, 1)):
        raise bad(scale, f"has shape {list(scale.shape)}", f"one number, or [{n}, 1], one for each row")
    rows, columns = block or (1, 0)
    stored = WEIGHT_FORMATS.get(scale.dtype, F32)
    format = FP8Format(ELEMENTS[weight.dtype], rows, columns, stored)
    return FP8Weight(name=name, shape=(n, k), format=format, source=source, tensors=(weight, scale))
