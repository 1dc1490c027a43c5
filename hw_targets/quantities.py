"""Numbers with units, as target files and overrides write them: `80GiB`, `57GB/s`, `90ns`, `0.234TFLOP/s`, `3.7GHz`.

`parse_quantity(text, kind)` gives a float in the base unit of the kind (bytes, bytes/s, seconds, FLOP/s, Hz, W,
J for each byte).
Decimal prefixes are powers of 1000, binary ones (Ki, Mi, Gi, Ti, Pi) powers of 1024. A plain number is in the base unit
already. Of bytes capitals do not matter: `2gib` is `2GiB`.
"""

from __future__ import annotations

import math
import re

from ir.diagnostics import DiagnosticError

_NUMBER = re.compile(r"\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(\S*)\s*")
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12}

# kind -> (unit symbols, prefixes, examples)
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, float], str]] = {
    "bytes": (("B",), _DECIMAL | _BINARY, "16GiB, 512MB"),
    "bandwidth": (("B/s",), _DECIMAL | _BINARY, "57GB/s, 3.2GiB/s"),
    "time": (("s",), _SMALL, "90ns, 1.5us"),
    "rate": (("FLOP/s", "OP/s"), _DECIMAL, "0.234TFLOP/s, 16TOP/s"),
    "frequency": (("Hz",), _DECIMAL, "3.7GHz"),
    "power": (("W",), _DECIMAL | {"m": 1e-3}, "360W"),
    "energy": (("J/B", "J"), _SMALL, "31pJ/B"),
    "share": (("",), {"": 1.0}, "0.7"),
    "count": (("",), {"": 1.0}, "8"),
}


def parse_quantity(text: str | int | float, kind: str, *, where: str = "") -> float:
    """The value in the base unit of `kind`. DiagnosticError for another unit, a negative or a huge value."""
    units, prefixes, examples = _KINDS[kind]
    if isinstance(text, int | float) and not isinstance(text, bool):
        value, unit = float(text), ""
    else:
        match = _NUMBER.fullmatch(str(text))
        if match is None:
            raise DiagnosticError(f"{text!r} is not a number with a unit", where=where, expected=examples)
        value, unit = float(match[1]), match[2]
    if kind == "bytes":  # nobody measures memory in millibytes
        unit, units = unit.lower(), ("b",)
        prefixes = {prefix.lower(): factor for prefix, factor in prefixes.items()}
    factor = 1.0 if not unit else _factor(unit, units, prefixes)
    if factor is None:
        named = ", ".join(p + u for u in _KINDS[kind][0] for p in _KINDS[kind][1] if u and p not in ("K", "P", "Pi"))
        known = f"{examples}; units are {named}" if named else examples
        raise DiagnosticError(f"{text!r} is not a quantity of kind {kind}", where=where, expected=known)
    if not 0 <= value * factor < 1e30:
        raise DiagnosticError(f"{text!r} is out of range", where=where, expected=f"a value such as {examples}")
    return value * factor


def _factor(unit: str, units: tuple[str, ...], prefixes: dict[str, float]) -> float | None:
    for symbol in units:
        if symbol and unit.endswith(symbol):
            prefix = unit[: len(unit) - len(symbol)]
            if prefix in prefixes:
                return prefixes[prefix]
    return None


def format_bytes(value: float) -> str:
    """`15.6 GiB`: the largest binary unit that leaves a number of one or more."""
    for symbol, factor in reversed(_BINARY.items()):
        if value >= factor:
            return f"{value / factor:.1f} {symbol}B"
    return f"{value:.0f} B"


def enough_bytes(value: float) -> str:
    """`15.61GiB`: a size to give that holds so many bytes, rounded up to a hundredth of the unit."""
    for symbol, factor in reversed(_BINARY.items()):
        if value >= factor:
            return f"{math.ceil(value * 100 / factor) / 100:.2f}{symbol}B"
    return f"{math.ceil(value)}B"
