"""Plans for this machine: measured once where it was not, and a budget that holds the process too."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hw_targets import calibrate
from hw_targets.calibrate import Calibration
from hw_targets.calibrate_disk import DiskCalibration
from hw_targets.quantities import parse_quantity
from ir.diagnostics import DiagnosticError
from passes.place.outcome import Outcome, PhaseOutcome
from passes.place.solve import NoFit
from stratum.planning import PlanRequest, make_plan
from stratum.process_room import PROCESS_BYTES
from stratum.run_bound import overlapped
from tests.stratum.test_targets_cli import DRIVE

FOUND = Calibration(2, 3e10, 1e11, bf16_peak=2e11, i8_peak=4e11, read_by_threads=((1, 2e10), (2, 3e10)))


def test_this_machine_is_measured_once(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Calibration] = []
    told: list[str] = []
    monkeypatch.setattr(calibrate, "cached", lambda threads: kept[-1] if kept else None)
    monkeypatch.setattr(calibrate, "calibrate", lambda: kept.append(FOUND))
    request = PlanRequest(str(llama_directory), context=64, generate=2, what_if=False)
    first = make_plan(request, tell=told.append)
    assert make_plan(request, tell=told.append).placement == first.placement
    assert len(kept) == 1 and len(told) == 1 and "3 s" in told[0]
    tier = first.target.tier()
    assert tier is not None and tier.read_bandwidth == FOUND.read_bandwidth


def test_the_process_is_part_of_the_budget(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "cached", lambda threads: FOUND)
    request = PlanRequest(str(llama_directory), context=64, generate=2, budgets=(("memory", "256MiB"),), what_if=False)
    dram = next(t for t in make_plan(request).placement.tiers if t.name == "dram")
    assert dram.capacity == (256 << 20) - PROCESS_BYTES - (1 << 20)


@pytest.mark.parametrize("drives", [[], [DRIVE]])
def test_the_budget_that_is_named_is_enough(
    drives: list[DiskCalibration], llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "cached", lambda threads: FOUND)
    monkeypatch.setattr("hw_targets.calibrate_disk.stored", lambda: drives)
    request = PlanRequest(
        str(llama_directory), context=64, generate=2, budgets=(("memory", "107MiB"),), what_if=False, simulate=False
    )
    with pytest.raises(NoFit) as fault:
        make_plan(request)
    named = re.search(r"note: with --memory (\S+) it fits", str(fault.value))
    assert named is not None
    nbytes = int(parse_quantity(named[1], "bytes"))
    assert make_plan(dataclasses.replace(request, budgets=(("memory", str(nbytes)),))).placement
    with pytest.raises(NoFit):  # nor would less do, keys and values on the drive included
        make_plan(dataclasses.replace(request, budgets=(("memory", str(nbytes - (1 << 16))),)))
    assert ("'compile-model targets calibrate --disk DIR'" in str(fault.value)) is (not drives)
    if not drives:
        with pytest.raises(DiagnosticError, match="calibrate --disk"):
            make_plan(dataclasses.replace(request, pins=("weights=disk",)))
        with pytest.raises(DiagnosticError, match="calibrate --disk"):
            make_plan(dataclasses.replace(request, budgets=(("disk", "1GiB"),)))


def test_the_closed_form_of_a_run_is_its_busiest_resource(
    llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are read before their router has spoken, so that waiting for it bounds nothing."""
    monkeypatch.setattr(calibrate, "cached", lambda threads: FOUND)
    planned = make_plan(PlanRequest(str(llama_directory), context=64, generate=10, what_if=False))
    assert planned.solution is not None
    busy = (("vda read", 3.0), ("dram read", 1.0))
    given = PhaseOutcome(4.0, "vda read", busy)
    found = overlapped(planned.solution.problem, Outcome(given, given, (), 0.0))
    assert found.decode == found.prefill == PhaseOutcome(3.0, "vda read", busy)
    assert found.objective == 3.0 + 10 * 3.0
