"""What generation asks of a session, wherever its steps run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.manifest import Manifest


class Stepper(Protocol):
    """A model with `num_slots` sequences of up to `max_context` positions; `runtime.session.Session` says more.

    `sequence_in` says by slot whom generation last gave it to: what is suspended meanwhile must not go on there.
    """

    manifest: Manifest
    num_slots: int
    max_context: int
    vocab_size: int
    sequence_in: dict[int, object]

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        slots: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Logits, f32 [len(rows), vocab_size]."""
        ...

    def release(self, slot: int) -> int:
        """Forgets a sequence; the bytes that became free."""
        ...
