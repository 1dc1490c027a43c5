"""Attention on the CPU beside a GPU, where the keys and values of a layer lie in the host's memory.

    step = host_attention(programs, lowering)         # launches of each program
    step.objects(cache)                               # instruction set -> object code
    step.entry()                                      # the manifest's `gpu.attention`

A function does what the GPU's launches from the joint projection to the output of attention do for a layer, with the
kernels that builds for CPUs have: norms, rope and packing into the CPU's own form of the cache, then attention in it.

    i64 NAME(args*, i64 tid)

`args` are words of 64 bits: 0 threads, 1 team*, 2 qkv (f32, rows of tokens), 3 cos, 4 sin (f32), 5 cache of the layer,
6 positions, 7 slots (i32), 8 gains of queries, 9 of keys (f32; unused where heads have no norm), 10 room for queries
(f32), 11 output, 12 tokens, 13 positions that a slot has room for. All threads of the team run it.

Programs of few tokens have a function without prompts' tiles of rows. There is an object for each instruction set in
`LEVELS`. Where what stands between projection and output has no such form, there is no entry, and a layer's keys and
values lie on the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import codegen.kernels.fused  # noqa: F401 - registers the emitters of CPUs
from codegen.kernels.attention import emit_attention
from codegen.kernels.call import EmitContext, KernelSpec
from codegen.kernels.kv_layout import KVLayout
from codegen.kernels.micro import TileShape
from codegen.kernels.rope import emit_rope_append
from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lower_kernel import lower_kernel
from codegen.nvptx.host.experts import LEVELS as PLAIN_LEVELS
from codegen.nvptx.host.objects import compiled, entries, module_text
from codegen.nvptx.launches import tensor_type
from codegen.object_cache import ObjectCache
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import PlainFormat
from ir.ops.fused import FusedOp
from ir.types import KVCacheType
from passes.fuse.forms import AttentionForm, FormError, RopeAppendForm, describe

QKV, COS, SIN, CACHE, POSITIONS, SLOTS, GAINS, QUERIES, OUT, TOKENS, CTX = 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13
STEM = "attention"  # of the names of its objects
LEVELS = (*PLAIN_LEVELS, "x86-64-v4-bf16")  # products of bf16 pairs and of bytes: 1.4 to 4 times as fast in prompts


@dataclass(frozen=True)
class AttentionLayer:
    """A layer with attention on CPUs: by program its function, and its first and last launch there. `columns` of the
    joint projection, `angles` of a row of cosines, `queries` (f32) and bytes of output of a token."""

    layer: int
    places: tuple[tuple[str, str, int, int], ...]
    columns: int
    angles: int
    queries: int
    out_bytes: int


@dataclass(frozen=True)
class HostAttention:
    """Layers whose attention has code for CPUs; of each function its two kernels, and whether queries and keys have
    gains; the form of the cache."""

    layers: tuple[AttentionLayer, ...]
    functions: Mapping[str, tuple[KernelSpec, KernelSpec, bool]]
    kv: KVLayout | None = None

    def text(self, triple: str, features: frozenset[str], attributes: str) -> str:
        """LLVM IR of the kernels, the team and the functions."""
        declarations: dict[str, str] = {}
        instructions = InstructionSet(features)
        names: dict[Any, str] = {}
        bodies: list[str] = []
        functions: list[str] = []
        for name, (append, attend, gains) in self.functions.items():
            for spec in (append, attend):
                if spec.key not in names:
                    names[spec.key] = f"stratum_{spec.stem}_{len(names)}"
                    bodies.append(lower_kernel(spec.build(names[spec.key]), instructions, declarations, "#0"))
            functions.append(_function_text(name, names[append.key], names[attend.key], gains))
        return module_text(triple, declarations.values(), bodies, functions, attributes)

    def objects(self, cache: ObjectCache | None = None, levels: Sequence[str] = LEVELS) -> dict[str, bytes]:
        """Level -> object code."""
        return compiled(STEM, self.text, levels, cache) if self.functions else {}

    def entry(self, levels: Sequence[str] = LEVELS) -> dict[str, Any]:
        """The manifest's `gpu.attention`, of an artifact with objects for `levels`."""
        assert self.kv is not None
        kv = self.kv
        return {
            "code": entries(STEM, levels),
            "cache": {
                "heads": kv.heads, "head_dim": kv.dim, "format": kv.format, "block": kv.block,
                "bytes_per_position": kv.bytes_per_position, "bytes_per_slot": kv.bytes_per_slot,
                "recent": kv.recent, "ring": kv.ring_blocks * kv.block,
            },
            "layers": [
                {
                    "layer": made.layer, "columns": made.columns, "angles": made.angles,
                    "queries": made.queries, "out_bytes": made.out_bytes,
                    "places": [
                        {"program": program, "function": function, "first": first, "last": last}
                        for program, function, first, last in made.places
                    ],
                }
                for made in self.layers
            ],
        }  # fmt: skip


