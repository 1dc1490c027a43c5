"""An imported model -> an artifact directory: passes, code generation, weights, manifest.

    build_artifact(imported, out, target=hw_targets.load("host"), dtype="bf16")

Weights stream from the checkpoint into the artifact piece by piece; the whole model is never in memory. The bytes of
the artifact depend on model, pipeline, target and versions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from codegen.artifact import ArtifactWriter
from codegen.build_pipeline import BuildPipeline, build_pipeline
from codegen.build_stages import BuildStages, Progress
from codegen.code_bundle import CodeBundle, bundle_key, load_bundle, store_bundle
from codegen.compile_step import CodegenTarget, compile_lowered, lower_step
from codegen.format_report import FormatUse, bits_per_weight, format_uses
from codegen.garbage import rare_collections
from codegen.lowering import Lowering
from codegen.nvptx.compile import TRIPLE as GPU_TRIPLE
from codegen.nvptx.gpu_code import compile_gpu_step, gpu_architectures, grid_options
from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import lower_grid_step
from codegen.object_cache import ObjectCache
from codegen.programs import WeightsFile
from codegen.weights import write_weights
from frontends.huggingface import ImportedModel
from hw_targets.target import Target as MachineTarget
from ir import print_module
from ir.ops.builtin import ModuleOp
from passes.pass_base import PassContext
from passes.pass_manager import PassManager, PipelineReport
from passes.quantize.quantize import QuantizePass

_WEIGHTS = "weights/weights.bin"


class Target(CodegenTarget, Protocol):
    """A code generation target with a name."""

    @property
    def name(self) -> str: ...
    def required_features(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class BuildResult:
    """Where the artifact is and how it came about. `notes` say what of the machine is not used, and what the recipe
    could not have as it is written."""

    path: Path
    code_was_cached: bool
    weights_bytes: int
    report: PipelineReport
    formats: tuple[FormatUse, ...]
    notes: tuple[str, ...]


@rare_collections()
def build_artifact(
    imported: ImportedModel,
    out: Path,
    *,
    target: Target,
    dtype: str = "bf16",
    pipeline: str | None = None,
    recipe: str | None = None,
    stand_ins: str | None = None,
    progress: Progress | None = None,
    dump_dir: Path | None = None,
    cache: ObjectCache | None = None,
    version: str = "",
) -> BuildResult:
    """Builds `out`. Raises DiagnosticError for pipelines that fail, models without kernels and full disks.

    `recipe` names recipes by commas (`passes.quantize.recipe`); a checkpoint that is quantized stays as it is stored
    unless another recipe or a pipeline is given. `stand_ins` names those of copies of the experts in fewer bits.
    """
    tell = BuildStages(progress)
    module = imported.module
    chosen = build_pipeline(imported, target, dtype, pipeline, recipe, stand_ins)
    key = bundle_key(print_module(module), chosen.text, target, chosen.recipe_files())
    tell("passes", 0.0)
    roles = {name: spec.role for name, spec in imported.weights.items()}
    report = PassManager(chosen.passes, context=PassContext(options={"roles": roles}), dump_dir=dump_dir).run(module)
    tell("code", 0.0)
    architectures = gpu_architectures(target)
    if architectures:
        maker = _gpu_code(module, grid_options(target), architectures, cache)
    else:
        maker = _cpu_code(module, target, key, cache, dump_dir)
    formats = _formats(maker.file)
    with (
        tell,
        ArtifactWriter(out, expected_bytes=maker.file.nbytes) as writer,
        ThreadPoolExecutor(1, "build-code") as pool,
    ):
        # LLVM runs in a process of its own: it works while the weights stream.
        pending = pool.submit(maker.make)
        _stream_weights(writer, maker, imported, tell)
        tell("code", 0.0)  # what is left of it
        code = pending.result()
        _add_files(writer, code, chosen, imported, dump_dir)
        writer.finish(
            {
                "stratum_version": version,
                "model": model_facts(imported),
                "dtype": dtype,
                **chosen.manifest_entries(),
                "target": _target_entry(target),
                "pipeline": chosen.text,
                **code.entries,
                "weights": _weights_entry(maker.file, formats, writer.files[_WEIGHTS].nbytes),
            }
        )
    notes = (*unused_gpu(target), *_notes(report))
    return BuildResult(Path(out), maker.was_cached, maker.file.nbytes, report, formats, notes)


def _formats(weights: WeightsFile) -> tuple[FormatUse, ...]:
    """What the model is stored in; copies of experts in fewer bits do not count."""
    copies = [value for bundle in weights.bundles if bundle.stand_in for value in bundle.weights]
    return format_uses([(name, value) for name, value in weights.roots if value not in copies])


def _stream_weights(writer: ArtifactWriter, maker: _CodeMaker, imported: ImportedModel, tell: BuildStages) -> None:
    with writer.open(_WEIGHTS) as file:
        write_weights(
            maker.file.roots,
            imported.checkpoint,
            file,
            bundles=maker.file.stacks,
            progress=lambda done, all: tell("weights", done / max(1, all)),
        )
        file.write(maker.tables)


def _add_files(
    writer: ArtifactWriter, code: _Code, chosen: BuildPipeline, imported: ImportedModel, dump_dir: Path | None
) -> None:
    """Everything but the weights and the manifest: IR texts, code, recipes, and the model's own files."""
    for name, content in code.files.items():
        writer.add(name, content)
    if dump_dir is not None:
        for name in ("plan.ir", "tile.ir"):
            (dump_dir / name).write_text(str(code.files[name]))
    if chosen.recipe_text:
        writer.add("recipe.toml", chosen.recipe_text)
    if chosen.stand_ins_text:
        writer.add("stand_ins.toml", chosen.stand_ins_text)
    for name, path in sorted(imported.files.items()):
        writer.copy(name, path)


