"""Batches of more single tokens than decoding takes: prompts of one token each, which give what decoding gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import GridSpec, lower_grid_step
from ir.interpreter import interpret, zero_states
from passes.pass_manager import PassManager
from passes.pipelines import gpu_pipeline
from runtime.cuda.program import prompt_pieces
from tests.codegen.harness import Batch
from tests.codegen.models import build_model
from tests.codegen.nvptx.grid_machine import GridMachine
from tests.codegen.nvptx.test_grid_step import SMALL

SLOTS, CTX = 17, 32
SHAPE = replace(SMALL, layers=1, q_heads=2, kv_heads=1, dim=32)


def single_tokens(slots: np.ndarray, positions: np.ndarray) -> Batch:
    return Batch((positions * 7 + slots * 3) % 70, positions, slots, np.arange(len(slots)))


def test_more_single_tokens_than_decoding_takes() -> None:
    """Sequences of unlike lengths, in an order of their own, behind what an earlier step has written; the cache has
    codes and a ring of the newest positions, whose border is another one for each row."""
    model = build_model(SHAPE)
    PassManager(gpu_pipeline(recipe=("w4a16-g32", "kv4"))).run(model.module)
    programs = (GridSpec("decode", 8, 8), GridSpec("prefill", 32, 0))
    lowered = lower_grid_step(model.step, GridOptions(prefill_tokens=32), programs=programs)
    machine = GridMachine(lowered, model, ctx=CTX, slots=SLOTS)
    states = zero_states(model.step, SLOTS, CTX)
    slots = np.random.default_rng(3).permutation(SLOTS)
    lengths = np.array([0, 18, 1, 3] + [0] * (SLOTS - 4))  # of what the sequences hold before
    before = [np.stack([np.full(n, slot), np.arange(n)]) for slot, n in enumerate(lengths)]
    written = np.concatenate(before, axis=1)
    for batch in (single_tokens(*written), single_tokens(slots, lengths[slots])):
        (want,) = interpret(model.step, batch.arrays, weights=model.weights, states=states)
        memory = machine.memory.copy()
        got = machine.run(batch, "prefill")
        assert np.abs(got - want).max() <= 0.015 * np.abs(want).max()
    assert machine.step.program(SLOTS).name == "prefill" and machine.step.program(8).name == "decode"
    machine.memory[:] = memory  # as before the last step
    few = machine.run(single_tokens(slots[:8], lengths[slots][:8]))
    assert np.abs(few - want[:8]).max() <= 0.015 * np.abs(want).max()


def test_each_single_token_is_a_piece() -> None:
    slots, positions = np.array([5, 5, 2, 3], np.int32), np.array([8, 9, 0, 1], np.int32)
    assert prompt_pieces(positions, slots, 64).tolist() == [[0, 2, 5, 8], [2, 1, 2, 0], [3, 1, 3, 1]]
    apart = prompt_pieces(np.array([4, 5], np.int32), np.array([0, 1], np.int32), 64)
    assert apart.tolist() == [[0, 1, 0, 4], [1, 1, 1, 5]]
