"""Where programs wait for pieces of the weights, as the manifest says it.

`runtime.manifest` has the rest of the manifest, `runtime.manifest_checks` what a wait must agree with.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.manifest_fields import Fields


@dataclass(frozen=True)
class RouterInfo:
    """The router of a layer's experts: its input and its matrix, both f32.

    `hidden`: where the input [tokens, columns] lies in the arena while the program waits for the experts. `weights`:
    where the matrix [strips, columns, strip] begins in the weights file; the last strip may have rows of no expert.
    """

    hidden: int
    weights: int
    experts: int
    columns: int
    strip: int

    @property
    def bytes(self) -> int:
        """Of the matrix."""
        return -(-self.experts // self.strip) * self.strip * self.columns * 4


@dataclass(frozen=True)
class StandInInfo:
    """Copies of a layer's experts in fewer bits: their piece of the weights file, and where the weights f32
    [tokens, top_k] of the router's choice lie in the arena while the program waits for the experts."""

    piece: int
    weights: int


@dataclass(frozen=True)
class AwaitInfo:
    """A place in a program where it waits for a piece of the weights, and pieces that it is done with there.

    `router`, `stand_ins`: of a wait for experts, where the artifact says it, or has some.
    """

    piece: int
    done: tuple[int, ...]
    router: RouterInfo | None = None
    stand_ins: StandInInfo | None = None


def read_await(wait: Fields) -> AwaitInfo:
    """One entry of a program's `awaits`."""
    done = tuple(wait.integers("done", 0, 1 << 20))
    return AwaitInfo(wait.integer("piece", 0, 1 << 20), done, _router(wait), _stand_ins(wait))


def _router(wait: Fields) -> RouterInfo | None:
    if "router" not in wait.values:
        return None
    router = wait.child("router")
    return RouterInfo(
        router.integer("hidden", 0, 1 << 44), router.integer("weights", 0, 1 << 50),
        router.integer("experts", 1, 1 << 16), router.integer("columns", 1, 1 << 24),
        router.integer("strip", 1, 1 << 16),
    )  # fmt: skip


def _stand_ins(wait: Fields) -> StandInInfo | None:
    if "stand_ins" not in wait.values:
        return None
    found = wait.child("stand_ins")
    return StandInInfo(found.integer("piece", 0, 1 << 20), found.integer("weights", 0, 1 << 44))
