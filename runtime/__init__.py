"""The runtime: opens a built artifact and generates with it. Needs numpy, llvmlite's loader and the standard library.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.artifact import Artifact, is_artifact, open_artifact
    from runtime.errors import RuntimeDiagnostic
    from runtime.generation import (
        GenerationParams,
        GenerationRequest,
        Statistics,
        TokenEvent,
        generate,
        generate_batch,
    )
    from runtime.host import HostCores, available_cores
    from runtime.sampling import Sampler, SamplingParams
    from runtime.session import MemoryReport, Session
    from runtime.trace import Profile

_HOMES = {
    "Artifact": "artifact",
    "is_artifact": "artifact",
    "open_artifact": "artifact",
    "RuntimeDiagnostic": "errors",
    "GenerationParams": "generation",
    "GenerationRequest": "generation",
    "Statistics": "generation",
    "TokenEvent": "generation",
    "generate": "generation",
    "generate_batch": "generation",
    "HostCores": "host",
    "available_cores": "host",
    "Sampler": "sampling",
    "SamplingParams": "sampling",
    "MemoryReport": "session",
    "Session": "session",
    "Profile": "trace",
}
__all__ = [
    "Artifact",
    "GenerationParams",
    "GenerationRequest",
    "HostCores",
    "MemoryReport",
    "Profile",
    "RuntimeDiagnostic",
    "Sampler",
    "SamplingParams",
    "Session",
    "Statistics",
    "TokenEvent",
    "available_cores",
    "generate",
    "generate_batch",
    "is_artifact",
    "open_artifact",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(f"runtime.{home}"), name)
