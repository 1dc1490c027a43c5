"""Everything code generation makes for one model and target, as one cacheable record.

The key is the content that decides it: imported graph IR, pipeline text, target, this compiler's sources. A warm start
reads the record and skips passes, lowering and LLVM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from codegen.compile_step import CodegenTarget, CompiledStep
from codegen.generator_version import generator_version
from codegen.llvm.step import step_symbol
from codegen.object_cache import ObjectCache, content_key
from ir import print_module
from ir.ops.builtin import ModuleOp


@dataclass(frozen=True)
class CodeBundle:
    """Texts of the three IR levels, the manifest's entries about code and KV cache, and the object."""

    graph_text: str
    plan_text: str
    tile_text: str
    programs: dict[str, Any]
    kv: dict[str, Any]
    object_code: bytes

    def to_bytes(self) -> bytes:
        header = {k: v for k, v in asdict(self).items() if k != "object_code"}
        text = json.dumps(header, sort_keys=True).encode()
        return len(text).to_bytes(8, "little") + text + self.object_code

    @classmethod
    def from_bytes(cls, data: bytes) -> CodeBundle:
        size = int.from_bytes(data[:8], "little")
        return cls(**json.loads(data[8 : 8 + size]), object_code=data[8 + size :])

    @classmethod
    def of(cls, module: ModuleOp, compiled: CompiledStep) -> CodeBundle:
        """Collects what `compile_step` made from the lowered `module`."""
        return cls(
            print_module(module),
            print_module(compiled.plan_module()),
            print_module(compiled.tile_module()),
            programs_entry(compiled),
            kv_entry(compiled),
            compiled.object_code,
        )


def bundle_key(imported_text: str, pipeline: str, target: CodegenTarget, extra: Sequence[str] = ()) -> str:
    """The cache key of a bundle."""
    machine = [target.llvm_triple, target.llvm_cpu, target.feature_string()]
    return content_key(["code-bundle-4", generator_version(), imported_text, pipeline, *machine, *extra])


def load_bundle(cache: ObjectCache | None, key: str) -> CodeBundle | None:
    """The bundle of that key, when it is cached and whole."""
    data = cache.get(key) if cache else None
    return CodeBundle.from_bytes(data) if data is not None else None


def store_bundle(cache: ObjectCache | None, key: str, bundle: CodeBundle) -> None:
    if cache:
        cache.put(key, bundle.to_bytes())


def programs_entry(compiled: CompiledStep) -> dict[str, Any]:
    """The manifest's `programs`: symbol, limits and launches in order."""
    return {
        p.name: {
            "symbol": step_symbol(p.name),
            "max_tokens": p.max_tokens,
            "arena_bytes": p.arena_bytes,
            "awaits": [
                {"piece": piece, "done": list(done)}
                | ({"router": asdict(p.routers[n])} if n in p.routers else {})
                | ({"stand_ins": asdict(p.stand_ins[n])} if n in p.stand_ins else {})
                for n, (piece, done) in enumerate(p.awaits())
            ],
            "kv_awaits": p.kv_awaits(),
            "launches": [
                {
                    "name": x.kernel,
                    "origin": x.origin,
                    "bytes": x.fixed_bytes + x.token_bytes,
                    "flops_per_token": x.token_flops,
                }
                for x in p.launches
            ],
        }
        for p in compiled.programs
    }


def kv_entry(compiled: CompiledStep) -> dict[str, Any]:
    """The manifest's `kv`; `bytes_per_position` and `bytes_per_slot` count all layers."""
    kv = compiled.kv
    assert kv is not None
    return {
        "layers": compiled.num_layers,
        "num_kv_heads": kv.heads,
        "head_dim": kv.dim,
        "format": kv.format,
        "bytes_per_position": kv.bytes_per_position * compiled.num_layers,
        "bytes_per_slot": kv.bytes_per_slot * compiled.num_layers,
        "recent": kv.recent,
        "ring": kv.ring_blocks * kv.block,
        "block": kv.block,
    }
