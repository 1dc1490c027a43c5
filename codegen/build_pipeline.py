"""What a build does to a model: the passes, from a pipeline's text or from the names of recipes.

    chosen = build_pipeline(imported, target, "bf16", pipeline=None, recipe="w4a8-g32", stand_ins=None)
    chosen.passes, chosen.text

Refused, with what would work: a pipeline together with a recipe or stand-ins, stand-ins without experts or for a GPU,
recipes that are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from codegen.compile_step import CodegenTarget
from codegen.nvptx.gpu_code import gpu_architectures
from frontends.huggingface import ImportedModel
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.ops.quant import DequantizeOp
from passes.pass_base import Pass
from passes.pipeline_text import parse_pipeline, print_pipeline
from passes.pipelines import cpu_pipeline, gpu_pipeline
from passes.quantize.quantize import QuantizePass
from passes.quantize.recipe import Recipe, is_path, load_recipe

DTYPES = ("bf16", "f32")


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


@dataclass(frozen=True)
class BuildPipeline:
    """The passes of a build, their text for the manifest, and their recipes as read now: files may change."""

    passes: tuple[Pass, ...]
    text: str
    recipes: tuple[Recipe, ...]
    stand_ins: Recipe | None  # what the experts' copies are stored in

    @property
    def recipe_text(self) -> str:
        return "\n".join(recipe.to_toml() for recipe in self.recipes)

    @property
    def stand_ins_text(self) -> str:
        return self.stand_ins.to_toml() if self.stand_ins else ""

    def recipe_files(self) -> list[str]:
        """The texts that, with the pipeline, decide what is built."""
        return [self.recipe_text, *filter(None, [self.stand_ins_text])]

    def manifest_entries(self) -> dict[str, str]:
        names = {"recipe": ",".join(recipe.name for recipe in self.recipes)}
        return names | ({"stand_ins": self.stand_ins.name} if self.stand_ins else {})


def build_pipeline(
    imported: ImportedModel,
    target: CodegenTarget,
    dtype: str,
    pipeline: str | None,
    recipe: str | None,
    stand_ins: str | None,
) -> BuildPipeline:
    """What a build was asked for. Raises DiagnosticError for what excludes one another, and for unknown names."""
    parts = recipe_parts(recipe, pipeline, imported.module)
    copies = stand_in_parts(stand_ins, pipeline, imported)
    if copies and gpu_architectures(target):
        raise DiagnosticError(
            "stand-ins are for runs on the CPU, under a budget", expected="a CPU target, or no stand-ins"
        )
    passes = parse_pipeline(pipeline) if pipeline else default_pipeline(target, dtype, parts, copies)
    return BuildPipeline(
        passes=tuple(passes),
        text=print_pipeline([_without_paths(p) for p in passes]),
        recipes=tuple(load_recipe(p.recipe) for p in passes if isinstance(p, QuantizePass)),
        stand_ins=load_recipe(copies) if copies else None,
    )


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
