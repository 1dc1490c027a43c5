"""Stratum: compile a language model's checkpoint to native code, and run it.

    import stratum
    stratum.build("path/to/model", "model.stratum")          # Hugging Face directory -> artifact
    model = stratum.load("model.stratum")                    # or the directory: built into a cache when needed
    for piece in model.generate("Once upon a time", max_tokens=64):
        print(piece, end="", flush=True)

Importing the package loads nothing else; each function brings in what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratum.version import __version__

if TYPE_CHECKING:
    from stratum.api import Model, build, load

__all__ = ["Model", "__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "build", "load"):
        from stratum import api

        value = getattr(api, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stratum' has no attribute {name!r}")
