"""What a recipe may ask of formats: which activations there are, which weights they meet, how a KV cache is written.

is_int8(format), is_fp8(format)        # formats of activations that a kernel makes while a product runs
can_meet(activations, weights)         # whether products multiply them
cache_type(text, num_kv_heads, head_dim)
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError
from ir.formats import PlainFormat

if TYPE_CHECKING:
    from ir.types import KVCacheType

ANY_WIDTH = 1 << 16  # of heads, when a recipe is read without a model


def cache_type(text: str, num_kv_heads: int, head_dim: int) -> KVCacheType:
    """The type of a KV cache kept as `[kv] format` says; blocks of a rotation are cut to what divides the heads."""
    from ir.parse_value import parse_type
    from ir.types import KVCacheType

    found = parse_type(f"kv<{num_kv_heads} x {ANY_WIDTH} x {text}>")
    if not isinstance(found, KVCacheType):
        raise DiagnosticError(f"{text!r} is no format of a KV cache")
    block = math.gcd(found.rotate, head_dim) if found.rotate else 0
    return replace(found, head_dim=head_dim, rotate=block if block > 1 else 0)


def is_int8(format: object) -> bool:
    """Whether this is the int8 format of activations: symmetric, in groups or by token, scales of f32."""
    words = str(format)
    return words.startswith("q8_sym<") and words.endswith("scale=f32>")


def is_fp8(format: object) -> bool:
    """Whether this is a format of activations in 8-bit floats: f8e4m3, a scale a row or so many columns of one."""
    return re.fullmatch(r"f8e4m3<block=(row|1x\d+), scale=f32>", str(format)) is not None


def can_meet(activations: object, weights: object) -> bool:
    """Whether products multiply them: int8 integers, f8e4m3 weights in f8e4m3, floats everything."""
    if is_fp8(activations):
        return str(weights).startswith("f8e4m3<")
    return not is_int8(activations) or has_integer_levels(weights)


def has_integer_levels(format: object) -> bool:
    """Whether the codes of a low-bit format stand for small integers, which int8 activations multiply exactly."""
    return not isinstance(format, PlainFormat) and hasattr(format, "integer_levels")
