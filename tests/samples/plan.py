"""plan.*: every input and size, places at the start of a memory and inside of it, a launch."""

from __future__ import annotations

import numpy as np

from ir.attributes import SymbolRef
from ir.formats import BF16, F32, I32, PlainFormat
from ir.types import INDEX, BufferType, ScalarType, Type
from tests.samples.base import Fault, Sample, Stored, fault, low_sample

F_BUFFER, I_BUFFER, HALVES = BufferType(F32), BufferType(I32), BufferType(BF16)
PRIVATE = BufferType(F32, "private")
NOTHING = SymbolRef("nothing")  # a kernel of two f32 buffers and a size, in the samples' environment
ALONE = SymbolRef("alone")  # and one of one buffer and a size


def place(op: str, label: str, out: Type, **attributes: object) -> Sample:
    return low_sample(f"plan.{op}", label, result_types=(out,), **attributes)


def stored(element: PlainFormat = F32) -> Stored:
    return Stored(np.arange(8).astype(element.dtype))


SAMPLES: tuple[Sample, ...] = (
    *(place("input", which, I_BUFFER, which=which) for which in ("ids", "positions", "slots", "rows")),
    place("input", "logits", F_BUFFER, which="logits"),
    *(low_sample("plan.size", which, which=which) for which in ("tokens", "rows", "ctx", "slots")),
    low_sample("plan.size", "scaled", which="tokens", scale=8),
    place("weight", "first", HALVES, symbol=SymbolRef("layers.0.mlp"), offset=0, bytes=128),
    place("weight", "inside", F_BUFFER, symbol=SymbolRef("norm"), offset=128, bytes=64),
    place("kv", "second_layer", HALVES, layer=1, position_bytes=16),
    place("reserve", "inside", F_BUFFER, offset=256, bytes=64),
    place("reserve", "empty", F_BUFFER, offset=0, bytes=0),
    low_sample("plan.release", "f32", stored()),
    low_sample("plan.launch", "two_buffers", stored(), stored(), 4, kernel=NOTHING, writes=(1,), reads=(0,)),
    low_sample("plan.launch", "written_and_read", stored(), stored(), 4, kernel=NOTHING, writes=(0, 1), reads=(1,)),
    low_sample(
        "plan.launch", "of_a_grid", stored(), 4, kernel=ALONE, writes=(0,), reads=(), grid="ceil(tokens, 4) * 2"
    ),
    place("kv_plane", "values", HALVES, layer=1, plane=1, position_bytes=16),
    place("kv_plane", "ring", HALVES, layer=0, plane=1, slot_bytes=64),
    place("pieces", "all", I_BUFFER),
    low_sample("plan.count", "tiles", size="min(tokens * 2, tokens + 7) + max(rows, 3)"),
    low_sample("plan.barrier", "one"),
    low_sample("plan.await_weights", "first", number=0, piece=2),
    low_sample("plan.await_weights", "two_done", number=3, piece=4, done=(2, 3)),
    low_sample("plan.await_kv", "first", number=0, layer=0),
    low_sample("plan.await_experts", "pairs", Stored(np.arange(8).astype(np.int32)), 8, number=1, piece=3, done=(2,)),
)
_LAUNCH = {"kernel": NOTHING, "writes": (1,), "reads": (0,)}
_GLOBAL = "expected to give a global buffer of machine numbers, got"
FAULTS: tuple[Fault, ...] = (
    fault(
        "plan.input", "expected one of ids, positions, slots, rows, logits, got 'tokens'",
        which="tokens", result_types=(I_BUFFER,),
    ),
    fault("plan.input", "expected ids to be buffer<i32>, got buffer<f32>", which="ids", result_types=(F_BUFFER,)),
    fault("plan.input", "expected logits to be buffer<f32>, got f32", which="logits", result_types=(ScalarType(F32),)),
    fault("plan.size", "expected one of tokens, rows, ctx, slots, got 'batch'", which="batch"),
    fault("plan.size", "expected scale >= 1, got 0", which="tokens", scale=0),
    fault(
        "plan.weight", "expected offset >= 0, got -1",
        symbol=NOTHING, offset=-1, bytes=4, result_types=(F_BUFFER,),
    ),
    fault("plan.weight", "expected bytes >= 0, got -4", symbol=NOTHING, offset=0, bytes=-4, result_types=(F_BUFFER,)),
    fault("plan.weight", f"{_GLOBAL} index", symbol=NOTHING, offset=0, bytes=4, result_types=(INDEX,)),
    fault("plan.kv", "expected layer >= 0, got -1", layer=-1, position_bytes=128, result_types=(F_BUFFER,)),
    fault("plan.kv", "expected position_bytes >= 1, got 0", layer=0, position_bytes=0, result_types=(F_BUFFER,)),
    fault(
        "plan.kv", "expected slot_bytes >= 0, got -8",
        layer=0, position_bytes=4, slot_bytes=-8, result_types=(F_BUFFER,),
    ),
    fault("plan.kv", f"{_GLOBAL} {PRIVATE}", layer=0, position_bytes=8, result_types=(PRIVATE,)),
    fault("plan.reserve", "expected offset >= 0, got -64", offset=-64, bytes=64, result_types=(F_BUFFER,)),
    fault("plan.reserve", "expected bytes >= 0, got -1", offset=0, bytes=-1, result_types=(F_BUFFER,)),
    fault("plan.reserve", f"{_GLOBAL} f32", offset=0, bytes=4, result_types=(ScalarType(F32),)),
    fault("plan.release", "expected a buffer, got index", INDEX),
    fault("plan.launch", "expected buffers and indices, got f32", F_BUFFER, ScalarType(F32), **_LAUNCH),
    fault("plan.launch", "argument 1 is not a buffer of this launch", F_BUFFER, INDEX, **_LAUNCH),
    fault("plan.launch", "argument 1 is not a buffer of this launch", F_BUFFER, **_LAUNCH),
    fault(
        "plan.await_weights", "expected numbers of pieces in done, got ['x']",
        number=0, piece=1, done=("x",),
    ),
    fault("plan.await_weights", "piece 1 is awaited and done at once", number=0, piece=1, done=(1,)),
    fault("plan.await_weights", "expected piece >= 0, got -1", number=0, piece=-1),
    fault("plan.await_kv", "expected layer >= 0, got -1", number=0, layer=-1),
    fault("plan.await_kv", "expected number >= 0, got -2", number=-2, layer=0),
    fault("plan.await_experts", "expected number >= 0, got -2", I_BUFFER, INDEX, number=-2, piece=1),
    fault("plan.await_experts", "expected ids to be buffer<i32>, got buffer<f32>", F_BUFFER, INDEX, number=0, piece=1),
    fault("plan.await_experts", "expected count to be an index", I_BUFFER, I_BUFFER, number=0, piece=1),
    fault("plan.await_experts", "piece 3 is awaited and done", I_BUFFER, INDEX, number=0, piece=3, done=(3,)),
    fault("plan.await_experts", "expected numbers of pieces", I_BUFFER, INDEX, number=0, piece=3, done=(-1,)),
    fault(
        "plan.launch", "argument x is not a buffer of this launch", F_BUFFER,
        kernel=NOTHING, writes=("x",), reads=(0,),
    ),
    fault("plan.launch", "grid to be a size of the run: 'n' is no size", F_BUFFER, F_BUFFER, grid="n", **_LAUNCH),
    fault("plan.count", "'tokens / 2' is no size; expected whole numbers, tokens, rows", size="tokens / 2"),
    fault("plan.count", "'ceil(4, 0)' divides by 0", size="ceil(4, 0)"),
    fault("plan.pieces", "expected to give buffer<i32>, got buffer<f32>", result_types=(F_BUFFER,)),
    fault("plan.kv_plane", "expected plane >= 0, got -1", layer=0, plane=-1, result_types=(HALVES,)),
    fault("plan.launch", "argument 2 is neither in reads nor in writes", F_BUFFER, F_BUFFER, I_BUFFER, **_LAUNCH),
)  # fmt: skip
