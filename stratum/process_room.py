"""What a budget of a whole process leaves for a model, and the budget that leaves so much: plans need no more of a run.

    room_of(2 << 30), budget_of_room(room)

The process itself takes what was measured of it. `stratum.process_account` adds what depends on the model.
"""

from __future__ import annotations

FORESEEN_BYTES = 85 << 20  # the interpreter with its libraries, as measured
SLACK_BYTES = 24 << 20  # logits, sampling, thread stacks, what a library allocates later
ROWS_BYTES = 8 << 20
PROCESS_BYTES = FORESEEN_BYTES + SLACK_BYTES + ROWS_BYTES  # of a budget, before the process is there
TABLES_SHARE = 256  # of a budget goes to page tables, one part


def room_of(budget: int) -> int:
    """What a budget is foreseen to leave for weights, keys and values, and activations."""
    return max(0, budget - PROCESS_BYTES - budget // TABLES_SHARE)


def budget_of_room(room: int) -> int:
    """The largest budget that leaves so much."""
    budget = (room + PROCESS_BYTES) * TABLES_SHARE // (TABLES_SHARE - 1)
    while room_of(budget + 1) <= room:
        budget += 1
    while budget and room_of(budget) > room:
        budget -= 1
    return budget
