"""What the caches of options take and lose where plans choose their formats (`passes.place.kv_formats`).

kv_row_bytes(problem, layer, "kv8")          # bytes of a position
kv_loss(problem, option)                     # of one layer; 0 where nothing is chosen
loses_too_much(problem, choice), kv_quality(problem, choice)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from frontends.model_shape import LayerShape
from passes.place.kv_formats import SOURCE
from passes.place.option import Option
from passes.place.placement import KVQuality
from passes.place.problem import Problem


def kv_text(problem: Problem, format: str) -> str:
    """A format of the menu as options name it; "", the format of the recipe, where there is no menu."""
    return problem.kv_menu.at(format).text if problem.kv_menu is not None else ""


def kv_row_bytes(problem: Problem, layer: LayerShape, text: str) -> int:
    """Bytes of a position of a layer in a format of the menu; "" is the format of the recipe."""
    if problem.kv_menu is None or not text:
        return problem.formats.kv_bytes(layer)
    return problem.kv_menu.at(text).formats.kv_bytes(layer)


def kv_loss(problem: Problem, option: Option) -> float:
    """What the cache of one layer loses."""
    layer = option.part.layer
    if problem.kv_menu is None or not option.kv_home or layer is None:
        return 0.0
    newer = problem.kv_menu.at(option.kv_format).loss
    if not option.kv_old:
        return newer / len(problem.shape.layers)
    old = option.kv_old / layer.kv_tokens(problem.session.context)
    older = problem.kv_menu.at(option.old_format).loss
    return (newer * (1 - old) + older * old) / len(problem.shape.layers)


def loses_too_much(problem: Problem, choice: Iterable[tuple[Option, int]]) -> bool:
    """Whether caches and weights lose more than they may, once caches are divided in whole blocks."""
    if problem.kv_menu is None or problem.kv_menu.most_loss is None:
        return False
    found = sum(count * (kv_loss(problem, option) + option.part.loss) for option, count in choice)
    return found > problem.kv_menu.most_loss * (1 + 1e-6)


def kv_quality(problem: Problem, choice: Iterable[tuple[Option, int]]) -> KVQuality | None:
    """What the caches of a choice lose; None where their format was not chosen."""
    menu = problem.kv_menu
    if menu is None:
        return None
    lost = math.fsum(kv_loss(problem, option) * count for option, count in choice)
    return KVQuality(tuple(c.name for c in menu.choices), lost, SOURCE, menu.most_loss)
