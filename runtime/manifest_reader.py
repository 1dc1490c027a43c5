"""Reads an artifact's manifest: the bytes of `manifest.json` to a frozen `Manifest`, typed and bounded.

The file is hostile until proven otherwise: the format version is looked at first, then the manifest's own hash, then
every field the runtime uses is checked for its type and bounded before anything is allocated from it. Refuses with one
RuntimeDiagnostic that names the field.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from runtime.await_info import read_await
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import (
    FileInfo,
    KVInfo,
    LaunchInfo,
    Manifest,
    ProgramInfo,
    TargetInfo,
    TensorInfo,
    WeightsInfo,
)
from runtime.manifest_checks import check_consistent
from runtime.manifest_fields import REBUILD_HINT, Fields, short
from runtime.piece_info import read_pieces

FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 256 << 20  # a 100 000-tensor model needs about 25 MiB
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_HEX = re.compile(r"[0-9a-f]+")


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of everything but `manifest_sha256`, over canonical JSON (sorted keys, no spaces, UTF-8)."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Checks and types a manifest. `where` is the path shown in diagnostics."""
    raw = _load_json(text, where)
    _check_version(raw, where)
    if raw.get("manifest_sha256") != manifest_digest(raw):
        raise RuntimeDiagnostic(
            "the manifest was changed after it was written (its own hash does not match)",
            where=where,
            hint=REBUILD_HINT,
        )
    return _typed(raw, Fields(raw, where))


def _load_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as fault:
        reason = "nested too deeply" if isinstance(fault, RecursionError) else str(fault)
        raise RuntimeDiagnostic(
            f"not a readable manifest: {reason}",
            where=where,
            hint=REBUILD_HINT,
        ) from None
    if not isinstance(raw, dict):
        raise RuntimeDiagnostic("not a readable manifest", where=where, expected=f"an object, got {_kind(raw)}")
    return raw


def _check_version(raw: dict[str, Any], where: str) -> None:
    version = raw.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version == FORMAT_VERSION:
        return
    writer = raw.get("stratum_version")
    by = f" (written by stratum {writer[:40]})" if isinstance(writer, str) else ""
    newer = isinstance(version, int) and version > FORMAT_VERSION
    raise RuntimeDiagnostic(
        f"artifact format version {short(version)}{by} cannot be read by this stratum",
        where=where,
        expected=f"format version {FORMAT_VERSION}",
        hint=("use the newer stratum that wrote it, or " if newer else "") + REBUILD_HINT,
    )


def _typed(raw: dict[str, Any], top: Fields) -> Manifest:
    model = top.child("model")
    kv = top.child("kv")
    target = top.child("target")
    manifest = Manifest(
        stratum_version=top.text("stratum_version"),
        model=model.values,
        vocab_size=model.integer("vocab_size", 1, 1 << 30),
        max_context=model.integer("max_context", 1, 1 << 30),
        dtype=top.text("dtype"),
        target=TargetInfo(
            target.text("name"), target.text("triple"), target.text("cpu"), tuple(target.texts("features"))
        ),
        programs=_programs(top.child("programs")),
        kv=KVInfo(
            layers=kv.integer("layers", 0, 1 << 16),
            num_kv_heads=kv.integer("num_kv_heads", 0, 1 << 16),
            head_dim=kv.integer("head_dim", 0, 1 << 16),
            format=kv.text("format"),
            bytes_per_position=kv.integer("bytes_per_position", 0, 1 << 32),
            block=kv.integer("block", 1, 1 << 16),
            bytes_per_slot=kv.integer("bytes_per_slot", 0, 1 << 40, 0),
            recent=kv.integer("recent", 0, 1 << 30, 0),
            ring=kv.integer("ring", 0, 1 << 30, 0),
        ),
        weights=read_weights(top.child("weights")),
        files=_files(top.child("files")),
        raw=raw,
        experts_per_token=model.integer("experts_per_token", 0, 1 << 16, 0),
    )
    check_consistent(manifest, top)
    return manifest


def _programs(fields: Fields) -> tuple[ProgramInfo, ...]:
    programs = []
    for name in sorted(fields.values):
        program = fields.child(name)
        symbol = program.text("symbol")
        if not _SYMBOL.fullmatch(symbol):
            program.fail("symbol", "a C identifier", symbol)
        launches = tuple(
            LaunchInfo(
                launch.text("name"),
                launch.text("origin", ""),
                launch.number("bytes"),
                launch.number("flops_per_token"),
            )
            for launch in program.children("launches", 1 << 20)
        )
        awaits = tuple(read_await(wait) for wait in program.children("awaits", 1 << 20, ()))
        arena = program.integer("arena_bytes", 0, 1 << 44)
        tokens = program.integer("max_tokens", 1, 1 << 20)
        kv_awaits = tuple(program.integers("kv_awaits", 0, 1 << 16)) if "kv_awaits" in program.values else ()
        programs.append(ProgramInfo(name, symbol, tokens, arena, launches, awaits, kv_awaits))
    if not programs:
        fields.fail("", "at least one program", fields.values)
    return tuple(sorted(programs, key=lambda p: (p.max_tokens, p.name)))


def read_weights(fields: Fields) -> WeightsInfo:
    """The entry `weights`: tensors and pieces inside of the file."""
    total = fields.integer("bytes", 0, 1 << 50)
    tensors = []
    for tensor in fields.children("tensors", 1 << 24):
        info = TensorInfo(
            tensor.text("name"), tensor.integer("offset", 0, total), tensor.integer("bytes", 0, total),
            tensor.text("format"),
        )  # fmt: skip
        if info.offset + info.bytes > total:
            tensor.fail("offset", f"offset + bytes <= {total}, the size of the weights", info.offset + info.bytes)
        tensors.append(info)
    return WeightsInfo(fields.text("file"), total, tuple(tensors), read_pieces(fields, total))


def _files(fields: Fields) -> dict[str, FileInfo]:
    files = {}
    for path in fields.values:
        entry = fields.child(path)
        sha256 = entry.text("sha256")
        if len(sha256) != 64 or not _HEX.fullmatch(sha256):
            entry.fail("sha256", "64 hexadecimal digits", sha256)
        files[path] = FileInfo(entry.integer("bytes", 0, 1 << 50), sha256)
    return files


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}.get(
        type(value), "null"
    )
