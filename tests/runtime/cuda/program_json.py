"""Programs for GPUs -> the manifest's JSON, for artifacts made by hand; `runtime.cuda.program_reader` reads it."""

from __future__ import annotations

from typing import Any

from runtime.cuda.program import (
    ArenaArgument,
    Argument,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KVArgument,
    SizeArgument,
    Wait,
    WeightArgument,
)


def step_json(step: GpuStep) -> dict[str, Any]:
    """The manifest's `gpu`."""
    return {
        "code": [{"architecture": c.architecture, "ptx": c.ptx, "cubin": c.cubin} for c in step.code],
        "kernels": [
            {"name": k.name, "threads": k.threads, "static": k.static_bytes, "dynamic": k.dynamic_bytes}
            for k in step.kernels
        ],
        "programs": [_program_json(p) for p in step.programs],
        "kv": {
            "layers": step.kv.layers,
            "block": step.kv.block,
            "planes": [
                {"name": p.name, "heads": p.heads, "bytes": p.bytes, "positions": p.positions} for p in step.kv.planes
            ],
        },
    }


def _program_json(program: GpuProgram) -> dict[str, Any]:
    return {
        "name": program.name,
        "max_tokens": program.max_tokens,
        "arena_bytes": program.arena_bytes,
        "piece_tokens": program.piece_tokens,
        "replays": program.replays,
        "launches": [_launch_json(launch) for launch in program.launches],
    }


def _launch_json(launch: GpuLaunch) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "kernel": launch.kernel,
        "grid": launch.grid.text,
        "arguments": [_argument_json(argument) for argument in launch.arguments],
        "writes": list(launch.writes),
        "origin": launch.origin,
    }
    return entry | ({"waits": [_wait_json(wait) for wait in launch.waits]} if launch.waits else {})


def _wait_json(wait: Wait) -> dict[str, Any]:
    entry: dict[str, Any] = {"piece": wait.piece, "done": list(wait.done)}
    return entry if wait.pairs is None else entry | {"ids": wait.ids, "pairs": wait.pairs.text}


def _argument_json(argument: Argument) -> dict[str, Any]:
    match argument:
        case ArenaArgument(offset, nbytes):
            return {"arena": offset, "bytes": nbytes}
        case WeightArgument(offset, nbytes, piece):
            return {"weight": offset, "bytes": nbytes, "piece": piece}
        case KVArgument(layer, plane):
            return {"kv": layer, "plane": plane}
        case InputArgument(which):
            return {"input": which}
        case SizeArgument(size):
            return {"size": size.text}
