"""A plan with what explains it: what `stratum.planning` makes and `stratum.plan_report` shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frontends.model_shape import ModelShape
    from hw_targets.routing.trace import RoutingTrace
    from hw_targets.target import Target
    from passes.place.cache_choice import Judged
    from passes.place.gain import Gain
    from passes.place.placement import Placement
    from passes.place.solve import Solution


@dataclass(frozen=True)
class Planned:
    """A plan with what explains it."""

    shape: ModelShape
    target: Target
    placement: Placement
    solution: Solution | None = None  # None: every device keeps its share, found in closed form
    gains: tuple[Gain, ...] = ()
    judged: Judged | None = None
    warnings: tuple[str, ...] = field(default=())
    trace: RoutingTrace | None = None
    # Chunks of a prompt that were simulated, with the seconds of a prompt and of a step.
    chunks: tuple[tuple[int, float, float], ...] = ()
    # Seconds of a step and of a prompt that gains are counted from: those of the plan that is best in closed form.
    gains_from: tuple[float, float] | None = None

    @property
    def seconds(self) -> tuple[float, float]:
        """The first token and a further one, as simulated where they were."""
        plan = self.placement
        first, step = plan.simulated_prefill, plan.simulated_step
        return plan.prefill.seconds if first is None else first, plan.decode.seconds if step is None else step
