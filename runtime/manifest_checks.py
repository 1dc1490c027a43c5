"""What fields of a manifest say together: the size of the KV cache, of the weights, where programs wait for what.

check_consistent(manifest, fields)      # raises RuntimeDiagnostic, naming the field
"""

from __future__ import annotations

import re

from runtime.await_info import AwaitInfo, RouterInfo, StandInInfo
from runtime.manifest import KVInfo, Manifest, ProgramInfo, WeightsInfo
from runtime.manifest_fields import Fields

_ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_LOW_BIT = re.compile(r"q[1-8]_(sym|zp)<")


def check_consistent(manifest: Manifest, top: Fields) -> None:
    """Numbers that state the same fact twice must agree: the KV size, the weights' size."""
    _check_kv(manifest.kv, max(program.max_tokens for program in manifest.programs), top)
    _check_waits(manifest, top)
    listed = manifest.files.get(manifest.weights.file)
    if listed is None:
        top.fail("weights.file", "a file listed under 'files'", manifest.weights.file)
    if listed.bytes != manifest.weights.bytes:
        top.fail("weights.bytes", f"{listed.bytes}, the size listed under 'files'", manifest.weights.bytes)


def _check_kv(kv: KVInfo, most_tokens: int, top: Fields) -> None:
    element_bytes = _ELEMENT_BYTES.get(kv.format)
    if element_bytes is None and not _LOW_BIT.match(kv.format):
        top.fail("kv.format", f"{', '.join(_ELEMENT_BYTES)} or a low-bit format like q8_sym<...>", kv.format)
    numbers = kv.layers * kv.num_kv_heads * kv.head_dim * 2
    needed = numbers * element_bytes if element_bytes else kv.bytes_per_position
    if kv.bytes_per_position != needed:
        top.fail("kv.bytes_per_position", f"layers * kv heads * head_dim * 2 * {element_bytes} = {needed}",
                 kv.bytes_per_position)  # fmt: skip
    if kv.bytes_per_position > 4 * numbers or kv.bytes_per_position % max(1, kv.layers):
        top.fail("kv.bytes_per_position", f"a multiple of the layers, at most {4 * numbers}", kv.bytes_per_position)
    if kv.bytes_per_slot % max(1, kv.layers) or kv.bytes_per_slot > 4 * numbers * kv.ring:
        top.fail("kv.bytes_per_slot", f"a multiple of the layers, at most {4 * numbers * kv.ring}", kv.bytes_per_slot)
    if kv.ring and kv.ring < kv.recent + most_tokens:
        top.fail("kv.ring", "room for the recent positions and those of a step", kv.ring)


def _check_waits(manifest: Manifest, top: Fields) -> None:
    kv, pieces = manifest.kv, manifest.weights.pieces
    for program in manifest.programs:
        for wait in program.awaits:
            if any(p >= len(pieces) or pieces[p].kind in ("rows", "stand_ins") for p in (wait.piece, *wait.done)):
                top.fail(f"programs.{program.name}.awaits", "numbers of dense and expert pieces", wait.piece)
            _check_await(wait, program, manifest, top)
        if any(layer >= kv.layers for layer in program.kv_awaits) or len(program.kv_awaits) > 1 << 20:
            top.fail(f"programs.{program.name}.kv_awaits", f"layers of the KV cache, 0..{kv.layers - 1}", "another")
    if any(piece.kind == "experts" for piece in pieces) and not manifest.experts_per_token:
        top.fail("model.experts_per_token", "at least 1, as there are experts", 0)


def _check_await(wait: AwaitInfo, program: ProgramInfo, manifest: Manifest, top: Fields) -> None:
    """What a wait says of routers and stand-ins lies in the arena and in the file."""
    if wait.router is not None:
        _check_router(program, wait.piece, wait.router, manifest.weights, top)
    if wait.stand_ins is not None:
        _check_stand_ins(program, wait.piece, wait.stand_ins, manifest, top)


def _check_router(program: ProgramInfo, piece: int, router: RouterInfo, weights: WeightsInfo, top: Fields) -> None:
    """What a router is said to read lies in the arena and in the file, and it has the experts of its piece."""
    where, info = f"programs.{program.name}.awaits.router", weights.pieces[piece]
    if router.hidden % 4 or router.hidden + program.max_tokens * router.columns * 4 > program.arena_bytes:
        top.fail(f"{where}.hidden", f"f32 rows inside of the arena of {program.arena_bytes} bytes", router.hidden)
    if router.weights % 4 or router.weights + router.bytes > weights.bytes:
        top.fail(f"{where}.weights", f"an f32 matrix inside of the {weights.bytes} bytes of weights", router.weights)
    if info.kind != "experts" or router.experts != info.count:
        top.fail(f"{where}.experts", "as many as the piece has", router.experts)


def _check_stand_ins(program: ProgramInfo, piece: int, found: StandInInfo, manifest: Manifest, top: Fields) -> None:
    """As many as there are experts, and smaller; the weights of the choice lie in the arena."""
    where, pieces = f"programs.{program.name}.awaits.stand_ins", manifest.weights.pieces
    whole, info = pieces[piece], pieces[found.piece] if found.piece < len(pieces) else None
    kinds = (whole.kind, info.kind if info is not None else "")
    if info is None or kinds != ("experts", "stand_ins") or info.count != whole.count:
        top.fail(f"{where}.piece", "a piece of kind stand_ins, with as many as there are experts", found.piece)
    if info.unit >= min((unit for unit, _ in whole.classes), default=whole.unit):
        top.fail(f"{where}.piece", "stand-ins smaller than the experts", found.piece)
    nbytes = 4 * program.max_tokens * manifest.experts_per_token
    if found.weights % 4 or found.weights + nbytes > program.arena_bytes:
        top.fail(f"{where}.weights", f"f32 numbers inside of the arena of {program.arena_bytes} bytes", found.weights)
