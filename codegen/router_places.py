"""Where a layer's router finds its input and its matrix, for whoever guesses what the next layer will choose.

Takes the experts of a layer; gives the router's product with its operands, where that is a plain product of f32 numbers
whose matrix is stored row by row or in strips of rows. Others are not described (None): a guess is never needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from codegen.weight_pieces import ExpertBundle
from ir.core import Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32
from ir.location import Location
from ir.ops.gemm import MatmulOp
from ir.ops.moe import RouteOp, StandInsOp
from ir.types import TensorType


@dataclass(frozen=True)
class Router:
    """`hidden` [tokens, columns] times `weight` [experts, columns], stored in strips of `strip` rows."""

    hidden: Value
    weight: Value
    experts: int
    columns: int
    strip: int


@dataclass(frozen=True)
class RouterPlace:
    """A router with its places in the arena and in the weights file, both in bytes."""

    hidden: int
    weights: int
    experts: int
    columns: int
    strip: int


@dataclass(frozen=True)
class StandInPlace:
    """The piece of the stand-ins of a layer, and where the weights f32 [tokens, top_k] of the router's choice lie in
    the arena while the program waits for its experts."""

    piece: int
    weights: int


def route_of(bundle: ExpertBundle) -> RouteOp | None:
    """The choice among these experts."""
    maker = bundle.ids.defining_op()
    if isinstance(maker, StandInsOp):
        maker = maker.ids.defining_op()
    return maker if isinstance(maker, RouteOp) else None


def router_of(bundle: ExpertBundle) -> Router | None:
    """The router that chooses among these experts."""
    route = route_of(bundle)
    product = route.logits.defining_op() if route is not None else None
    if not isinstance(product, MatmulOp):
        return None
    hidden, weight = product.x.type, product.w.type
    if not isinstance(hidden, TensorType) or not isinstance(weight, TensorType):
        return None
    experts, columns = weight.shape
    layout = weight.layout
    if hidden.element != F32 or weight.element != F32 or not isinstance(experts, int) or not isinstance(columns, int):
        return None
    if layout is None:
        return Router(product.x, product.w, experts, columns, 1)
    plain = layout.pack == 1 and layout.interleave == 1
    return Router(product.x, product.w, experts, columns, layout.rows) if plain else None


class InArena(NamedTuple):
    """A value in the arena: the first and the last launch that touch it, and where it lies."""

    first: int
    last: int
    offset: int


class ExpertWait(NamedTuple):
    """A wait of a program, before the launch number `step`; of other weights than experts without a bundle."""

    step: int
    location: Location
    bundle: ExpertBundle | None


FindValue = Callable[[Value], InArena | None]


def router_places(
    waits: Sequence[ExpertWait], in_arena: FindValue, in_file: Callable[[Value], int | None]
) -> dict[int, RouterPlace]:
    """By the number of the wait: the routers whose input is still in the arena where their experts are waited for."""
    found: dict[int, RouterPlace] = {}
    for number, wait in enumerate(waits):
        router = router_of(wait.bundle) if wait.bundle is not None else None
        if router is None:
            continue
        hidden, stored = in_arena(router.hidden), in_file(router.weight)
        if hidden is not None and stored is not None and hidden.last >= wait.step:
            found[number] = RouterPlace(hidden.offset, stored, router.experts, router.columns, router.strip)
    return found


def stand_in_places(
    waits: Sequence[ExpertWait], in_arena: FindValue, pieces: Mapping[ExpertBundle, int]
) -> dict[int, StandInPlace]:
    """By the number of the wait for the experts of `pieces`, which have the piece of their stand-ins.

    Raises DiagnosticError where the router's weights are not in the arena then.
    """
    found: dict[int, StandInPlace] = {}
    for number, wait in enumerate(waits):
        if wait.bundle is None or wait.bundle not in pieces:
            continue
        route = route_of(wait.bundle)
        weights = in_arena(route.weights) if route is not None else None
        if weights is None or not weights.first < wait.step <= weights.last:
            message = "the weights of the router's choice are not there"
            raise DiagnosticError.of(Diagnostic("error", message, wait.location))
        found[number] = StandInPlace(pieces[wait.bundle], weights.offset)
    return found
