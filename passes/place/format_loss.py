"""What a model loses when a part of a layer is stored in a format: measured, or estimated from bits.

    ESTIMATED.of_part(shape, part, formats)                     # (loss of each layer of the part, ...)
    ESTIMATED.of_experts(shape, part, formats, uses)            # ((loss of each expert, ...) of each layer, ...)
    measured = MeasuredLosses.read(Path("sensitivity.jsonl"))   # what `build --bits-per-weight` measured

The estimate knows no weights: a format of b bits (scales included) is taken to err like the best code of b bits for a
Gaussian source, 4^-b of the square of the values, and the error of a product costs what it does on average in this part
of a model (`passes.quantize.loss_prior`). Only ratios of estimates mean something. Measured losses are nats per
token. Losses add up over parts and layers. What experts lose together is divided among them by how often each is picked
and, where that was measured, by the error of one of its rows (`passes.quantize.expert_uses`). Refuses tables that lack
a layer or a format that is asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontends.model_shape import ModelShape, TensorShape
from ir.diagnostics import DiagnosticError
from ir.formats import PlainFormat
from passes.place.formats import Formats
from passes.place.parts import Part, tensors_of
from passes.quantize.expert_uses import divided_losses, use_shares
from passes.quantize.loss_prior import PRIOR

MAX_BYTES = 64 << 20  # of a file of measured losses
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_LAST = re.compile(r"(?:^|[._])(?:down|o|w2|c_proj|out|dense)(?:_proj)?(?:$|[._])")


@dataclass(frozen=True)
class Losses:
    """The estimate; measured losses are a subclass. `source` tells people which it is."""

    source: str = "estimated from bits"

    def of_part(self, shape: ModelShape, part: Part, formats: Formats) -> tuple[float, ...]:
        """The loss of each layer of the part (one entry for the head) in these formats."""
        seen: dict[str, list[tuple[float, int]]] = {}
        for tensor in _products(shape, part):
            bits = 8 * formats.nbytes(tensor) / tensor.elements
            seen.setdefault(joint_role(tensor.role), []).append((4.0**-bits * tensor.elements, tensor.elements))
        loss = sum(PRIOR[role] * sum(e for e, _ in found) / sum(n for _, n in found) for role, found in seen.items())
        return (loss,) * part.count

    def of_experts(
        self, shape: ModelShape, part: Part, formats: Formats, uses: Mapping[int, Sequence[float]]
    ) -> tuple[tuple[float, ...], ...]:
        """The loss of each expert of each layer of the part; `uses` has how often each is picked, by layer."""
        losses = self.of_part(shape, part, formats)
        return tuple(
            tuple(loss * share for share in use_shares(uses.get(layer, (0.0,) * part.experts)))
            for layer, loss in zip(part.layers, losses, strict=True)
        )


ESTIMATED = Losses()


@dataclass(frozen=True)
class Entry:
    """What one product loses in a format, as it was measured; of stacked experts also the squared error of a row of
    each and how many rows it had."""

    loss: float
    experts: tuple[float, ...] = ()
    uses: tuple[float, ...] = ()


@dataclass(frozen=True)
class MeasuredLosses(Losses):
    """Entries by (group of a part, layer, whether it is the last product of the part), then by format of weights."""

    table: dict[tuple[str, int, bool], dict[str, Entry]] = field(default_factory=dict, hash=False)

    @staticmethod
    def read(path: Path) -> MeasuredLosses:
        """The losses in a file as `passes.quantize.sensitivity` writes it; lines of other kinds are passed over."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise DiagnosticError(f"the sensitivities cannot be read: {error.strerror}", where=str(path)) from None
        if len(data) > MAX_BYTES:
            raise DiagnosticError("the sensitivities are too large", where=str(path), expected="64 MiB or less")
        table: dict[tuple[str, int, bool], dict[str, Entry]] = {}
        for line in data.decode(errors="replace").splitlines():
            found = _entry(line)
            if found is not None:
                name, candidate, entry = found
                table.setdefault(_place(name), {})[candidate] = entry
        if not table:
            raise DiagnosticError(
                "the file has no measured losses",
                where=str(path),
                expected='lines such as {"group": "model.layers.0...", "candidate": "q4_sym<...> x ...", "loss": 0.01}',
            )
        return MeasuredLosses(f"measured, {path.name}", table)

    def of_part(self, shape: ModelShape, part: Part, formats: Formats) -> tuple[float, ...]:
        return tuple(
            sum((entry.loss for entry in self._of_layer(shape, part, formats, layer)), 0.0)
            for layer in part.layers or (-1,)
        )

    def of_experts(
        self, shape: ModelShape, part: Part, formats: Formats, uses: Mapping[int, Sequence[float]]
    ) -> tuple[tuple[float, ...], ...]:
        found = []
        for layer in part.layers:
            lost = [0.0] * part.experts
            for entry in self._of_layer(shape, part, formats, layer):
                if len(entry.experts) == part.experts:
                    each = divided_losses(entry.loss, entry.experts, entry.uses, uses.get(layer))
                else:
                    each = [entry.loss * share for share in use_shares(uses.get(layer, lost))]
                lost = [a + b for a, b in zip(lost, each, strict=True)]
            found.append(tuple(lost))
        return tuple(found)

    def uses(self) -> dict[int, tuple[float, ...]]:
        """How often the text of the calibration asked for each expert, by layer, where that was counted."""
        found: dict[int, tuple[float, ...]] = {}
        for (group, layer, _), entries in self.table.items():
            counted = next((e.uses for e in entries.values() if e.uses), ())
            if group == "experts" and counted:
                found.setdefault(layer, counted)
        return found

    def _of_layer(self, shape: ModelShape, part: Part, formats: Formats, layer: int) -> list[Entry]:
        """What was measured of each product of a layer."""
        wanted: dict[bool, TensorShape] = {}
        for tensor in _products(shape, part):  # the largest tensor of a joint product stands for it
            last = joint_role(tensor.role).endswith((".o", ".down"))
            if last not in wanted or tensor.elements > wanted[last].elements:
                wanted[last] = tensor
        entries = []
        for last, tensor in wanted.items():
            format = formats.weight(tensor)
            known = self.table.get((part.group, layer, last), {})
            found = [x for text, x in known.items() if text == str(format) or text.startswith(f"{format} x ")]
            if not found and not isinstance(format, PlainFormat):
                where = f"{part.group} of layer {layer}" if layer >= 0 else part.group
                raise DiagnosticError(
                    f"nothing was measured of {format} for {where}",
                    expected="a file of sensitivities of this model and of the listed formats",
                    hint="'compile-model build MODEL --bits-per-weight N --recipe FORMATS' measures them",
                )
            if found:
                entries.append(min(found, key=lambda entry: entry.loss))
        return entries