def host_attention(
    programs: Sequence[tuple[str, int, Sequence[Any]]],
    layer_of: Callable[[Any], int | None],
    stored_alike: Callable[[Value], bool],
) -> HostAttention:
    """Of programs (name, rows of few tokens or 0, calls in launch order). `layer_of` gives the layer whose cache a call
    uses, `stored_alike` whether a value lies in a GPU's memory as its type says."""
    maker = _Maker(layer_of, stored_alike)
    for name, few, calls in programs:
        maker.program(name, few, calls)
    layers = [
        AttentionLayer(layer, tuple(places), *maker.shapes[layer])
        for layer, places in sorted(maker.places.items())
        if len(places) == len(programs)
    ]
    if not layers:
        return HostAttention((), {})
    used = dict.fromkeys(function for layer in layers for _, function, _, _ in layer.places)
    return HostAttention(tuple(layers), {name: maker.functions[name] for name in used}, maker.kv)


class _Maker:
    """Collects layers, program by program."""

    def __init__(self, layer_of: Callable[[Any], int | None], stored_alike: Callable[[Value], bool]) -> None:
        self.layer_of, self.stored_alike = layer_of, stored_alike
        self.places: dict[int, list[tuple[str, str, int, int]]] = {}
        self.shapes: dict[int, tuple[int, int, int, int]] = {}
        self.functions: dict[str, tuple[KernelSpec, KernelSpec, bool]] = {}
        self.kv: KVLayout | None = None
        self._names: dict[Any, str] = {}

    def program(self, name: str, few: int, calls: Sequence[Any]) -> None:
        for number, call in enumerate(calls):
            if _form(call.op, RopeAppendForm) is None:
                continue
            attends = [i for i in range(number + 1, len(calls)) if call.op.results[0] in calls[i].op.operands]
            count = len(attends)
            layer = self.layer_of(call)
            together = attends == list(range(number + 1, number + 1 + count))
            if (
                layer is None
                or not count
                or not together
                or any(calls[i].op is not calls[attends[0]].op for i in attends)
            ):
                continue
            attention = calls[attends[0]].op
            if _form(attention, AttentionForm) is None or not self.stored_alike(attention.results[0]):
                continue
            function = self._function(call.op, attention, EmitContext(TileShape(), "decode" if few else "prefill"))
            if function is None:
                continue
            self.shapes[layer] = _shape(call.op, attention)
            self.places.setdefault(layer, []).append((name, function, number, attends[-1]))

    def _function(self, append: Op, attention: Op, context: EmitContext) -> str | None:
        """The function of two ops, built where it is new; None where CPUs have no kernel for one of them."""
        try:
            first, second = emit_rope_append(append, context), emit_attention(attention, context)
        except DiagnosticError:
            return None  # the layer's keys and values lie on the GPU
        cache = append.operands[3].type
        assert isinstance(cache, KVCacheType)
        found = KVLayout.of(cache)
        if self.kv not in (None, found):
            return None
        self.kv = found
        name = self._names.setdefault((first.key, second.key), f"stratum_attention_{len(self._names)}")
        self.functions[name] = first, second, len(append.operands) > 6
        return name


def _form(op: Op, kind: type[Any]) -> Any:
    """The form of a fused region or an op, where it is of that kind."""
    if kind is RopeAppendForm and not isinstance(op, FusedOp):
        return None
    try:
        form = describe(op)
    except FormError:
        return None
    return form if isinstance(form, kind) else None


def _shape(append: Op, attention: Op) -> tuple[int, int, int, int]:
    """(columns of the projection, angles of a row, queries of a token, bytes of output of a token)."""
    values = (append.operands[0], append.operands[1], append.results[0], attention.results[0])
    counts: list[int] = []
    for value in values:
        sizes = [size for size in tensor_type(value).shape[1:] if isinstance(size, int)]  # all but tokens are known
        counts.append(math.prod(sizes))
    element = tensor_type(values[3]).element
    assert isinstance(element, PlainFormat)
    return counts[0], counts[1], counts[2], counts[3] * element.bits // 8


# -- the functions


def _function_text(name: str, append: str, attend: str, gains: bool) -> str:
    """Both kernels with barriers between; a barrier also counts the tickets of attention from 0 again. Thread 0 returns
    when all are done, since its caller then takes the output away."""
    words = sorted({*range(QKV, GAINS), *((GAINS, GAINS + 1) if gains else ()), QUERIES, OUT, TOKENS, CTX})
    lines = [f"define i64 @{name}(ptr %args, i64 %tid) {{", "entry:"]
    lines += ["  %threads = load i64, ptr %args, align 8"]
    lines += ["  %team_at = getelementptr i64, ptr %args, i64 1", "  %team = load ptr, ptr %team_at, align 8"]
    for word in words:
        lines += [f"  %p{word} = getelementptr i64, ptr %args, i64 {word}"]
        lines += [f"  %w{word} = load {'i64' if word in (TOKENS, CTX) else 'ptr'}, ptr %p{word}, align 8"]
    both = [GAINS, GAINS + 1] if gains else []
    first = [QKV, COS, SIN, CACHE, POSITIONS, SLOTS, *both, QUERIES]
    second = [QUERIES, CACHE, POSITIONS, SLOTS, OUT]
    sizes = f"i64 %w{TOKENS}, i64 %w{CTX}, i64 %tid, i64 %threads, ptr %team"
    for kernel, chosen in ((append, first), (attend, second)):
        pointers = ", ".join(f"ptr %w{word}" for word in chosen)
        lines += [f"  call void @{kernel}({pointers}, {sizes})"]
        lines += ["  call void @stratum_barrier(ptr %team, i64 %threads)"]
    return "\n".join([*lines, "  ret i64 0", "}"]) + "\n"
