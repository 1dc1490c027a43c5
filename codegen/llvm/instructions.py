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


INSTRUCTIONS = (
    Instruction(
        "tile.dot2",
        "f32",
        16,
        frozenset({"avx512bf16"}),
        "llvm.x86.avx512bf16.dpbf16ps.512",
        "Intel SDM, VDPBF16PS zmm",
    ),
    Instruction(
        "tile.dot2",
        "f32",
        8,
        frozenset({"avx512bf16", "avx512vl"}),
        "llvm.x86.avx512bf16.dpbf16ps.256",
        "Intel SDM, VDPBF16PS ymm",
    ),
    Instruction(
        "tile.dot2",
        "f32",
        4,
        frozenset({"avx512bf16", "avx512vl"}),
        "llvm.x86.avx512bf16.dpbf16ps.128",
        "Intel SDM, VDPBF16PS xmm",
    ),
    Instruction(
        "tile.cast",
        "bf16",
        16,
        frozenset({"avx512bf16"}),
        "llvm.x86.avx512bf16.cvtneps2bf16.512",
        "Intel SDM, VCVTNEPS2BF16 zmm",
    ),
)


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

    def used_features(self) -> frozenset[str]:
        """Features any entry may ask for, present here."""
        return frozenset().union(*(e.features for e in INSTRUCTIONS)) & self.features
