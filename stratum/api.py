"""The Python front door: `build` makes artifacts, `load` gives a model that generates.

`load` takes an artifact or a Hugging Face directory; the latter is built into a cache the first time, under a key of
everything that decides the result (see `stratum.building`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import RuntimeDiagnostic
from stratum.building import Warn, build, ensure_built, show_warning
from stratum.progress import Progress

if TYPE_CHECKING:
    from runtime.step_reader import RoutingListener
    from stratum.device_choice import DeviceChoice
    from stratum.model import Model, Slots

__all__ = ["build", "ensure_built", "load", "memory_bytes"]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_context: int | None = None,
    verify: bool = False,
    target: str | None = None,
    dtype: str = "bf16",
    pipeline: str | None = None,
    recipe: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    memory: int | str | None = None,
    expert_policy: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    routing: RoutingListener | None = None,
    kv_dir: str | os.PathLike[str] | None = None,
    device: str | DeviceChoice = "cpu",
    device_memory: int | str | None = None,
    missed_experts: str | None = None,
    stand_ins: float | None = None,
    slots: Slots | None = None,
    mmap: bool = True,
) -> Model:
    """Opens an artifact, or a Hugging Face directory by way of the cache, for generation.

    `threads` defaults to one a physical core this process may use, `max_context` to the model's. `verify` hashes the
    weights even when they are large. A cached artifact that turns out damaged is built again.

    `memory` (bytes, or a text like "2GiB") bounds what the process may use: weights that do not fit are read as they
    are needed, `max_context` defaults to what takes an eighth of it, and a build runs in a process of its own.
    `expert_policy` says which experts such a budget gives up first: one of `runtime.eviction.POLICIES`.
    `plan`, a file that `compile-model plan -o` wrote (maybe edited since), says instead what stays and what is read; a
    directory is then built in the plan's formats.
    `routing` is told which experts every token chose. `kv_dir` is a folder for the KV cache of a `max_context` that the
    budget has no room for. `stand_ins`, a share of a token's routing weight: missing experts that have less are
    computed from the copies that `build(stand_ins=...)` made, and the output is not that of the full model any more.
    `slots` is room for several sequences (`stratum.batch_run`). Without `mmap` the weights are copied into memory of
    huge pages, which is slower to start and often faster then. Raises `stratum.memory_plan.DoesNotFit` for a budget
    that is too small.

    `device`: cpu, cuda (an NVIDIA GPU; the artifact must have been built for one), or auto, which is explained in
    `stratum.device_choice`; the model's `device_choice` says what was chosen. `device_memory` bounds what may be used
    of the GPU's; experts that it has no room for are brought there or computed by the CPU, whichever is sooner, or as
    `missed_experts` says: auto, fetch (the same bits as with room for all) or cpu; `threads` are then the CPU's that
    compute experts, refused where it computes nothing. `target` defaults to host, or to any GPU.
    """
    from runtime.artifact import is_artifact, open_artifact
    from stratum.device_choice import DeviceChoice, check_missed_experts, choose_device
    from stratum.model import Model

    check_missed_experts(missed_experts, device)
    device_bytes = memory_bytes(device_memory, "--device-memory")
    if isinstance(device, DeviceChoice):
        choice = device
    else:
        choice = choose_device(
            Path(path),
            device,
            device_memory=device_bytes,
            dtype=dtype,
            recipe=recipe,
            target=target,
            plan=plan,
            kv_dir=kv_dir,
            record_routing=routing,
            no_mmap=None if mmap else True,
        )
    options: dict[str, Any] = {  # of a build
        "target": target or (choice.target if choice.device == "cuda" else "host"),
        "dtype": dtype,
        "pipeline": pipeline,
        "recipe": recipe,
        "progress": progress,
        "warn": warn,
    }
    opened: dict[str, Any] = {  # of the model that is opened
        "threads": threads,
        "max_context": max_context,
        "verify": verify,
        "routing": routing,
        "memory": memory_bytes(memory),
        "expert_policy": expert_policy,
        "plan": plan,
        "kv_dir": kv_dir,
        "device": choice,
        "device_memory": device_bytes,
        "progress": progress,
        "stand_ins": stand_ins,
        "missed_experts": missed_experts,
        "slots": slots,
        "mmap": mmap,
    }
    if plan is not None and not is_artifact(path):
        from stratum.stream_placement import read_placement

        given = read_placement(Path(plan))
        options |= {"dtype": given.dtype, "recipe": recipe or given.recipe or None}
    if (memory is not None or plan is not None) and not is_artifact(path):
        from stratum.build_apart import built_apart

        settings = {name: options[name] for name in ("target", "dtype", "pipeline", "recipe")}
        artifact = built_apart(Path(path), settings, progress, warn)
    else:
        artifact = ensure_built(path, **options)
    try:
        return Model(artifact, **opened)
    except RuntimeDiagnostic:
        if is_artifact(path):
            raise
        try:
            open_artifact(artifact, verify=verify)
        except RuntimeDiagnostic as damage:
            (warn or show_warning)(f"the cached build is damaged and is made again: {damage.message}")
        else:
            raise  # the artifact is fine: threads, context or memory are not
        build(path, artifact, **options)
        return Model(artifact, **opened)


def memory_bytes(memory: int | str | None, where: str = "--memory") -> int | None:
    """Bytes of a budget given as a number or a text ("2GiB", "1500MB"). Raises DiagnosticError for other texts."""
    if memory is None or isinstance(memory, int):
        return memory
    from hw_targets.quantities import parse_quantity

    return int(parse_quantity(memory, "bytes", where=where))
