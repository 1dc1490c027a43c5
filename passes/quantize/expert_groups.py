"""The experts of a layer as groups of weights of their own, so that a budget may give each another format.

    groups, entries = by_expert(groups, candidates, table, uses)
    problem = BitProblem.of(groups, candidates, entries)

Takes groups of whole stacks [E, n, k] and what their formats cost (`passes.quantize.sensitivity`, with the errors of
single experts); gives a group [1, n, k] for each expert in the place of its stack. What the stack loses is divided
among its experts by error and use (`passes.quantize.expert_uses`). How often each is picked is that of the calibration
text, or of a routing trace where there is one (`uses`, by number of the layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from passes.quantize.expert_uses import divided_losses
from passes.quantize.sensitivity_table import Candidate, SensitivityTable
from passes.quantize.weight_groups import WeightGroup, expert_name

Uses = Mapping[int, Sequence[float]]  # by layer: how often each expert is picked, in any unit


def by_expert(
    groups: Sequence[WeightGroup], candidates: Sequence[Candidate], table: SensitivityTable, uses: Uses
) -> tuple[list[WeightGroup], SensitivityTable]:
    """(groups with experts apart, a table of theirs). Stacks whose experts were not told apart stay whole."""
    made, entries = [], SensitivityTable()
    for group in groups:
        known = [entry for c in candidates if (entry := table.get(group, c)) is not None]
        if not known or not all(entry.experts for entry in known) or len(group.shape) != 3:
            made.append(group)
            entries.add(known)
            continue
        parts = [_expert(group, expert) for expert in range(group.shape[0])]
        made += parts
        for entry in known:
            picked = uses.get(group.layer if group.layer is not None else -1)
            losses = divided_losses(entry.loss, entry.experts, entry.uses, picked)
            entries.add([replace(entry, group=p.name, loss=loss) for p, loss in zip(parts, losses, strict=True)])
    return made, entries


def _expert(stack: WeightGroup, expert: int) -> WeightGroup:
    """One expert of a stack; of tensors that hold all of them the whole."""
    each, rest = divmod(len(stack.tensors), stack.shape[0])
    own = stack.tensors[expert :: stack.shape[0]] if each and not rest else stack.tensors
    return replace(
        stack, name=expert_name(stack.name, expert), tensors=own, shape=(1, *stack.shape[1:]), of=stack, expert=expert
    )
