"""Where an artifact's manifest lies, which tells an artifact from other directories without opening it."""

from __future__ import annotations

import os
from pathlib import Path

MANIFEST_NAME = "manifest.json"


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether the directory looks like an artifact (has a manifest), without opening it."""
    return (Path(path) / MANIFEST_NAME).is_file()
