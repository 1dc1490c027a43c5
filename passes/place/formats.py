"""Bytes of a model's tensors and cache under a recipe, and the element that products are computed in.

    formats = formats_of("w4a8-g32,kv8", dtype="bf16")
    formats.nbytes(tensor)            # all copies
    formats.kv_bytes(layer)           # that one token adds

Takes recipes as builds do; a tensor that its format cannot hold (a group that does not divide its columns) stays in
the float of the build. Refuses what `passes.quantize.recipe` refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from frontends.model_shape import LayerShape, TensorShape
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, NumberFormat, PlainFormat
from passes.quantize.recipe import FLOAT, HELD_BACK, STORED, Choice, Recipe, Rule, load_recipe
from passes.quantize.recipe_formats import cache_type

FLOATS: dict[str, PlainFormat] = {"bf16": BF16, "f16": F16, "f32": F32}
# From the most exact to the smallest: what "the next format down" means. "" is the float of the build.
LADDER = ("", "w8a8", "w6a8", "w5a8", "w4a8-g32", "w3", "w2a8")


_TENSORS = {
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"experts.{x}": f"mlp.experts.0.{x}_proj" for x in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Formats:
    """A recipe applied to shapes. `name` is the recipe's text, "" for floats throughout.

    `classes`: where the experts of a layer differ, how many are alike, and their formats.
    """

    name: str
    recipe: Recipe = field(default_factory=lambda: Recipe(""))
    float_format: str = "bf16"
    classes: tuple[tuple[int, Formats], ...] = ()

    def at(self, layer: int, experts: int = 0) -> Formats:
        """The formats of one layer with so many experts: rules that choose by the names of tensors take those of
        Hugging Face's Llama."""
        if not any(rule.match or rule.experts for rule in self.recipe.rules):
            return self
        found: dict[tuple[Choice, ...], list[int]] = {}
        for expert in range(experts):
            said = tuple(self._choice_at(layer, role, expert) for role in _TENSORS if role.startswith("experts."))
            found.setdefault(said, []).append(expert)
        classes = tuple((len(e), replace(self, recipe=self._recipe_at(layer, e[0]))) for e in found.values())
        made = replace(self, recipe=self._recipe_at(layer, 0 if experts else None))
        return replace(made, classes=classes) if len(classes) > 1 else made

    def _choice_at(self, layer: int, role: str, expert: int | None) -> Choice:
        """What the recipe says of a tensor of a layer, as Llama or Qwen names it."""
        if role == "head":
            return self.recipe.choice("lm_head.weight", role)
        tail = _TENSORS[role]
        if not role.startswith("experts."):
            return self.recipe.choice(f"model.layers.{layer}.{tail}.weight", role)
        tail = tail.replace("experts.0.", f"experts.{expert or 0}.")
        return self.recipe.choice(f"model.layers.{layer}.{tail}.weight", role, expert)

    def _recipe_at(self, layer: int, expert: int | None) -> Recipe:
        """What the recipe says of a layer, and of one of its experts, by roles alone."""
        kept = tuple(rule for rule in self.recipe.rules if rule.role in HELD_BACK)
        said = [(self._choice_at(layer, role, expert), role) for role in (*_TENSORS, "head")]
        rules = [Rule(choice, role) for choice, role in said if choice != Choice()]
        return Recipe(self.recipe.name, rules=(*kept, *rules), kv=self.recipe.kv)

    def weight(self, tensor: TensorShape) -> NumberFormat:
        """The number format of a tensor."""
        if not tensor.is_product:
            return FLOATS[self.float_format] if tensor.role == "embedding" else F32
        role = tensor.role.replace("shared.", "mlp.")
        chosen = self.recipe.choice("", role).format
        if chosen is None or chosen in (FLOAT, STORED) or isinstance(chosen, str):
            return FLOATS[self.float_format]
        return chosen if _fits(chosen, tensor.shape) else FLOATS[self.float_format]

    def nbytes(self, tensor: TensorShape) -> int:
        """Bytes of all copies of a tensor."""
        if self.classes and tensor.role.startswith("experts."):
            return sum(_nbytes(made.weight(tensor), tensor.shape) * count for count, made in self.classes)
        return _nbytes(self.weight(tensor), tensor.shape) * tensor.copies

    def text(self, tensor: TensorShape) -> str:
        """The format of a tensor, or the formats of its copies, as text."""
        if not self.classes or not tensor.role.startswith("experts."):
            return str(self.weight(tensor))
        counts: dict[str, int] = {}
        for count, made in self.classes:
            counts[str(made.weight(tensor))] = counts.get(str(made.weight(tensor)), 0) + count
        return next(iter(counts)) if len(counts) == 1 else " + ".join(f"{n} of {name}" for name, n in counts.items())

    def element(self, tensor: TensorShape) -> str:
        """What the products of a tensor are computed in: i8 when both sides are integers, else the float."""
        chosen = self.recipe.choice("", tensor.role.replace("shared.", "mlp.")).activations
        integers = chosen is not None and not isinstance(chosen, str | PlainFormat)
        return "i8" if integers and not isinstance(self.weight(tensor), PlainFormat) else self.float_format

    def kv_bytes(self, layer: LayerShape) -> int:
        """Bytes that one token adds to the cache of a layer."""
        attention = layer.attention
        if not self.recipe.kv:
            return attention.kv_elements * FLOATS[self.float_format].nbytes((1,))
        if attention.kind == "mla":
            return _kv_row(self.recipe.kv, attention.kv_elements)
        rows = _kv_row(self.recipe.kv, attention.head_dim) + _kv_row(self.recipe.kv, attention.value_dim)
        return attention.kv_heads * rows

    @property
    def kv_name(self) -> str:
        """The format of the cache as text."""
        return self.recipe.kv or self.float_format


def formats_of(recipe: str | None, dtype: str = "bf16") -> Formats:
    """The formats of a recipe text as `--recipe` takes it; None or "" for floats of `dtype` everywhere."""
    if not recipe:
        return Formats("", float_format=dtype)
    return Formats(recipe, load_recipe(recipe), dtype)


def next_down(formats: Formats) -> Formats | None:
    """The same with the next smaller recipe of the ladder; None when the recipe is not on it or the smallest."""
    first, _, rest = formats.name.partition(",")
    if first not in LADDER[:-1]:
        return None
    below = LADDER[LADDER.index(first) + 1]
    return formats_of(",".join(part for part in (below, rest) if part), formats.float_format)


@lru_cache(maxsize=4096)
def _nbytes(format: NumberFormat, shape: tuple[int, ...]) -> int:
    return format.nbytes(shape)


@lru_cache(maxsize=4096)
def _fits(format: NumberFormat, shape: tuple[int, ...]) -> bool:
    try:
        format.nbytes(shape)
    except DiagnosticError:
        return False
    return True


@lru_cache(maxsize=256)
def _kv_row(text: str, width: int) -> int:
    return cache_type(text, 1, width).element.nbytes((1, width))
