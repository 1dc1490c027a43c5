"""Checkpoints whose weights are quantized already: GPTQ, AWQ, compressed-tensors, FP8, MXFP4 in, low-bit formats out.

    settings = find_settings(fields)                       # what config.json says; refuses schemes that are not known
    checkpoint = open_quantized(settings, checkpoint)      # the same checkpoint, its packed tensors seen as weights

Nothing is rounded: a weight NAME of the model becomes the parts of one of the formats of `ir.formats`, which are read
as tensors NAME.codes, NAME.scales, NAME.zeros of the checkpoint, some rows at a time. docs/checkpoints.md has the
table of what becomes what.
"""

from frontends.quantized.checkpoint import QuantizedCheckpoint, open_quantized
from frontends.quantized.schemes import QuantizationSettings, find_settings, find_settings_of
from frontends.quantized.weight import ColumnOrder, QuantizedWeight

__all__ = [
    "ColumnOrder",
    "QuantizationSettings",
    "QuantizedCheckpoint",
    "QuantizedWeight",
    "find_settings",
    "find_settings_of",
    "open_quantized",
]
