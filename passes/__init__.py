"""Passes over the IR: the pass manager, pipelines as text, and the passes themselves by name.

from passes import Pass, PassManager, parse_pipeline
PassManager("canonicalize,cse,fuse-qkv").run(module)

Names are loaded when they are asked for: a process that only reads a plan (`passes.place`) has no memory for a
compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from passes.pass_base import (
        FunctionPass,
        Pass,
        PassContext,
        Remark,
        find_pass,
        register_pass,
        registered_passes,
    )
    from passes.pass_manager import PassError, PassManager, PassRecord, PipelineReport
    from passes.pipeline_text import parse_pipeline, print_pipeline

__all__ = [
    "FunctionPass",
    "Pass",
    "PassContext",
    "PassError",
    "PassManager",
    "PassRecord",
    "PipelineReport",
    "Remark",
    "find_pass",
    "parse_pipeline",
    "print_pipeline",
    "register_pass",
    "registered_passes",
]

_HOMES = {
    "pass_manager": ("PassError", "PassManager", "PassRecord", "PipelineReport"),
    "pipeline_text": ("parse_pipeline", "print_pipeline"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"passes.{_HOME_OF.get(name, 'pass_base')}"), name)
