"""Launches -> plan level: an arena for activations, waits for weights, barriers, every launch with its places.

What is the same for all targets. Activations live in an arena whose offsets are assigned once; a barrier is put between
two launches only where one touches memory the other writes. Before the first launch that reads a piece of the weights
file stands a wait for it, and it is named as done behind the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from codegen.kernels.call import SizeArgument, Temporary
from codegen.lowering import Lowering
from codegen.pending import Pending
from codegen.programs import Launch, Program, WeightsFile
from codegen.router_places import (
    ExpertWait,
    InArena,
    RouterPlace,
    StandInPlace,
    router_places,
    stand_in_places,
)
from codegen.weight_pieces import ExpertBundle
from codegen.weight_waits import Wait, weight_waits
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, U8, PlainFormat
from ir.ops import plan, plan_await
from ir.ops.builtin import FuncOp, ReturnOp
from ir.ops.kv_cache import KVStateOp
from ir.ops.moe import DispatchOp, JoinRowsOp, StandInsOp
from ir.ops.tensor import ReshapeOp
from ir.sizes import num_bytes
from ir.types import BufferType, KVCacheType, SymbolicDim, TensorType, Type
from passes.analysis.constants import is_constant_expression
from passes.schedule.arena import Lifetime, assign_arena

_TICKETS = ("tickets", 0, 1)  # the team has one count of them: kernels that take some need a barrier between


@dataclass
class Call:
    """A launch before buffers have places."""

    op: Op
    spec: Any  # what the emitter gave
    kernel: str
    buffers: list[Any]  # by argument


class ProgramBuilder(ABC):
    """Lowers the step function for one program, of `max_tokens` at most; what ops become is the target's."""

    def __init__(self, lowering: Lowering, name: str, max_tokens: int, file: WeightsFile) -> None:
        self.lowering, self.name, self.max_tokens, self.file = lowering, name, max_tokens, file
        self.tensors = {tensor.name: tensor for tensor in file.tensors}
        self.alias: dict[Value, Value] = {}
        self.calls: list[Call] = []
        self.sizes = {"tokens": max_tokens, "rows": max_tokens, "ctx": 1, "slots": 1}
        experts = {bundle.ids: bundle for bundle in file.bundles if not bundle.stand_in}
        self.partner = {experts[bundle.ids]: bundle for bundle in file.bundles if bundle.stand_in}

    def build(self) -> Program:
        for op in self.lowering.step.block.ops[:-1]:
            self._lower(op)
        self._write_logits_directly()
        self.waits = self._waits()
        arena, lifetimes = self._assign()
        func = self._emit(arena.offsets, lifetimes)
        launches = [self._launch(call) for call in self.calls]
        routers, stand_ins = self._places_at_waits(arena.offsets, lifetimes)
        nbytes = max(64, arena.total_bytes)
        return Program(self.name, self.max_tokens, func, nbytes, launches, routers, stand_ins)

    def root(self, value: Value) -> Value:
        """The value whose buffer `value` shares."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def _lower(self, op: Op) -> None:
        if isinstance(op, KVStateOp) or (op.results and is_constant_expression(op.results[0])):
            return
        if isinstance(op, ReshapeOp):
            self.alias[op.results[0]] = op.x
            return
        if isinstance(op, StandInsOp):
            self._only_reader(op, op.ids)  # the wait for the experts changes them where they lie
            self.alias[op.used] = op.ids
            return
        if isinstance(op, JoinRowsOp):
            self._join(op)
            return
        for result in op.results:
            if isinstance(result.type, KVCacheType):
                cache = next(v for v in op.operands if isinstance(v.type, KVCacheType))
                self.alias[result] = cache
        self._launch_op(op)

    @abstractmethod
    def _launch_op(self, op: Op) -> None:
        """Adds the launches of an op to `calls`. Raises DiagnosticError for one without a kernel."""

    def _join(self, op: JoinRowsOp) -> None:
        """The two products write different rows of one buffer."""
        self._only_reader(op, op.y)
        self._only_reader(op, op.others)
        made: dict[Value, int] = {result: step for step, call in enumerate(self.calls) for result in call.op.results}
        y = self.root(op.y)  # the buffer of rows that are joined already
        if y not in made or op.others not in made or made[y] > made[op.others]:
            message = "rows of experts, or of stand-ins, are not computed behind those that they are joined to"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))
        self.alias[op.others] = self.alias[op.joined] = op.y

    def _only_reader(self, op: Op, value: Value) -> None:
        if len(value.uses) != 1:
            message = f"'{op.name}' shares the place of a value with other readers"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))

    def _write_logits_directly(self) -> None:
        end = self.lowering.step.block.terminator
        assert isinstance(end, ReturnOp)
        self.logits = self.root(end.operands[0])

    def _in_arena(self, key: Any) -> bool:
        if isinstance(key, tuple):
            return True
        if isinstance(key, SizeArgument) or not isinstance(key.type, TensorType) or key is self.logits:
            return False
        return key.defining_op() is not None and key not in self.lowering.weights

    def _assign(self) -> tuple[Any, dict[Any, Lifetime]]:
        first: dict[Any, int] = {}
        last: dict[Any, int] = {}
        for step, call in enumerate(self.calls):
            for key in map(self._key, call.buffers):
                if self._in_arena(key):
                    first.setdefault(key, step)
                    last[key] = step
            for _, bundle, _ in self.waits[step]:
                if bundle is not None:
                    last[self._key(bundle.ids)] = max(step, last[self._key(bundle.ids)])
        lifetimes = {key: Lifetime(i, self._bytes(key), first[key], last[key]) for i, key in enumerate(first)}
        arena = assign_arena(list(lifetimes.values()))
        return arena, lifetimes

    def _key(self, buffer: Any) -> Any:
        return self.root(buffer) if isinstance(buffer, Value) else buffer

    def _type(self, key: Any) -> Type:
        if isinstance(key, tuple):
            argument = self.calls[key[0]].spec.arguments[key[1]]
            assert isinstance(argument, Temporary)
            return argument.type
        return key.type

    def _bytes(self, key: Any) -> int:
        return num_bytes(self._type(key), self.sizes)

    def _waits(self) -> list[list[Wait]]:
        """By launch. Stand-ins come with the experts they stand in for, and these before they are grouped: the wait may
        change which are used."""
        bundles = {self._piece(b): b for b in self.file.bundles}
        chosen = {b.ids: self._piece(b) for b in self.partner}
        whole = {self._piece(stand_ins): self._piece(b) for b, stand_ins in self.partner.items()}
        read = [
            [self.file.piece_of[name] for b in call.buffers if (name := self._weight(b)) is not None]
            for call in self.calls
        ]
        read = [[whole.get(piece, piece) for piece in found] for found in read]
        for found, call in zip(read, self.calls, strict=True):
            if isinstance(call.op, DispatchOp) and call.op.ids in chosen:
                found.append(chosen[call.op.ids])
        return weight_waits(read, self.file.pieces, bundles)

    def _places_at_waits(
        self, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]
    ) -> tuple[dict[int, RouterPlace], dict[int, StandInPlace]]:
        """By the number of the wait for their experts: routers; stand-ins with the weights of the router's choice."""

        def in_arena(value: Value) -> InArena | None:
            lifetime = lifetimes.get(self._key(value))
            return lifetime and InArena(lifetime.first, lifetime.last, offsets[lifetime.buffer])

        def in_file(value: Value) -> int | None:
            name = self._weight(value)
            return None if name is None else self.tensors[name].offset

        waits = [
            ExpertWait(step, self.calls[step].op.location, wait.bundle)
            for step, waits in enumerate(self.waits)
            for wait in waits
        ]
        pieces = {bundle: self._piece(stand_ins) for bundle, stand_ins in self.partner.items()}
        return router_places(waits, in_arena, in_file), stand_in_places(waits, in_arena, pieces)

    def _piece(self, bundle: ExpertBundle) -> int:
        """Its number in the weights file."""
        return self.file.piece_of[self.lowering.weights[bundle.weights[0]]]

    def _weight(self, buffer: Any) -> str | None:
        """The name of the weight behind a launch's buffer."""
        key = self._key(buffer)
        return self.lowering.weights.get(key) if isinstance(key, Value) else None

    def _kv_layer(self, call: Call) -> int | None:
        """The layer whose keys and values a launch touches."""
        for buffer in call.buffers:
            key = self._key(buffer)
            op = key.defining_op() if isinstance(key, Value) else None
            if isinstance(op, KVStateOp):
                return self.lowering.layers[op.symbol.name]
        return None

    # -- plan IR

    def _emit(self, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]) -> FuncOp:
        func = FuncOp.create(self.name, [])
        b = Builder.at_end(func.block)
        places: dict[Any, Value] = {}
        ends: dict[int, list[Any]] = {}
        for key, lifetime in lifetimes.items():
            ends.setdefault(lifetime.last, []).append(key)
        pending = Pending()
        number = kv_number = 0
        kv_layer: int | None = None
        for step, call in enumerate(self.calls):
            layer = self._kv_layer(call)
            if layer not in (None, kv_layer):
                b(plan_await.AwaitKVOp(number=kv_number, layer=layer, location=call.op.location))
                kv_number, kv_layer = kv_number + 1, layer
            for piece, bundle, done in self.waits[step]:
                if bundle is None:
                    b(plan_await.AwaitWeightsOp(number=number, piece=piece, done=done, location=call.op.location))
                else:
                    pairs = _pairs(bundle)
                    if pairs not in places:
                        places[pairs] = self._place(b, pairs, offsets, lifetimes)
                    ids, where = places[self._key(bundle.ids)], call.op.location
                    stand_ins = self._piece(self.partner[bundle]) if bundle in self.partner else -1
                    b(
                        plan_await.AwaitExpertsOp(
                            ids, places[pairs], number=number, piece=piece, done=done, stand_ins=stand_ins,
                            location=where,
                        )
                    )  # fmt: skip
                number += 1
            arguments, regions = [], []
            for buffer in call.buffers:
                key = self._key(buffer)
                if key not in places:
                    places[key] = self._place(b, key, offsets, lifetimes)
                arguments.append(places[key])
                lifetime = lifetimes.get(key)
                start = offsets[lifetime.buffer] if lifetime else 0
                regions.append(("arena", start, start + self._bytes(key)) if lifetime else (key, 0, 1))
            writes, reads = call.spec.writes, call.spec.reads
            written, read = [regions[i] for i in writes], [regions[i] for i in reads]
            if call.kernel in self.lowering.with_tickets:
                written.append(_TICKETS)
            if pending.conflicts(written, read):
                b(plan.BarrierOp())
                pending.clear()
            pending.add(written, read)
            attributes = {"kernel": SymbolRef(call.kernel), "writes": writes, "reads": reads, "grid": self._grid(call)}
            b(plan.LaunchOp(*arguments, **attributes, location=call.op.location))
            for key in ends.get(step, ()):
                b(plan.ReleaseOp(places[key]))
        b(plan.BarrierOp())
        b(ReturnOp())
        return func

    def _grid(self, call: Call) -> str:
        """Blocks of a launch; nothing on a CPU."""
        return ""

    def _place(self, b: Builder, key: Any, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]) -> Value:
        if isinstance(key, SizeArgument):
            dim = key.dim
            assert isinstance(dim, SymbolicDim)
            return b(plan.SizeOp(which=dim.name, scale=dim.scale), dim.name)
        buffer = BufferType(self._element(key))
        if key in lifetimes:
            lifetime = lifetimes[key]
            return b(plan.ReserveOp(offset=offsets[lifetime.buffer], bytes=lifetime.bytes, result_types=[buffer]))
        if key is self.logits:
            return b(plan.InputOp(which="logits", result_types=[BufferType(F32)]), "logits")
        if key in self.lowering.weights:
            name = self.lowering.weights[key]
            tensor = self.tensors[name]
            place = plan.WeightOp(
                symbol=SymbolRef(name), offset=tensor.offset, bytes=tensor.extent, result_types=[buffer]
            )
            return b(place)
        op = key.defining_op()
        if isinstance(op, KVStateOp):
            kv = self.lowering.kv
            assert kv is not None
            layer = self.lowering.layers[op.symbol.name]
            position, slot = kv.bytes_per_position, kv.bytes_per_slot
            return b(plan.KVOp(layer=layer, position_bytes=position, slot_bytes=slot, result_types=[buffer]))
        assert op is None, f"{op} has no place"
        which = list(plan.INPUTS)[key.index]
        return b(plan.InputOp(which=which, result_types=[buffer]), which)

    def _element(self, key: Any) -> PlainFormat:
        """The element of the buffer that holds a value: low-bit numbers lie in bytes."""
        type = self._type(key)
        assert isinstance(type, TensorType | KVCacheType)
        return type.element if isinstance(type.element, PlainFormat) else U8

    def _launch(self, call: Call) -> Launch:
        """Weights' bytes are fixed (those of experts used by one token), all else goes with the tokens."""
        op: Any = call.op
        one = {"tokens": 1, "rows": 1, "ctx": 1, "slots": 1}
        fixed = sum(op.operand_bytes(i, one) for i, v in enumerate(op.operands) if v in self.lowering.weights)
        return Launch(call.kernel, op.location.origin, fixed, op.bytes_moved(one) - fixed, op.flops(one))


def _pairs(bundle: ExpertBundle) -> SizeArgument:
    """How many experts a step chooses: tokens times top_k."""
    type = bundle.ids.type
    assert isinstance(type, TensorType)
    tokens, top_k = type.shape
    assert isinstance(tokens, SymbolicDim) and isinstance(top_k, int)
    return SizeArgument(SymbolicDim(tokens.name, tokens.scale * top_k))
