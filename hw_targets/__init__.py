"""Hardware descriptions: what code may use on a machine, and what the machine can do.

`load("host")`, `load("x86-64-v3")`, `load("x86-64-v4{dram=8GiB}")` give a frozen `Target`; `names()` lists what there
is.
"""

from __future__ import annotations

from hw_targets.registry import load, names
from hw_targets.target import Target

__all__ = ["Target", "load", "names"]
