"""Which compiler this is: a hash of its own sources, for the keys of caches.

A cache of what the compiler made must miss when the compiler changes. A number that somebody has to raise is forgotten;
the sources themselves are not.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

COMPILER_FOLDERS = ("ir", "frontends", "hw_targets", "passes", "codegen")


@cache
def generator_version() -> str:
    """Hex digest of the compiler's source files by path and content: some 400 files, 15 ms, once a process.

    Descriptions of targets and recipes are not among them: what of them was used is in a key by itself.
    """
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=16)
    for folder in COMPILER_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".lark") and path.is_file():
                digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
