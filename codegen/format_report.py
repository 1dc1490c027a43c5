"""How the weights of a build are stored: tensors, numbers and bytes of every format, and the bits of a weight.

    uses = format_uses(roots)                    # roots: (name, value) of the weights that the step reads
    print(format_text(uses, bits_per_weight))

Bytes are those of the formats with scales and zero points; what layouts pad is not counted here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ir.core import Value
from ir.types import TensorType


@dataclass(frozen=True)
class FormatUse:
    """What is stored in one format. `format` is its text form."""

    format: str
    tensors: int
    parameters: int
    nbytes: int


def format_uses(roots: Sequence[tuple[str, Value]]) -> tuple[FormatUse, ...]:
    """One entry a format, the one with the most numbers first."""
    found: dict[str, FormatUse] = {}
    for _, value in roots:
        type = value.type
        assert isinstance(type, TensorType)  # weights are
        shape = tuple(d for d in type.shape if isinstance(d, int))
        name = str(type.element)
        old = found.get(name, FormatUse(name, 0, 0, 0))
        count, nbytes = old.parameters + math.prod(shape), old.nbytes + type.element.nbytes(shape)
        found[name] = FormatUse(name, old.tensors + 1, count, nbytes)
    return tuple(sorted(found.values(), key=lambda use: (-use.parameters, use.format)))


def bits_per_weight(uses: Sequence[FormatUse]) -> float:
    """Bits that a stored number takes on average, scales included."""
    parameters = sum(use.parameters for use in uses)
    return 8 * sum(use.nbytes for use in uses) / parameters if parameters else 0.0


def format_text(uses: Sequence[FormatUse]) -> str:
    """One line: `4.86 bits per weight: 44 tensors of q4_sym<group=32, scale=f16>, 1 of q6_sym<...>, 34 of f32`."""
    listed = [f"{use.tensors} of {use.format}" for use in uses]
    if listed:
        listed[0] = listed[0].replace(" of ", f" tensor{'s' if uses[0].tensors != 1 else ''} of ", 1)
    return f"{bits_per_weight(uses):.2f} bits per weight: {', '.join(listed)}"
