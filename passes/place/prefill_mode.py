"""From how many tokens on a prompt is better passed by the faster unit: by simulation, beside the closed form.

    mode = prefill_mode(problem, choice)      # PrefillMode(tokens=128, bound=64); no tokens: never, as far as tried

What lies by a slow unit and is computed there in decode steps may be moved to a faster one for a prompt, layer by layer
for all its tokens; so may experts that a cache lacks, where a helper can compute them. Weights that are moved cost the
same for every prompt, computing them grows with its tokens. The closed form (`build_plan.prefill_threshold`) compares
single parts and lets moves run beside everything else: it says from where on moving may win. From there a few doublings
are simulated event by event, all parts moved against none, and the first that is faster moved is taken. Devices that
work as one, and plans that cannot be simulated, keep the closed form.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError
from passes.place.attention_option import attention_option
from passes.place.build_plan import prefill_threshold, prompt_ways
from passes.place.expert_options import option_with
from passes.place.option import CACHED, Option
from passes.place.options import options_of
from passes.place.outcome import Choice
from passes.place.problem import Problem

DOUBLINGS = 5  # of the closed form's tokens, at most, that are simulated


@dataclass(frozen=True)
class PrefillMode:
    """Tokens of a prompt from which weights are moved, None for never; `bound` is what the closed form says.

    `simulated`: whether events were played, or `tokens` is the bound.
    """

    tokens: int | None
    bound: int | None
    simulated: bool = False


def prefill_mode(problem: Problem, choice: Choice) -> PrefillMode:
    """The threshold of a plan."""
    from passes.schedule.placed_plan import prompt_time

    bound = prefill_threshold(problem, choice)
    if bound is None or problem.together_prefill:
        return PrefillMode(bound, bound)
    for tokens in (bound << n for n in range(DOUBLINGS)):
        session = dataclasses.replace(problem.session, prompt=tokens, chunk=tokens)
        trial = dataclasses.replace(problem, session=session, pins=())
        stays, moves = (for_prompt(trial, choice, moved) for moved in (False, True))
        if stays is None or moves is None:
            return PrefillMode(bound, bound)
        try:
            if prompt_time(trial, moves).seconds < prompt_time(trial, stays).seconds:
                return PrefillMode(tokens, bound, True)
        except DiagnosticError:
            return PrefillMode(bound, bound)
    return PrefillMode(None, bound, True)


def for_prompt(problem: Problem, choice: Choice, moved: bool) -> Choice | None:
    """The same placement for another prompt, parts that may be moved for it moved or not; None where there is none."""
    found: list[tuple[Option, int]] = []
    for option, count in choice:
        if option.mode == CACHED:
            same = option_with(problem, option.part, CACHED, option.unit, option.home, option.slots)
            pair = prompt_ways(problem, option) or (same, same)
            way = pair[moved]
            if way is None:
                return None
            found.append((way, count))
            continue
        same = [o for o in options_of(problem, option.part) if _placed(o) == _placed(option)]
        if option.kv_old:
            kv = (option.kv_home, option.kv_unit), (option.old_home, option.old_unit)
            same = [attention_option(problem, option, *kv, option.kv_old, (option.kv_format, option.old_format))]
        here = [o for o in same if o.prefill_unit in ("", o.unit)]
        away = [o for o in same if o.prefill_unit not in ("", o.unit)]
        ways = away or here if moved else here
        if not ways:
            return None
        found.append((ways[0], count))
    return tuple(found)


def _placed(option: Option) -> tuple[object, ...]:
    """What tells an option from others of its part, but for who computes prompts."""
    return (
        option.home, option.unit, option.mode, option.slots, option.kv_home, option.kv_unit, option.helper,
        option.missed, option.kv_format,
    )  # fmt: skip
