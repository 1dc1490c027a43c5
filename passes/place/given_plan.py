"""A plan that is given back, maybe edited: whether it can be meant for this model and machine, before it is judged.

    check_given(placement, shape, target, "plan.json")   # DiagnosticError naming the entry
    restated(problem, placement)                         # its entries with the bytes and formats that they really have

Refused are layers that the model lacks or that are named twice, groups that it lacks, sessions that contradict
themselves, and devices that the target lacks. Fields that are computed from others (`nbytes`, `format`) are not taken
from the file.
"""

from __future__ import annotations

import dataclasses

from frontends.model_shape import ModelShape
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.expert_entries import said_of, stored_as
from passes.place.kv_losses import kv_row_bytes, kv_text
from passes.place.parallel import degrees_of, device_unit
from passes.place.parts import GROUPS
from passes.place.placement import Placed, PlacedKV, Placement, layer_numbers
from passes.place.problem import Problem


def check_given(placement: Placement, shape: ModelShape, target: Target, where: str) -> None:
    """Refuses what cannot be a plan of this model on this target, whatever it promises."""
    session = placement.session
    for name, value, bound, most in (
        ("context", session.context, f"what {shape.name} takes", shape.max_context),
        ("prompt", session.prompt, "the context", session.context),
        ("micro_batches", session.micro_batches, "the batch", session.batch),
    ):
        if value > most:
            raise DiagnosticError(
                f"session.{name} is {value}, more than {bound}", where=where, expected=f"{most} or less"
            )
    named: set[tuple[str, str, int]] = set()
    for entry in placement.groups:
        if entry.group not in GROUPS:
            raise DiagnosticError(f"groups: there is no group {entry.group!r}", where=where, expected=", ".join(GROUPS))
        for layer in _layers(entry.layers, shape, where) if entry.layers else (-1,):
            if (entry.group, entry.pieces, layer) in named:
                which = f"layer {layer} of {entry.group}" if layer >= 0 else entry.group
                raise DiagnosticError(f"groups: {which} is named twice", where=where, expected="each once")
            named.add((entry.group, entry.pieces, layer))
    places: dict[int, list[PlacedKV]] = {}
    for kv in placement.kv:
        for layer in _layers(kv.layers, shape, where):
            places.setdefault(layer, []).append(kv)
    for layer, found in places.items():
        if len(found) > 2:
            raise DiagnosticError(
                f"kv: layer {layer} is named {len(found)} times", where=where, expected="once, or in two places"
            )
        if len(found) == 1 and found[0].positions:
            raise DiagnosticError(
                f"kv: of layer {layer} {found[0].positions} positions lie in {found[0].tier}, and the others nowhere",
                where=where, expected="positions of 0 (all), or another entry for the layer",
            )  # fmt: skip
    _check_devices(placement, shape, target, where)


def _layers(text: str, shape: ModelShape, where: str) -> list[int]:
    found = layer_numbers(text)
    if found and max(found) >= len(shape.layers):
        raise DiagnosticError(
            f"the plan names layers {text!r}", where=where, expected=f"layers 0 to {len(shape.layers) - 1}"
        )
    return found


def _check_devices(placement: Placement, shape: ModelShape, target: Target, where: str) -> None:
    """Several devices: degrees that make as many as there are, and everything in their own memory."""
    degrees, unit = placement.degrees, device_unit(target)
    if degrees == dataclasses.replace(degrees, tensor=1, pipeline=1, expert=1, data=1, vocabulary=1):
        return
    known = degrees_of(shape, target)
    if unit is None or degrees not in known:
        raise DiagnosticError(
            f"degrees: {target.name} and {shape.name} cannot be spread so: {_text(degrees)}", where=where,
            expected=f"one of {len(known)} ways, such as {_text(known[-1])}" if known else "all of them 1",
        )  # fmt: skip
    for entry in (*placement.groups, *placement.kv):
        elsewhere = entry.tier != unit.tier or entry.unit != unit.name
        if elsewhere or (isinstance(entry, Placed) and entry.mode != "resident"):
            what = entry.group if isinstance(entry, Placed) else "kv"
            raise DiagnosticError(
                f"a plan over {degrees.devices} devices keeps everything in their own memory, not {what} in "
                f"{entry.tier} by {entry.unit}", where=where, expected=f"{unit.tier} and {unit.name}, or degrees of 1",
            )  # fmt: skip


def _text(degrees: object) -> str:
    assert dataclasses.is_dataclass(degrees) and not isinstance(degrees, type)
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(degrees).items())


def restated(problem: Problem, placement: Placement) -> tuple[tuple[Placed, ...], tuple[PlacedKV, ...]]:
    """The entries of groups and kv as the file divides them, with the bytes and formats that they have."""
    if any(entry.pieces for entry in placement.groups):
        return placement.groups, placement.kv
    groups: list[Placed] = []
    variants, said = problem.variants(), said_of(problem, placement.expert_formats)
    for entry in placement.groups:
        layers, nbytes, formats = set(layer_numbers(entry.layers)), 0, ""
        for ways in variants:
            mine = tuple(layer for layer in ways[0].layers if layer in layers)
            if ways[0].group == entry.group and (mine or not ways[0].layers):
                for part, numbers in stored_as(problem, ways, entry, mine, said):
                    nbytes, formats = nbytes + part.nbytes * (len(numbers) or 1), formats or part.format
        groups.append(dataclasses.replace(entry, nbytes=nbytes, format=formats))
    kv: list[PlacedKV] = []
    session = problem.session
    for place in placement.kv:
        held, text = 0, kv_text(problem, place.format)
        for number in layer_numbers(place.layers):
            layer = problem.shape.layers[number]
            rows = session.batch * (place.positions or layer.kv_tokens(session.context))
            held += rows * kv_row_bytes(problem, layer, text)
        kv.append(dataclasses.replace(place, nbytes=held, format=text or problem.formats.kv_name))
    return tuple(groups), tuple(kv)
