"""Decisions taken beforehand, as text: `--pin 'experts=disk'`, `--pin 'layers.0-9.attention=gpu'`, `--pin 'kv=dram'`.

    pin = parse_pin("layers.0-9.experts=hbm", shape, machine)

Left of `=`: `weights` (every group), a group (`embedding`, `attention`, `mlp`, `experts`, `head`) or `kv`, perhaps with
`layers.A-B.` in front. Right of it: a tier or storage (where it lies), a unit (who computes it), a mode (`resident`,
`streamed`, `cached`, `split`), or a recipe where a plan chooses among `formats`. `disk` is the first storage, `gpu` and
`cpu` the first unit of that kind. `kv=near` leaves open where keys and values lie, but a unit beside them attends;
`kv=dram:0.5` is a place with the share of each layer's that lies there, the rest being elsewhere. Where experts of a
layer may differ, `experts=w8a8:0.25` gives a quarter of each layer's that recipe, those that would lose most in fewer
bits. All else is refused with what would work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from frontends.model_shape import ModelShape
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean
from passes.place.machine import Machine
from passes.place.option import CACHED, RESIDENT, SPLIT, STREAMED
from passes.place.parts import GROUPS
from passes.place.problem import NEAR, Pin

MEASURE_DRIVE = "'compile-model targets calibrate --disk DIR' measures one of this machine"
MODES = (RESIDENT, STREAMED, CACHED, SPLIT)
_PIN = re.compile(r"(?:layers\.(\d{1,6})(?:-(\d{1,6}))?\.)?([a-z_]+)=([A-Za-z0-9._,-]+)(?::([0-9.]{1,8})(%?))?")


def parse_pin(
    text: str, shape: ModelShape, machine: Machine, formats: Sequence[str] = (), *, by_expert: bool = False
) -> Pin:
    """The pin that a text means on this machine. `by_expert`: whether experts of a layer may have several formats."""
    match = _PIN.fullmatch(text.strip())
    if match is None:
        raise DiagnosticError(
            f"{text!r} is not a pin", expected="group=where, such as experts=disk or layers.0-9.attention=gpu"
        )
    first, last, group, where, amount, percent = match.groups()
    groups = ("weights", *GROUPS, "kv")
    if group not in groups:
        raise DiagnosticError(
            f"pin {text!r}: there is no group {group!r}{did_you_mean(group, groups)}", expected=", ".join(groups)
        )
    layers = None
    if first is not None:
        layers = (int(first), int(last if last is not None else first))
        if layers[0] > layers[1] or layers[1] >= len(shape.layers):
            raise DiagnosticError(
                f"pin {text!r}: the model has layers 0 to {len(shape.layers) - 1}", expected="a range among them"
            )
        if group in ("embedding", "head"):
            raise DiagnosticError(f"pin {text!r}: {group} belongs to no layer")
    known = places(machine) | {name: name for name in formats if name} | ({NEAR: NEAR} if group == "kv" else {})
    share = _share(text, group, amount, bool(percent), by_expert) if amount is not None else None
    if share is not None and group == "experts":
        known = {name: name for name in formats if name}
    elif share is not None:  # of a memory or a drive
        known = {name: place for name, place in known.items() if place in dict(machine.room)}
    if where not in known:
        raise DiagnosticError(
            f"pin {text!r}: target {machine.target.name} has nothing named {where!r}{did_you_mean(where, known)}",
            expected=", ".join(known),
            hint=MEASURE_DRIVE if where == "disk" and machine.target.name == "host" else "",
        )
    return Pin(text.strip(), group, known[where], layers, share if share is not None and share < 1 else None)


def _share(text: str, group: str, amount: str, percent: bool, by_expert: bool) -> float:
    """The part of the keys and values, or of the experts, of a layer that a pin speaks of, above 0 and at most 1."""
    try:
        share = float(amount) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    divided = group in (("kv", "experts") if by_expert else ("kv",))
    if not divided or not 0 < share <= 1:
        what = f"{amount!r} is no share" if divided else "only keys and values are divided"
        if group == "experts" and not divided:
            what += ": without --by-expert the experts of a layer share a format"
        raise DiagnosticError(f"pin {text!r}: {what}", expected="such as kv=dram:0.5 or kv=dram:50%")
    return share


def places(machine: Machine) -> dict[str, str]:
    """What may stand right of `=`, and what it means here."""
    found = {name: name for name, _ in machine.room}
    found |= {unit.name: unit.name for unit in machine.units}
    if machine.stores:
        found.setdefault("disk", machine.stores[0])
    for kind in ("gpu", "cpu"):
        unit = next((u for u in machine.units if u.kind == kind), None)
        if unit is not None:
            found.setdefault(kind, unit.name)
    return found | {mode: mode for mode in MODES}
