"""Several sequences in turn on one session, each ending or failing by itself.

    batch = Batch(session, decode)
    batch.admit("a", GenerationRequest(ids), slot=0)        # RuntimeDiagnostic where its prompt cannot be used
    for key, event in batch.step(): ...                     # a TokenEvent, or the RuntimeDiagnostic that ended it

Every step carries one token of each sequence that generates and pieces of the prompts of the others
(`runtime.generation.step_together`). A position has the same bits in every step, so what else is in the batch never
shows in a token. When a step fails its sequences are tried one by one, and only those that fail again end.
"""

from __future__ import annotations

from runtime.errors import RuntimeDiagnostic
from runtime.generation import Decode, GenerationRequest, RunningSequence, TokenEvent, step_together
from runtime.stepping import Stepper


class Batch:
    """What is running. Keys are the caller's names of sequences; a slot holds one sequence at a time."""

    def __init__(self, session: Stepper, decode: Decode | None = None) -> None:
        self._session, self._decode = session, decode
        self._most_tokens = session.manifest.programs[-1].max_tokens
        self._running: dict[str, RunningSequence] = {}

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, key: str, request: GenerationRequest, slot: int) -> None:
        """From the next step on; `request.reuse` positions of the slot are the first of its prompt."""
        if key in self._running or slot in [sequence.slot for sequence in self._running.values()]:
            raise ValueError(f"sequence {key!r} or slot {slot} is in use")
        sequence = RunningSequence(len(self._running), request, self._session, self._decode)
        sequence.admit(slot)
        self._running[key] = sequence

    def step(self) -> list[tuple[str, TokenEvent | RuntimeDiagnostic]]:
        """One step of all; what ended is not running any more."""
        key_of = {id(sequence): key for key, sequence in self._running.items()}
        ended: list[tuple[str, TokenEvent | RuntimeDiagnostic]] = []
        try:
            served = step_together(self._session, list(self._running.values()), self._most_tokens)
        except RuntimeDiagnostic as fault:
            served = []
            if len(self._running) == 1:
                ended = [(key, fault) for key in self._running]
            else:
                for key, sequence in self._running.items():
                    try:
                        served += step_together(self._session, [sequence], self._most_tokens)
                    except RuntimeDiagnostic as own:
                        ended.append((key, own))
        found = [(key_of[id(sequence)], sequence.accept(logits)) for sequence, logits in served]
        for key, event in (*found, *ended):
            if isinstance(event, RuntimeDiagnostic) or event.finish_reason is not None:
                del self._running[key]
        return [*found, *ended]
