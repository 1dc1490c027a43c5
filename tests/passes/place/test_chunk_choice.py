"""Chunks of prompts: the simulated best of those that fit, and never worse for more memory."""

from __future__ import annotations

import pytest

from passes.place.chunk_choice import best_chunk
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.outcome import objective
from passes.place.problem import Problem, Session
from passes.place.refine import simulated, simulated_prompt
from passes.place.solve import Solution, solve
from stratum.cli import main
from tests.passes.place.machines import MIB, dense, target


def streamed(dram: int, prompt: int = 512) -> Solution:
    """A model of which a part comes from the drive, once for every chunk of 64 tokens."""
    machine = machine_of(target(gpu=False, dram=dram))
    return solve(Problem(dense(4), machine, formats_of("w8a8"), Session(1024, 1, prompt, 4, chunk=64)))


def test_longer_chunks_move_less_as_long_as_they_fit() -> None:
    chunks = []
    for dram in (7 * MIB // 2, 4 * MIB):
        solution = streamed(dram)
        prompt, step = simulated_prompt(solution), simulated(solution)
        assert prompt is not None and step is not None and solution.problem.session.passes > 1
        found = best_chunk(solution, prompt, step)
        assert found.prompt is not None and found.step_seconds is not None and found.solution.outcome.fits
        lengths = [objective(solution.problem, step, seconds) for _, seconds, step in found.tried]
        chunks.append(found.solution.problem.session.chunk)
        best = objective(solution.problem, found.step_seconds, found.prompt.seconds)
        assert best == min(lengths) <= lengths[0] and chunks[-1] == found.tried[lengths.index(best)][0]
        assert found.solution.placement.session.chunk == chunks[-1]
    assert chunks[1] > 64


def test_one_pass_is_left_as_it_is() -> None:
    solution = streamed(6 * MIB, prompt=32)
    assert best_chunk(solution, simulated_prompt(solution), 1.0).solution is solution
    assert best_chunk(solution, None, None).tried == ()


def test_more_memory_is_never_slower_with_chunks_of_any_length() -> None:
    """A long chunk that just fits takes room from weights: shorter ones are tried beside it."""
    last = float("inf")
    for dram in range(5 * MIB, 8 * MIB, MIB // 2):
        machine = machine_of(target(gpu=False, dram=dram))
        base = Problem(dense(4), machine, formats_of("w8a8"), Session(2048, 1, 1024, 256))
        value = solve(base).outcome.objective
        assert value <= last * 1.006
        last = value


def test_the_command_says_which_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "TinyLlama-1.1B-Chat-v1.0", "--target", "rtx-4090", "--budget", "vram=1GiB"]
    assert main([*words, "--quick", "--ctx", "2048", "--prompt-tokens", "1024"]) == 0
    said = capsys.readouterr().out
    assert "prompts pass in chunks of " in said and "simulated with 512: " in said
