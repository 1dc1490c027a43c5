"""Formats of the cache in a plan: from what is asked for to what plans choose among, and what is said of the choice.

    formats = kv_base(request, formats, given)                  # with one format listed, that of the cache throughout
    kv_menu = kv_menu_for(request, shape, formats, given, menu) # with several, a menu; else None
    placement = named_as_built(placement, formats); kv_lines(placement); kv_warnings(placement)

Refuses recipes that say another format of the cache, and several formats without a bound of what may be lost.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError
from passes.place.format_menu import Menu, uniform_quality
from passes.place.formats import Formats, formats_of
from passes.place.kv_formats import MEASURED, KVMenu, kv_format, kv_menu_of, kv_mixed
from passes.place.placement import Placement
from stratum.plan_request import PlanRequest

if TYPE_CHECKING:
    from frontends.model_shape import ModelShape


def kv_base(request: PlanRequest, formats: Formats, given: Placement | None) -> Formats:
    """The formats of the weights, the cache in floats where formats are chosen for it, or in the one that is listed."""
    if given is not None:
        if given.kv_quality is None:
            return formats
        names = [name for name in formats.name.split(",") if name not in MEASURED]
        return formats_of(",".join(names), formats.float_format)
    names = tuple(dict.fromkeys(name.strip() for name in request.kv_formats))
    if names and formats.recipe.kv:
        raise DiagnosticError(
            f"recipe {formats.name} says the format of the cache, too", where="--kv-formats",
            expected="a recipe of weights alone, its format of the cache among those listed",
        )  # fmt: skip
    if len(names) == 1:
        kv_format(names[0], formats)  # refuses others
        return _with_cache(formats, names[0])
    return formats


def kv_menu_for(
    request: PlanRequest, shape: ModelShape, formats: Formats, given: Placement | None, menu: Menu | None
) -> KVMenu | None:
    """The formats that the cache may have: those of the request, or those of a plan that is given."""
    if given is not None:
        kept = given.kv_quality
        return kv_menu_of(kept.formats, formats, shape, None) if kept is not None and kept.formats else None
    names = tuple(dict.fromkeys(name.strip() for name in request.kv_formats))
    if len(names) < 2:
        if names and request.max_loss is not None:
            kv_menu_of(names, formats, shape, request.max_loss)  # refuses one that loses more
        return None
    if request.max_loss is None:
        lost = ", ".join(f"{name} {loss:g}" for name, loss in MEASURED.items())
        raise DiagnosticError(
            "several formats of the cache without a bound of what they may lose", where="--kv-formats",
            expected=f"--max-loss X as well (a whole cache loses: {formats.float_format} 0, {lost})",
        )  # fmt: skip
    found = kv_menu_of(names, formats, shape, request.max_loss)
    least = min(choice.loss for choice in found.choices)
    if menu is not None:
        least += min(uniform_quality(menu, shape, name).loss for name in menu.names)
    if request.max_loss < least:
        raise DiagnosticError(
            f"the cache and the weights lose more than {request.max_loss:.4g} together", where="--max-loss",
            expected=f"{least:.4g} or more, or a wider format among those listed",
        )  # fmt: skip
    return found


def named_as_built(placement: Placement, formats: Formats) -> Placement:
    """The plan with the recipe of a model that has its cache, where that is in one format throughout."""
    name = kv_chosen(placement)
    if not name or placement.quality is not None:
        return placement
    return dataclasses.replace(placement, recipe=_with_cache(formats, name).name)


def kv_chosen(placement: Placement) -> str:
    """The recipe of the format that the whole cache has; "" for floats, for several, and where none was chosen."""
    if placement.kv_quality is None or not placement.kv or kv_mixed(placement):
        return ""
    base = Formats("", float_format=placement.dtype)
    named = {kv_format(name, base).text: name for name in placement.kv_quality.formats}
    name = named.get(placement.kv[0].format, "")
    return "" if name == placement.dtype else name


def kv_lines(placement: Placement) -> list[str]:
    """What formats of the cache were chosen among, what the choice loses, and what has it."""
    found = placement.kv_quality
    if found is None:
        return []
    bound = f"; with weights at most {found.most_loss:.4g}" if found.most_loss is not None else ""
    line = f"cache chosen among {', '.join(found.formats)}: loss {found.loss:.4g} ({found.source}{bound})"
    name = kv_chosen(placement)
    if name and placement.quality is None:
        line += f"; build it with --recipe {placement.recipe}"
    return [line]


def kv_warnings(placement: Placement) -> list[str]:
    """That nothing built has such a cache, where parts of it are in several formats."""
    if not kv_mixed(placement):
        return []
    return [
        "this is a plan only: a model is built with one format of the cache, and here parts of it are in several"
        " ('--kv-formats' with one of them plans what can be built)"
    ]


def _with_cache(formats: Formats, name: str) -> Formats:
    """The same with a format of the cache in the recipe."""
    if name == formats.float_format:
        return formats
    return formats_of(",".join(part for part in (formats.name, name) if part), formats.float_format)
