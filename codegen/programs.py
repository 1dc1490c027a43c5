"""What lowering a step gives: its programs as plan IR with what they launch, and the file that their weights are in.

`codegen.lower_to_plan.Lowering` makes them; compilation, the manifest and tests read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from codegen.kernels.call import EmitContext
from codegen.router_places import RouterPlace, StandInPlace
from codegen.weight_pieces import ExpertBundle, WeightPiece
from codegen.weights import StoredTensor
from ir.core import Value
from ir.ops import plan_await
from ir.ops.builtin import FuncOp


@dataclass(frozen=True)
class ProgramSpec:
    """One specialisation of the step: its name, the most tokens of a step, what emitters may ask."""

    name: str
    max_tokens: int
    context: EmitContext


@dataclass(frozen=True)
class Launch:
    """What one launch costs: bytes that do not depend on the tokens (weights), bytes and FLOPs of each token."""

    kernel: str
    origin: str
    fixed_bytes: int
    token_bytes: int
    token_flops: int


@dataclass
class Program:
    """A lowered program: plan IR, arena size, launches in order."""

    name: str
    max_tokens: int
    func: FuncOp
    arena_bytes: int
    launches: list[Launch]
    routers: dict[int, RouterPlace] = field(default_factory=dict)  # by the number of the wait for their experts
    stand_ins: dict[int, StandInPlace] = field(default_factory=dict)  # likewise

    def awaits(self) -> list[tuple[int, tuple[int, ...]]]:
        """(piece, pieces done) of the program's waits for weights, in order."""
        waits = [op.attributes for op in self.func.block.ops if isinstance(op, plan_await.AwaitOp)]
        return [(wait["piece"], wait["done"]) for wait in waits]

    def kv_awaits(self) -> list[int]:
        """Layers of the program's waits for keys and values, in order."""
        return [op.layer for op in self.func.block.ops if isinstance(op, plan_await.AwaitKVOp)]


@dataclass(frozen=True)
class WeightsFile:
    """Where the weights of a step lie, tensor by tensor and piece by piece."""

    roots: tuple[tuple[str, Value], ...]
    bundles: tuple[ExpertBundle, ...]
    tensors: tuple[StoredTensor, ...]
    nbytes: int
    pieces: tuple[WeightPiece, ...]
    piece_of: dict[str, int]

    @classmethod
    def empty(cls) -> WeightsFile:
        """A file without weights."""
        return cls((), (), (), 0, (), {})

    @property
    def stacks(self) -> tuple[tuple[Value, ...], ...]:
        """The bundled weights, as `codegen.weights` takes them."""
        return tuple(bundle.weights for bundle in self.bundles)
