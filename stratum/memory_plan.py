"""`run --memory`: the placement that `plan --memory` prints, made for this process and turned into what is executed.

    made = plan_for(artifact, 1 << 30, context=4096)
    made.placement, made.stream, made.context, made.kv_bytes

`stratum.host_placement` decides, `stratum.stream_placement` gives the executable part of it; a file that `plan -o`
wrote takes the second step only, and is the same plan to the byte. Raises DoesNotFit with the least budget that would
do.
"""

from __future__ import annotations

from pathlib import Path

from runtime.manifest import Manifest
from stratum.host_placement import DRIVE, drive_of, place_on_host
from stratum.process_account import DoesNotFit, baseline_bytes, mib
from stratum.stream_placement import MemoryPlan, stream_of_placement, with_options

__all__ = ["DoesNotFit", "MemoryPlan", "mib", "plan_for", "plan_memory"]


def plan_memory(
    manifest: Manifest,
    budget: int,
    *,
    baseline: int,
    context: int | None = None,
    num_slots: int = 1,
    policy: str | None = None,
    drive: str = DRIVE,
    kv_on_disk: bool = True,
    where: str = "",
) -> MemoryPlan:
    """What to keep of `manifest`'s weights in `budget` bytes, of which the process has `baseline` already.

    `num_slots`: sequences that the KV cache has room for. `policy` of the cache of experts: one of
    `runtime.eviction.POLICIES`; by default what no routing makes useless.
    Where the cache of a `context` does not fit, layers of it lie on `drive`, unless `kv_on_disk` forbids that.
    """
    placement = place_on_host(
        manifest, budget, baseline=baseline, context=context, batch=num_slots, policy=policy, drive=drive,
        kv_on_disk=kv_on_disk, where=where,
    )  # fmt: skip
    return stream_of_placement(manifest, placement, budget, baseline=baseline, where=where or "plan")


def plan_for(
    artifact: Path,
    budget: int,
    context: int | None = None,
    policy: str | None = None,
    num_slots: int = 1,
    *,
    kv_on_disk: bool = True,
) -> MemoryPlan:
    """`plan_memory` for this process, with what running takes loaded already."""
    from runtime.artifact import open_artifact

    manifest, drive = open_artifact(artifact).manifest, drive_of(artifact)
    made = plan_memory(
        manifest, budget, baseline=baseline_bytes(manifest), context=context, num_slots=num_slots, policy=policy,
        drive=drive, kv_on_disk=kv_on_disk, where=str(artifact),
    )  # fmt: skip
    return with_options(made, artifact, policy)
