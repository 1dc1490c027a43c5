"""An imported model -> an artifact directory: passes, code generation, weights, manifest.

    build_artifact(imported, out, target=hw_targets.load("host"), dtype="bf16")

Weights stream from the checkpoint into the artifact piece by piece; the whole model is never in memory. The bytes of
the artifact depend on model, pipeline, target and versions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from codegen.artifact import ArtifactWriter
from codegen.build_stages import BuildStages, Progress
from codegen.code_bundle import CodeBundle, bundle_key, load_bundle, store_bundle
from codegen.compile_step import CodegenTarget, compile_lowered, lower_step
from codegen.format_report import FormatUse, bits_per_weight, format_uses
from codegen.garbage import rare_collections
from codegen.lower_to_plan import Lowering
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
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.ops.quant import DequantizeOp
from passes.pass_base import Pass, PassContext
from passes.pass_manager import PassManager, PipelineReport
from passes.pipeline_text import parse_pipeline, print_pipeline
from passes.pipelines import cpu_pipeline, gpu_pipeline
from passes.quantize.quantize import QuantizePass
from passes.quantize.recipe import is_path, load_recipe

DTYPES = ("bf16", "f32")


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


def default_pipeline(
    target: CodegenTarget, dtype: str, recipe: Sequence[str] = (), stand_ins: Sequence[str] = ()
) -> tuple[Pass, ...]:
    """The passes for a target; `dtype` is bf16 or f32, the floats; `recipe` names what decides the other formats,
    `stand_ins` what decides those of experts' copies.

    Raises DiagnosticError for other dtypes.
    """
    if dtype not in DTYPES:
        raise DiagnosticError(f"unknown dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}")
    if gpu_architectures(target):
        return gpu_pipeline(dtype, recipe)
    wide = "avx512f" in target.llvm_features
    passes = cpu_pipeline(dtype, dtype, dtype, recipe=recipe, stand_ins=stand_ins)
    if wide:
        return passes
    narrow = parse_pipeline("choose-layouts{bf16-rows=16 f32-rows=16 low-bit-rows=16 small-rows=16}")[0]
    return tuple(narrow if p.name == "choose-layouts" else p for p in passes)


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
    module, architectures = imported.module, gpu_architectures(target)
    parts = recipe_parts(recipe, pipeline, module)
    copies = stand_in_parts(stand_ins, pipeline, imported)
    if copies and architectures:
        raise DiagnosticError(
            "stand-ins are for runs on the CPU, under a budget", expected="a CPU target, or no stand-ins"
        )
    passes: Sequence[Pass] = parse_pipeline(pipeline) if pipeline else default_pipeline(target, dtype, parts, copies)
    text = print_pipeline([_without_paths(p) for p in passes])
    recipes = [load_recipe(p.recipe) for p in passes if isinstance(p, QuantizePass)]  # files may change
    recipe_text = "\n".join(r.to_toml() for r in recipes)
    copies_text = load_recipe(copies).to_toml() if copies else ""
    key = bundle_key(print_module(module), text, target, [recipe_text, *filter(None, [copies_text])])
    tell("passes", 0.0)
    roles = {name: spec.role for name, spec in imported.weights.items()}
    report = PassManager(passes, context=PassContext(options={"roles": roles}), dump_dir=dump_dir).run(module)
    tell("code", 0.0)
    maker = (
        _gpu_code(module, grid_options(target), architectures, cache)
        if architectures
        else _cpu_code(module, target, key, cache, dump_dir)
    )
    weights = maker.file
    extra = [value for bundle in weights.bundles if bundle.stand_in for value in bundle.weights]
    formats = format_uses([(name, value) for name, value in weights.roots if value not in extra])
    with (
        tell,
        ArtifactWriter(out, expected_bytes=weights.nbytes) as writer,
        ThreadPoolExecutor(1, "build-code") as pool,
    ):
        # LLVM runs in a process of its own: it works while the weights stream.
        pending = pool.submit(maker.make)
        with writer.open("weights/weights.bin") as file:
            write_weights(
                weights.roots,
                imported.checkpoint,
                file,
                bundles=weights.stacks,
                progress=lambda done, all: tell("weights", done / max(1, all)),
            )
            file.write(maker.tables)
        tell("code", 0.0)  # what is left of it
        code = pending.result()
        for name, content in code.files.items():
            writer.add(name, content)
        if dump_dir is not None:
            for name in ("plan.ir", "tile.ir"):
                (dump_dir / name).write_text(str(code.files[name]))
        if recipe_text:
            writer.add("recipe.toml", recipe_text)
        if copies_text:
            writer.add("stand_ins.toml", copies_text)
        for name, path in sorted(imported.files.items()):
            writer.copy(name, path)
        record = writer.files["weights/weights.bin"]
        cpu, features = (architectures[0], []) if architectures else (target.llvm_cpu, list(target.required_features()))
        writer.finish(
            {
                "stratum_version": version,
                "model": model_facts(imported),
                "dtype": dtype,
                "recipe": ",".join(r.name for r in recipes),
                **({"stand_ins": load_recipe(copies).name} if copies else {}),
                "target": {
                    "name": target.name,
                    "triple": GPU_TRIPLE if architectures else target.llvm_triple,
                    "cpu": cpu,
                    "features": features,
                },
                "pipeline": text,
                **code.entries,
                "weights": {
                    "file": "weights/weights.bin",
                    "bytes": record.nbytes,
                    "bits_per_weight": round(bits_per_weight(formats), 4),
                    "formats": [asdict(use) for use in formats],
                    "tensors": [t.manifest_entry() for t in weights.tensors],
                    "pieces": [p.manifest_entry() for p in weights.pieces],
                },
            }
        )
    return BuildResult(
        Path(out), maker.was_cached, weights.nbytes, report, formats, (*unused_gpu(target), *_notes(report))
    )


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


def recipe_parts(recipe: str | None, pipeline: str | None, module: ModuleOp) -> tuple[str, ...]:
    """What `--recipe` names, each part by itself; the default of a quantized checkpoint; () for builds of floats."""
    if recipe is not None and pipeline is not None:
        raise DiagnosticError(
            "a recipe and a pipeline are given, and each decides the formats",
            expected="one of them",
            hint=f"the pipeline may name the recipe: quantize{{recipe={recipe}}}",
        )
    if recipe is None:
        return ("as-stored",) if any(isinstance(op, DequantizeOp) for op in module.walk()) else ()
    load_recipe(recipe)  # refuses what is no recipe before anything is done
    return tuple(part.strip() for part in recipe.split(","))


def stand_in_parts(stand_ins: str | None, pipeline: str | None, imported: ImportedModel) -> tuple[str, ...]:
    """What `--stand-ins` names, each part by itself. Refuses models without experts, and pipelines of the caller."""
    if stand_ins is None:
        return ()
    if pipeline is not None:
        raise DiagnosticError(
            "stand-ins and a pipeline are given, and each decides the passes",
            expected="one of them",
            hint=f"the pipeline may have them: add-stand-ins first, and quantize{{stand-ins={stand_ins}}}",
        )
    if imported.config.moe is None:
        raise DiagnosticError(
            "this model has no experts that others could stand in for", expected="a mixture of experts, or no stand-ins"
        )
    load_recipe(stand_ins)
    return tuple(part.strip() for part in stand_ins.split(","))


def _without_paths(made: Pass) -> Pass:
    """The pass as the manifest names it: a recipe from a file by the artifact's own copy, so that equal recipes give
    equal artifacts wherever they lay.
    """
    if isinstance(made, QuantizePass):
        if any(is_path(part) for part in made.recipe):
            made = replace(made, recipe=("recipe.toml",))
        if any(is_path(part) for part in made.stand_ins):
            made = replace(made, stand_ins=("stand_ins.toml",))
    return made


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
