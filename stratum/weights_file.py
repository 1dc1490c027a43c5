"""How large the weights file of a build will be, without building it.

    weights_file_bytes(Path("model"), recipe, target="host", dtype="bf16")

Runs the passes over the graph and plans the file as a build does; no weight is read and no code is made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from passes.quantize.recipe import Recipe


def weights_file_bytes(model: Path, recipe: Recipe, *, target: str = "host", dtype: str = "bf16") -> int:
    """Bytes of `weights/weights.bin` of a build of the Hugging Face directory `model` with `recipe`."""
    import hw_targets
    from codegen.build_pipeline import default_pipeline
    from codegen.lowering import Lowering
    from frontends.huggingface import import_model
    from passes.pass_base import PassContext
    from passes.pass_manager import PassManager

    imported = import_model(model)
    with imported.checkpoint, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe.to_toml(), encoding="utf-8")
        passes = default_pipeline(hw_targets.load(target), dtype, (str(path),))
        roles = {name: spec.role for name, spec in imported.weights.items()}
        PassManager(passes, context=PassContext(options={"roles": roles})).run(imported.module)
        return Lowering(imported.module.function("step")).weights_file().nbytes
