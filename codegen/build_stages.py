"""The stages that a build tells of, in the order of its work: passes, code, weights; and between them "compiling".

    stages = BuildStages(progress)
    with stages:
        stages("weights", 0.25)

Weights are rounded by loops that numba compiles when they are first needed, once on a machine (`passes.quantize.jit`).
While that goes on the stage is "compiling" and no weights are counted; then the interrupted stage goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from passes.quantize.jit import watch_compiling

COMPILING = "compiling"
Progress = Callable[[str, float], None]  # stage, fraction of it that is done


class BuildStages:
    """Tells `progress` of stages, from any thread; of nothing when that is None."""

    def __init__(self, progress: Progress | None) -> None:
        self.tell = progress or (lambda stage, fraction: None)
        self.lock = threading.RLock()
        self.now = ("", 0.0)
        self.compiling = False
        self.watch: AbstractContextManager[None] = watch_compiling(self._compiles)

    def __call__(self, stage: str, fraction: float) -> None:
        with self.lock:
            self.now = (stage, fraction)
            if not self.compiling:
                self.tell(stage, fraction)

    def __enter__(self) -> BuildStages:
        self.watch.__enter__()
        return self

    def __exit__(self, *fault: object) -> None:
        self.watch.__exit__(None, None, None)

    def _compiles(self, begun: bool) -> None:
        with self.lock:
            self.compiling = begun
            stage, fraction = self.now
            if begun:
                self.tell(COMPILING, 0.0)
            elif stage:
                self.tell(stage, fraction)
