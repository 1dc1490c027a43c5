"""tensor.fused and tensor.yield: one and two results, a norm in front of a product."""

from __future__ import annotations

from ir.builder import Builder
from ir.core import Block, Region
from ir.ops.fused import YieldOp
from ir.ops.gemm import MatmulOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, SiluOp
from tests.samples.base import TOKENS, fault, normal, sample, t

_ROW = t(TOKENS, 8)


def _elementwise() -> tuple[Region, ...]:
    block = Block((_ROW, _ROW))
    b = Builder.at_end(block)
    a = b(SiluOp(block.arguments[0]))
    b(YieldOp(a, b(AddOp(a, block.arguments[1]))))
    return (Region(block),)


def _norm_gemm() -> tuple[Region, ...]:
    block = Block((_ROW, t(8), t(5, 8)))
    b = Builder.at_end(block)
    x, gain, w = block.arguments
    b(YieldOp(b(MatmulOp(b(RmsNormOp(x, gain, eps=1e-6)), w))))
    return (Region(block),)


def _no_end() -> tuple[Region, ...]:
    return (Region(Block((_ROW,))),)


SAMPLES = (
    sample("tensor.fused", "two_results", normal(3, 8), normal(3, 8, seed="b"), types=(_ROW, _ROW), kind="elementwise",
           regions=_elementwise),
    sample("tensor.fused", "gemm", normal(1, 8), normal(8), normal(5, 8), types=(_ROW, t(8), t(5, 8)), kind="gemm",
           regions=_norm_gemm),
    sample("tensor.yield", "nothing"),
    sample("tensor.yield", "two", normal(3), normal(2, 2)),
)  # fmt: skip
FAULTS = (
    fault("tensor.fused", "kind of tensor.fused among gemm", _ROW, _ROW, kind="loop", regions=_elementwise),
    fault("tensor.fused", "expected block arguments of tensor.fused of types", _ROW, t(8), kind="gemm",
          regions=_norm_gemm),
    fault("tensor.fused", "to end in tensor.yield, got nothing", _ROW, kind="gemm", regions=_no_end),
    fault("tensor.fused", "one region of one block, got 0 regions", _ROW, kind="gemm"),
)  # fmt: skip
