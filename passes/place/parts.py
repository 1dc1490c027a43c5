"""What is placed: for every kind of layer its attention, its MLP and its experts; the embeddings and the head.

    for part in parts_of(shape, formats): part.name, part.count, part.nbytes, part.flops_per_token

Layers that are equal are one part with a count, which is what keeps the choice small for models of any depth. A pin may
name single layers (`layers.0-9.experts=...`): then the runs it cuts are parts of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from frontends.model_shape import LayerShape, ModelShape, TensorShape
from passes.place.expert_mix import ExpertMix
from passes.place.formats import Formats
from passes.place.placement import span

GROUPS = ("embedding", "attention", "mlp", "experts", "head")
# Kernels that a token passes in each, after fusion: what dispatch is paid for.
_LAUNCHES = {"embedding": 1, "attention": 4, "mlp": 2, "experts": 3, "head": 2}
_OF_EACH_FORMAT = 2  # of experts: gate and up, and down


@dataclass(frozen=True)
class Part:
    """One group of `count` equal layers (`layers` are their numbers; empty for embedding and head).

    Bytes and FLOP are of one layer. Of `experts`, `nbytes` is of all experts of the layer and `flops_per_token` of
    those that one token uses. Of the bytes `weight_bytes` are those of the `weights` of products. Where a plan chooses
    among formats (`passes.place.format_menu`), a part is one way to store it: that of `recipes`, of which each of the
    layers loses `losses`. With a `mix` the experts of a layer have several formats.
    """

    group: str
    kind: int
    layers: tuple[int, ...]
    nbytes: int
    flops_per_token: int
    element: str
    format: str
    layer: LayerShape | None = None
    kv_bytes_per_token: int = 0
    weights: int = 0
    weight_bytes: int = 0
    tied: bool = False  # a head whose bytes are those of the embedding table
    recipes: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    mix: ExpertMix | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What all ways to store a part have in common."""
        return self.group, self.kind

    @property
    def recipe(self) -> str:
        """The first of `recipes`, of a mix that of the experts that are not named; "" where nothing is chosen."""
        if self.mix is not None:
            return self.mix.recipes[-1]
        return self.recipes[0] if self.recipes else ""

    @property
    def loss(self) -> float:
        """Of one layer, on average."""
        return sum(self.losses) / len(self.losses) if self.losses else 0.0

    @property
    def count(self) -> int:
        return len(self.layers) or 1

    @property
    def name(self) -> str:
        return f"{self.group} {span(self.layers)}".strip()

    @property
    def launches(self) -> int:
        more = len(self.mix.recipes) - 1 if self.mix is not None else 0
        return _LAUNCHES[self.group] + _OF_EACH_FORMAT * more

    @property
    def experts(self) -> int:
        return self.layer.mlp.experts if self.layer is not None and self.group == "experts" else 0

    @property
    def top_k(self) -> int:
        return self.layer.mlp.top_k if self.layer is not None and self.group == "experts" else 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, on average: its matrices lie beside each other."""
        return self.nbytes // self.experts if self.experts else 0

    def asked_bytes(self, tokens: float) -> float:
        """Bytes of an expert, on average over those that a pass over so many tokens asks for."""
        return self.mix.asked(tokens) if self.mix is not None else self.expert_bytes

    def slot_bytes(self, slots: int) -> int:
        """Bytes of a cache that has room for any `slots` experts of the layer."""
        return self.mix.largest(slots) if self.mix is not None else slots * self.expert_bytes

    def rest_bytes(self, slots: int) -> float:
        """Bytes of an expert, on average over those that such a cache has no room for."""
        if self.mix is None or slots >= self.experts:
            return self.expert_bytes
        return (self.nbytes - self.mix.largest(slots)) / (self.experts - slots)


def parts_of(shape: ModelShape, formats: Formats, cuts: tuple[tuple[int, int], ...] = ()) -> tuple[Part, ...]:
    """The parts of a model. `cuts` are ranges of layers (first, last) that must not share a part with others."""
    outer = formats.at(0)
    found: list[Part] = [_outer(shape, outer, "embedding")]
    for kind, (layer, layers) in enumerate(_kinds(shape, formats, cuts)):
        here = formats.at(layers[0], layer.mlp.experts)
        for group in ("attention", "mlp", "experts"):
            tensors = tuple(t for t in shape.tensors(layer) if _group(t, layer) == group)
            if tensors:
                found.append(_inner(here, group, kind, layer, layers, tensors))
    found.append(_outer(shape, outer, "head"))
    return tuple(found)


def tensors_of(shape: ModelShape, part: Part) -> tuple[TensorShape, ...]:
    """The tensors of one layer of a part of layers."""
    assert part.layer is not None
    return tuple(t for t in shape.tensors(part.layer) if _group(t, part.layer) == part.group)


def _kinds(
    shape: ModelShape, formats: Formats, cuts: tuple[tuple[int, int], ...]
) -> list[tuple[LayerShape, tuple[int, ...]]]:
    """Layers that are equal, stored alike, and not told apart by a pin."""
    found: dict[tuple[LayerShape, tuple[bool, ...], Formats], list[int]] = {}
    for i, layer in enumerate(shape.layers):
        inside = tuple(first <= i <= last for first, last in cuts)
        found.setdefault((layer, inside, formats.at(i, layer.mlp.experts)), []).append(i)
    return [(layer, tuple(numbers)) for (layer, _, _), numbers in found.items()]


def _group(tensor: TensorShape, layer: LayerShape) -> str:
    """Shared experts and the router are the layer's MLP; without any, the router goes with the attention."""
    first = tensor.role.partition(".")[0]
    if first in ("experts", "mlp"):
        return first
    if first == "shared" or (first == "router" and layer.mlp.shared):
        return "mlp"
    return "attention"


