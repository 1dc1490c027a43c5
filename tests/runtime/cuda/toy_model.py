"""An artifact for GPUs without the compiler: kernels that show what reached the GPU, as `fake_artifact` does on CPUs.

`store` writes each token's id and position into the cache of two layers at its own (slot, position); `hash` makes the
logits of a row from everything its sequence has there, and from the first weight: `fake_artifact.sequence_logits` says
what they must be. Prompts take what they store from `pieces`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cuda.device import CudaDevice, open_device
from runtime.cuda.program import (
    ArenaArgument,
    CodeFiles,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KernelInfo,
    KVArgument,
    KVPlan,
    KVPlane,
    SizeArgument,
    WeightArgument,
)
from runtime.cuda.session import CudaSession
from runtime.cuda.sizes import SizeExpr
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import PythonRunner
from tests.runtime.cuda.emulated_streams import Ranges
from tests.runtime.cuda.program_json import step_json
from tests.runtime.fake_artifact import DECODE_TOKENS, PREFILL_TOKENS, VOCAB, default_files, write_artifact

CELL_BYTES = 512
GRANULE = 1 << 16
PTX = b".version 7.8\n.target sm_80\n.visible .entry store(\n.visible .entry store_pieces(\n.visible .entry hash(\n"
_MASK = (1 << 64) - 1


def _i32(reach: Any, address: int, count: int) -> np.ndarray:
    return reach(address, 4 * count).view(np.int32)


def _cells(reach: Any, kv: int, slot: int, ctx: int, position: int) -> tuple[np.ndarray, tuple[int, int]]:
    at = kv + (slot * ctx + position) * CELL_BYTES
    return reach(at, 8).view(np.int64), (at, at + 8)


def _store(reach: Any, tokens: list[tuple[int, int, int]], kv0: int, kv1: int, ctx: int) -> Ranges:
    writes = []
    for token, position, slot in tokens:
        for kv, value in ((kv0, token + 1), (kv1, position + 1)):
            cell, place = _cells(reach, kv, slot, ctx, position)
            cell[0] = value
            writes.append(place)
    return writes


def store(
    blocks: int, reach: Any, ids: int, positions: int, slots: int, scratch: int, kv0: int, kv1: int, tokens: int,
    ctx: int,
) -> tuple[Ranges, Ranges]:  # fmt: skip
    """One token a block."""
    assert blocks == tokens
    columns = [_i32(reach, a, tokens).tolist() for a in (ids, positions, slots)]
    reach(scratch, 8)[:] = 1
    writes = _store(reach, list(zip(*columns, strict=True)), kv0, kv1, ctx)
    return [(a, a + 4 * tokens) for a in (ids, positions, slots)], [*writes, (scratch, scratch + 8)]


def store_pieces(
    blocks: int, reach: Any, ids: int, pieces: int, kv0: int, kv1: int, tokens: int, ctx: int
) -> tuple[Ranges, Ranges]:
    """One piece of a prompt a block."""
    numbers, found = _i32(reach, ids, tokens).tolist(), []
    for first, count, slot, start in _i32(reach, pieces, 4 * blocks).reshape(-1, 4).tolist():
        found += [(numbers[first + i], start + i, slot) for i in range(count)]
    assert len(found) == tokens
    return [(ids, ids + 4 * tokens), (pieces, pieces + 16 * blocks)], _store(reach, found, kv0, kv1, ctx)


def hash_rows(
    blocks: int, reach: Any, positions: int, slots: int, rows: int, weight: int, kv0: int, kv1: int, logits: int,
    ctx: int,
) -> tuple[Ranges, Ranges]:  # fmt: skip
    """One row of logits a block."""
    reads: Ranges = [(rows, rows + 4 * blocks), (weight, weight + 8)]
    for r, row in enumerate(_i32(reach, rows, blocks).tolist()):
        position, slot = (int(_i32(reach, a + 4 * row, 1)[0]) for a in (positions, slots))
        state = int(reach(weight, 8).view(np.uint64)[0])
        for p in range(position + 1):
            (a, place_a), (b, place_b) = (_cells(reach, kv, slot, ctx, p) for kv in (kv0, kv1))
            state = (state * 6364136223846793005 + int(a[0]) + int(b[0]) * 1442695040888963407) & _MASK
            reads += [place_a, place_b]
        bits = [((state * (2 * v + 1)) & _MASK) >> 44 for v in range(VOCAB)]
        made = np.array(bits, dtype=np.float32) * np.float32(2**-17)
        reach(logits + 4 * VOCAB * r, 4 * VOCAB).view(np.float32)[:] = made
    return reads, [(logits, logits + 4 * VOCAB * blocks)]


RUNNER = PythonRunner({"store": (8, store), "store_pieces": (6, store_pieces), "hash": (8, hash_rows)})


def toy_step() -> GpuStep:
    """The program."""
    ids, positions, slots, rows, pieces, logits = (
        InputArgument(name) for name in ("ids", "positions", "slots", "rows", "pieces", "logits")
    )
    kv, weight, ctx = (KVArgument(0, 0), KVArgument(1, 0)), WeightArgument(0, 8, 0), SizeArgument(SizeExpr("ctx"))
    tokens = SizeArgument(SizeExpr("tokens"))
    head = GpuLaunch("hash", SizeExpr("rows"), (positions, slots, rows, weight, *kv, logits, ctx), (6,), "lm_head")
    few = (ids, positions, slots, ArenaArgument(256, 8), *kv, tokens, ctx)
    many = (ids, pieces, *kv, tokens, ctx)
    return GpuStep(
        (CodeFiles("sm_80", "code/sm_80.ptx"),),
        (KernelInfo("store", 32), KernelInfo("store_pieces", 64), KernelInfo("hash", 128, 0, 60 << 10)),
        (
            GpuProgram(
                "decode", DECODE_TOKENS, 1024,
                (GpuLaunch("store", SizeExpr("tokens"), few, (3, 4, 5), "layers.0.self_attn"), head), replays=True,
            ),
            GpuProgram(
                "prefill", PREFILL_TOKENS, 1024,
                (GpuLaunch("store_pieces", SizeExpr("pieces"), many, (2, 3), "layers.0.self_attn"), head), 8,
            ),
        ),
        KVPlan(2, (KVPlane("cells", 1, CELL_BYTES),)),
    )  # fmt: skip


def write_toy(root: Path, change: Callable[[dict], None] | None = None) -> Path:
    """The artifact."""
    files = {name: content for name, content in default_files().items() if not name.endswith(".o")}
    files["code/sm_80.ptx"] = PTX

    def for_gpu(manifest: dict) -> None:
        manifest["target"] = {"name": "h100", "triple": "nvptx64-nvidia-cuda", "cpu": "sm_90", "features": []}
        nbytes = manifest["weights"]["bytes"]
        manifest["weights"]["pieces"] = [
            {"kind": "dense", "offset": 0, "bytes": nbytes, "unit": 0, "origin": "all"}
        ]  # fmt: skip
        manifest["gpu"] = step_json(toy_step())
        for program in manifest["programs"].values():
            program["symbol"] = program["symbol"].removeprefix("stratum_step_")
        if change is not None:
            change(manifest)

    return write_artifact(root, files=files, change=for_gpu)


class CheckedDevice(CudaDevice):
    """Tells the emulated driver how far each argument of a launch reaches."""

    def launch(self, function: Any, blocks: int, threads: int, dynamic_bytes: int, arguments: Any, stream: Any) -> None:
        self._driver.module.extents = arguments.extents
        super().launch(function, blocks, threads, dynamic_bytes, arguments, stream)


def emulated_driver(**options: Any) -> EmulatedDriver:
    """With the toy's kernels."""
    return EmulatedDriver(RUNNER, **{"granule": GRANULE, **options})


def open_checked(driver: EmulatedDriver, limit_bytes: int | None = None) -> CudaDevice:
    """A device whose launches are checked argument by argument."""
    device = open_device(limit_bytes=limit_bytes, driver=driver)
    device.__class__ = CheckedDevice
    return device


def open_toy(path: Path, driver: EmulatedDriver, limit_bytes: int | None = None, **options: Any) -> CudaSession:
    """A session on the emulated driver."""
    return CudaSession(path, device=open_checked(driver, limit_bytes), **options)
