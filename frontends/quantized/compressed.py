"""compressed-tensors checkpoints (LLM Compressor, vLLM): integers and 8-bit floats by tensor, row, group or block.

What a linear layer P of shape [n, k] is stored as, by the format that the settings name:
- pack-quantized: P.weight_packed int32 [n, words], codes of 1 to 8 bits along k (those of older versions do not cross
  words); P.weight_shape = [n, k]; with zero points P.weight_zero_point int32, packed along n, or int8;
- int-quantized, naive-quantized: P.weight int8 [n, k];
- float-quantized, naive-quantized, mxfp8-quantized: P.weight F8_E4M3 [n, k];
- mxfp4-pack-quantized: P.weight_packed u8 [n, k / 2], exponents in P.weight_scale u8 [n, k / 32];
- each with P.weight_scale: one number, or [n, 1], [n, k / group] or [n / R, k / C].
The stored integers are signed: code = integer + 2**(bits - 1), and so for the zero points. Which group of settings a
layer belongs to is seen from its tensors, which must fit one of them. P.weight_g_idx, the group of each column, is
taken as in GPTQ. Refused: sparse and two-level formats, and transforms that the graph would have to undo.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.config_reader import ConfigReader
from frontends.quantized.fp8 import ELEMENTS, FP8Weight, fp8_weight, read_block
from frontends.quantized.mxfp4 import GROUP, MXFP4Weight, mxfp4_weight
from frontends.quantized.source import Source
from frontends.quantized.weight import (
    GroupedWeight,
    QuantizedWeight,
    bad,
    column_groups,
    expect_shape,
    expect_tensor,
    only_weight,
    part_of,
    read_modules,
    scale_format,
    sorted_columns,
)
from frontends.quantized.words import dense_words, loose_words, unpack_dense, unpack_loose
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError
from ir.formats import F32, GroupedIntFormat

LEAVES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
          "weight_global_scale")  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized",
           "mxfp8-quantized", "mixed-precision")  # fmt: skip
STRATEGIES = ("tensor", "channel", "group", "block")
MAX_GROUPS = 1000
MAX_GROUP_SIZE = 1 << 20


@dataclass(frozen=True)
class WeightScheme:
    """One entry of `config_groups`: what its weights are. `group` is the columns that share a scale, 0 for all."""

    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int] | None

    def __str__(self) -> str:
        kind = f"{self.bits} bit {'floats' if self.floats else 'integers'}"
        by = {"group": f"group {self.group}", "channel": "a scale a row", "tensor": "one scale"}.get(self.strategy)
        if self.block:
            by = f"blocks of {self.block[0]}x{self.block[1]}"
        return f"{kind}, {by}{'' if self.symmetric else ', with zero points'}"


@dataclass(frozen=True)
class CompressedSettings:
    """The schemes of all groups."""

    format: str
    schemes: tuple[WeightScheme, ...]

    def __str__(self) -> str:
        return f"{self.format}: " + "; ".join(dict.fromkeys(str(s) for s in self.schemes))


def read_settings(fields: ConfigReader) -> CompressedSettings:
    """The validated settings. Refuses formats that are not known and weights that are stored otherwise than said."""
    format = _known_format(fields, fields.text("format", default="pack-quantized"))
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None and sparsity.text("format", default="dense") != "dense":
        raise sparsity.wrong(("format",), sparsity.value("format"), "'dense'")
    if fields.value("transform_config"):
        raise fields.fault(
            "'transform_config' rotates the weights, which the model would have to undo", "no such field"
        )
    groups = fields.nested("config_groups")
    if groups is None or not groups.fields or len(groups.fields) > MAX_GROUPS:
        count = len(groups.fields) if groups is not None else 0
        raise fields.fault(f"compressed-tensors with {count} 'config_groups'", f"1 to {MAX_GROUPS} of them")
    schemes = []
    for name in groups.fields:
        group = groups.nested(name)
        weights = group.nested("weights") if group is not None else None
        if group is not None and group.value("format") is not None:
            _known_format(group, group.text("format"))
        if weights is not None:
            schemes.append(_scheme(weights))
    return CompressedSettings(format, tuple(schemes))


def _known_format(fields: ConfigReader, format: str) -> str:
    if format not in FORMATS:
        raise fields.fault(
            f"the checkpoint is stored as {format[:60]!r} of compressed-tensors",
            f"one of {', '.join(FORMATS)}",
            "use the checkpoint that this one was quantized from",
        )
    return format


def _scheme(fields: ConfigReader) -> WeightScheme:
    kind = fields.text("type", default="int").lower()
    if kind not in ("int", "float"):
        raise fields.wrong(("type",), kind, "'int' or 'float'")
    size = fields.integer("group_size", low=-1, high=MAX_GROUP_SIZE, default=0)
    implied = "group" if size > 0 else "channel" if size < 0 else "tensor"
    strategy = fields.text("strategy", default=implied).lower()
    if strategy not in STRATEGIES or (strategy == "group" and size < 1):
        expected = f"one of {', '.join(STRATEGIES)}; a group has a 'group_size' of 1 or more"
        raise fields.wrong(("strategy",), strategy, expected)
    block = fields.value("block_structure")
    if strategy == "block":
        if isinstance(block, str) and len(block) < 20:  # "128x128", as old versions wrote it
            block = [int(part) if part.isdecimal() else 0 for part in block.split("x")]
        block = read_block(fields, "block_structure", block)
    return WeightScheme(
        bits=fields.integer("num_bits", low=1, high=8, default=8),
        floats=kind == "float",
        symmetric=fields.flag("symmetric", default=True),
        strategy=strategy,
        group=size if strategy == "group" else 0,
        block=block if strategy == "block" else None,
    )


@dataclass(frozen=True, eq=False)
class CompressedWeight(GroupedWeight):
    """`tensors` are the codes, the scales and, where there are, the zero points. `loose`: codes do not cross words."""

    loose: bool = False

    def codes(self, first: int, last: int) -> np.ndarray:
        stored = self.source.rows(self.tensors[0].name, first, last)
        if self.tensors[0].dtype == "I8":
            return self._from_signed(stored, first)
        return (unpack_loose if self.loose else unpack_dense)(stored, self.shape[1], self.bits)

    def scales(self, first: int, last: int) -> np.ndarray:
        return self._by_row(1, first, last)

    def zeros(self, first: int, last: int) -> np.ndarray:
        if len(self.tensors) == 2:
            return np.full(self.scales(first, last).shape, 1 << (self.bits - 1), np.uint8)
        info = self.tensors[2]
        if info.dtype == "I8":
            return self._from_signed(self._by_row(2, first, last), first)
        # packed along the rows of the matrix; 32 rows are whole words
        per_word = 32 // self.bits
        unit, step = (per_word, 1) if self.loose else (32, self.bits)
        low = first // unit
        words = self.source.rows(info.name, low * step, min(-(-last // unit) * step, info.shape[0]))
        unpack = unpack_loose if self.loose else unpack_dense
        zeros = unpack(np.ascontiguousarray(words.T), last - low * unit, self.bits)
        return np.ascontiguousarray(zeros[:, first - low * unit :].T)

    def _by_row(self, tensor: int, first: int, last: int) -> np.ndarray:
        """Rows of a part that has a row for each row of the matrix, or one number for all."""
        info = self.tensors[tensor]
        if info.shape[:1] == (self.shape[0],):
            return self.source.rows(info.name, first, last).reshape(last - first, math.prod(info.shape[1:]))
        values = self.source.rows(info.name).reshape(1, 1)
        return np.ascontiguousarray(np.broadcast_to(values, (last - first, 1)))

    def _from_signed(self, values: np.ndarray, first: int) -> np.ndarray:
        """u8 codes of int8 integers, which must have the stated width."""
        offset = 1 << (self.bits - 1)
        if self.bits < 8:
            outside = (values < -offset) | (values >= offset)
            if outside.any():
                row, column = (int(i) for i in np.argwhere(outside)[0])
                message = f"row {first + row}, column {column} holds {values[row, column]}"
                raise DiagnosticError(message, where=self.where, expected=f"an integer of {self.bits} bits")
        return (values.view(np.uint8) + np.uint8(offset)) & np.uint8(2 * offset - 1)


def read_weights(
    settings: CompressedSettings, tensors: Mapping[str, TensorInfo], source: Source
) -> dict[str, QuantizedWeight]:
    """Every quantized weight by its name. Raises one DiagnosticError for all that do not fit."""
    return read_modules(tensors, LEAVES, lambda prefix, module: _weight(settings, prefix, module, source), _floats)


def _floats(module: Mapping[str, TensorInfo]) -> bool:
    return only_weight(module) in WEIGHT_FORMATS


def _weight(
    settings: CompressedSettings, prefix: str, module: Mapping[str, TensorInfo], source: Source
) -> QuantizedWeight:
    scale = part_of(module, prefix, "weight_scale")
    if "weight_global_scale" in module:
        raise bad(module["weight_global_scale"], "makes scales of two levels (NVFP4)", "a weight with one level")
    codes = module.get("weight_packed") or part_of(module, prefix, "weight")
    if codes.dtype in WEIGHT_FORMATS:
        raise bad(codes, f"has dtype {codes.dtype} beside {scale.name!r}", "a weight in its compressed form")
    if codes.dtype in ELEMENTS:
        return _float_weight(settings, prefix, codes, scale, source)
    if codes.dtype == "U8":
        return _mxfp4(settings, prefix, codes, scale, source)
    return _integer_weight(settings, prefix, module, codes, source)


def _float_weight(
    settings: CompressedSettings, prefix: str, codes: TensorInfo, scale: TensorInfo, source: Source
) -> FP8Weight:
    faults = []
    for scheme in settings.schemes:
        if not scheme.floats or scheme.bits != 8:
            continue
        block = (1, scheme.group) if scheme.strategy == "group" else scheme.block
        try:
            return fp8_weight(prefix + "weight", codes, scale, block, source)
        except DiagnosticError as error:
            faults.append(error)
    raise faults[0] if faults else _no_scheme(settings, codes, "8 bit floats")


def _mxfp4(
    settings: CompressedSettings, prefix: str, codes: TensorInfo, scale: TensorInfo, source: Source
) -> MXFP4Weight:
    if not any(s.floats and s.bits == 4 and s.group == GROUP for s in settings.schemes):
        raise _no_scheme(settings, codes, f"4 bit floats, group {GROUP}")
    expect_tensor(codes, ("U8",))
    n, half = codes.shape
    if half * 2 % GROUP:
        raise bad(codes, f"has {half} bytes a row", f"a multiple of {GROUP // 2}")
    return mxfp4_weight(prefix + "weight", (n, half * 2), codes, scale, source)


def _integer_weight(
    settings: CompressedSettings, prefix: str, module: Mapping[str, TensorInfo], codes: TensorInfo, source: Source
) -> CompressedWeight:
    faults = []
    for scheme in settings.schemes:
        if scheme.floats:
            continue
        try:
            return _integers(scheme, prefix, module, codes, source)
        except DiagnosticError as error:
            faults.append(error)
    raise faults[0] if faults else _no_scheme(settings, codes, "integers")


def _integers(
    scheme: WeightScheme, prefix: str, module: Mapping[str, TensorInfo], codes: TensorInfo, source: Source
) -> CompressedWeight:
    """The weight as one scheme describes it. Raises DiagnosticError when its tensors do not fit that scheme."""
    scale = part_of(module, prefix, "weight_scale")
    n, k, loose = _size(scheme, prefix, module, codes, source)
    expect_tensor(scale, WEIGHT_FORMATS, rank=(0, 1, 2))
    group = scheme.group or k
    groups = -(-k // group)
    if scheme.strategy == "block":
        raise bad(codes, "holds integers with scales for blocks of rows", "scales for rows, or for groups within rows")
    shapes = {"tensor": ((), (1,), (1, 1)), "channel": ((n, 1), (n,)), "group": ((n, groups),)}[scheme.strategy]
    if scale.shape not in shapes:
        raise bad(scale, f"has shape {list(scale.shape)}", f"{list(shapes[0])}, for [{n}, {k}] with {scheme}")
    tensors = [codes, scale]
    zeros = module.get("weight_zero_point")
    if not scheme.symmetric:
        zeros = expect_tensor(part_of(module, prefix, "weight_zero_point"), ("I8", "I32"), rank=(0, 1, 2))
        packed = (loose_words if loose else dense_words)(n, scheme.bits)
        wanted = (packed, groups) if zeros.dtype == "I32" else scale.shape
        expect_shape(zeros, wanted, f"for {n} rows of {groups} zero points of {scheme.bits} bits")
        tensors.append(zeros)
    elif zeros is not None:
        raise bad(zeros, "is there, but the settings say 'symmetric'", "settings that fit the tensors")
    order = module.get("weight_g_idx")
    scattered, by_group = False, None
    if order is not None:
        expect_tensor(order, ("I32", "I64"), rank=1)
        expect_shape(order, (k,), "the group of each column")
        scattered = not column_groups(order, group, groups, source)
        by_group = sorted_columns(prefix + "weight", order, group, source) if scattered else None
    runs = (by_group is not None or not scattered) and k % group == 0
    # A single symmetric bit is -1 or 0 here, while the symmetric format of one bit has -1 and 1.
    has_zeros = not scheme.symmetric or scheme.bits == 1
    format = GroupedIntFormat(scheme.bits, scheme.group, has_zeros, scale_format(scale))
    return CompressedWeight(
        name=prefix + "weight",
        shape=(n, k),
        format=format if runs else F32,
        source=source,
        tensors=tuple(tensors),
        bits=scheme.bits,
        group=scheme.group,
        order=order.name if order is not None and scattered else "",
        has_zeros=has_zeros,
        sorted=by_group,
        loose=loose,
    )


def _size(
    scheme: WeightScheme, prefix: str, module: Mapping[str, TensorInfo], codes: TensorInfo, source: Source
) -> tuple[int, int, bool]:
    """(n, k, whether the codes are packed loosely)."""
    if codes.dtype == "I8":
        n, k = expect_tensor(codes, ("I8",)).shape
        return n, k, False
    expect_tensor(codes, ("I32",))
    stated = expect_tensor(part_of(module, prefix, "weight_shape"), ("I64", "I32"), rank=1)
    expect_shape(stated, (2,), "rows and columns")
    n, k = (int(size) for size in source.rows(stated.name))
    rows, words = codes.shape
    if n != rows or k < 1 or k > words * 32:
        raise bad(stated, f"says [{n}, {k}]", f"{rows} rows, as {codes.name!r} has, and columns that fit its words")
    if words not in (dense_words(k, scheme.bits), loose_words(k, scheme.bits)):
        message = f"has {words} words for {k} columns, which is {words * 32 / k:.3g} bits each"
        raise bad(codes, message, f"{scheme.bits} bits, as the settings say")
    return n, k, words != dense_words(k, scheme.bits)


def _no_scheme(settings: CompressedSettings, codes: TensorInfo, found: str) -> DiagnosticError:
    said = "; ".join(dict.fromkeys(str(s) for s in settings.schemes)) or "no weights"
    return bad(codes, f"holds {found} ({codes.dtype})", f"what the settings say: {said}")
