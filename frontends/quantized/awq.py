"""AWQ checkpoints (AutoAWQ's "gemm" version): integers of 4 bits with zero points.

A linear layer P of shape [n, k] is stored as P.qweight int32 [k, n / 8], P.qzeros int32 [groups, n / 8], both packed
along n in AWQ's order (see `frontends.quantized.words`), and P.scales [groups, n] in floats. A weight is
scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.config_reader import ConfigReader
from frontends.quantized.source import Source
from frontends.quantized.weight import (
    GroupedWeight,
    bad,
    expect_shape,
    expect_tensor,
    part_of,
    read_modules,
    scale_format,
)
from frontends.quantized.words import unpack_awq
from frontends.safetensors_header import TensorInfo
from ir.formats import GroupedIntFormat

LEAVES = ("qweight", "qzeros", "scales")
BITS = 4
MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class AWQSettings:
    """`group` 0 means all columns."""

    group: int

    def __str__(self) -> str:
        return f"{BITS} bit, {f'group {self.group}' if self.group else 'one group a row'}"


def read_settings(fields: ConfigReader) -> AWQSettings:
    """The validated settings. Refuses other widths and the layouts of single kernels."""
    bits = fields.integer("bits", "w_bit", low=1, high=16, default=BITS)
    if bits != BITS:
        raise fields.wrong(("bits", "w_bit"), bits, str(BITS))
    group = fields.integer("group_size", "q_group_size", low=-1, high=MAX_GROUP, default=128)
    if group == 0:
        raise fields.wrong(("group_size", "q_group_size"), group, "1 or more, or -1 for one group a row")
    version = fields.text("version", default="gemm").lower()
    backend = fields.text("backend", default="autoawq").lower()
    if version not in ("gemm", "exllama", "ipex") or backend == "llm-awq":
        layout = version if backend != "llm-awq" else backend
        raise fields.fault(
            f"the AWQ checkpoint is stored for the kernel {layout[:40]!r}",
            "the version 'gemm'",
            "save it again as that",
        )
    return AWQSettings(max(group, 0))


@dataclass(frozen=True, eq=False)
class AWQWeight(GroupedWeight):
    """`tensors` are qweight, scales and qzeros."""

    def codes(self, first: int, last: int) -> np.ndarray:
        return self._unpacked(0, first, last)

    def scales(self, first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(self.source.columns(self.tensors[1].name, first, last).T)

    def zeros(self, first: int, last: int) -> np.ndarray:
        return self._unpacked(2, first, last)

    def _unpacked(self, tensor: int, first: int, last: int) -> np.ndarray:
        low, high = first // 8, -(-last // 8)
        codes = unpack_awq(self.source.columns(self.tensors[tensor].name, low, high))
        return np.ascontiguousarray(codes[:, first - low * 8 : last - low * 8].T)


def read_weights(settings: AWQSettings, tensors: Mapping[str, TensorInfo], source: Source) -> dict[str, AWQWeight]:
    """Every quantized weight by its name. Raises one DiagnosticError for all that do not fit."""
    return read_modules(tensors, LEAVES, lambda prefix, module: _weight(settings, prefix, module, source))


def _weight(settings: AWQSettings, prefix: str, module: Mapping[str, TensorInfo], source: Source) -> AWQWeight:
    qweight = expect_tensor(part_of(module, prefix, "qweight"), ("I32",))
    scales = expect_tensor(part_of(module, prefix, "scales"), WEIGHT_FORMATS)
    qzeros = expect_tensor(part_of(module, prefix, "qzeros"), ("I32",))
    k, words = qweight.shape
    n = words * 8
    groups = scales.shape[0]
    if scales.shape[1] == words and qzeros.shape[1] != words:
        raise bad(qweight, "is packed as GPTQ packs it, but the settings say AWQ", "settings that fit the tensors")
    expect_shape(scales, (groups, n), f"one scale for each of the {n} columns of {BITS} bits in {qweight.name!r}")
    expect_shape(qzeros, (groups, words), f"a row for each row of {scales.name!r}, packed like {qweight.name!r}")
    group = settings.group or k
    if k % group or k // group != groups:
        message = f"has {groups} groups for {k} columns"
        raise bad(scales, message, f"{k / group:g}, since 'group_size' is {settings.group or -1}")
    return AWQWeight(
        name=prefix + "weight",
        shape=(n, k),
        format=GroupedIntFormat(BITS, settings.group, True, scale_format(scales)),
        source=source,
        tensors=(qweight, scales, qzeros),
        bits=BITS,
        group=settings.group,
        has_zeros=True,
    )
