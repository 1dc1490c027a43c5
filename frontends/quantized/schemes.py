"""Recognises checkpoints whose weights are quantized already, and refuses them by the name of their scheme.

Takes the parsed config.json and the tensors. The config's `quantization_config` is asked first; without it the tensor
names tell: every scheme has suffixes of its own. A label without such tensors, and such tensors without a label, are
both refused: changing a label does not convert tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError

# quant_method in config.json -> name of the scheme
SCHEMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "modelopt": "ModelOpt",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "torchao": "torchao",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
}


def refuse_quantized(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: Path) -> None:
    """Raises DiagnosticError when the checkpoint is quantized."""
    found = _scheme_of_config(config) or _scheme_of_tensors(tensors)
    if found is None:
        return
    scheme, evidence = found
    raise DiagnosticError(
        f"the checkpoint is quantized with {scheme} ({evidence})",
        where=str(where),
        expected="weights in F32, F16 or BF16",
        hint="use the checkpoint that this one was quantized from",
    )


def _scheme_of_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    for field in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(field)
        if not settings:
            continue
        if not isinstance(settings, Mapping):
            return f"an unknown scheme, {str(settings)[:60]!r}", f"{field} in config.json"
        method = settings.get("quant_method") or settings.get("quant_algo")
        if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
            method = "bitsandbytes"
        name = SCHEMES.get(str(method).lower(), f"an unknown scheme, {str(method)[:60]!r}")
        bits = settings.get("bits")
        width = f"{bits}-bit, " if type(bits) is int else ""
        return name, f"{width}{field} in config.json"
    return None


def _scheme_of_tensors(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The scheme that the most telling tensor belongs to, in the order of `_HINTS`."""
    first: dict[str, str] = {}
    for name, info in tensors.items():
        hint = _hint(name.rpartition(".")[2], name, info.dtype)
        if hint:
            first.setdefault(hint, name)
    for hint, scheme in _HINTS.items():
        if hint in first:
            if hint == "qweight":
                scheme = _gptq_or_awq(first[hint], tensors)
            return scheme, f"tensor {first[hint]}"
    return None


_HINTS = {
    "g_idx": "GPTQ",
    "qweight": "",
    "quant_state": "bitsandbytes",
    "packed": "compressed-tensors",
    "blocks": "MXFP4",
    "fp8": "FP8",
    "scale": "compressed-tensors",
}


def _hint(last: str, name: str, dtype: str) -> str:
    """The key of `_HINTS` for a tensor whose last name part is `last`, or ""."""
    if last in ("g_idx", "qweight"):
        return last
    if last in ("absmax", "quant_map", "nested_absmax", "SCB") or ".quant_state." in name:
        return "quant_state"
    if last in ("weight_packed", "weight_zero_point"):
        return "packed"
    if last.endswith("_blocks") and dtype == "U8":
        return "blocks"
    if last == "weight_scale_inv" or dtype.startswith("F8_"):
        return "fp8"
    return "scale" if last in ("weight_scale", "_scale") else ""


def _gptq_or_awq(qweight: str, tensors: Mapping[str, TensorInfo]) -> str:
    """AWQ packs the columns of weight and zeros alike; GPTQ packs the rows of the weight."""
    zeros = tensors.get(qweight.removesuffix("qweight") + "qzeros")
    if zeros is None:
        return "GPTQ or AWQ"
    return "AWQ" if zeros.shape[-1:] == tensors[qweight].shape[-1:] else "GPTQ"
