"""Records which experts every token chose, as a `hw_targets.routing.RoutingTrace`, for `run --record-routing`.

The runtime tells a `RoutingRecorder` of each native call (positions and slots of its tokens) and of each layer's
choice. A sequence that begins at position 0 is a new turn; several tokens of one sequence in one call are a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hw_targets.routing import RoutingTrace
    from runtime.manifest import Manifest


class RoutingRecorder:
    """Collects; `trace` gives what there is. Calls that did not finish are left out."""

    def __init__(self) -> None:
        self._calls: list[tuple[np.ndarray, np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]] = []
        self._turns: dict[int, int] = {}

    def begins(self, positions: np.ndarray, slots: np.ndarray) -> None:
        """A native call over these tokens begins."""
        self._calls.append((positions.copy(), slots.copy(), {}))

    def chosen(self, layer: int, choices: np.ndarray, weights: np.ndarray | None = None) -> None:
        """The experts [tokens, top_k] that a layer of that call chose; the router's weights where they are known."""
        known = weights if weights is not None else np.full(choices.shape, np.nan, np.float32)
        self._calls[-1][2][layer] = choices, known

    def trace(self, manifest: Manifest) -> RoutingTrace:
        """All calls so far."""
        from hw_targets.routing import RoutingTrace

        pieces = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
        experts, weights, turns, positions, batches, decode = [], [], [], [], [], []
        current: dict[int, int] = {}
        begun = 0
        whole = [call for call in self._calls if len(call[2]) == len(pieces) and pieces]
        for number, (at, slots, layers) in enumerate(whole):
            experts.append(np.stack([layers[i][0] for i in range(len(pieces))], axis=1))
            weights.append(np.stack([layers[i][1] for i in range(len(pieces))], axis=1))
            for position, slot in zip(at.tolist(), slots.tolist(), strict=True):
                if position == 0 or slot not in current:
                    current[slot] = begun
                    begun += 1
                turns.append(current[slot])
                decode.append(position > 0 and int(np.count_nonzero(slots == slot)) == 1)
            positions += at.tolist()
            batches += [number] * len(at)
        top_k = manifest.experts_per_token
        shape = (0, len(pieces), top_k)
        chosen = np.concatenate(experts).astype(np.int32) if experts else np.zeros(shape, np.int32)
        return RoutingTrace(
            model=str(manifest.model.get("name", "")).replace(" ", "_") or "model",
            arch=str(manifest.model.get("family", "")) or "unknown",
            expert_count=max((piece.count for piece in pieces), default=0),
            top_k=top_k,
            layers=tuple(_layer_number(piece.origin, index) for index, piece in enumerate(pieces)),
            expert_bytes=tuple(piece.bytes // piece.count for piece in pieces),
            dense_bytes=(0,) * len(pieces),
            experts=chosen,
            weights=np.concatenate(weights).astype(np.float32) if weights else np.zeros(shape, np.float32),
            turn=np.array(turns, np.int64),
            position=np.array(positions, np.int64),
            batch=np.array(batches, np.int64),
            decode=np.array(decode, bool),
        )


def _layer_number(origin: str, index: int) -> int:
    """`layers.7.mlp.experts` is layer 7."""
    numbers = [part for part in origin.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else index
