"""The bars of quality, checked on the figures of bench/quality.py: pass, fail, or open where a row is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

A8_RECIPES = ("w8a8", "w6a8", "w5a8", "w4a8-g32", "w4a8-g128", "w3", "w2a8")


class Measured(Protocol):
    """What checks read of a row."""

    @property
    def divergence(self) -> float: ...
    @property
    def bits(self) -> float | None: ...


@dataclass(frozen=True)
class Check:
    """A bar, what was measured, and the verdict: pass, fail, open, or empty for what is only reported."""

    bar: str
    measured: str
    verdict: str


Rows = Mapping[str, Measured]


def checks(rows: Rows) -> list[Check]:
    """All bars, in the order of the page."""
    found = []
    for scope, words in (("layers", ""), ("whole", ", head included")):
        found.append(_best_of_four(rows, f"4.5 bits: KL at most 0.7 x llama.cpp Q4_0{words}", scope))
    for key in ("layers/q4", "layers/q4-signed-g16", "layers/nf4", "layers/k4", "gptq/w4a16-g32", "awq/w4a16-g32"):
        found.append(_ratio(rows, f"{key} against llama.cpp Q4_0", key, "layers/gguf-Q4_0", None))
    found.append(_ratio(rows, "8.5 bits: KL no higher than llama.cpp Q8_0", "layers/q8", "layers/gguf-Q8_0", 1.0))
    for name in A8_RECIPES:
        bar = f"int8 activations: KL at most 4/3 of the weights alone, {name}"
        found.append(_ratio(rows, bar, f"f32/{name}", f"alone/{name}", 4 / 3))
    found.append(_at_most(rows, "kv8 adds at most 0.0005", "kv/kv8", 0.0005))
    found.append(_at_least(rows, "kv4 rotated: KL at least 3 x below plain int4", "kv/kv4-plain", "kv/kv4", 3.0))
    for method in ("gptq", "awq"):
        bar = f"{method} in groups of 128: KL no higher than plain q4 in groups of 32"
        found.append(_ratio(rows, bar, f"{method}/w4a16-g128", "alone/w4a8-g32", 1.0))
    uniform = sorted(key for key in rows if key.startswith("whole/") and not key.startswith("whole/gguf"))
    for key in ("solver/4.125", "solver/4.25", "solver/4.5"):
        found.append(_best_uniform(rows, key, uniform))
    return found


def _open(bar: str, rows: Rows, keys: Sequence[str]) -> Check | None:
    missing = [key for key in keys if key not in rows]
    return Check(bar, f"no row {', '.join(missing)}", "open") if missing else None


def _verdict(passed: bool | None) -> str:
    return "" if passed is None else "pass" if passed else "**fail**"


def _ratio(rows: Rows, bar: str, ours: str, other: str, most: float | None) -> Check:
    if (missing := _open(bar, rows, (ours, other))) is not None:
        return missing
    a, b = rows[ours].divergence, rows[other].divergence
    ratio = a / b if b else float("inf")
    passed = None if most is None else ratio <= most
    return Check(bar, f"{a:.5f} / {b:.5f} = {ratio:.3f}", _verdict(passed))


def _at_most(rows: Rows, bar: str, key: str, most: float) -> Check:
    return _single(rows, bar, key, lambda value: value <= most)


def _single(rows: Rows, bar: str, key: str, passes: Callable[[float], bool]) -> Check:
    if (missing := _open(bar, rows, (key,))) is not None:
        return missing
    value = rows[key].divergence
    return Check(bar, f"{value:.6f}", _verdict(passes(value)))


def _at_least(rows: Rows, bar: str, above: str, below: str, least: float) -> Check:
    if (missing := _open(bar, rows, (above, below))) is not None:
        return missing
    a, b = rows[above].divergence, rows[below].divergence
    ratio = a / b if b else float("inf")
    return Check(bar, f"{a:.5f} / {b:.5f} = {ratio:.2f}", _verdict(ratio >= least))


def _best_of_four(rows: Rows, bar: str, scope: str) -> Check:
    """Our best format that takes as many bits as Q4_0, but for a table of 16 levels a matrix."""
    yardstick = f"{scope}/gguf-Q4_0"
    ours = [k for k in rows if k.startswith(f"{scope}/") and "gguf" not in k and (rows[k].bits or 99.0) <= 4.51]
    if yardstick not in rows or not ours:
        return Check(bar, f"no row {yardstick if ours else f'{scope}/q4'}", "open")
    best = min(ours, key=lambda k: (rows[k].divergence, k))
    found = _ratio(rows, bar, best, yardstick, 0.7)
    return Check(bar, f"{found.measured} ({best})", found.verdict)


def _best_uniform(rows: Rows, key: str, uniform: Sequence[str]) -> Check:
    """A mixed build against every uniform one that is not larger."""
    bar = f"{key}: KL no higher than the best uniform format of its size"
    if (missing := _open(bar, rows, (key,))) is not None:
        return missing
    bits = rows[key].bits or 0.0
    fitting = [u for u in uniform if (rows[u].bits or 99.0) <= bits + 1e-6]
    if not fitting:
        return Check(bar, f"{rows[key].divergence:.5f} at {bits:.3f} bits; no uniform format is as small", "open")
    best = min(fitting, key=lambda u: (rows[u].divergence, u))
    a, b = rows[key].divergence, rows[best].divergence
    return Check(bar, f"{a:.5f} ({bits:.3f} bits) / {b:.5f} ({best}) = {a / b:.3f}", _verdict(a <= b))
