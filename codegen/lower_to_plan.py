"""Graph level -> plan level and tile level: every op becomes a launch of a kernel, every value a buffer.

`Lowering` turns one step function into programs (`decode`, `prefill`): the same graph with different row limits and
kernel shapes. Activations live in an arena whose offsets are assigned once; weights are the roots of constant
expressions; a barrier is put between two launches only where one touches memory the other writes. Before the first
launch that reads a piece of the weights file stands a wait for it, and it is named as done behind the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import codegen.kernels.fused
import codegen.kernels.moe  # noqa: F401 - both register emitters
from codegen.kernels.call import EMITTERS, KernelSpec, SizeArgument, Temporary
from codegen.kernels.kv_layout import MAX_STEP_TOKENS, KVLayout
from codegen.pending import Pending
from codegen.programs import Launch, Program, ProgramSpec, WeightsFile
from codegen.router_places import RouterPlace, StandInPlace, route_of, router_of
from codegen.weight_pieces import ExpertBundle, expert_bundles, in_file_order, plan_pieces
from codegen.weights import plan_weights
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
from ir.ops.tile_control import TicketOp
from ir.sizes import num_bytes
from ir.spelling import did_you_mean
from ir.types import BufferType, KVCacheType, SymbolicDim, TensorType, Type
from passes.analysis.constants import is_constant_expression
from passes.schedule.arena import Lifetime, assign_arena

_TICKETS = ("tickets", 0, 1)  # the team has one count of them: kernels that take some need a barrier between


@dataclass
class _Call:
    """A launch before buffers have places."""

    op: Op
    spec: KernelSpec
    kernel: str
    buffers: list[Any]  # per argument: a key of `_Places`


@dataclass
class Lowering:
    """Shared between the programs of one model: kernels by what they compute, weights in the order they are read."""

    step: FuncOp
    kernels: dict[Any, FuncOp] = field(default_factory=dict)
    weights: dict[Value, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    with_tickets: dict[str, None] = field(default_factory=dict)  # kernels that take tickets
    kv: Any = None  # KVLayout, or what `kv_layout` of a subclass gives
    bundles: tuple[ExpertBundle, ...] = ()

    def __post_init__(self) -> None:
        """Finds weights and layers once, in the order of the step."""
        for op in self.step.block.ops:
            if isinstance(op, KVStateOp):
                self.layers.setdefault(op.symbol.name, len(self.layers))
                assert isinstance(op.cache.type, KVCacheType)
                layout = self.kv_layout(op.cache.type, op)
                if self.kv not in (None, layout):
                    raise DiagnosticError.of(
                        Diagnostic("error", "layers with different KV shapes are not supported", op.location)
                    )
                self.kv = layout
            if op.results and is_constant_expression(op.results[0]):
                continue
            for value in op.operands:
                if value not in self.weights and is_constant_expression(value):
                    self.weights[value] = self._unique(_weight_name(value, op))
        self.bundles = expert_bundles(self.step, self.weights)

    def kv_layout(self, cache: KVCacheType, op: Op) -> Any:
        """Where the keys and values of a layer lie."""
        return KVLayout.of(cache)

    def weights_file(self) -> WeightsFile:
        """Plans the file. Raises DiagnosticError for weights that cannot be stored."""
        roots = in_file_order([(name, value) for value, name in self.weights.items()], self.bundles)
        tensors, nbytes = plan_weights(roots, [bundle.weights for bundle in self.bundles])
        pieces, piece_of = plan_pieces(roots, tensors, self.bundles)
        return WeightsFile(roots, self.bundles, tuple(tensors), nbytes, pieces, piece_of)

    def _unique(self, name: str) -> str:
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"

    def kernel(self, spec: KernelSpec) -> FuncOp:
        """The kernel of a spec, built when it is new."""
        func = self.kernels.get(spec.key)
        if func is None:
            func = self.kernels[spec.key] = spec.build(self._unique(spec.stem))
            if any(isinstance(op, TicketOp) for op in func.walk()):
                self.with_tickets[func.sym_name] = None
        return func

    def program(self, spec: ProgramSpec, file: WeightsFile) -> Program:
        """Lowers the step. `file` is what `weights_file` gave."""
        ring = self.kv is not None and bool(self.kv.recent)
        assert not ring or spec.max_tokens <= MAX_STEP_TOKENS, "the ring is too short"
        strides = {value: bundle.stride for bundle in file.bundles for value in bundle.weights}
        return ProgramBuilder(self, replace(spec, context=replace(spec.context, strides=strides)), file).build()


def _weight_name(value: Value, user: Op) -> str:
    op = value.defining_op()
    assert op is not None
    return op.location.origin or user.location.origin or "weight"


class ProgramBuilder:
    """Lowers the step function for one program. `codegen.nvptx.lower_to_grid` overrides what differs on a GPU."""

    def __init__(self, lowering: Lowering, spec: ProgramSpec, file: WeightsFile) -> None:
        self.lowering, self.spec, self.file = lowering, spec, file
        self.tensors = {tensor.name: tensor for tensor in file.tensors}
        self.alias: dict[Value, Value] = {}
        self.calls: list[_Call] = []
        self.sizes = {"tokens": spec.max_tokens, "rows": spec.max_tokens, "ctx": 1, "slots": 1}
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
        routers, stand_ins = self._routers(arena.offsets, lifetimes), self._stand_ins(arena.offsets, lifetimes)
        nbytes = max(64, arena.total_bytes)
        return Program(self.spec.name, self.spec.max_tokens, func, nbytes, launches, routers, stand_ins)

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

    def _launch_op(self, op: Op) -> None:
        """Adds the launches of an op."""
        emit = EMITTERS.get(type(op))
        if emit is None:
            names = sorted(c.name for c in EMITTERS)
            hint = "attention is lowered after fuse-attention, rope and the cache after fuse-rope-append"
            message = f"no kernel for '{op.name}'{did_you_mean(op.name, names)}; {hint}"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))
        spec = emit(op, self.spec.context)
        kernel = self.lowering.kernel(spec)
        buffers = [(len(self.calls), i) if isinstance(a, Temporary) else a for i, a in enumerate(spec.arguments)]
        self.calls.append(_Call(op, spec, kernel.sym_name, buffers))

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

    def _waits(self) -> list[list[tuple[int, ExpertBundle | None, tuple[int, ...]]]]:
        """By launch: the pieces it is the first to read, with the experts' bundle, and pieces read for the last time
        before. Rows are not waited for: who runs the step knows its ids. Stand-ins come with the experts they stand in
        for, and these before they are grouped: the wait may change which are used.
        """
        pieces = self.file.pieces
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
        last = {piece: step for step, found in enumerate(read) for piece in found}
        waits: list[list[tuple[int, ExpertBundle | None, tuple[int, ...]]]] = []
        ready: dict[int, None] = {}
        for step, found in enumerate(read):
            new = [p for p in dict.fromkeys(found) if p not in ready and pieces[p].kind != "rows"]
            done = tuple(p for p in ready if last[p] < step) if new else ()
            for piece in done:
                del ready[piece]
            ready.update(dict.fromkeys(new))
            waits.append([(p, bundles.get(p), done if p == new[0] else ()) for p in new])
        return waits

    def _routers(self, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]) -> dict[int, RouterPlace]:
        """The routers whose input is still in the arena where the program waits for their experts."""
        found: dict[int, RouterPlace] = {}
        waits = [(step, bundle) for step, waits in enumerate(self.waits) for _, bundle, _ in waits]
        for number, (step, bundle) in enumerate(waits):
            router = router_of(bundle) if bundle is not None else None
            lifetime = lifetimes.get(self._key(router.hidden)) if router is not None else None
            name = self._weight(router.weight) if router is not None else None
            if router is None or name is None or lifetime is None or lifetime.last < step:
                continue
            at, stored = offsets[lifetime.buffer], self.tensors[name].offset
            found[number] = RouterPlace(at, stored, router.experts, router.columns, router.strip)
        return found

    def _stand_ins(self, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]) -> dict[int, StandInPlace]:
        """By the number of the wait for their experts: the piece of the stand-ins, and the router's weights."""
        found: dict[int, StandInPlace] = {}
        waits = [(step, bundle) for step, waits in enumerate(self.waits) for _, bundle, _ in waits]
        for number, (step, bundle) in enumerate(waits):
            if bundle is None or bundle not in self.partner:
                continue
            route = route_of(bundle)
            lifetime = lifetimes.get(self._key(route.weights)) if route is not None else None
            if lifetime is None or not lifetime.first < step <= lifetime.last:
                raise DiagnosticError.of(
                    Diagnostic(
                        "error", "the weights of the router's choice are not there", self.calls[step].op.location
                    )
                )
            found[number] = StandInPlace(self._piece(self.partner[bundle]), offsets[lifetime.buffer])
        return found

    def _piece(self, bundle: ExpertBundle) -> int:
        """Its number in the weights file."""
        return self.file.piece_of[self.lowering.weights[bundle.weights[0]]]

    def _weight(self, buffer: Any) -> str | None:
        """The name of the weight behind a launch's buffer."""
        key = self._key(buffer)
        return self.lowering.weights.get(key) if isinstance(key, Value) else None

    def _kv_layer(self, call: _Call) -> int | None:
        """The layer whose keys and values a launch touches."""
        for buffer in call.buffers:
            key = self._key(buffer)
            op = key.defining_op() if isinstance(key, Value) else None
            if isinstance(op, KVStateOp):
                return self.lowering.layers[op.symbol.name]
        return None

    # -- plan IR

    def _emit(self, offsets: dict[Any, int], lifetimes: dict[Any, Lifetime]) -> FuncOp:
        func = FuncOp.create(self.spec.name, [])
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

    def _grid(self, call: _Call) -> str:
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

    def _launch(self, call: _Call) -> Launch:
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
