"""A quantized checkpoint, seen as the weights that the model names.

`QuantizedCheckpoint.tensors` has one entry for each weight, packed or not: of a packed one, NAME, the dtype is its
format and the shape that of the matrix. Its parts are read as NAME.codes, NAME.scales, NAME.zeros, and NAME.columns
where the codes are in another order than the columns of the matrix; `read_rows(NAME)` gives the floats of the matrix.
Tensors that only matter to a quantized activation or cache are left out and named in `warnings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from frontends.checkpoint import Checkpoint
from frontends.quantized import awq, compressed, fp8, gptq, mxfp4
from frontends.quantized.schemes import AWQ, COMPRESSED, FP8, GPTQ, MXFP4, QuantizationSettings
from frontends.quantized.source import Source
from frontends.quantized.weight import ColumnOrder, GroupedWeight, QuantizedWeight
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError

_SCHEMES: dict[str, tuple[Callable[..., Any], Callable[..., Mapping[str, QuantizedWeight]]]] = {
    GPTQ: (gptq.read_settings, gptq.read_weights),
    AWQ: (awq.read_settings, awq.read_weights),
    COMPRESSED: (compressed.read_settings, compressed.read_weights),
    FP8: (fp8.read_settings, fp8.read_weights),
    MXFP4: (mxfp4.read_settings, mxfp4.read_weights),
}
# Last name parts of tensors that say how activations or the KV cache were quantized: nothing the weights need.
_UNUSED = frozenset(
    ("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale", "output_scale",
     "output_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point")
)  # fmt: skip

# What follows the name of a weight in the names of tensors that were read when it was found.
_READ_BEFORE = ("_shape", "_g_idx")


def open_quantized(settings: QuantizationSettings, checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """The checkpoint as its weights. Raises DiagnosticError when the tensors are not what the settings say."""
    read_settings, read_weights = _SCHEMES[settings.scheme]
    details = read_settings(settings.fields)
    weights = read_weights(details, checkpoint.tensors, Source(checkpoint))
    if not weights:
        raise DiagnosticError(
            f"{settings.evidence} says {settings.scheme}, but no tensor is stored so",
            where=str(checkpoint.directory),
            expected="tensors that fit the settings",
            hint="a checkpoint of floats has no such settings; changing a label does not convert tensors",
        )
    weights = _with_shared_orders(weights)
    tensors, unused = _visible(checkpoint, weights)
    warnings = []
    if unused:
        warnings.append(
            f"{len(unused)} tensors, {unused[0]} first, are scales of activations or of the KV cache; they are not used"
        )
    as_floats = [w.name for w in weights.values() if not w.low_bit]
    if as_floats:
        warnings.append(
            f"{len(as_floats)} weights, {as_floats[0]} first, are experts whose groups of columns are no neighbours "
            "(act-order), or have groups that do not fill the rows; they are used as floats, and a recipe can round "
            "them anew"
        )
    return QuantizedCheckpoint(checkpoint, tensors, weights, f"{settings.scheme}, {details}", tuple(warnings))


def _with_shared_orders(weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The weights, of which those whose columns are in one order name one tensor for it: they can read one gather."""
    known: dict[bytes, ColumnOrder] = {}
    found: dict[str, QuantizedWeight] = {}
    for name, weight in weights.items():
        if isinstance(weight, GroupedWeight) and weight.sorted is not None:
            shared = known.setdefault(weight.sorted.columns.tobytes(), weight.sorted)
            weight = replace(weight, sorted=shared)
        found[name] = weight
    return found


def _visible(stored: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> tuple[dict[str, TensorInfo], list[str]]:
    """(the weights, each at the place of its first tensor, and all tensors that are no part of one; unused tensors)."""
    packed = {info.name: weight for weight in weights.values() for info in weight.tensors}
    spoken_for = {name + leaf for name in weights for leaf in _READ_BEFORE}
    part_names = {f"{weight.name}.{part}" for weight in weights.values() for part in weight.parts()}
    part_names |= {weight.order_of_codes.name for weight in weights.values() if weight.order_of_codes is not None}
    tensors: dict[str, TensorInfo] = {}
    unused: list[str] = []
    for name, info in stored.tensors.items():
        weight = packed.get(name)
        if name in part_names or (name in weights and weight is None):
            raise DiagnosticError(
                f"has {name!r} both packed and as floats", where=str(info.file), expected="one of them"
            )
        if weight is not None:
            if name == weight.tensors[0].name:
                dtype = str(weight.format) if weight.low_bit else "F32"
                view = replace(info, name=weight.name, dtype=dtype, shape=weight.shape, nbytes=weight.nbytes)
                tensors[weight.name] = view
        elif name in spoken_for:
            continue
        elif name.rpartition(".")[2] in _UNUSED:
            unused.append(name)
        else:
            tensors[name] = info
    return tensors, unused


class QuantizedCheckpoint(Checkpoint):
    """`quantized` are the packed weights by name; `quantization` says in words what they are."""

    def __init__(
        self,
        stored: Checkpoint,
        tensors: dict[str, TensorInfo],
        quantized: Mapping[str, QuantizedWeight],
        quantization: str,
        warnings: tuple[str, ...],
    ) -> None:
        super().__init__(stored.directory, tensors, stored.metadata)
        self.stored = stored
        self.quantized = dict(quantized)
        self.quantization = quantization
        self.warnings = warnings
        self._parts = {
            f"{name}.{part}": (weight, part) for name, weight in quantized.items() for part in weight.parts()
        }
        orders = [w.order_of_codes for w in quantized.values()]
        self._orders = {order.name: order.columns for order in orders if order is not None}
        self._not_stored = {*self._parts, *self._orders, *self.quantized}

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def info(self, name: str) -> TensorInfo:
        if name in self._parts:
            weight, part = self._parts[name]
            element, shape = weight.part_type(part)
            nbytes = element.nbytes(shape)
            return replace(weight.tensors[0], name=name, dtype=str(element).upper(), shape=shape, nbytes=nbytes)
        if name in self._orders:
            order, weight = self._orders[name], self.quantized[name.removesuffix(".columns")]
            return replace(weight.tensors[0], name=name, dtype="I32", shape=order.shape, nbytes=order.nbytes)
        return super().info(name)

    def read(self, name: str) -> np.ndarray:
        if name in self._not_stored:
            return self.read_rows(name, 0, self.info(name).shape[0])
        return super().read(name)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        if name not in self._not_stored:
            return super().read_rows(name, first, last)
        rows = self.info(name).shape[0]
        if not 0 <= first <= last <= rows:
            raise ValueError(f"rows {first} to {last} of {name}, which has {rows}")
        if name in self._parts:
            weight, part = self._parts[name]
            return weight.read_part(part, first, last)
        if name in self._orders:
            return self._orders[name][first:last]
        return self.quantized[name].floats(first, last)

    def byte_view(self, name: str) -> memoryview:
        if name in self._not_stored:
            raise ValueError(f"{name} is packed in the file; its bytes are not those of an array")
        return super().byte_view(name)

    def zero_biases(self, needed: Mapping[str, object]) -> frozenset[str]:
        """Biases of packed weights that the model has no use for and that are zero, as some quantizers add them."""
        found = []
        for name in self.tensors:
            weight = name.removesuffix(".bias") + ".weight"
            if name.endswith(".bias") and name not in needed and weight in self.quantized and not self.read(name).any():
                found.append(name)
        return frozenset(found)

    def close(self) -> None:
        super().close()
        self.stored.close()
