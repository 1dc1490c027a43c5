"""Stratum: compile a language model's checkpoint to native code and run it."""

from __future__ import annotations

__version__ = "0.1.0"
