"""From a Hugging Face directory to an artifact: where one is asked for, or in a cache under a key of what decides it.

build("path/to/model", "model.stratum")        ensure_built("path/to/model")      # see `stratum.model_cache`
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stratum.progress import Progress
from stratum.version import __version__

if TYPE_CHECKING:
    from codegen.build import BuildResult

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
            (warn or show_warning)(message)
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


def show_warning(message: str) -> None:
    warnings.warn(message, stacklevel=3)
