"""Energy of phases: power while at work, idle power, bytes that move, and whole machines."""

from __future__ import annotations

import dataclasses

import pytest

import hw_targets
from hw_targets.energy import energy
from hw_targets.target import Target
from stratum.planning import PlanRequest, make_plan

BUSY = {"gpu f16": 0.2, "vram read": 0.1, "cores i8": 0.5, "pcie dram->vram": 0.4, "nvme read": 0.25}


def machine(text: str = "") -> Target:
    return hw_targets.load(f"rtx-4090{text}")


def test_units_that_take_part_and_those_that_do_not() -> None:
    assert energy(machine(), 1.0, BUSY, ["gpu"]) == pytest.approx(450)
    assert energy(machine(), 1.0, BUSY, ["cores"]) is None  # its power is not stated
    both = machine("{cores.power=100W}")
    assert energy(both, 1.0, BUSY, ["gpu", "cores"]) == pytest.approx(550)
    resting = machine("{gpu.idle=50W, cores.power=100W, cores.idle=20W}")
    assert energy(resting, 1.0, BUSY, ["gpu", "cores"]) == pytest.approx(450 * 0.3 + 50 * 0.7 + 100 * 0.5 + 20 * 0.5)
    assert energy(resting, 1.0, BUSY, ["gpu"]) == pytest.approx(450 * 0.3 + 50 * 0.7 + 20)


def test_what_moves_bytes() -> None:
    found = machine("{nvme.energy=1nJ, pcie.energy=10pJ, dram.energy=1J, nvme.power=8W, nvme.idle=4W}")
    drive, link = found.store("nvme"), found.link_between("dram", "vram")
    assert drive is not None and link is not None
    moved = 0.25 * (drive.read_rate() or 0) * 1e-9 + 0.4 * (link.rate() or 0) * 10e-12
    assert energy(found, 1.0, BUSY, ["gpu"]) == pytest.approx(450 + moved + 8 * 0.25 + 4 * 0.75)


def test_whole_machines_and_plans() -> None:
    nodes = hw_targets.load("64xh100")
    assert energy(nodes, 2.0, {}, ["gpu"]) == pytest.approx(10200 * 8 * 2)
    plan = make_plan(PlanRequest("Qwen3-235B-A22B", "64xh100", "fp8", what_if=False)).placement
    assert plan.joules_per_token == pytest.approx(10200 * 8 * plan.decode.seconds)
    unstated = dataclasses.replace(nodes, power_watts=None)
    assert energy(unstated, 1.0, {}, ["gpu"]) == pytest.approx(700)  # one copy
    alone = PlanRequest("Llama-3.1-8B", "rtx-4090", "w4a8-g32", budgets=(("vram", "1MiB"),), what_if=False)
    assert make_plan(alone).placement.joules_per_token is None  # by the CPU alone
    fits = dataclasses.replace(alone, model="TinyLlama-1.1B-Chat-v1.0", budgets=(("vram", "4GiB"),))
    found = make_plan(fits).placement
    assert found.simulated_step is not None and found.joules_per_token == pytest.approx(450 * found.simulated_step)
