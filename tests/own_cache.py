"""Caches of a test's own, for what it builds; compiled code is found by its content, so all tests share that."""

from __future__ import annotations

import os
from pathlib import Path

from codegen.object_cache import ObjectCache


def own_cache(folder: Path) -> str:
    """An empty cache at `folder` (as it is, where a test of the module made it), as STRATUM_CACHE takes it."""
    if not folder.exists():
        shared = ObjectCache().directory
        shared.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        os.symlink(shared, folder / "objects")
    return str(folder)
