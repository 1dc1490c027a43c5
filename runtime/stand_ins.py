"""Stand-ins: copies of experts in fewer bits, used for missing experts of little weight, where that is asked for.

An expert counts for a token by its share of the token's routing weight. One that is missing, and has less than
`threshold` for every token of a step that chose it, is computed from its stand-in: of an unimportant expert a shorter
read is enough (HOBBIT, arXiv:2411.01433). What is in memory is always used as it is. Tokens then depend on what happens
to be in memory, and are not those of the full model; equal caches give equal tokens.

In the caches of experts (`runtime.expert_cache`) the stand-in of expert e is the entry -1 - e of its layer, in programs
the number e + E.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.await_info import AwaitInfo
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import Manifest, PieceInfo


def stand_in_pieces(manifest: Manifest) -> dict[int, int]:
    """By piece of experts: the piece of their stand-ins. Empty unless every layer with experts has some."""
    pieces = manifest.weights.pieces
    found: dict[int, int] = {}
    for program in manifest.programs:
        for wait in program.awaits:
            if wait.stand_ins is not None:
                found[wait.piece] = wait.stand_ins.piece
            elif pieces[wait.piece].kind == "experts":
                return {}
    return found


def check_stand_ins(manifest: Manifest, threshold: float) -> None:
    """Raises RuntimeDiagnostic where stand-ins are asked for and the artifact has none."""
    if threshold and not stand_in_pieces(manifest):
        raise RuntimeDiagnostic(
            "stand-ins are asked for, and the artifact has no second copies of its experts",
            expected="an artifact of a mixture of experts, built with stand-ins",
            hint="compile-model build DIR -o OUT --stand-ins w2a8",
        )


def choice_weights(wait: AwaitInfo, tokens: int, top_k: int, arena: np.ndarray) -> np.ndarray | None:
    """f32 [tokens, top_k]: what the router gave to the experts it chose; None where the artifact does not say."""
    if wait.stand_ins is None:
        return None
    first = wait.stand_ins.weights
    return arena[first : first + 4 * tokens * top_k].view(np.float32).reshape(tokens, top_k).copy()


def largest_shares(experts: Sequence[int], weights: np.ndarray) -> dict[int, float]:
    """Of each expert the largest share of a token's weight that it has; `experts` are flat, `weights` [tokens, top_k].

    A token whose weights have no sum counts all its experts alike.
    """
    whole = weights.sum(axis=1, dtype=np.float64, keepdims=True)
    usable = np.isfinite(whole) & (whole > 0)
    shares = np.where(usable, weights / np.where(usable, whole, 1.0), 1.0 / weights.shape[1])
    found: dict[int, float] = {}
    for expert, share in zip(experts, shares.ravel().tolist(), strict=True):
        found[expert] = max(share, found.get(expert, 0.0))
    return found


def stand_in(expert: int) -> int:
    """The entry of an expert's stand-in in a cache, and back."""
    return -1 - expert


def in_program(entries: Sequence[int], piece: PieceInfo) -> list[int]:
    """Numbers of a program's experts for entries of a cache; `piece` holds the experts of the layer."""
    return [entry if entry >= 0 else piece.count + stand_in(entry) for entry in entries]
