"""Models as the compiler lowers them for GPUs, run by the runtime on an emulated one: kernels by their meaning, memory
bounded argument by argument, work in any order that streams allow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.host.objects import object_path
from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import GridSpec, LoweredGridStep, lower_grid_step
from codegen.nvptx.program_entry import gpu_entry, kv_entry, programs_entry
from codegen.object_cache import ObjectCache
from ir.formats import BF16
from ir.interpreter import interpret
from passes.pass_manager import PassManager
from passes.pipelines import gpu_pipeline
from runtime.cuda.session import CudaSession
from runtime.generation import GenerationParams, GenerationRequest, generate_batch
from tests.codegen.harness import Batch
from tests.codegen.models import Model, Shape, build_model
from tests.codegen.nvptx.grid_machine import NO_CODE, stored_weights
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import GridRunner, PtxRunner, Runner
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import write_artifact

CONTEXT, SLOTS, VOCAB = 64, 2, 70
SMALL = Shape(hidden=64, ffn=64, vocab=VOCAB, dim=16)
CASES: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "dense": (replace(SMALL, layers=1, q_heads=2, kv_heads=1), ()),
    "experts": (replace(SMALL, layers=1, experts=5, top_k=2), ("w4a16-g32",)),
    "rounded": (replace(SMALL, layers=1, q_heads=2, kv_heads=1, experts=4, top_k=2), ("w4a8-g32",)),
    "bytes": (replace(SMALL, hidden=32, layers=1, q_heads=2, kv_heads=1, experts=3, top_k=2), ("w4a8-g32",)),
}
PROGRAMS: dict[str, Sequence[GridSpec]] = {}  # where not all that there are
HOPPER = ("experts", "bytes")  # with products of warpgroups for prompts
TOLERANCE = 0.01  # of the largest logit, as where the program is tested
TOLERANCE_OF_BYTES = 0.04  # activations of 8 bits are a code apart


@cache
def lowered(case: str) -> tuple[Model, LoweredGridStep]:
    shape, recipe = CASES[case]
    model = build_model(shape)
    PassManager(gpu_pipeline(recipe=recipe)).run(model.module)
    options = GridOptions(multiprocessors=4, split_positions=32, prefill_tokens=32, hopper=case in HOPPER)
    return model, lower_grid_step(model.step, options, programs=PROGRAMS.get(case))


def write_lowered(
    root: Path, case: str, code: str = ".version 7.8\n", levels: Sequence[str] = (), attention: Sequence[str] = ()
) -> Path:
    """An artifact of it; beside `code` it holds the names of the kernels only. `levels`, `attention`: instruction sets
    of CPUs that it has code of experts, and of attention, for."""
    model, step = lowered(case)
    weights = stored_weights(step, model)
    names = [f".entry {k.name}(\n" for k in step.kernels]
    ptx = (code + "".join(name for name in names if name.strip() not in code)).encode()
    files = {"code/sm_90.ptx": ptx, "weights/weights.bin": weights}
    files |= {object_path("experts", level): made for level, made in step.host.objects(levels=levels).items()}
    kept = ObjectCache(Path(os.environ["STRATUM_CACHE"]) / "objects")
    files |= {object_path("attention", level): made for level, made in step.attention.objects(kept, attention).items()}

    def describe(manifest: dict) -> None:
        manifest["model"] |= {"vocab_size": VOCAB, "max_context": CONTEXT}
        manifest["model"] |= {"experts_per_token": CASES[case][0].top_k} if CASES[case][0].experts else {}
        manifest["target"] = {"name": "cuda", "triple": "nvptx64-nvidia-cuda", "cpu": "sm_90", "features": []}
        gpu = gpu_entry(step, NO_CODE, levels, attention)
        manifest |= {"programs": programs_entry(step), "kv": kv_entry(step), "gpu": gpu}
        pieces = [
            {"kind": p.kind, "offset": p.offset, "bytes": p.nbytes, "unit": p.unit, "origin": p.origin}
            for p in step.file.pieces
        ]
        manifest["weights"] |= {"tensors": [], "pieces": pieces}

    return write_artifact(root, files=files, change=describe)


def open_lowered(path: Path, case: str, order: str, runner: Runner | None = None) -> tuple[EmulatedDriver, CudaSession]:
    driver = EmulatedDriver(runner or GridRunner(lowered(case)[1].kernels), order=order, seed=1)
    return driver, CudaSession(path, device=open_checked(driver), num_slots=SLOTS)


def step_of(session: CudaSession, batch: Batch) -> np.ndarray:
    return session.step(*batch.arrays)


def batch(*runs: tuple[int, int, int], rows: list[int] | None = None) -> Batch:
    """Tokens of runs (slot, first position, count); logits of the last token of each unless `rows` says which."""
    positions = np.concatenate([np.arange(first, first + count) for _, first, count in runs])
    slots = np.concatenate([np.full(count, slot) for slot, _, count in runs])
    last = np.cumsum([count for *_, count in runs]) - 1
    return Batch((positions * 7 + slots * 3) % VOCAB, positions, slots, last if rows is None else np.array(rows))


@pytest.mark.parametrize(("case", "order"), [("dense", "shuffled"), ("experts", "lazy"), ("bytes", "shuffled")])
def test_logits_of_ragged_batches(case: str, order: str, tmp_path: Path) -> None:
    """As the graph's interpreter has them; a replayed step gives the bits of one that is launched."""
    model, _ = lowered(case)
    driver, session = open_lowered(write_lowered(tmp_path / "artifact", case), case, order)
    states = model.states(SLOTS, CONTEXT, BF16.dtype)
    with session:
        steps = [batch((0, 0, 17), (1, 0, 3)), batch((0, 17, 1), rows=[]), batch((1, 3, 1), (0, 18, 1))]
        got, one = np.empty(0), steps[0]
        for one in steps:
            got = step_of(session, one)
            (want,) = interpret(model.step, one.arrays, weights=model.weights, states=states)
            assert np.abs(got - want).max(initial=0) <= (TOLERANCE_OF_BYTES if case == "bytes" else TOLERANCE) * np.abs(
                want
            ).max(initial=0)
        assert session.executor.replayed == 2
        with session.profile() as profile:
            np.testing.assert_array_equal(step_of(session, one), got)  # launched one by one, back to where it was
        assert session.executor.replayed == 2 and "GPU" in profile.table()
    assert driver.leaks() == []


