"""A model of Python kernels that shows every byte of its weights in its logits: dense pieces and layers of experts.

Each token has a number of its own: it begins with the token, every dense piece is mixed into it in turn, and what every
expert that the token chose makes of it, by two products, is added. A byte that is not there, or not yet, changes the
logits. `PythonExperts` is the CPU beside the GPU: what it computes are the same numbers exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cuda.device import host_view
from runtime.cuda.host_experts import HostJob, HostLayer
from runtime.cuda.program import (
    ArenaArgument,
    CodeFiles,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KernelInfo,
    KVPlan,
    KVPlane,
    SizeArgument,
    Wait,
    WeightArgument,
)
from runtime.cuda.sizes import SizeExpr
from tests.runtime.cuda.emulated_kernels import PythonRunner
from tests.runtime.cuda.emulated_streams import Ranges
from tests.runtime.cuda.program_json import step_json
from tests.runtime.fake_artifact import DECODE_TOKENS, PREFILL_TOKENS, VOCAB, default_files, write_artifact

EXPERTS, CHOSEN, UNIT, PAGE = 5, 2, 4096, 4096
STATE, ORDER, TILES, IDS, HIDDEN, MADE, ARENA = 0, 1024, 2048, 3072, 4096, 6144, 8192  # places in the arena
_FACTOR = np.uint64(6364136223846793005)
Touched = tuple[Ranges, Ranges]


def _digest(reach: Any, address: int, nbytes: int) -> int:
    words = reach(address, nbytes).view(np.uint64)
    return int((words * (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1))).sum())


def _states(reach: Any, address: int, tokens: int) -> tuple[np.ndarray, Ranges]:
    return reach(address, 8 * tokens).view(np.uint64), [(address, address + 8 * tokens)]


def begin(blocks: int, reach: Any, ids: int, state: int, tokens: int) -> Touched:
    found, place = _states(reach, state, tokens)
    found[:] = reach(ids, 4 * tokens).view(np.int32)
    return [(ids, ids + 4 * tokens)], place


def mix(blocks: int, reach: Any, weight: int, state: int, nbytes: int, tokens: int) -> Touched:
    found, place = _states(reach, state, tokens)
    found[:] = found * _FACTOR + np.uint64(_digest(reach, weight, nbytes))
    return [(weight, weight + nbytes), *place], place


def route(blocks: int, reach: Any, ids: int, order: int, tiles: int, tokens: int, layer: int) -> Touched:
    """Pairs in the order of their experts, and a tile for each expert that somebody chose."""
    numbers = reach(ids, 4 * tokens).view(np.int32).tolist()
    pairs = [  # of a token all different
        ((n * 3 + layer + c * (1 + n % (EXPERTS - 1))) % EXPERTS, t * CHOSEN + c)
        for t, n in enumerate(numbers)
        for c in range(CHOSEN)
    ]
    pairs.sort()
    reach(order, 4 * len(pairs)).view(np.int32)[:] = [pair for _, pair in pairs]
    made = reach(tiles, 16 * EXPERTS).view(np.int32).reshape(-1, 4)
    made[:] = 0
    for row, expert in enumerate(sorted({e for e, _ in pairs})):
        rows = [j for j, (e, _) in enumerate(pairs) if e == expert]
        made[row] = (expert, rows[0], len(rows), 0)
    return [(ids, ids + 4 * tokens)], [(order, order + 4 * len(pairs)), (tiles, tiles + 16 * EXPERTS)]


def _of_tiles(
    reach: Any, tiles: int, most: int, weights: int, source: Callable[[int], int], y: int
) -> tuple[Ranges, Ranges]:
    """y[j] = digest of the expert * x[source(j)] for the rows j of each tile; `source` gives addresses."""
    reads: Ranges = [(tiles, tiles + 16 * most)]
    writes: Ranges = []
    for expert, first, count, _ in reach(tiles, 16 * most).view(np.int32).reshape(-1, 4).tolist():
        at = weights + expert * UNIT
        digest = _digest(reach, at, UNIT) if count else 0
        reads += [(at, at + UNIT)] if count else []
        for row in range(first, first + count):
            x, made = source(row), y + 8 * row
            reach(made, 8).view(np.uint64)[0] = made_of(digest, int(reach(x, 8).view(np.uint64)[0]))
            reads.append((x, x + 8))
            writes.append((made, made + 8))
    return reads, writes


def made_of(digest: int, x: int) -> int:
    return (digest * int(_FACTOR) ^ x * 3) % (1 << 64)


def up(blocks: int, reach: Any, weights: int, x: int, order: int, tiles: int, y: int, most: int) -> Touched:
    places: Ranges = []

    def source(row: int) -> int:
        places.append((order + 4 * row, order + 4 * row + 4))
        return x + 8 * (int(reach(order + 4 * row, 4).view(np.int32)[0]) // CHOSEN)

    reads, writes = _of_tiles(reach, tiles, most, weights, source, y)
    return reads + places, writes


def down(blocks: int, reach: Any, weights: int, x: int, order: int, tiles: int, y: int, most: int) -> Touched:
    return _of_tiles(reach, tiles, most, weights, lambda row: x + 8 * row, y)


def combine(blocks: int, reach: Any, order: int, y: int, state: int, tokens: int) -> Touched:
    """The results of a token's experts added to its number."""
    found, place = _states(reach, state, tokens)
    pairs = tokens * CHOSEN
    made = reach(y, 8 * pairs).view(np.uint64)
    for j, pair in enumerate(reach(order, 4 * pairs).view(np.int32).tolist()):
        found[pair // CHOSEN] = (int(found[pair // CHOSEN]) + int(made[j])) % (1 << 64)
    return [(order, order + 4 * pairs), (y, y + 8 * pairs), *place], place


class PythonExperts:
    """The CPU beside the GPU: rows of 8 bytes stand for four numbers in bf16, or for two in f32."""

    threads = 1

    def __init__(self) -> None:
        self.computed, self.closed = 0, False

    def layer(self, piece: int) -> HostLayer | None:
        return HostLayer(piece, "python", 4, 4, 2, CHOSEN, (0, -1, 0, -1))

    def run(self, layer: HostLayer, jobs: Sequence[HostJob]) -> None:
        for job in jobs:
            digest = _digest(host_view, job.weights, UNIT)
            for row, source in enumerate(host_view(job.sources, 4 * job.rows).view(np.int32).tolist()):
                x = int(host_view(job.x + 8 * source, 8).view(np.uint64)[0])
                hidden = host_view(job.hidden + 8 * row, 8).view(np.uint64)
                hidden[0] = made_of(digest, x)
                host_view(job.y + 8 * row, 8).view(np.uint64)[0] = made_of(digest, int(hidden[0]))
        self.computed += len(jobs)

    def close(self) -> None:
        self.closed = True


def head(blocks: int, reach: Any, rows: int, state: int, logits: int) -> Touched:
    reads: Ranges = [(rows, rows + 4 * blocks)]
    for r, row in enumerate(reach(rows, 4 * blocks).view(np.int32).tolist()):
        found, place = _states(reach, state + 8 * row, 1)
        bits = (found[0] * (2 * np.arange(VOCAB, dtype=np.uint64) + np.uint64(1))) >> np.uint64(44)
        reach(logits + 4 * VOCAB * r, 4 * VOCAB).view(np.float32)[:] = bits.astype(np.float32) * np.float32(2**-17)
        reads += place
    return reads, [(logits, logits + 4 * VOCAB * blocks)]


RUNNER = PythonRunner(
    {
        "begin": (3, begin), "mix": (4, mix), "route": (5, route), "up": (6, up), "down": (6, down),
        "combine": (4, combine), "head": (3, head),
    }
)  # fmt: skip


def _size(text: str) -> SizeArgument:
    return SizeArgument(SizeExpr(text))


def write_passing(root: Path, layers: list[int]) -> Path:
    """An artifact: each layer is a dense piece of so many pages, 0 one of experts."""
    pieces: list[dict[str, Any]] = [{"kind": "rows", "offset": 0, "bytes": PAGE, "unit": 64, "origin": "table"}]
    state, ids = ArenaArgument(STATE, 1024), InputArgument("ids")
    order, tiles = ArenaArgument(ORDER, 1024), ArenaArgument(TILES, 16 * EXPERTS)
    launches = [GpuLaunch("begin", SizeExpr("1"), (ids, state, _size("tokens")), (1,), "begin")]
    at, one = PAGE, SizeExpr("1")
    for number, pages in enumerate(layers, 1):
        nbytes = pages * PAGE or EXPERTS * UNIT
        weight, done = WeightArgument(at, nbytes, number), (number - 1,) if number > 1 else ()
        if pages:
            arguments = (weight, state, _size(f"{nbytes}"), _size("tokens"))
            launches.append(GpuLaunch("mix", one, arguments, (1,), f"layers.{number}", (Wait(number, done),)))
        else:
            routed = (ids, order, tiles, _size("tokens"), _size(f"{number}"))
            launches.append(GpuLaunch("route", one, routed, (1, 2), f"layers.{number}.router"))
            chosen = Wait(number, done, IDS, SizeExpr(f"tokens * {CHOSEN}"))
            hidden, made = ArenaArgument(HIDDEN, 2048), ArenaArgument(MADE, 2048)
            of = f"layers.{number}.experts"
            arguments = (weight, state, order, tiles, hidden, _size(f"{EXPERTS}"))
            launches.append(GpuLaunch("up", one, arguments, (4,), of, (chosen,)))
            arguments = (weight, hidden, order, tiles, made, _size(f"{EXPERTS}"))
            launches.append(GpuLaunch("down", one, arguments, (4,), of))
            launches.append(GpuLaunch("combine", one, (order, made, state, _size("tokens")), (2,), of))
        kind, unit = ("dense", 0) if pages else ("experts", UNIT)
        pieces.append({"kind": kind, "offset": at, "bytes": nbytes, "unit": unit, "origin": f"layers.{number}"})
        at += nbytes
    launches.append(
        GpuLaunch("head", SizeExpr("rows"), (InputArgument("rows"), state, InputArgument("logits")), (2,), "head")
    )
    step = GpuStep(
        (CodeFiles("sm_80", "code/sm_80.ptx"),),
        tuple(KernelInfo(name, 32) for name in RUNNER.kernels),
        (
            GpuProgram("decode", DECODE_TOKENS, ARENA, tuple(launches), replays=True),
            GpuProgram("prefill", PREFILL_TOKENS, ARENA, tuple(launches)),
        ),
        KVPlan(1, (KVPlane("cells", 1, 16),)),
    )
    files = {name: content for name, content in default_files().items() if not name.endswith(".o")}
    names = "".join(f".visible .entry {name}(\n" for name in RUNNER.kernels)
    files["code/sm_80.ptx"] = f".version 7.8\n.target sm_80\n{names}".encode()
    files["weights/weights.bin"] = np.random.default_rng(len(layers)).bytes(at)

    def describe(manifest: dict) -> None:
        manifest["model"] |= {"experts_per_token": CHOSEN}
        manifest["target"] = {"name": "cuda", "triple": "nvptx64-nvidia-cuda", "cpu": "sm_80", "features": []}
        manifest["weights"] |= {"tensors": [], "pieces": pieces}
        manifest["gpu"] = step_json(step)
        for program in manifest["programs"].values():
            program["symbol"] = program["symbol"].removeprefix("stratum_step_")
            program["launches"] = [
                {"name": x.kernel, "origin": x.origin, "bytes": 0, "flops_per_token": 0} for x in launches
            ]

    return write_artifact(root, files=files, change=describe)