def _target_entry(target: Target) -> dict[str, Any]:
    """The manifest's `target`: what the code needs of a machine."""
    architectures = gpu_architectures(target)
    if architectures:
        return {"name": target.name, "triple": GPU_TRIPLE, "cpu": architectures[0], "features": []}
    return {
        "name": target.name,
        "triple": target.llvm_triple,
        "cpu": target.llvm_cpu,
        "features": list(target.required_features()),
    }


def _weights_entry(weights: WeightsFile, formats: Sequence[FormatUse], nbytes: int) -> dict[str, Any]:
    """The manifest's `weights`: where each tensor lies in the file of `nbytes`, and in what it is stored."""
    return {
        "file": _WEIGHTS,
        "bytes": nbytes,
        "bits_per_weight": round(bits_per_weight(formats), 4),
        "formats": [asdict(use) for use in formats],
        "tensors": [tensor.manifest_entry() for tensor in weights.tensors],
        "pieces": [piece.manifest_entry() for piece in weights.pieces],
    }


@dataclass(frozen=True)
class _Code:
    """Files of an artifact (IR texts, code), and the manifest's entries about them."""

    files: dict[str, str | bytes]
    entries: dict[str, Any]


@dataclass(frozen=True)
class _CodeMaker:
    """The weights file of a lowered step (`tables` at its end), and how its code comes about."""

    file: WeightsFile
    make: Callable[[], _Code]
    was_cached: bool = False
    tables: bytes = b""


def _cpu_code(
    module: ModuleOp, target: Target, key: str, cache: ObjectCache | None, dump_dir: Path | None
) -> _CodeMaker:
    """Ops without a kernel are refused here, before a byte is written."""
    bundle, step = load_bundle(cache, key), module.function("step")
    lowered = lower_step(step, frozenset(target.llvm_features)) if bundle is None or dump_dir is not None else None

    def make() -> _Code:
        made = bundle
        if lowered is not None:
            compiled = compile_lowered(lowered, target, cache=cache)
            made = CodeBundle.of(module, compiled)
            store_bundle(cache, key, made)
            if dump_dir is not None:
                (dump_dir / "step.ll").write_text(compiled.llvm_text)
        assert made is not None
        texts = {"graph.ir": made.graph_text, "plan.ir": made.plan_text, "tile.ir": made.tile_text}
        return _Code(texts | {"code/step.o": made.object_code}, {"programs": made.programs, "kv": made.kv})

    file = lowered.file if lowered is not None else Lowering(step).weights_file()
    return _CodeMaker(file, make, bundle is not None)


def _gpu_code(
    module: ModuleOp, options: GridOptions, architectures: Sequence[str], cache: ObjectCache | None
) -> _CodeMaker:
    """Ops without a kernel for GPUs are refused here, before a byte is written."""
    lowered = lower_grid_step(module.function("step"), options)

    def make() -> _Code:
        code = compile_gpu_step(lowered, architectures, cache)
        levels = {"graph.ir": module, "plan.ir": lowered.plan_module(), "tile.ir": lowered.tile_module()}
        return _Code({name: print_module(level) for name, level in levels.items()} | code.files(), code.entries())

    return _CodeMaker(lowered.file, make, tables=lowered.tables)


def unused_gpu(target: Target) -> tuple[str, ...]:
    """Of a machine with a GPU that has no kernels: what is built instead."""
    first = target.units[0] if isinstance(target, MachineTarget) and target.units else None
    if first is None or first.kind != "gpu" or gpu_architectures(target):
        return ()
    return (
        f"built for the CPU of {target.name} ({target.llvm_cpu}); its GPU is not used: kernels are for CPUs and for "
        "NVIDIA GPUs",
    )


def _notes(report: PipelineReport) -> tuple[str, ...]:
    """What the recipe asked for and could not have, equal remarks counted."""
    counts: dict[str, list[str]] = {}
    for record in report.records:
        if record.name == QuantizePass.name:
            for remark in record.remarks:
                counts.setdefault(remark.message, []).append(remark.origin)
    return tuple(
        f"{origins[0]}{f' and {len(origins) - 1} more' if len(origins) > 1 else ''}: {message}"
        for message, origins in counts.items()
    )


def model_facts(imported: ImportedModel) -> dict[str, Any]:
    """The manifest's `model`: what a user asks of a model, and what the runtime bounds requests by."""
    config = imported.config
    return {
        "name": imported.name,
        "family": config.family,
        "license": imported.license,
        "parameters": imported.num_parameters,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_q_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_context": config.max_context,
        "num_experts": config.moe.num_experts if config.moe else 0,
        "experts_per_token": config.moe.top_k if config.moe else 0,
    }
