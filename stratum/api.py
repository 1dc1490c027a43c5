"""The Python front door: `build` makes artifacts, `load` gives a model that generates.

`load` takes an artifact or a Hugging Face directory; the latter is built into a cache the first time, under a key of
everything that decides the result (see `stratum.model_cache`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import RuntimeDiagnostic
from stratum import __version__
from stratum.progress import Progress

if TYPE_CHECKING:
    from codegen.build import BuildResult
    from runtime.step_reader import RoutingListener
    from stratum.device_choice import DeviceChoice
    from stratum.model import Model, Slots

Warn = Callable[[str], None]


def build(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "host",
    dtype: str = "bf16",
    pipeline: str | None = None,
    recipe: str | None = None,
    stand_ins: str | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    told: Callable[[BuildResult], None] | None = None,
) -> Path:
    """Compiles the Hugging Face directory `model` into the artifact `out`, replacing an artifact that is there.

    `target` is a name of `hw_targets` (`host`, `x86-64-v3`, ...), `dtype` bf16 or f32, `pipeline` the text or name of
    a pass pipeline (None: the default one), `recipe` the names or paths of recipes by commas (None: floats, or what a
    quantized checkpoint stores), `stand_ins` those of second copies of the experts (None: no copies). `told` gets the
    result when it is there. Returns the path of the artifact. Raises `ir.diagnostics.DiagnosticError` for every fault
    in the model, the options or the disk.
    """
    import hw_targets
    from codegen.build import build_artifact
    from codegen.object_cache import ObjectCache
    from frontends.huggingface import import_model
    from stratum.opt_driver import resolve_pipeline

    chosen = hw_targets.load(target)
    if progress is not None:
        progress("import", 0, 0)
    imported = import_model(Path(model))
    with imported.checkpoint as checkpoint:
        for message in imported.warnings:
            (warn or _warn)(message)
        result = build_artifact(
            imported,
            Path(out),
            target=chosen,
            dtype=dtype,
            pipeline=resolve_pipeline(pipeline) if pipeline is not None else None,
            recipe=recipe,
            stand_ins=stand_ins,
            progress=_fractions(progress, checkpoint.nbytes) if progress is not None else None,
            dump_dir=Path(dump_ir) if dump_ir is not None else None,
            cache=ObjectCache(),
            version=__version__,
        )
    if told is not None:
        told(result)
    return result.path


def ensure_built(
    path: str | os.PathLike[str],
    *,
    target: str = "host",
    dtype: str = "bf16",
    pipeline: str | None = None,
    recipe: str | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Path:
    """The artifact for `path`: itself when it is one, else a cached build of that Hugging Face directory.

    The options are those of `build`; an artifact has its own, and is taken as it is.
    """
    from runtime.artifact import is_artifact

    if is_artifact(path):
        return Path(path)
    from frontends.checkpoint_files import check_directory
    from stratum.model_cache import cache_entry, cached

    model = check_directory(Path(path))
    entry = cache_entry(model, [__version__, *_target_key(target), dtype, pipeline or "", _recipe_text(recipe)])
    options = {"target": target, "dtype": dtype, "pipeline": pipeline, "recipe": recipe}

    def make(out: Path) -> None:
        build(model, out, progress=progress, warn=warn, **options)

    return cached(entry, make)


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
    choice = device if isinstance(device, DeviceChoice) else choose_device(
        Path(path), device, device_memory=memory_bytes(device_memory, "--device-memory"), dtype=dtype, recipe=recipe,
        target=target, plan=plan, kv_dir=kv_dir, record_routing=routing,
        no_mmap=None if mmap else True,
    )  # fmt: skip
    on_gpu = choice.device == "cuda"
    options: dict[str, Any] = {
        "target": target or (choice.target if on_gpu else "host"),
        "dtype": dtype,
        "pipeline": pipeline,
        "recipe": recipe,
    }
    options |= {"progress": progress, "warn": warn}
    opened: dict[str, Any] = {"threads": threads, "max_context": max_context, "verify": verify, "routing": routing}
    opened |= {"memory": memory_bytes(memory), "expert_policy": expert_policy, "plan": plan, "kv_dir": kv_dir}
    opened |= {"device": choice, "device_memory": memory_bytes(device_memory, "--device-memory"), "progress": progress}
    opened |= {"stand_ins": stand_ins, "missed_experts": missed_experts, "slots": slots, "mmap": mmap}
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
            (warn or _warn)(f"the cached build is damaged and is made again: {damage.message}")
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


def _target_key(target: str) -> list[str]:
    """What of a target decides the code: its name alone would not do for `host` on a shared cache."""
    import hw_targets

    found = hw_targets.load(target)
    return [found.name, found.llvm_triple, found.llvm_cpu, found.feature_string()]


def _recipe_text(recipe: str | None) -> str:
    """What a recipe says, not what it is called: its file may change."""
    from passes.quantize.recipe import load_recipe

    return load_recipe(recipe).to_toml() if recipe is not None else ""


def _fractions(progress: Progress, checkpoint_bytes: int) -> Callable[[str, float], None]:
    """Fractions of a stage as the amounts that displays show; weights count bytes of the checkpoint."""

    def tell(stage: str, fraction: float) -> None:
        if stage == "weights":
            progress(stage, fraction * checkpoint_bytes, checkpoint_bytes, "bytes")
        else:
            progress(stage, fraction, 1.0 if fraction else 0.0)

    return tell


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
