"""GPTQ checkpoints (AutoGPTQ, GPTQModel, and what writes as they do): integers of 2, 3, 4 or 8 bits with zero points.

A linear layer P of shape [n, k] is stored as P.qweight int32 [k * bits / 32, n], packed densely along k; P.scales
[groups, n] in floats; P.qzeros int32 [groups, n * bits / 32], packed densely along n; P.g_idx int32 [k], the group of
each column. A weight is scale * (code - zero). Version 1 of the format stores zero - 1 (modulo 2**bits), version 2
the zero itself. With `sym` every zero is 2**(bits - 1), which is the symmetric format; a checkpoint that claims `sym`
and has another zero keeps its zero points. Columns that are grouped by activations (`desc_act`) are sorted by group;
experts whose columns are so are read as floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.config_reader import ConfigReader
from frontends.quantized.source import Source
from frontends.quantized.weight import (
    GroupedWeight,
    bad,
    column_groups,
    expect_shape,
    expect_tensor,
    part_of,
    read_modules,
    scale_format,
    sorted_columns,
)
from frontends.quantized.words import unpack_dense
from frontends.safetensors_header import TensorInfo
from ir.formats import F32, GroupedIntFormat

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
WIDTHS = (2, 3, 4, 8)
MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class GPTQSettings:
    """`group` 0 means all columns. `stored` is what is added to a stored zero point: 1 in version 1 of the format.
    `mixed`: some layers have settings of their own, which their tensors tell.
    """

    bits: int
    group: int
    symmetric: bool
    stored: int
    mixed: bool = False

    def __str__(self) -> str:
        group = f"group {self.group}" if self.group else "one group a row"
        return f"{self.bits} bit, {group}, zero points of version {1 if self.stored else 2}"


def read_settings(fields: ConfigReader) -> GPTQSettings:
    """The validated settings. Refuses widths and layouts that are not known."""
    bits = fields.integer("bits", low=1, high=16)
    if bits not in WIDTHS:
        raise fields.wrong(("bits",), bits, f"one of {', '.join(map(str, WIDTHS))}")
    group = fields.integer("group_size", low=-1, high=MAX_GROUP, default=-1)
    if group == 0:
        raise fields.wrong(("group_size",), group, "1 or more, or -1 for one group a row")
    layout = fields.text("checkpoint_format", "format", default="gptq").lower()
    if layout not in ("gptq", "gptq_v2") or fields.flag("is_marlin_format", default=False):
        layout = "marlin" if layout.startswith("gptq") else layout
        raise fields.fault(
            f"the GPTQ checkpoint is stored as {layout[:40]!r}", "'gptq' or 'gptq_v2'", "save it again in one of these"
        )
    words = fields.text("pack_dtype", default="int32")
    if words != "int32":
        raise fields.wrong(("pack_dtype",), words, "'int32'")
    return GPTQSettings(
        bits=bits,
        group=max(group, 0),
        symmetric=fields.flag("sym", default=True),
        stored=int(layout == "gptq"),
        mixed=bool(fields.value("dynamic")),
    )


@dataclass(frozen=True, eq=False)
class GPTQWeight(GroupedWeight):
    """`tensors` are qweight, scales, qzeros and, where there is one, g_idx."""

    stored: int = 1

    def codes(self, first: int, last: int) -> np.ndarray:
        words = self.source.columns(self.tensors[0].name, first, last)
        return unpack_dense(words.T, self.shape[1], self.bits)

    def scales(self, first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(self.source.columns(self.tensors[1].name, first, last).T)

    def zeros(self, first: int, last: int) -> np.ndarray:
        low, high = first // 32 * 32, min(-(-last // 32) * 32, self.shape[0])  # whole words
        words = self.source.columns(self.tensors[2].name, low * self.bits // 32, high * self.bits // 32)
        zeros = unpack_dense(words, high - low, self.bits)[:, first - low : last - low]
        return np.ascontiguousarray((zeros + np.uint8(self.stored)).T) & np.uint8((1 << self.bits) - 1)


def read_weights(settings: GPTQSettings, tensors: Mapping[str, TensorInfo], source: Source) -> dict[str, GPTQWeight]:
    """Every quantized weight by its name. Raises one DiagnosticError for all that do not fit."""
    found = read_modules(tensors, LEAVES, lambda prefix, module: _weight(settings, prefix, module, source))
    symmetric = settings.symmetric and all(_is_symmetric(w) for w in found.values())
    ordered = frozenset(_stack(w.name) for w in found.values() if w.order and w.sorted is None)
    return {name: _in_format(w, symmetric, _stack(name) in ordered) for name, w in found.items()}


def _weight(settings: GPTQSettings, prefix: str, module: Mapping[str, TensorInfo], source: Source) -> GPTQWeight:
    qweight = expect_tensor(part_of(module, prefix, "qweight"), ("I32",))
    scales = expect_tensor(part_of(module, prefix, "scales"), WEIGHT_FORMATS)
    qzeros = expect_tensor(part_of(module, prefix, "qzeros"), ("I32",))
    words, n = qweight.shape
    if scales.shape[1] != n and qzeros.shape[1] == n:
        raise bad(qweight, "is packed as AWQ packs it, but the settings say GPTQ", "settings that fit the tensors")
    groups = scales.shape[0]
    expect_shape(scales, (groups, n), f"one scale for each of the {n} columns of {qweight.name!r}")
    bits = qzeros.shape[1] * 32 // n
    if bits * n != qzeros.shape[1] * 32 or bits not in WIDTHS or (bits != settings.bits and not settings.mixed):
        raise bad(
            qzeros,
            f"has {qzeros.shape[1]} words for {n} zero points, which is {qzeros.shape[1] * 32 / n:g} bits each",
            f"{settings.bits} bits, as the settings say" if not settings.mixed else f"one of {WIDTHS}",
        )
    expect_shape(qzeros, (groups, qzeros.shape[1]), f"a row for each of the {groups} rows of {scales.name!r}")
    k = words * 32 // bits
    if k * bits != words * 32:
        raise bad(qweight, f"has {words} rows of words", f"a multiple of {bits}, for codes of {bits} bits")
    order = module.get("g_idx")
    if order is not None:
        expect_tensor(order, ("I32",), rank=1)
        if order.shape[0] != k:
            width = words * 32 / order.shape[0]
            message = (
                f"has {words} words for the {order.shape[0]} columns of {order.name!r}, which is {width:g} bits each"
            )
            raise bad(qweight, message, f"{bits} bits, as the zero points have")
    group = (settings.group or k) if not settings.mixed else -(-k // groups)
    if -(-k // group) != groups:
        wanted = f"{-(-k // group)}, since 'group_size' is {settings.group or -1}"
        raise bad(scales, f"has {groups} groups for {k} columns", wanted)
    scattered = order is not None and not column_groups(order, group, groups, source)
    return GPTQWeight(
        name=prefix + "weight",
        shape=(n, k),
        format=F32,
        source=source,
        tensors=(qweight, scales, qzeros, *([order] if order is not None else [])),
        bits=bits,
        group=0 if groups == 1 and settings.group != k else group,
        order=order.name if order is not None and scattered else "",
        has_zeros=True,
        sorted=sorted_columns(prefix + "weight", order, group, source) if order is not None and scattered else None,
        stored=settings.stored,
    )


def _is_symmetric(weight: GPTQWeight) -> bool:
    """Whether every zero point is 2**(bits - 1), so that the symmetric format says the same."""
    step = 1 << 16
    for first in range(0, weight.shape[0], step):
        if (weight.zeros(first, min(first + step, weight.shape[0])) != 1 << (weight.bits - 1)).any():
            return False
    return True


def _stack(name: str) -> str:
    """What weights have in common that become one constant: the experts of a layer."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _in_format(weight: GPTQWeight, symmetric: bool, ordered: bool) -> GPTQWeight:
    """The weight in the low-bit format that says exactly what it stores; in floats when its groups are no runs."""
    k = weight.shape[1]
    if ordered or k % (weight.group or k):
        return replace(weight, sorted=None)
    format = GroupedIntFormat(weight.bits, weight.group, not symmetric, scale_format(weight.tensors[1]))
    return replace(weight, format=format, has_zeros=not symmetric)
