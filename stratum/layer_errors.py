"""Where in a model the error of a build arises: the residual stream, layer by layer, beside the reference's.

    measure_layers(Path("model"), Path("model"), ids, dtype="bf16", recipe="w4a8-g32")

Both graphs are executed in numpy by what their ops mean (`passes.quantize.forward`), not by the generated code: the
build's after the passes that decide products and number formats, the reference's in f32. The error at a place is
|x - y| / |y| (Frobenius norms over all tokens, x the build's residual stream there, y the reference's) and holds what
all layers before have done. Weights are read when an op needs them; memory holds one layer of both models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frontends.huggingface import ImportedModel, import_model
from ir.core import Op
from ir.diagnostics import DiagnosticError
from ir.ops.low_bit import unpacked
from ir.ops.norm import RmsNormOp
from ir.traits import Terminator, has_trait
from passes.fuse.fuse_gate_up import FuseGateUpPass
from passes.fuse.fuse_qkv import FuseQKVPass
from passes.pass_manager import PassManager
from passes.pipelines import quantize, set_precision, simplify
from passes.quantize.forward import Forward
from passes.quantize.set_precision import FloatName

DEFAULT_TOKENS = 128
SMALL_MODEL = 50_000_000  # parameters: such a model is executed in seconds
Tell = Callable[[int, int], None]  # ops done, ops in all


@dataclass(frozen=True)
class LayerError:
    """`name` says behind which part of the model, `error` is relative."""

    name: str
    error: float


def is_large(model: Path) -> bool:
    """Whether executing the model in numpy takes more than seconds."""
    imported = import_model(model)
    with imported.checkpoint:
        return imported.num_parameters > SMALL_MODEL


def measure_layers(
    model: Path,
    reference: Path,
    ids: np.ndarray,
    *,
    dtype: FloatName = "bf16",
    pipeline: str | None = None,
    recipe: str | None = None,
    tell: Tell | None = None,
) -> list[LayerError]:
    """The errors behind the embedding, each attention, each layer, and of the logits, for one sequence int32 `ids`.

    `dtype` and `recipe` are the build's. Raises DiagnosticError for builds with a pipeline of their own (which of its
    passes decide formats is not known) and for models of different structure.
    """
    if pipeline is not None:
        raise DiagnosticError(
            "the layers of a build with its own pipeline cannot be looked into", expected="--layer-tokens 0"
        )
    passes = quantize(recipe.split(","), dtype) if recipe else set_precision(dtype, dtype, dtype)
    ours, theirs = import_model(model), import_model(reference)
    with ours.checkpoint, theirs.checkpoint:
        PassManager((*simplify(), FuseQKVPass(), FuseGateUpPass(), *passes)).run(ours.module)
        pairs = zip(_stream(ours, ids, tell), _stream(theirs, ids, None), strict=True)
        found = []
        for (name, x), (other, y) in pairs:
            if name != other or x.shape != y.shape:
                raise DiagnosticError(
                    f"the models differ in structure: {name} {list(x.shape)} and {other} {list(y.shape)}",
                    where=str(reference),
                    expected="a reference that is the same model in full precision",
                )
            found.append(LayerError(name, relative_error(x, y)))
        return found


def relative_error(x: np.ndarray, y: np.ndarray) -> float:
    """|x - y| / |y|, in float64; of zeros the size of the difference itself."""
    wide = y.astype(np.float64)
    size = float(np.linalg.norm(wide))
    return float(np.linalg.norm(x.astype(np.float64) - wide)) / (size or 1.0)


class _TracedForward(Forward):
    """A forward pass that stops in front of ops."""

    def reads(self, tell: Tell | None) -> Iterator[tuple[Op, list[Any]]]:
        """Norms and the end of the step, and what they read, in order."""
        values = self._start()
        for at, op in enumerate(self.ops):
            last = has_trait(op, Terminator)
            if last or isinstance(op, RmsNormOp):
                yield op, [values[v] for v in op.operands]
            if tell is not None:
                tell(at + 1, len(self.ops))
            if last:
                return
            self._step(at, values, None)


def _stream(imported: ImportedModel, ids: np.ndarray, tell: Tell | None) -> Iterator[tuple[str, np.ndarray]]:
    """(place, float array [tokens, width]): the residual stream wherever a norm reads it, and the logits."""
    tokens = ids[: imported.config.max_context].reshape(1, -1)
    forward = _TracedForward(imported.module.function("step"), imported.checkpoint.read, tokens)
    layer = ""
    for op, read in forward.reads(tell):
        value = np.asarray(unpacked(read[0]))
        if not isinstance(op, RmsNormOp):
            yield "logits", value
            continue
        origin = op.location.origin
        if value.ndim != 2 or origin.endswith(("q_norm", "k_norm")):
            continue  # norms of the heads stand beside the stream
        yield _place(origin, layer), value
        found = re.match(r"layers\.\d+", origin)
        layer = found[0] if found else layer


def _place(origin: str, layer: str) -> str:
    """What stands in front of the norm `origin`; `layer` is that of the norm before, "" for none."""
    if origin.endswith("input_layernorm") or origin == "norm":
        return layer or "embedding"
    if origin.endswith("post_attention_layernorm"):
        return origin.removesuffix("post_attention_layernorm") + "self_attn"
    return f"in front of {origin}"
