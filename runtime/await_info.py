"""Where programs wait for pieces of the weights, as the manifest says it: read and checked.

`runtime.manifest` has the rest of the manifest, and gives `check_await` what a wait must agree with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.manifest_fields import Fields

if TYPE_CHECKING:
    from runtime.manifest import Manifest, ProgramInfo, WeightsInfo


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


def check_await(wait: AwaitInfo, program: ProgramInfo, manifest: Manifest, top: Fields) -> None:
    """What a wait says of routers and stand-ins lies in the arena and in the file."""
    if wait.router is not None:
        _check_router(program, wait.piece, wait.router, manifest.weights, top)
    if wait.stand_ins is not None:
        _check_stand_ins(program, wait.piece, wait.stand_ins, manifest, top)


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


def _check_router(program: ProgramInfo, piece: int, router: RouterInfo, weights: WeightsInfo, top: Fields) -> None:
    """What a router is said to read lies in the arena and in the file, and it has the experts of its piece."""
    where, info = f"programs.{program.name}.awaits.router", weights.pieces[piece]
    if router.hidden % 4 or router.hidden + program.max_tokens * router.columns * 4 > program.arena_bytes:
        top.fail(f"{where}.hidden", f"f32 rows inside of the arena of {program.arena_bytes} bytes", router.hidden)
    if router.weights % 4 or router.weights + router.bytes > weights.bytes:
        top.fail(f"{where}.weights", f"an f32 matrix inside of the {weights.bytes} bytes of weights", router.weights)
    if info.kind != "experts" or router.experts != info.count:
        top.fail(f"{where}.experts", "as many as the piece has", router.experts)


def _check_stand_ins(program: ProgramInfo, piece: int, found: StandInInfo, manifest: Manifest, top: Fields) -> None:
    """As many as there are experts, and smaller; the weights of the choice lie in the arena."""
    where, pieces = f"programs.{program.name}.awaits.stand_ins", manifest.weights.pieces
    whole, info = pieces[piece], pieces[found.piece] if found.piece < len(pieces) else None
    kinds = (whole.kind, info.kind if info is not None else "")
    if info is None or kinds != ("experts", "stand_ins") or info.count != whole.count:
        top.fail(f"{where}.piece", "a piece of kind stand_ins, with as many as there are experts", found.piece)
    if info.unit >= min((unit for unit, _ in whole.classes), default=whole.unit):
        top.fail(f"{where}.piece", "stand-ins smaller than the experts", found.piece)
    nbytes = 4 * program.max_tokens * manifest.experts_per_token
    if found.weights % 4 or found.weights + nbytes > program.arena_bytes:
        top.fail(f"{where}.weights", f"f32 numbers inside of the arena of {program.arena_bytes} bytes", found.weights)
