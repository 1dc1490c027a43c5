"""Model families: how a config becomes a graph. One short recipe a family, registered by decorator.

    @register_family
    class Qwen2(Family):
        model_type = "qwen2"
        architectures = ("Qwen2ForCausalLM",)

        @abstractmethod
    def config(self, fields): ...       # config.json -> ModelConfig
        def layer(self, step, x, layer, rope): ...   # the graph of one layer; `Family` has the llama-shaped one

The built-in recipes are the modules of `frontends.families`. Other packages add theirs through the entry point group
`stratum.families`: each entry point names a module that registers a family when imported, or the class itself.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar

from frontends import blocks
from frontends.config import ModelConfig
from frontends.config_reader import ConfigReader
from frontends.step import StepBuilder
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.spelling import did_you_mean

ENTRY_POINTS = "stratum.families"


class Family(ABC):
    """Base of the recipes: a pre-norm decoder with RMS norms, rotary attention and a gated MLP."""

    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    # Tensors of the checkpoint that carry nothing the graph needs, as regular expressions of whole names.
    ignored: ClassVar[tuple[str, ...]] = (r".*\.rotary_emb\.inv_freq",)

    @abstractmethod
    def config(self, fields: ConfigReader) -> ModelConfig:
        """The validated sizes of the model. Asks `fields` for every field that the family knows."""

    def layer(self, step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
        """The residual stream after layer number `layer`."""
        return blocks.dense_mlp(step, blocks.attention(step, x, layer, rope))

    def build(self, step: StepBuilder) -> ModuleOp:
        """The whole step function."""
        x, table = blocks.embedding(step)
        rope = blocks.rope_tables(step)
        for layer in range(step.config.num_layers):
            with step.scope(f"layers.{layer}"):
                x = self.layer(step, x, layer, rope)
        return step.finish(blocks.head(step, x, table))


_FAMILIES: dict[str, Family] = {}
_BUILT_IN = "frontends.families"
F = TypeVar("F", bound=Family)


def register_family(cls: type[F]) -> type[F]:
    """Class decorator: makes `model_type` known. A second family of the same name is an error."""
    known = _FAMILIES.get(cls.model_type)
    if known is not None:
        raise ValueError(f"family {cls.model_type!r} is registered by {type(known).__module__} already")
    _FAMILIES[cls.model_type] = cls()
    return cls


def find_family(model_type: str, where: str = "") -> Family:
    """The recipe for a `model_type`. A name that nobody registered is a diagnostic with the nearest and all names."""
    importlib.import_module(_BUILT_IN)
    if model_type not in _FAMILIES:
        _load_entry_points()
    if model_type not in _FAMILIES:
        raise DiagnosticError(
            f"the model family {model_type!r} is not known{did_you_mean(model_type, _FAMILIES)}",
            where=where,
            expected=f"one of {', '.join(sorted(_FAMILIES))}",
            hint=f"a package can add a family through the entry point group {ENTRY_POINTS!r}",
        )
    return _FAMILIES[model_type]


def family_names() -> tuple[str, ...]:
    """Every registered family, those of other packages included."""
    importlib.import_module(_BUILT_IN)
    _load_entry_points()
    return tuple(sorted(_FAMILIES))


def _load_entry_points() -> None:
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        try:
            loaded = point.load()
            if isinstance(loaded, type) and issubclass(loaded, Family) and loaded.model_type not in _FAMILIES:
                register_family(loaded)
        except Exception as error:  # whatever a foreign package raises
            message = f"the family {point.name!r} of the package entry point {point.value!r} cannot be loaded: {error}"
            raise DiagnosticError(message, hint="mend or remove that package") from error
