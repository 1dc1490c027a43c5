"""Sample inputs of ops, as data: tests of any kind (contract, codegen against reference, text) walk them.

One module a family with `SAMPLES` (valid instances with arrays) and `FAULTS` (instances that must be refused, with the
words that the message must contain).
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.samples.base import Fault, Sample

_FAMILIES = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def all_samples() -> tuple[Sample, ...]:
    """Every sample, family by family."""
    return tuple(s for name in _FAMILIES for s in importlib.import_module(f"{__name__}.{name}").SAMPLES)


def all_faults() -> tuple[Fault, ...]:
    """Every fault, family by family."""
    return tuple(f for name in _FAMILIES for f in importlib.import_module(f"{__name__}.{name}").FAULTS)
