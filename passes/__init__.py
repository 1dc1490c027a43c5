"""Passes over the IR: the pass manager, pipelines as text, and the passes themselves by name.

from passes import Pass, PassManager, parse_pipeline
PassManager("canonicalize,cse,fuse-qkv").run(module)
"""

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
from passes.pipeline_text import parse_pipeline, print_pass, print_pipeline

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
    "print_pass",
    "print_pipeline",
    "register_pass",
    "registered_passes",
]
