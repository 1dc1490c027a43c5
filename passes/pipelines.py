"""Named pipelines: functions that give passes, to use as they are or to take apart and recombine.

    PassManager(cpu_pipeline(weights="f32")).run(module)
    PassManager([*simplify(), MyPass(), *fuse_within_kernels()])

Each function says why its order is as it is. `PIPELINES` holds them by name for the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from passes.fuse.fuse_attention import FuseAttentionPass
from passes.fuse.fuse_elementwise import FuseElementwisePass
from passes.fuse.fuse_epilogue import FuseEpiloguePass
from passes.fuse.fuse_gate_up import FuseGateUpPass
from passes.fuse.fuse_norm_gemm import FuseNormGemmPass
from passes.fuse.fuse_qkv import FuseQKVPass
from passes.fuse.fuse_rope_append import FuseRopeAppendPass
from passes.layout.choose_layouts import ChooseLayoutsPass
from passes.pass_base import Pass
from passes.quantize.add_stand_ins import AddStandInsPass
from passes.quantize.quantize import QuantizePass
from passes.quantize.set_precision import FloatName, SetPrecisionPass
from passes.simplify.canonicalize import CanonicalizePass
from passes.simplify.cse import CSEPass
from passes.simplify.dce import DeadCodePass

Pipeline = tuple[Pass, ...]


def simplify() -> Pipeline:
    """Normal forms first: equal ops are only seen as equal in one form."""
    return CanonicalizePass(), CSEPass()


def fuse_across_kernels() -> Pipeline:
    """Fusions that change which products there are. Before precision is set: they want one cast per joint product."""
    return FuseAttentionPass(), FuseQKVPass(), FuseGateUpPass()


def set_precision(weights: FloatName, activations: FloatName, kv: FloatName) -> Pipeline:
    """The canonicalize behind it folds cast(cast(w)) of checkpoints that are stored narrow already."""
    return SetPrecisionPass(weights, activations, kv), CanonicalizePass()


def quantize(recipe: Sequence[str], floats: FloatName, stand_ins: Sequence[str] = ()) -> Pipeline:
    """What takes the place of `set_precision` when there is a recipe.

    The canonicalize in front joins what a quantized checkpoint stores, so that a fused product has one low-bit weight.
    """
    return CanonicalizePass(), QuantizePass(tuple(recipe), floats, tuple(stand_ins)), CanonicalizePass()


def fuse_within_kernels() -> Pipeline:
    """Fusions that make regions, greediest last.

    Norms choose before epilogues, for a norm has one place to go and an epilogue grows around it. Rope and append come
    after epilogues, because biases and clips of the joint projection belong to its GEMM. Elementwise chains are what
    all others left.
    """
    return FuseNormGemmPass(), FuseEpiloguePass(), FuseRopeAppendPass(), FuseElementwisePass()


def cpu_pipeline(
    weights: FloatName = "bf16",
    activations: FloatName = "bf16",
    kv: FloatName = "bf16",
    vector_bits: int = 0,
    recipe: Sequence[str] = (),
    stand_ins: Sequence[str] = (),
) -> Pipeline:
    """The graph-level pipeline of CPU targets. Layouts come last: they need to know which gate | up pairs there are.

    With a `recipe` (names or paths) that decides the formats, and `weights` is what it leaves open. With `stand_ins`,
    a recipe too, experts get copies in its formats; before the fusions, which then see both alike.
    """
    low_bit = recipe or stand_ins
    precision = (
        quantize(recipe or ("none",), weights, stand_ins) if low_bit else set_precision(weights, activations, kv)
    )
    return (
        *simplify(),
        *((AddStandInsPass(),) if stand_ins else ()),
        *fuse_across_kernels(),
        *precision,
        *fuse_within_kernels(),
        ChooseLayoutsPass(vector_bits=vector_bits),
        DeadCodePass(),
    )


def cpu_f32_pipeline() -> Pipeline:
    """Everything in f32."""
    return cpu_pipeline("f32", "f32", "f32")


def gpu_pipeline(weights: FloatName = "bf16", recipe: Sequence[str] = ()) -> Pipeline:
    """That of GPU targets: as for CPUs, with weights as the lanes of a warp want them. The cache is bf16 at least."""
    kv = "bf16" if weights == "f32" else weights
    passes = cpu_pipeline(weights, weights, kv, recipe=recipe)
    return tuple(ChooseLayoutsPass(grid=True) if isinstance(made, ChooseLayoutsPass) else made for made in passes)


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "simplify": simplify,
    "cpu": cpu_pipeline,
    "cpu-f32": cpu_f32_pipeline,
    "gpu": gpu_pipeline,
}
