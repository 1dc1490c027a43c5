"""What ran on the GPU when: a `runtime.trace.Profile` whose times are those of the GPU's events.

One track holds the launches, one the steps as the host saw them. A step is profiled launch by launch, not as a graph,
so it takes longer than one that is not; the launches' own times are those of the GPU.
"""

from __future__ import annotations

import time

import numpy as np

from runtime.cuda.executor import StepTimes
from runtime.cuda.program import GpuProgram, GpuStep
from runtime.manifest import LaunchInfo, Manifest, ProgramInfo
from runtime.trace import Profile, StepRecord


class GpuProfile(Profile):
    """Records of a session on `device`, a name for reports."""

    def __init__(self, manifest: Manifest, step: GpuStep, device: str) -> None:
        super().__init__(1, time.perf_counter_ns, place=f"on {device}", tracks=(device,))
        listed = {program.name: program for program in manifest.programs}
        self._programs = {p.name: _described(p, listed.get(p.name)) for p in step.programs}

    def add_step(self, program: GpuProgram, tokens: int, rows: int, times: StepTimes) -> None:
        """Keeps one step; nanoseconds stand for cycles."""
        cycles = np.rint((times.seconds + times.started_s) * 1e9).astype(np.int64)[:, None, :]
        self.add(StepRecord(self._programs[program.name], tokens, rows, cycles, times.started_s, times.ended_s))


def _described(program: GpuProgram, listed: ProgramInfo | None) -> ProgramInfo:
    """The program as reports want it: with the work that the manifest states of each launch, where it does."""
    if listed is not None and len(listed.launches) == len(program.launches):
        return listed
    launches = tuple(LaunchInfo(launch.kernel, launch.origin, 0.0, 0.0) for launch in program.launches)
    return ProgramInfo(program.name, program.name, program.max_tokens, program.arena_bytes, launches)
