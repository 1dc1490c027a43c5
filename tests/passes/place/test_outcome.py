"""What a choice of options amounts to, by hand: the length of a phase, and buffers."""

from __future__ import annotations

import pytest

from passes.place.option import PhaseCost
from passes.place.outcome import buffer_bytes, phase


def cost(path: dict[str, float], streams: dict[str, float], units: dict[str, float]) -> PhaseCost:
    made = PhaseCost()
    made.path.update(path)
    made.streams.update(streams)
    made.unit_seconds.update(units)
    return made


@pytest.mark.parametrize(
    ("micro_batches", "stream", "seconds", "bound"),
    [
        (1, 0.0, 5.0, "hbm read"),  # one after the other
        (2, 0.0, 4.0, "hbm read"),  # the busiest unit, and half of the others' turn
        (4, 0.0, 3.5, "hbm read"),
        (4, 3.25, 3.5, "hbm read"),
        (4, 4.0, 4.0, "pcie"),  # what flows beside them
        (1, 4.0, 5.0, "hbm read"),
    ],
)
def test_a_phase_waits_for_its_path_and_for_every_resource(
    micro_batches: int, stream: float, seconds: float, bound: str
) -> None:
    one = cost({"hbm read": 3.0, "dram read": 2.0}, {"pcie": stream} if stream else {}, {"gpu": 3.0, "cpu": 2.0})
    found = phase(one, micro_batches)
    assert (found.seconds, found.bound) == (pytest.approx(seconds), bound)


def test_work_and_streams_of_a_resource_add_up() -> None:
    found = phase(cost({"dram read": 2.0}, {"dram read": 1.5}, {"cpu": 2.0}), 1)
    assert (found.seconds, found.bound, dict(found.busy)) == (3.5, "dram read", {"dram read": 3.5})


@pytest.mark.parametrize(("depth", "nbytes"), [(1, 50), (2, 50 + 30), (3, 50 + 60), (4, 50 + 90)])
def test_buffers_hold_the_piece_in_use_and_layers_ahead(depth: int, nbytes: int) -> None:
    """The head (50) is never ahead of anything: behind it comes a layer."""
    assert buffer_bytes([(30, True), (20, True), (50, False)], depth) == nbytes
