"""GPU programs as data: sizes, the way to JSON and back, what is refused, pieces of prompts."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cuda.program import (
    ArenaArgument,
    CodeFiles,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KernelInfo,
    KVArgument,
    KVPlan,
    KVPlane,
    SizeArgument,
    Wait,
    WeightArgument,
    prompt_pieces,
)
from runtime.cuda.program_reader import read_step
from runtime.cuda.sizes import SizeExpr
from runtime.errors import RuntimeDiagnostic
from tests.runtime.cuda.program_json import step_json

WEIGHTS_BYTES, PIECES = 1 << 20, 3


def example() -> GpuStep:
    """A step with one of everything."""
    arguments = (
        ArenaArgument(256, 512),
        WeightArgument(4096, 8192, 1),
        KVArgument(1, 0),
        InputArgument("ids"),
        SizeArgument(SizeExpr("tokens")),
    )
    waits = (Wait(1, (0,)), Wait(2, (), 256, SizeExpr("tokens * 2")))
    launch = GpuLaunch("decode_w4", SizeExpr("ceil(tokens, 16) * 32"), arguments, (0, 2), "layers.0.mlp", waits)
    plain = GpuLaunch("decode_w4", SizeExpr("4"), arguments[:1], (0,))
    return GpuStep(
        (CodeFiles("sm_90", "code/sm_90.ptx", "code/sm_90.cubin"), CodeFiles("sm_90a", "code/sm_90a.ptx")),
        (KernelInfo("decode_w4", 256, 4096, 65536),),
        (GpuProgram("decode", 16, 1024, (launch, plain), replays=True), GpuProgram("prefill", 512, 768, (plain,), 64)),
        KVPlan(2, (KVPlane("keys", 2, 128), KVPlane("recent_keys", 2, 128, 96))),
    )


def read(values: Any) -> GpuStep:
    return read_step(values, "manifest.json", WEIGHTS_BYTES, PIECES)


def test_a_step_comes_back_from_json() -> None:
    text = json.dumps(step_json(example()))
    assert read(json.loads(text)) == example()


def test_the_smallest_program_takes_a_step() -> None:
    step = example()
    assert [step.program(n).name for n in (1, 16, 17, 512)] == ["decode", "decode", "prefill", "prefill"]
    with pytest.raises(RuntimeDiagnostic, match="513 tokens"):
        step.program(513)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("kernels", 0, "threads"), 33, r"gpu.kernels\[0\].threads"),
        (("kernels", 0, "name"), "a;b", r"gpu.kernels\[0\].name"),
        (("kernels", 0, "dynamic"), 1 << 40, "dynamic"),
        (("code",), [], "gpu.code"),
        (("code", 0, "architecture"), "../x", "architecture"),
        (("programs",), [], "gpu.programs"),
        (("programs", 0, "arena_bytes"), 512, "arena"),
        (("programs", 0, "replays"), 1, "replays"),
        (("programs", 0, "launches", 0, "kernel"), "none", r"launches\[0\].kernel"),
        (("programs", 0, "launches", 0, "grid"), "__import__('os')", "grid"),
        (("programs", 0, "launches", 0, "writes"), [1], "writes"),
        (("programs", 0, "launches", 0, "writes"), [9], "writes"),
        (("programs", 0, "launches", 0, "arguments", 0), {"arena": 1000, "bytes": 512}, "arena"),
        (("programs", 0, "launches", 0, "arguments", 0), {"arena": 8, "bytes": 8}, "arena"),
        (("programs", 0, "launches", 0, "arguments", 0), {}, "arguments"),
        (("programs", 0, "launches", 0, "arguments", 1, "weight"), 1 << 20, "weight"),
        (("programs", 0, "launches", 0, "arguments", 1, "piece"), 3, "piece"),
        (("programs", 0, "launches", 0, "arguments", 2, "kv"), 2, "kv"),
        (("programs", 0, "launches", 0, "arguments", 3, "input"), "ids ", "input"),
        (("programs", 0, "launches", 0, "arguments", 4, "size"), "tokens - 1", "size"),
        (("programs", 0, "launches", 0, "waits", 0, "done"), [7], "done"),
        (("kv", "planes", 0, "heads"), 0, "heads"),
    ],
)
def test_what_is_wrong_is_named(path: tuple[Any, ...], value: Any, said: str) -> None:
    values = copy.deepcopy(step_json(example()))
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(RuntimeDiagnostic, match=said):
        read(values)


@given(st.integers(1, 4096), st.integers(1, 64))
def test_sizes_are_counted(tokens: int, rows: int) -> None:
    known = {"tokens": tokens, "rows": rows}
    assert SizeExpr("ceil(tokens, 16) * 32").evaluate(known) == -(-tokens // 16) * 32
    assert SizeExpr("min(tokens * 8, 64) + max(rows, 3)").evaluate(known) == min(tokens * 8, 64) + max(rows, 3)
    assert SizeExpr("rows + ctx * tokens").names() == ("tokens", "rows", "ctx")


@pytest.mark.parametrize(
    "text",
    ["", "tokens / 2", "x", "1.5", "-1", "ceil(1)", "min(1, b=2)", "True", "(" * 150 + "1" + ")" * 40, "1" * 300],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RuntimeDiagnostic, match="is no size of a step"):
        SizeExpr(text)


def test_sizes_that_cannot_be_counted() -> None:
    with pytest.raises(RuntimeDiagnostic, match="needs the size 'ctx'"):
        SizeExpr("ctx").evaluate({"tokens": 1})
    with pytest.raises(RuntimeDiagnostic, match="divides by 0"):
        SizeExpr("ceil(1, tokens * 0)").evaluate({"tokens": 1})
    with pytest.raises(RuntimeDiagnostic, match="expected: at most"):
        SizeExpr("ctx * ctx * ctx").evaluate({"ctx": 1 << 20})


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 90)), max_size=4), st.integers(1, 64))
def test_pieces_cover_every_token_once(runs: list[tuple[int, int, int]], most: int) -> None:
    slots = np.array([slot for slot, _, count in runs for _ in range(count)], np.int32)
    positions = np.array([start + i for _, start, count in runs for i in range(count)], np.int32)
    pieces = prompt_pieces(positions, slots, most)
    assert pieces.dtype == np.int32 and pieces.shape[1] == 4
    seen = [(t, s, p + i) for t0, n, s, p in pieces.tolist() for i, t in enumerate(range(t0, t0 + n))]
    assert seen == list(zip(range(len(slots)), slots.tolist(), positions.tolist(), strict=True))
    assert all(1 <= count <= most for count in pieces[:, 1].tolist())


def test_planes_lie_one_after_another() -> None:
    kv = KVPlan(3, (KVPlane("keys", 2, 128), KVPlane("scales", 2, 2)))
    assert kv.bytes_per_position == 3 * 2 * 130
    assert kv.plane_bytes(1, slots=2, ctx=48) == 2 * 2 * 48 * 2
    assert kv.offset(0, 1, 2, 48) == 2 * 2 * 48 * 128
    assert kv.offset(1, 0, 2, 48) == kv.offset(0, 1, 2, 48) + 512  # 384 bytes, on a multiple of 256
    assert kv.nbytes(2, 48) == 3 * kv.offset(1, 0, 2, 48)
    ring = KVPlan(3, (KVPlane("keys", 2, 128), KVPlane("recent_keys", 2, 64, 96)))
    assert (ring.bytes_per_position, ring.bytes_per_slot) == (3 * 2 * 128, 3 * 2 * 64 * 96)
    assert ring.plane_bytes(1, slots=2, ctx=48) == 2 * 2 * 96 * 64
