"""The version of this package, as artifacts, caches and `--version` state it."""

__version__ = "0.1.0"
