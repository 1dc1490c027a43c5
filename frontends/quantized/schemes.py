"""Which scheme a checkpoint is quantized with, and the refusal of those that cannot be imported.

`find_settings` takes the fields of config.json and gives the settings of a scheme that is imported. Where there are
none, `find_settings_of` takes the tensors, whose names tell, and looks for the files that older tools wrote instead.
Refused by name: every other scheme, and quantized tensors without settings: what their numbers mean is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from frontends.checkpoint_files import companion
from frontends.config_reader import ConfigReader
from frontends.json_file import read_json_object
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import DiagnosticError

GPTQ, AWQ, FP8, COMPRESSED, MXFP4 = "GPTQ", "AWQ", "FP8", "compressed-tensors", "MXFP4"
IMPORTED = (GPTQ, AWQ, COMPRESSED, FP8, MXFP4)

# quant_method in config.json -> name of the scheme
SCHEMES = {
    "gptq": GPTQ,
    "awq": AWQ,
    "fp8": FP8,
    "fbgemm_fp8": FP8,
    "compressed-tensors": COMPRESSED,
    "compressed_tensors": COMPRESSED,
    "mxfp4": MXFP4,
    "modelopt": "ModelOpt",
    "bitsandbytes": "bitsandbytes",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "quark": "Quark",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "torchao": "torchao",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "fp_quant": "FP-Quant",
    "sinq": "SINQ",
    "metal": "Metal (MLX)",
}
# Files beside config.json that hold the settings when config.json does not, and the scheme they stand for.
LEGACY_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


@dataclass(frozen=True)
class QuantizationSettings:
    """`scheme` is one of `IMPORTED`; `fields` are its settings, not yet validated."""

    scheme: str
    fields: ConfigReader
    evidence: str  # where they were found, for messages


def find_settings(fields: ConfigReader) -> QuantizationSettings | None:
    """The settings in config.json, None when there are none. Raises DiagnosticError for schemes not imported."""
    for name in ("quantization_config", "compression_config", "quantization"):
        settings = fields.value(name)
        if not settings:
            continue
        evidence = f"{name} in config.json"
        if not isinstance(settings, Mapping):
            raise _refusal(f"an unknown scheme, {str(settings)[:60]!r}", evidence, fields.where)
        method = "metal" if name == "quantization" and "group_size" in settings else ""
        return _settings(ConfigReader(settings, fields.where, f"{name}."), method, evidence)
    return None


def find_settings_of(tensors: Mapping[str, TensorInfo], directory: Path) -> QuantizationSettings | None:
    """The settings beside config.json of a checkpoint whose tensors are quantized, None for one of floats.

    Raises DiagnosticError for schemes not imported, and when nothing says how the tensors are quantized.
    """
    found = _scheme_of_tensors(tensors)
    if found is None:
        return None
    scheme, evidence = found
    for file, method in LEGACY_FILES.items():
        path = companion(directory, file)
        if path is not None:
            return _settings(ConfigReader(read_json_object(path), str(path)), method, file)
    if scheme not in (*IMPORTED, "GPTQ or AWQ"):
        raise _refusal(scheme, evidence, str(directory))
    raise DiagnosticError(
        f"the checkpoint is quantized with {scheme} ({evidence}), but config.json does not say how",
        where=str(directory),
        expected="the 'quantization_config' that the quantizer wrote into config.json",
        hint="take config.json from the place the weights came from",
    )


def _settings(settings: ConfigReader, method: str, evidence: str) -> QuantizationSettings:
    method = str(settings.fields.get("quant_method") or method).lower()
    if not method and (settings.fields.get("load_in_4bit") or settings.fields.get("load_in_8bit")):
        method = "bitsandbytes"
    if not method and "config_groups" in settings.fields:
        method = "compressed-tensors"
    if method == "modelopt":
        return _modelopt(settings, evidence)
    if method == "fp8" and settings.fields.get("expert_dtype", "fp8") != "fp8":
        raise _refusal("FP8 with experts in FP4", evidence, settings.where)
    scheme = SCHEMES.get(method, f"an unknown scheme, {(method or 'None')[:60]!r}")
    if scheme not in IMPORTED:
        raise _refusal(scheme, evidence, settings.where)
    return QuantizationSettings(scheme, settings, evidence)


def _modelopt(settings: ConfigReader, evidence: str) -> QuantizationSettings:
    """ModelOpt stores FP8 like everybody; its FP4 has scales of two levels, for which there is no format."""
    inner = settings.fields.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else settings.fields).get("quant_algo")
    if algorithm != "FP8":
        raise _refusal(f"ModelOpt {str(algorithm or '')[:40]}".rstrip(), evidence, settings.where)
    return QuantizationSettings(FP8, ConfigReader({}, settings.where), evidence)


def _refusal(scheme: str, evidence: str, where: str) -> DiagnosticError:
    return DiagnosticError(
        f"the checkpoint is quantized with {scheme} ({evidence})",
        where=where,
        expected=f"weights in F32, F16 or BF16, or quantized with {', '.join(IMPORTED[:-1])} or {IMPORTED[-1]}",
        hint="use the checkpoint that this one was quantized from",
    )


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
    "g_idx": GPTQ,
    "qweight": "",
    "quant_state": "bitsandbytes",
    "packed": COMPRESSED,
    "blocks": MXFP4,
    "fp8": FP8,
    "scale": COMPRESSED,
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
    return AWQ if zeros.shape[-1:] == tensors[qweight].shape[-1:] else GPTQ
