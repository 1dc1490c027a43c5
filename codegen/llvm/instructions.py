"""What a CPU can issue: each special instruction once, with its meaning, its feature and its intrinsic.

Selection (`InstructionSet.find`), the interpreter (the meaning is a tile op, which has a reference) and the docs
(`describe`) use the same entries. An op without an entry for the target is spelled out in plain LLVM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`op` is the tile op it computes, on results of `lanes` lanes of `element`; `features` must all be present."""

    op: str
    element: str
    lanes: int
    features: frozenset[str]
    intrinsic: str
    source: str


_BF16, _BF16_VL = frozenset({"avx512bf16"}), frozenset({"avx512bf16", "avx512vl"})
_VNNI, _VNNI_VL = frozenset({"avx512vnni"}), frozenset({"avx512vnni", "avx512vl"})
INSTRUCTIONS = (
    Instruction("tile.dot2", "f32", 16, _BF16, "llvm.x86.avx512bf16.dpbf16ps.512", "Intel SDM, VDPBF16PS zmm"),
    Instruction("tile.dot2", "f32", 8, _BF16_VL, "llvm.x86.avx512bf16.dpbf16ps.256", "Intel SDM, VDPBF16PS ymm"),
    Instruction("tile.dot2", "f32", 4, _BF16_VL, "llvm.x86.avx512bf16.dpbf16ps.128", "Intel SDM, VDPBF16PS xmm"),
    Instruction("tile.dot4", "i32", 16, _VNNI, "llvm.x86.avx512.vpdpbusd.512", "Intel SDM, VPDPBUSD zmm"),
    Instruction("tile.dot4", "i32", 8, _VNNI_VL, "llvm.x86.avx512.vpdpbusd.256", "Intel SDM, VPDPBUSD ymm"),
    Instruction("tile.dot4", "i32", 4, _VNNI_VL, "llvm.x86.avx512.vpdpbusd.128", "Intel SDM, VPDPBUSD xmm"),
    Instruction("tile.cast", "bf16", 16, _BF16, "llvm.x86.avx512bf16.cvtneps2bf16.512", "Intel SDM, VCVTNEPS2BF16 zmm"),
)


def describe() -> str:
    """The instructions as a Markdown table, for docs/codegen.md."""
    rows = ["| op | result | needs | issued as | source |", "|---|---|---|---|---|"]
    for entry in INSTRUCTIONS:
        needs = ", ".join(sorted(entry.features))
        cells = (f"`{entry.op}`", f"{entry.lanes} x {entry.element}", needs, f"`{entry.intrinsic}`", entry.source)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


@dataclass(frozen=True)
class InstructionSet:
    """The features of a target, by LLVM name (`avx512bf16`)."""

    features: frozenset[str]

    def has(self, feature: str) -> bool:
        return feature in self.features

    def find(self, op: str, element: str, lanes: int) -> Instruction | None:
        """The instruction that computes `op` on that many lanes here, or None."""
        for entry in INSTRUCTIONS:
            if (entry.op, entry.element, entry.lanes) == (op, element, lanes) and entry.features <= self.features:
                return entry
        return None