def test_texts_of_several_sequences_are_those_of_each_alone(tmp_path: Path) -> None:
    """Two prompts at once, and each alone: the same greedy tokens."""
    path = write_lowered(tmp_path / "artifact", "dense")
    prompts, params = [[5, 9, 33], [61]], GenerationParams(max_tokens=2)

    def texts(chosen: list[list[int]]) -> list[list[int]]:
        driver, session = open_lowered(path, "dense", "shuffled")
        made: list[list[int]] = [[] for _ in chosen]
        with session:
            for event in generate_batch(session, [GenerationRequest(p, params) for p in chosen]):
                made[event.sequence].append(event.token)
        assert driver.leaks() == []
        return made

    assert texts(prompts) == [texts([prompt])[0] for prompt in prompts]


def test_the_ptx_of_a_step_gives_the_bits_of_its_tile_ir(tmp_path: Path) -> None:
    """The text that a GPU's driver would assemble, run instruction by instruction."""
    _, step = lowered("dense")
    used = {launch.kernel for launch in step.programs[0].launches}
    text = compile_ptx([k for k in step.kernels if k.name in used], "sm_90")
    path = write_lowered(tmp_path / "artifact", "dense", text)
    logits = []
    for runner in (None, PtxRunner(text)):
        driver, session = open_lowered(path, "dense", "lazy", runner)
        with session:
            logits.append([step_of(session, one) for one in (batch((0, 0, 2)), batch((0, 2, 1), (1, 0, 1)))])
        assert driver.leaks() == []
    np.testing.assert_array_equal(np.concatenate(logits[0]), np.concatenate(logits[1]))