def joint_role(role: str) -> str:
    """The key of `PRIOR` for a tensor: products that are joined share one."""
    first, _, last = role.replace("shared.", "mlp.").partition(".")
    if first == "head":
        return "head"
    if first in ("mlp", "experts"):
        return f"{first}.down" if last == "down" else f"{first}.gate"
    return "attention.o" if last == "o" else "attention.q"


def _products(shape: ModelShape, part: Part) -> list[TensorShape]:
    if part.layer is None:
        return [shape.head()]
    return [t for t in tensors_of(shape, part) if t.is_product and t.role != "router"]


def _place(name: str) -> tuple[str, int, bool]:
    """(group of a part, layer or -1, whether it is the last product) by the joined name of a product's weights."""
    match = _LAYER.search(name)
    if match is None:
        return "head", -1, False
    layer, rest = int(match[1]), name[match.end() :]
    last = _LAST.search(rest) is not None
    if "shared" in rest:
        return "mlp", layer, last
    if "expert" in rest:
        return "experts", layer, last
    return ("attention" if "attn" in rest or "attention" in rest else "mlp"), layer, last


def _entry(line: str) -> tuple[str, str, Entry] | None:
    """(group, candidate, what was measured) of a line; None for lines of other kinds."""
    try:
        found: Any = json.loads(line)
        name, candidate, loss = found["group"], found["candidate"], float(found["loss"])
        experts, uses = (tuple(float(n) for n in found.get(key, ())) for key in ("experts", "uses"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    valid = isinstance(name, str) and isinstance(candidate, str) and len(experts) == len(uses)
    valid = valid and all(math.isfinite(n) and n >= 0 for n in (loss, *experts, *uses))
    return (name, candidate, Entry(loss, experts, uses)) if valid else None
