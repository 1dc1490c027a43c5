"""What a checkpoint or an artifact holds, as plain data and as text: what `compile-model inspect` prints.

Only headers and manifests are read, never weights (unless verification is asked for).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum.progress import format_bytes, format_count

if TYPE_CHECKING:
    from runtime.manifest import Manifest, ProgramInfo

_PRODUCTS = ("decode", "gemm", "wgmma", "experts", "wide")  # first words of kernels' names
MAX_MANIFEST_BYTES = 256 << 20


def describe_checkpoint(directory: Path) -> dict[str, Any]:
    """Facts of a Hugging Face directory. Raises DiagnosticError for what cannot be compiled."""
    from frontends.huggingface import import_model

    imported = import_model(directory)
    with imported.checkpoint as checkpoint:
        config = imported.config
        by_dtype: dict[str, dict[str, int]] = {}
        tensors = []
        for info in checkpoint.tensors.values():
            count = by_dtype.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
            count["tensors"] += 1
            count["parameters"] += math.prod(info.shape)
            count["bytes"] += info.nbytes
            tensors.append(
                {
                    "name": info.name,
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "bytes": info.nbytes,
                    "file": info.file.name,
                }
            )
        moe = config.moe
        return {
            "kind": "checkpoint",
            "path": str(directory),
            "name": imported.name,
            "family": config.family,
            "parameters": imported.num_parameters,
            "bytes": checkpoint.nbytes,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_size": config.ffn_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "experts": moe.num_experts if moe else 0,
            "experts_per_token": moe.top_k if moe else 0,
            "vocab_size": config.vocab_size,
            "max_context": config.max_context,
            "quantization": getattr(checkpoint, "quantization", ""),
            "license": imported.license,
            "files": sorted(imported.files),
            "dtypes": by_dtype,
            "warnings": list(imported.warnings),
            "tensors": tensors,
        }


def describe_artifact(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Facts of an artifact, all its checks made; `fault` says why it does not load here, or is "".

    Raises RuntimeDiagnostic for a manifest that cannot be read at all.
    """
    from runtime.artifact import MANIFEST_NAME, open_artifact
    from runtime.errors import RuntimeDiagnostic
    from runtime.manifest_reader import parse_manifest

    fault = ""
    try:
        manifest = open_artifact(path, verify=verify).manifest
    except RuntimeDiagnostic as error:
        fault = str(error)
        with (path / MANIFEST_NAME).open("rb") as file:
            manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES), str(path))
    formats: dict[str, dict[str, int]] = {}
    for tensor in manifest.weights.tensors:
        count = formats.setdefault(tensor.format, {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += tensor.bytes
    return {
        "kind": "artifact",
        "path": str(path),
        "stratum_version": manifest.stratum_version,
        **{key: manifest.model.get(key) for key in ("name", "family", "parameters", "license")},
        "vocab_size": manifest.vocab_size,
        "max_context": manifest.max_context,
        "dtype": manifest.dtype,
        "target": manifest.raw["target"],
        "gpu_code": _gpu_code(manifest),
        "pipeline": manifest.raw.get("pipeline", ""),
        "programs": {
            program.name: {
                "max_tokens": program.max_tokens,
                "arena_bytes": program.arena_bytes,
                "launches": len(program.launches),
                "products": _products(manifest, program),
            }
            for program in manifest.programs
        },
        "kv_bytes_per_position": manifest.kv.bytes_per_position,
        "kv_format": manifest.kv.format,
        "kv_recent": manifest.kv.recent,
        "kv_ring": manifest.kv.ring,
        "kv_bytes_per_slot": manifest.kv.bytes_per_slot,
        "weights_bytes": manifest.weights.bytes,
        "formats": formats,
        "stand_ins": manifest.raw.get("stand_ins", ""),
        "stand_in_bytes": sum(piece.bytes for piece in manifest.weights.pieces if piece.kind == "stand_ins"),
        "expert_classes": _expert_classes(manifest),
        "files": manifest.raw["files"],
        "weights_hashed": verify,
        "fault": fault,
    }


def checkpoint_text(facts: dict[str, Any], *, tensors: bool = False) -> str:
    """`describe_checkpoint` for people."""
    count = sum(d["tensors"] for d in facts["dtypes"].values())
    lines = [
        f"{facts['path']}: checkpoint, {facts['family']}",
        f"  parameters  {format_count(facts['parameters'])} ({facts['parameters']})",
        f"  weights     {format_bytes(facts['bytes'])} in {count} tensors: "
        + ", ".join(f"{name} {format_bytes(d['bytes'])}" for name, d in facts["dtypes"].items()),
        f"  layers      {facts['layers']} of width {facts['hidden_size']}, mlp {facts['ffn_size']}",
        f"  heads       {facts['heads']} query, {facts['kv_heads']} key/value, of {facts['head_dim']}",
    ]
    if facts["experts"]:
        lines.append(f"  experts     {facts['experts']}, {facts['experts_per_token']} a token")
    if facts["quantization"]:
        lines.append(f"  quantized   {facts['quantization']}")
    lines += [
        f"  vocabulary  {facts['vocab_size']}, context {facts['max_context']}",
        f"  licence     {facts['license'] or '(not stated)'}",
        f"  files       {', '.join(facts['files'])}",
    ]
    lines += [f"  warning     {message}" for message in facts["warnings"]]
    if tensors:
        lines += [
            f"  {t['name']:<60} {t['dtype']:<5} {'x'.join(map(str, t['shape'])) or 'scalar':<16} {t['bytes']}"
            for t in facts["tensors"]
        ]
    return "\n".join(lines)


def _ring_lines(facts: dict[str, Any]) -> list[str]:
    """What a sequence keeps besides its positions: those read last, in 16 bits."""
    if not facts["kv_ring"]:
        return []
    return [
        f"              the newest {facts['kv_recent']} positions are read in bf16, from a ring of {facts['kv_ring']}, "
        f"{format_bytes(facts['kv_bytes_per_slot'])} a sequence"
    ]


def _gpu_code(manifest: Manifest) -> dict[str, bool]:
    """Architecture -> whether there is machine code beside the PTX; nothing for CPUs."""
    found = manifest.raw.get("gpu") if manifest.target.is_gpu else None
    code = found.get("code", ()) if isinstance(found, dict) else ()
    return {str(entry.get("architecture")): bool(entry.get("cubin")) for entry in code if isinstance(entry, dict)}


def _products(manifest: Manifest, program: ProgramInfo) -> list[str]:
    """The kinds of kernels for matrix products that a program for a GPU launches; nothing for CPUs."""
    if not manifest.target.is_gpu:
        return []
    words = [launch.name.split("_") for launch in program.launches]
    kinds = ["wgmma" if "wgmma" in word[:2] else word[0] for word in words]
    return [kind for kind in _PRODUCTS if kind in kinds]


def _code_line(facts: dict[str, Any]) -> str:
    """What the code needs: features of a CPU, architectures of GPUs."""
    if not facts["gpu_code"]:
        return f"  features    {' '.join(facts['target']['features']) or '(the baseline)'}"
    made = [f"{name} (PTX{' and machine code' if whole else ''})" for name, whole in facts["gpu_code"].items()]
    only = all(name.endswith("a") for name in facts["gpu_code"])
    others = "no other GPUs run it" if only else "newer GPUs take the newest PTX"
    return f"  GPU code    {', '.join(made)}; {others}; run with --device cuda"


def artifact_text(facts: dict[str, Any]) -> str:
    """`describe_artifact` for people."""
    target = facts["target"]
    checked = "all hashes checked" if facts["weights_hashed"] else "--verify hashes large weights too"
    lines = [
        f"{facts['path']}: artifact of stratum {facts['stratum_version']}, {facts['name']} ({facts['family']})",
        f"  parameters  {format_count(facts['parameters'] or 0)}, licence {facts['license'] or '(not stated)'}",
        f"  weights     {format_bytes(facts['weights_bytes'])}: "
        + ", ".join(f"{name} {format_bytes(f['bytes'])}" for name, f in facts["formats"].items()),
        f"  KV cache    {facts['kv_format']}, {format_bytes(facts['kv_bytes_per_position'])} a position, "
        f"context {facts['max_context']}",
        *_ring_lines(facts),
        *_stand_in_lines(facts),
        *_class_lines(facts),
        f"  target      {target['name']} ({target['triple']}, {target['cpu']})",
        _code_line(facts),
        f"  pipeline    {facts['pipeline']}",
    ]
    for name, program in facts["programs"].items():
        lines.append(
            f"  {name:<11} up to {program['max_tokens']} tokens a step, {program['launches']} kernels, "
            f"{format_bytes(program['arena_bytes'])} of activations"
            + (f", products by {', '.join(program['products'])}" if program["products"] else "")
        )
    lines += [
        f"  {entry['sha256'][:16]}  {entry['bytes']:>12}  {name}" for name, entry in sorted(facts["files"].items())
    ]
    where = "on an NVIDIA GPU (--device cuda), " if facts["gpu_code"] else "yes, "
    lines.append(f"  loads here  {'no' if facts['fault'] else where + checked}")
    return "\n".join(lines)


def _expert_classes(manifest: Manifest) -> list[dict[str, Any]]:
    """Pieces of experts in several formats, equal ones together: which experts have which formats and bytes."""
    found: dict[str, dict[str, Any]] = {}
    for piece in manifest.weights.pieces:
        classes = []
        for unit, experts in piece.classes:
            at = piece.place(experts[0])[0]
            formats = [t.format for t in manifest.weights.tensors if at <= t.offset < at + unit]
            classes.append({"experts": list(experts), "formats": list(dict.fromkeys(formats)), "bytes": unit})
        if classes:
            found.setdefault(repr(classes), {"pieces": [], "classes": classes})["pieces"].append(piece.origin)
    return list(found.values())


def _class_lines(facts: dict[str, Any]) -> list[str]:
    """Which experts have which formats, where they differ."""
    from passes.quantize.expert_ranges import ranges_of, ranges_text

    lines = []
    for entry in facts["expert_classes"]:
        origins = entry["pieces"]
        more = f" and {len(origins) - 1} more" if len(origins) > 1 else ""
        classes = (
            f"{ranges_text(ranges_of(c['experts']))} {' + '.join(c['formats'])} {format_bytes(c['bytes'])}"
            for c in entry["classes"]
        )
        lines.append(f"  experts     {origins[0]}{more}: {', '.join(classes)}")
    return lines


def _stand_in_lines(facts: dict[str, Any]) -> list[str]:
    """Copies of the experts in fewer bits, where there are any."""
    if not facts["stand_in_bytes"]:
        return []
    return [f"  stand-ins   {facts['stand_ins']}, {format_bytes(facts['stand_in_bytes'])} of the weights"]
