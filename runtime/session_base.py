"""What sessions on all devices share: the sequences they hold by slot, the checks of a step, and `with` blocks.

A session of a device says how a step is prepared (`_make_room`) and run (`_run_all`); what goes into a step, and that
logits come back in the order asked for, is the same on all of them. Every index is checked here, because compiled code
checks nothing. One step at a time: callers on several threads wait for each other.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import Manifest
from runtime.session_parts import check_ring, checked_context, checked_count
from runtime.step_inputs import StepInputs, check_step

MAX_SLOTS = 1 << 16


class SessionBase(ABC):
    """A session has set `manifest` before it calls `_hold_sequences`; `_finalizer` gives back what it holds."""

    manifest: Manifest
    _finalizer: weakref.finalize

    # What is lost to a forked child, and what ended the session when a step went wrong.
    _of_parent: ClassVar[str]
    _after_fault: ClassVar[tuple[str, str]]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._where = str(path)
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._broken = False

    def _hold_sequences(self, max_context: int | None, num_slots: int) -> None:
        """Raises RuntimeDiagnostic for sizes that the model or a session cannot have."""
        self.max_context = checked_context(max_context, self.manifest, self._where)
        self.num_slots = checked_count(num_slots, "sequence slots", MAX_SLOTS)
        self.vocab_size = self.manifest.vocab_size
        self._filled = np.zeros(self.num_slots, dtype=np.int64)  # positions written, by slot
        self._newest = np.full(self.num_slots, -1, dtype=np.int64)  # the last position ever written, by slot
        self.sequence_in: dict[int, object] = {}  # by slot, the generation that it was last given to

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        slots: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Runs one step over a ragged batch.

        `ids`, `positions`, `slots` [tokens]: token t belongs to the sequence in `slots[t]` and stands at
        `positions[t]`; the positions of a sequence continue where it stands (or go back and overwrite). `rows` names
        the tokens whose logits are wanted, each at most once. Gives float32 [len(rows), vocab_size], in the order of
        `rows`. A step longer than the program takes is run in pieces, with the same meaning.
        """
        inputs = self._checked_inputs(ids, positions, slots, rows)
        logits = np.empty((len(inputs.rows), self.vocab_size), dtype=np.float32)
        if len(inputs.ids) == 0:
            return logits
        order = np.argsort(inputs.rows, kind="stable")
        in_order = bool(np.all(order == np.arange(len(order))))
        target = logits if in_order else np.empty_like(logits)
        with self._lock:
            self._check_usable()
            inputs.check_continues(self._filled)
            check_ring(self.manifest.kv, inputs, self._newest, self._where)
            self._make_room(inputs)
            self._run_all(inputs, inputs.rows[order], target)
        if not in_order:
            logits[order] = target
        return logits

    @abstractmethod
    def _make_room(self, inputs: StepInputs) -> None:
        """Prepares the cache for the positions of a step."""

    @abstractmethod
    def _run_all(self, inputs: StepInputs, rows: np.ndarray, logits: np.ndarray) -> None:
        """All tokens, in as few runs as they take; `rows` ascend. Writes `logits`, in the order of `rows`."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the session holds, after a step in progress. Closing twice is fine."""

    def filled(self, slot: int) -> int:
        """How many positions of `slot` are written: the position the next token of that sequence takes."""
        return int(self._filled[self._checked_slot(slot)])

    def _checked_inputs(
        self,
        ids: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        slots: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
    ) -> StepInputs:
        return check_step(ids, positions, slots, rows, self.vocab_size, self.max_context, self.num_slots)

    def _checked_slot(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise RuntimeDiagnostic(f"slot {slot} does not exist", expected=f"0..{self.num_slots - 1}")
        return slot

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeDiagnostic("the session is closed", where=self._where, hint="open a new one")
        if self._owner_pid != os.getpid():
            raise RuntimeDiagnostic(
                f"the session was opened before this process was forked, {self._of_parent} only in the parent",
                where=self._where,
                hint="open the session in the child",
            )
        if self._broken:
            what, hint = self._after_fault
            raise RuntimeDiagnostic(f"the session stopped after {what}", where=self._where, hint=hint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
