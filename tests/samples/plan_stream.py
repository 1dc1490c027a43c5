"""Streaming ops of the plan level, on one segment, two slots and a token that is over."""

from __future__ import annotations

from typing import Any

from ir.attributes import SymbolRef
from ir.types import INDEX, SEGMENT, SLOT, TOKEN
from tests.samples.base import A_SEGMENT, A_TOKEN, EMPTY_SLOT, FULL_SLOT, Fault, Sample, fault

_TYPES = {int(A_SEGMENT): SEGMENT, int(FULL_SLOT): SLOT, int(EMPTY_SLOT): SLOT, int(A_TOKEN): TOKEN}
MLP = SymbolRef("layers.0.mlp")


def handled(op: str, label: str, /, *handles: Any, **attributes: Any) -> Sample:
    return Sample(f"plan.{op}", label, handles, tuple(_TYPES[int(h)] for h in handles), attributes)


_GPU: dict[str, Any] = {"unit": "gpu"}
_OVER = {**_GPU, "over": "pcie"}
_MESSAGE = {"over": "nvlink", "bytes": 64, "tag": "stage.0"}
_SEND = {"unit": "gpu[0]", "to": "gpu[1]", **_MESSAGE}
_RECV = {"unit": "gpu[1]", "source": "gpu[0]", **_MESSAGE}
_GROUP = {"unit": "gpu[0]", "group": ("gpu[0]", "gpu[1]"), **_MESSAGE}

SAMPLES: tuple[Sample, ...] = (
    handled("segment", "disk", symbol=MLP, tier="disk", bytes=4096),
    handled("segment", "empty_on_a_copy", symbol=MLP, tier="hbm[7]", bytes=0),
    handled("slot", "whole_tier", **_GPU, tier="hbm", bytes=3968),
    handled("prefetch", "over_a_link", A_SEGMENT, EMPTY_SLOT, **_OVER),
    handled(
        "prefetch", "from_storage", A_SEGMENT, EMPTY_SLOT, **_GPU, over="ssd", block=1 << 20, depth=4, pinned=False
    ),
    handled("prefetch", "cached", A_SEGMENT, EMPTY_SLOT, **_OVER, stream="experts", cache="layers.0", rank=2),
    handled("prefetch", "from_a_slot", FULL_SLOT, EMPTY_SLOT, **_OVER),
    handled("store", "over_a_link", FULL_SLOT, A_SEGMENT, **_OVER),
    handled("store", "to_storage", FULL_SLOT, A_SEGMENT, **_GPU, over="ssd", block=4096, depth=2),
    handled("wait", "one", A_TOKEN, **_GPU),
    handled("wait", "several", A_TOKEN, A_TOKEN, **_GPU),
    handled("compute", "reads", FULL_SLOT, A_SEGMENT, **_GPU, kernel=MLP, work=64, tiers=("hbm",), moved=(128,)),
    handled("compute", "writes", FULL_SLOT, EMPTY_SLOT, **_GPU, kernel=MLP, writes=(1,), element="f16", launches=3),
    handled("compute", "on_nothing", unit="cpu", kernel=MLP, work=8),
    handled("compute", "missed", A_SEGMENT, unit="cpu", kernel=MLP, work=8, cache="layers.0", rank=2),
    handled("compute", "found", FULL_SLOT, **_GPU, kernel=MLP, work=8, cache="layers.0", rank=2, missing=False),
    handled("evict", "full", FULL_SLOT, **_GPU),
    handled("send", "one", FULL_SLOT, **_SEND),
    handled("recv", "one", EMPTY_SLOT, **_RECV),
    handled("collective", "all_reduce", FULL_SLOT, **_GROUP, kind="all_reduce"),
    handled("collective", "all_to_all", FULL_SLOT, **_GROUP, kind="all_to_all"),
)