def _inner(
    formats: Formats,
    group: str,
    kind: int,
    layer: LayerShape,
    layers: tuple[int, ...],
    tensors: tuple[TensorShape, ...],
) -> Part:
    products = [t for t in tensors if t.is_product]
    largest = max(products, key=lambda t: t.elements)
    return Part(
        group,
        kind,
        layers,
        sum(formats.nbytes(t) for t in tensors),
        sum(2 * t.used_elements for t in products),
        formats.element(largest),
        formats.text(largest),
        layer,
        formats.kv_bytes(layer) if group == "attention" else 0,
        sum(t.elements for t in products),
        sum(formats.nbytes(t) for t in products),
    )


def _outer(shape: ModelShape, formats: Formats, group: str) -> Part:
    """The head with the last norm, or the embeddings; a tied table is the head's bytes and costs the other nothing."""
    head = shape.head()
    if group == "head":
        own = [t for t in shape.outer_tensors() if t.role != "embedding" and t.role != "head"]
        extra = sum(formats.nbytes(t) for t in own)
        flops = 2 * head.elements + sum(2 * t.elements for t in own if t.is_product)
        return Part(
            "head", -1, (), formats.nbytes(head) + extra, flops, formats.element(head), str(formats.weight(head)),
            weights=head.elements, weight_bytes=formats.nbytes(head), tied=_tied(shape, formats),
        )  # fmt: skip
    tables = [t for t in shape.outer_tensors() if t.role == "embedding"]
    nbytes = sum(formats.nbytes(t) for t in tables[1 if _tied(shape, formats) else 0 :])
    return Part("embedding", -1, (), nbytes, 0, formats.float_format, str(formats.weight(tables[0])))


def _tied(shape: ModelShape, formats: Formats) -> bool:
    """Whether one table serves both: one that the head keeps in low bits is looked up in floats all the same."""
    table = next(t for t in shape.outer_tensors() if t.role == "embedding")
    return shape.tied_head and formats.weight(shape.head()) == formats.weight(table)
