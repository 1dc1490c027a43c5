"""The inputs of one step, checked: native code trusts them, so nothing unchecked may reach it.

Takes what the caller gave (`ids`, `positions`, `slots`, `rows`, any integer sequences), gives int32 arrays. Refuses
other kinds of numbers, unequal lengths, ids outside the vocabulary, positions outside the context, slots and rows that
do not exist, a row named twice, and positions that skip or repeat within a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic


@dataclass(frozen=True)
class StepInputs:
    """Checked int32 arrays: ids, positions, slots [tokens]; rows [rows]."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    rows: np.ndarray

    def check_continues(self, filled: np.ndarray) -> None:
        """Each sequence's positions are consecutive and start at or before `filled[slot]`, the first free position.

        A gap would be read by attention as if it held keys.
        """
        if len(self.slots) == 1 and self.positions[0] <= filled[self.slots[0]]:
            return  # one token of one sequence, the step that must be quick
        order = np.argsort(self.slots, kind="stable")
        slots, positions = self.slots[order], self.positions[order]
        starts = np.ones(len(slots), dtype=np.bool_)
        starts[1:] = slots[1:] != slots[:-1]
        expected = np.empty(len(slots), dtype=np.int64)
        expected[1:] = positions[:-1].astype(np.int64) + 1
        expected[starts] = np.minimum(positions[starts], filled[slots[starts]])
        wrong = np.flatnonzero(positions != expected)
        if len(wrong):
            at = wrong[0]
            what = "starts at" if starts[at] else "continues with"
            raise RuntimeDiagnostic(
                f"the sequence in slot {slots[at]} {what} position {positions[at]}",
                expected=f"position {expected[at]}" + (" or an earlier one" if starts[at] else ""),
                hint="give a sequence's tokens in order and without gaps",
            )


def check_step(
    ids: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    slots: Sequence[int] | np.ndarray,
    rows: Sequence[int] | np.ndarray,
    vocab_size: int,
    max_context: int,
    num_slots: int,
) -> StepInputs:
    """All checks that need no knowledge of the session's past."""
    tokens = _indices(ids, "ids", vocab_size, "token ids of this vocabulary")
    inputs = StepInputs(
        tokens,
        _indices(positions, "positions", max_context, "positions of this context"),
        _indices(slots, "slots", num_slots, "sequence slots of this session"),
        _indices(rows, "rows", len(tokens), "rows of this step"),
    )
    if not len(inputs.ids) == len(inputs.positions) == len(inputs.slots):
        raise RuntimeDiagnostic(
            f"a step got {len(inputs.ids)} ids, {len(inputs.positions)} positions and {len(inputs.slots)} slots",
            expected="one position and one slot for each id",
        )
    if len(inputs.rows) > 1 and len(np.unique(inputs.rows)) != len(inputs.rows):
        raise RuntimeDiagnostic("a step names a row of logits twice", expected="distinct rows")
    return inputs


def _indices(values: Sequence[int] | np.ndarray, name: str, count: int, what: str) -> np.ndarray:
    """`values` as a contiguous int32 vector with 0 <= value < count."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as fault:
        raise RuntimeDiagnostic(f"'{name}' is not a list of integers: {fault}") from None
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RuntimeDiagnostic(
            f"'{name}' has {array.ndim} dimensions of {array.dtype}", expected="one dimension of integers"
        )
    if array.size and not (array.min() >= 0 and array.max() < count):
        at = int(np.flatnonzero((array < 0) | (array >= count))[0])
        raise RuntimeDiagnostic(f"{name}[{at}] is {array[at]}", expected=f"{what}, 0..{count - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
