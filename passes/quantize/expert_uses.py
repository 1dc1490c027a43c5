"""How often each expert of a layer is asked for, and what it loses by that: shared by builds and plans.

    uses = uses_of_trace(read_trace(path), {layer: experts, ...}, path)    # by layer: how often each is picked
    divided_losses(entry.loss, entry.experts, entry.uses, uses[3])         # of a stack, by expert

What a stack loses is divided by the squared error that each expert adds to the product: that of one of its rows times
how often the router picks it, as W. Huang et al. weigh experts by how often they are used when bits are given out
(*Mixture Compressor for Mixture-of-Experts LLMs Gains More*, arXiv:2410.06270). Refuses a trace of another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from hw_targets.routing.trace import RoutingTrace


def uses_of_trace(trace: RoutingTrace, experts: Mapping[int, int], where: Path | str) -> dict[int, list[float]]:
    """How often a routing trace picks each expert, by number of the layer.

    `experts`: of each layer that has some, how many; the trace has to have these layers with that many. DiagnosticError
    for the trace of another model.
    """
    import numpy as np

    if {*experts} != {*trace.layers} or any(n != trace.expert_count for n in experts.values()):
        raise DiagnosticError(
            f"the routing trace is of {trace.expert_count} experts in layers {list(trace.layers)}",
            where=str(where),
            expected="a trace of this model: compile-model run --record-routing FILE",
        )
    found = {}
    for at, layer in enumerate(trace.layers):
        picked = trace.experts[:, at].ravel()
        found[layer] = np.bincount(picked[picked >= 0], minlength=trace.expert_count).astype(float).tolist()
    return found


def use_shares(uses: Sequence[float]) -> list[float]:
    """Shares of all picks, each expert picked once more than it was (Laplace): none is never asked for."""
    whole = sum(uses) + len(uses)
    return [(u + 1) / whole for u in uses]


def divided_losses(
    loss: float, errors: Sequence[float], measured: Sequence[float], uses: Sequence[float] | None = None
) -> list[float]:
    """What each expert of a stack loses; in all `loss`, where experts are met as they were measured.

    `errors`: squared error of a row of each, found from so many rows (`measured`); an expert that the calibration never
    met has the mean error of the others. `uses`: how often each is picked, None for as often as was measured.
    """
    met = [r for r, u in zip(errors, measured, strict=True) if u]
    mean = sum(met) / len(met) if met else 1.0
    rows = [r if u else mean for r, u in zip(errors, measured, strict=True)]
    before = use_shares(measured)
    wanted = use_shares(uses) if uses is not None and len(uses) == len(rows) else before
    whole = sum(r * u for r, u in zip(rows, before, strict=True))
    return [loss * r * u / whole if whole else 0.0 for r, u in zip(rows, wanted, strict=True)]