_COMPUTE = {**_GPU, "kernel": MLP}
FAULTS: tuple[Fault, ...] = (
    fault("plan.segment", "expected bytes >= 0, got -1", symbol=MLP, tier="disk", bytes=-1),
    fault("plan.segment", "tier: expected a name like gpu or gpu[3], got 'a disk'", symbol=MLP, tier="a disk", bytes=1),
    fault("plan.slot", "expected bytes >= 0, got -8", unit="gpu", tier="hbm", bytes=-8),
    fault("plan.slot", "unit: expected a name like gpu or gpu[3], got 'gpu[]'", unit="gpu[]", tier="hbm", bytes=8),
    fault("plan.prefetch", "expected a segment or slot, got token", TOKEN, SLOT, **_OVER),
    fault("plan.prefetch", "expected a slot, got index", SEGMENT, INDEX, **_OVER),
    fault("plan.prefetch", "expected depth >= 1, got 0", SEGMENT, SLOT, **_OVER, depth=0),
    fault("plan.prefetch", "expected rank >= 1 with a cache and 0 without, got 1", SEGMENT, SLOT, **_OVER, rank=1),
    fault("plan.prefetch", "expected rank >= 1 with a cache and 0 without, got 0", SEGMENT, SLOT, **_OVER, cache="a"),
    fault("plan.store", "expected a slot, got segment", SEGMENT, SLOT, **_OVER),
    fault("plan.store", "expected block >= 0, got -1", SLOT, SEGMENT, **_OVER, block=-1),
    fault("plan.store", "expected a segment, got token", SLOT, TOKEN, **_OVER),
    fault("plan.wait", "expected tokens, got slot", SLOT, **_GPU),
    fault("plan.compute", "expected slots and segments, got token", TOKEN, **_COMPUTE),
    fault("plan.compute", "expected as many tiers as bytes moved, got 1 and 0", **_COMPUTE, tiers=("hbm",)),
    fault("plan.compute", "expected moved to be numbers of 0 or more", **_COMPUTE, tiers=("hbm",), moved=(-1,)),
    fault("plan.compute", "expected tiers to be names", **_COMPUTE, tiers=(1,), moved=(1,)),
    fault("plan.compute", "expected each tier once", **_COMPUTE, tiers=("hbm", "hbm"), moved=(1, 1)),
    fault("plan.compute", "operand 1 in writes is not one of 1", SLOT, **_COMPUTE, writes=(1,)),
    fault("plan.compute", "expected work >= 0, got -1", **_COMPUTE, work=-1),
    fault("plan.compute", "expected rank >= 1 with a cache and 0 without, got 2", **_COMPUTE, rank=2),
    fault("plan.evict", "expected a slot, got segment", SEGMENT, **_GPU),
    fault("plan.send", "expected a slot, got segment", SEGMENT, **_SEND),
    fault("plan.send", "gpu[0] sends to itself", SLOT, **(_SEND | {"to": "gpu[0]"})),
    fault("plan.send", "expected bytes >= 0, got -64", SLOT, **(_SEND | {"bytes": -64})),
    fault("plan.recv", "expected a slot, got token", TOKEN, **_RECV),
    fault("plan.recv", "gpu[1] receives from itself", SLOT, **(_RECV | {"source": "gpu[1]"})),
    fault("plan.collective", "expected a slot, got segment", SEGMENT, **_GROUP, kind="all_reduce"),
    fault("plan.collective", "expected one of all_reduce, all_gather,", SLOT, **_GROUP, kind="sum"),
    fault("plan.collective", "gpu[2] is not of its group", SLOT, **(_GROUP | {"unit": "gpu[2]"}), kind="all_reduce"),
    fault(
        "plan.collective", "expected each unit of the group once",
        SLOT, **(_GROUP | {"group": ("gpu[0]", "gpu[0]")}), kind="all_reduce",
    ),
    fault(
        "plan.collective", "expected group to be names of units",
        SLOT, **(_GROUP | {"group": ("gpu[0]", 1)}), kind="all_reduce",
    ),
    fault(
        "plan.collective", "group: expected a name like gpu or gpu[3], got 'gpu 1'",
        SLOT, **(_GROUP | {"group": ("gpu[0]", "gpu 1")}), kind="all_reduce",
    ),
)  # fmt: skip
