"""Formats of the KV cache that a plan may choose among, by where a part of the cache lies, and what each loses.

    menu = kv_menu_of(["bf16", "kv8", "kv4"], formats, most_loss=0.002)
    menu.at("kv8").formats.kv_bytes(layer)

Losses are those of docs/quality.md: nats per token of examples/tiny-moe, the whole cache
in a format, as measured; the float of the build loses nothing. A layer has the same share of that as every other, and a
part of a layer's cache as much of it as of the layer's positions. Formats that take no fewer bytes than another and
lose no less are left out. Refuses formats without a measured loss, and losses that no listed format keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from frontends.model_shape import ModelShape
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean
from passes.place.formats import Formats
from passes.place.placement import Placement
from passes.quantize.recipe import load_recipe

MEASURED = {"kv8": 0.00034, "kv4": 0.00267, "kv2": 0.00666}  # nats per token, docs/quality.md
SOURCE = "measured on examples/tiny-moe, docs/quality.md"


@dataclass(frozen=True)
class KVFormat:
    """A format by its name in recipes; `text` is how plans name it, `loss` that of a whole model's cache."""

    name: str
    formats: Formats
    loss: float

    @property
    def text(self) -> str:
        return self.formats.kv_name


@dataclass(frozen=True)
class KVMenu:
    """Two formats or more. `most_loss` bounds what the cache and chosen formats of weights lose together; None: a plan
    that is given."""

    choices: tuple[KVFormat, ...]
    most_loss: float | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(choice.text for choice in self.choices)

    def at(self, text: str) -> KVFormat:
        """The format of this name or text. DiagnosticError for one that is not listed."""
        for choice in self.choices:
            if text in (choice.name, choice.text):
                return choice
        names = [choice.name for choice in self.choices]
        raise DiagnosticError(
            f"the cache is in {text!r}, which is none of the formats of the plan{did_you_mean(text, names)}",
            expected=", ".join(names),
        )


def kv_format(name: str, formats: Formats) -> KVFormat:
    """A format of the cache for weights as `formats` has them."""
    if name == formats.float_format:
        return KVFormat(name, _with_kv(formats, ""), 0.0)
    if name not in MEASURED:
        known = (formats.float_format, *MEASURED)
        raise DiagnosticError(
            f"{name!r} is no format of a cache with a measured loss{did_you_mean(name, known)}",
            where="--kv-formats", expected=", ".join(known),
        )  # fmt: skip
    return KVFormat(name, _with_kv(formats, load_recipe(name).kv), MEASURED[name])


def _with_kv(formats: Formats, text: str) -> Formats:
    return dataclasses.replace(formats, recipe=dataclasses.replace(formats.recipe, kv=text))


def kv_menu_of(names: Sequence[str], formats: Formats, shape: ModelShape, most_loss: float | None) -> KVMenu:
    """The menu of listed names. `formats` keep the cache in floats."""
    found = [kv_format(name, formats) for name in dict.fromkeys(n.strip() for n in names)]
    least = min(choice.loss for choice in found)
    if most_loss is not None and most_loss < least:
        raise DiagnosticError(
            f"none of {', '.join(c.name for c in found)} loses as little as {most_loss:.4g}", where="--kv-formats",
            expected=f"a loss of {least:.4g} or more, or a wider format among them",
        )  # fmt: skip
    return KVMenu(tuple(c for c in found if not any(_dominates(o, c, shape) for o in found)), most_loss)


def _dominates(other: KVFormat, one: KVFormat, shape: ModelShape) -> bool:
    """Whether another format loses no more and takes no more bytes in any layer, and less of one of both."""
    layers = [layer for layer, _ in shape.kinds()]
    pairs = [(other.formats.kv_bytes(layer), one.formats.kv_bytes(layer)) for layer in layers]
    pairs_loss = (other.loss, one.loss)
    return all(a <= b for a, b in (*pairs, pairs_loss)) and any(a < b for a, b in (*pairs, pairs_loss))


def kv_mixed(placement: Placement) -> bool:
    """Whether a plan has caches in several formats: such a plan can be judged, not built."""
    return len({entry.format for entry in placement.kv}) > 1
