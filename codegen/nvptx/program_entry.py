"""Lowered programs for a GPU as the manifest has them: `gpu`, which the runtime reads (`runtime.cuda.program_reader`).

Made from the plan IR alone, so that what runs is what the checks have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codegen.nvptx.builder import GridKernel
from codegen.nvptx.kv_planes import KvPlanes
from codegen.nvptx.lower_to_grid import GridProgram, LoweredGridStep
from codegen.nvptx.lowering import dynamic_bytes, shared_bytes
from codegen.weight_pieces import WeightPiece
from ir.core import Value
from ir.ops import plan, plan_await, plan_grid
from ir.types import KV_BLOCK


def gpu_entry(
    step: LoweredGridStep,
    code: Sequence[Mapping[str, str]],
    host_levels: Sequence[str] = (),
    attention_levels: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest's `gpu`. `code`: architecture, ptx and cubin (paths in the artifact) of each architecture;
    `host_levels`, `attention_levels`: the instruction sets that the artifact has objects of experts and of attention
    for."""
    return {
        "code": [dict(files) for files in code],
        "kernels": [_kernel(kernel) for kernel in step.kernels],
        "programs": [_program(program, step.file.pieces) for program in step.programs],
        "kv": {"layers": step.num_layers, "block": KV_BLOCK, "planes": _planes(step.kv)},
        **({"experts": step.host.entry(host_levels)} if step.host.layers else {}),
        **({"attention": step.attention.entry(attention_levels)} if attention_levels else {}),
    }


def programs_entry(step: LoweredGridStep) -> dict[str, Any]:
    """The manifest's `programs`: what reports ask of each."""
    return {
        program.name: {
            "symbol": program.name,
            "max_tokens": program.max_tokens,
            "arena_bytes": program.arena_bytes,
            "launches": [
                {
                    "name": launch.kernel,
                    "origin": launch.origin,
                    "bytes": launch.fixed_bytes + launch.token_bytes,
                    "flops_per_token": launch.token_flops,
                }
                for launch in program.launches
            ],
        }
        for program in step.programs
    }


def kv_entry(step: LoweredGridStep) -> dict[str, Any]:
    """The manifest's `kv`; bytes count all layers."""
    planes = step.kv.planes
    row = {p.name: step.kv.heads * p.row_bytes for p in planes}
    return {
        "layers": step.num_layers,
        "num_kv_heads": step.kv.heads,
        "head_dim": step.kv.stored if not step.kv.bits else step.kv.width,
        "format": step.kv_format,
        "bytes_per_position": step.num_layers * sum(row[p.name] for p in planes if not p.positions),
        "bytes_per_slot": step.num_layers * sum(row[p.name] * p.positions for p in planes),
        "recent": step.kv.recent,
        "ring": step.kv.ring,
        "block": KV_BLOCK,
    }


def _planes(kv: KvPlanes) -> list[dict[str, Any]]:
    return [
        {"name": plane.name, "heads": kv.heads, "bytes": plane.row_bytes, "positions": plane.positions}
        for plane in kv.planes
    ]


def _kernel(kernel: GridKernel) -> dict[str, Any]:
    asked = dynamic_bytes(kernel)
    own = 0 if asked else shared_bytes(kernel)
    return {"name": kernel.name, "threads": kernel.threads, "static": own, "dynamic": asked}


def _program(program: GridProgram, pieces: Sequence[WeightPiece]) -> dict[str, Any]:
    launches: list[dict[str, Any]] = []
    waits: list[dict[str, Any]] = []
    for op in program.func.block.ops:
        match op:
            case plan_await.AwaitWeightsOp():
                waits.append({"piece": op.piece, "done": list(op.done)})
            case plan_await.AwaitExpertsOp():
                ids, pairs = op.ids.defining_op(), op.count.defining_op()
                assert isinstance(ids, plan.ReserveOp) and isinstance(pairs, plan.SizeOp)
                wait = {"piece": op.piece, "done": list(op.done)}
                waits.append(wait | {"ids": ids.offset, "pairs": _size(pairs)})
            case plan.LaunchOp():
                entry: dict[str, Any] = {
                    "kernel": op.kernel.name,
                    "grid": op.grid,
                    "arguments": [_argument(value, pieces) for value in op.arguments],
                    "writes": list(op.writes),
                    "origin": op.location.origin,
                }
                launches.append(entry | ({"waits": waits} if waits else {}))
                waits = []
    return {
        "name": program.name,
        "max_tokens": program.max_tokens,
        "arena_bytes": program.arena_bytes,
        "piece_tokens": program.piece_tokens,
        "replays": program.replays,
        "launches": launches,
    }


def _argument(value: Value, pieces: Sequence[WeightPiece]) -> dict[str, Any]:
    match value.defining_op():
        case plan.ReserveOp() as op:
            return {"arena": op.offset, "bytes": op.bytes}
        case plan.WeightOp() as op:
            piece = next(i for i, p in enumerate(pieces) if p.offset <= op.offset < p.offset + p.nbytes)
            return {"weight": op.offset, "bytes": op.bytes, "piece": piece}
        case plan_grid.KVPlaneOp() as op:
            return {"kv": op.layer, "plane": op.plane}
        case plan.InputOp() as op:
            return {"input": op.which}
        case plan_grid.PiecesOp():
            return {"input": "pieces"}
        case plan.SizeOp() as op:
            return {"size": _size(op)}
        case plan_grid.CountOp() as op:
            return {"size": op.size}
    raise TypeError(f"{value.type} is no argument of a launch on a GPU")


def _size(op: plan.SizeOp) -> str:
    return op.which if op.scale == 1 else f"{op.which} * {op.scale}"
