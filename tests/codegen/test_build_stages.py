"""What a build tells: of its stages while loops are compiled, and of a GPU that it does not use."""

from __future__ import annotations

import numba

from codegen.build import unused_gpu
from codegen.build_stages import BuildStages
from hw_targets import load


def test_compiling_is_a_stage_of_its_own() -> None:
    """The interrupted stage is told again behind it; nothing is told where nothing has to be compiled."""
    told: list[tuple[str, float]] = []
    loop = numba.njit(lambda x: x + 1)
    with BuildStages(lambda stage, fraction: told.append((stage, fraction))) as stages:
        stages("weights", 0.25)
        assert loop(1) == loop(1) == 2
        stages("weights", 0.5)
    assert told == [("weights", 0.25), ("compiling", 0.0), ("weights", 0.25), ("weights", 0.5)]
    numba.njit(lambda x: x - 1)(1)
    assert len(told) == 4


def test_without_anybody_to_tell() -> None:
    with BuildStages(None) as stages:
        stages("code", 0.0)


def test_a_gpu_without_kernels_is_named() -> None:
    (note,) = unused_gpu(load("m1-max"))
    assert "the CPU of m1-max (apple-m1)" in note and "its GPU is not used" in note
    assert [unused_gpu(load(name)) for name in ("x86-64-v3", "rtx-4090", "cuda", "ddr5-laptop")] == [()] * 4
