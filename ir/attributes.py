"""Attributes: the frozen values an op carries besides its operands.

Plain Python values are attributes: `bool`, `int`, `float`, `str`, tuples of attributes, and any `Type`. Structured
ones are frozen dataclasses derived from `Attribute`, registered by `register_attribute`, printed as
`#mnemonic<field = value, ...>`. Equality is structural.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np


@dataclass(frozen=True)
class Attribute:
    """Base of the structured attributes. `mnemonic` is the name in text."""

    mnemonic: ClassVar[str]


ATTRIBUTES: dict[str, type[Attribute]] = {}
A = TypeVar("A", bound=type[Attribute])


def register_attribute(cls: A) -> A:
    """Class decorator: makes `#mnemonic<...>` parse and print. A second class of the same mnemonic is an error."""
    if cls.mnemonic in ATTRIBUTES:
        raise ValueError(f"attribute #{cls.mnemonic} is registered by {ATTRIBUTES[cls.mnemonic].__module__} already")
    ATTRIBUTES[cls.mnemonic] = cls
    return cls


_PLAIN_SYMBOL = re.compile(r"[A-Za-z0-9_.*]+", re.ASCII)


@dataclass(frozen=True)
class SymbolRef:
    """A name that stands for bytes or code outside the IR, printed `@name` (quoted when it is not a plain path)."""

    name: str

    def __str__(self) -> str:
        return "@" + (self.name if _PLAIN_SYMBOL.fullmatch(self.name) else quoted(self.name))


def quoted(text: str) -> str:
    """A string literal, in the notation of JSON; what cannot be printed is escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


@register_attribute
@dataclass(frozen=True)
class Rope(Attribute):
    """Rotary position embedding of a head: which frequencies, scaled how.

    `scaling` is one of "default", "linear", "llama3", "yarn". Unused fields keep their defaults. Frequencies follow
    RoFormer (arXiv:2104.09864), yarn arXiv:2309.00071, and the parameter names of Hugging Face `rope_parameters`.
    """

    mnemonic: ClassVar[str] = "rope"
    dim: int  # rotated width of a head; even
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_context: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float = 1.0  # yarn: multiplies cos and sin

    def inverse_frequencies(self) -> np.ndarray:
        """float64 [dim / 2]: radians per position of each rotated pair."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        base = 1.0 / self.theta**exponent
        if self.scaling == "default":
            return base
        if self.scaling == "linear":
            return base / self.factor
        if self.scaling == "llama3":
            return self._llama3(base)
        if self.scaling == "yarn":
            return self._yarn(base)
        raise ValueError(f"unknown rope scaling {self.scaling!r}")

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / base
        low = self.original_context / self.low_freq_factor
        high = self.original_context / self.high_freq_factor
        smooth = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * base / self.factor + smooth * base
        scaled = np.where(wavelength > low, base / self.factor, blended)
        return np.where(wavelength < high, base, scaled)

    def _yarn(self, base: np.ndarray) -> np.ndarray:
        def dimension_of(rotations: float) -> float:
            return self.dim * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001  # the ramp needs a width
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
        return base / self.factor * ramp + base * (1 - ramp)
