"""Where things that can be made again are kept: `$STRATUM_CACHE`, else `$XDG_CACHE_HOME/stratum`, else
`~/.cache/stratum`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache directory. It is not created here."""
    explicit = os.environ.get("STRATUM_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "stratum"
