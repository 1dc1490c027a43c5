"""The directory of a quantized checkpoint: shards, their index, config.json and what lies beside them.

Tensors come in the order of the checkpoint that was quantized: those that were rounded as their parts, out of the files
that `state` keeps; those with factors computed; all others byte by byte. Written under a temporary name, config.json
last (without it nothing loads), and renamed when whole. Memory holds a chunk of a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from frontends.checkpoint import Checkpoint
from frontends.checkpoint_files import INDEX_FILE, SINGLE_FILE, companion
from frontends.huggingface import ImportedModel
from frontends.json_file import read_json_object
from ir.diagnostics import DiagnosticError
from passes.quantize.calibrate.awq import Scaling
from passes.quantize.calibrate.compressed_layout import part_shapes, quantization_config
from passes.quantize.calibrate.safetensors_writer import Entry, dtype_name, write_safetensors
from passes.quantize.calibrate.state import KeptTensors
from passes.quantize.calibrate.targets import Targets

MAX_SHARD_BYTES = 4 << 30
REPORT_FILE = "quantization_report.json"
# Files beside those of `ImportedModel.files` that other programs read.
_ALSO = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "README.md",
         "LICENSE", "LICENSE.txt", "LICENSE-PSF.txt")  # fmt: skip


def write_directory(
    imported: ImportedModel,
    targets: Targets,
    kept: KeptTensors,
    scaling: Scaling,
    out: Path,
    report: str,
    tell: Callable[[str, float, float, str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `out`. Raises DiagnosticError when the disk refuses."""
    part = out.with_name(f".{out.name}.writing")
    entries = [
        entry for name in imported.checkpoint.tensors for entry in _entries(imported, targets, kept, scaling, name)
    ]
    total = sum(entry.nbytes for entry in entries)
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell("write", done, total, "bytes")

    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        _write_shards(part, _shards(entries, max_shard_bytes), total, wrote)
        _copy_companions(imported, part)
        (part / REPORT_FILE).write_text(report, encoding="utf-8")
        config = read_json_object(imported.directory / "config.json")
        settings = quantization_config(targets.formats, targets.linears)
        text = json.dumps({**config, "quantization_config": settings}, indent=2, ensure_ascii=False)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")
        os.rename(part, out)
    except OSError as error:
        raise DiagnosticError(f"cannot be written: {error.strerror}", where=str(error.filename or out)) from error


def _entries(
    imported: ImportedModel, targets: Targets, kept: KeptTensors, scaling: Scaling, name: str
) -> Iterable[Entry]:
    checkpoint = imported.checkpoint
    info = checkpoint.info(name)
    if name in targets.formats:
        n, k = info.shape
        for leaf, (dtype, shape) in part_shapes(targets.formats[name], (n, k)).items():
            full = f"{name.removesuffix('.weight')}.{leaf}"
            yield Entry(full, dtype_name(dtype), shape, lambda leaf=leaf: _kept_part(kept, name, leaf))
    elif scaling.changes(name):
        yield Entry(name, info.dtype, info.shape, lambda: [_scaled(checkpoint, scaling, name)])
    else:
        yield Entry(name, info.dtype, info.shape, lambda: [checkpoint.byte_view(name)])


def _kept_part(kept: KeptTensors, name: str, leaf: str) -> Iterable[bytes | memoryview]:
    infos = kept.infos(name)
    if infos is None:
        raise DiagnosticError(f"the finished tensor {name!r} is gone", where=str(kept.directory), hint="run it again")
    with Checkpoint(kept.directory, infos, {}) as file:
        yield file.read_stored(leaf).tobytes()


def _scaled(checkpoint: Checkpoint, scaling: Scaling, name: str) -> bytes:
    values = checkpoint.read(name)
    return scaling.apply(name, values).astype(values.dtype).tobytes()


def _shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, cut where a shard would become too large."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shards(part: Path, shards: list[list[Entry]], total: int, tell: Callable[[int], None]) -> None:
    if len(shards) == 1:
        write_safetensors(part / SINGLE_FILE, shards[0], tell=tell)
        return
    placement: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(part / name, entries, tell=tell)
        placement.update(dict.fromkeys((entry.name for entry in entries), name))
    index = {"metadata": {"total_size": total}, "weight_map": placement}
    (part / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_companions(imported: ImportedModel, part: Path) -> None:
    found = {name: path for name, path in imported.files.items() if name != "config.json"}
    for name in _ALSO:
        path = companion(imported.directory, name)
        if path is not None:
            found[name] = path
    for name, path in found.items():
        shutil.copyfile(path, part / name)
