"""The block schedule over micro-batches: one copy of a layer's weights serves several batches (zig-zag order).

For token i, layer j, micro-batch k the plan starts, in this order (FlexGen, arXiv:2303.06865, algorithm 1):

    load_weight(i, j+1, k); load_cache(i, j, k+1); store_hidden(i, j, k-1); load_hidden(i, j, k+1);
    store_cache(i, j, k-1); compute(i, j, k); sync

FlexGen launches the computation before the last store; both run side by side there, and do here in this order, in which
a unit starts its transfers before it is busy. Indices run over: the batch after the last is the first of the next
layer, the layer after the last the first of the next token. `sync = "each"` ends every step by waiting for all that was
started, as FlexGen does; `"needed"` waits for what is needed next, so a long copy of weights runs on under several
batches. `weights = "first"` copies the next layer whole during its first batch, `"spread"` a part of it in every batch.
`choose_block` simulates these and takes the fastest.

Keys and values of a batch are copied to the unit before its attention and the new ones back after it; hidden states are
parked likewise where `hidden_over` names a link and there are two batches or more, else they stay in slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hw_targets.cost_model import Work
from hw_targets.plan_demands import Prices
from hw_targets.simulator import simulate
from hw_targets.target import Target
from hw_targets.timeline import Timeline
from ir.core import Value
from ir.ops.builtin import FuncOp
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter

WEIGHTS = ("spread", "first")
SYNC = ("needed", "each")


@dataclass(frozen=True)
class BlockLayer:
    """`work` of one micro-batch, `weights` for all of them, bytes of keys and values of one batch: read, and new."""

    name: str
    work: Work
    weights: tuple[Piece, ...] = ()
    cache_bytes: int = 0
    new_cache_bytes: int = 0


@dataclass(frozen=True)
class BlockProblem:
    """`tokens` steps of `batches` micro-batches through `layers` on one unit.

    `cache_home` and `cache_over` say where keys and values are and which link brings them; without a link they are read
    where they are. The same for hidden states of `hidden_bytes` a batch.
    """

    unit: str
    tier: str
    layers: tuple[BlockLayer, ...]
    batches: int
    tokens: int = 1
    cache_home: str = ""
    cache_over: str = ""
    hidden_bytes: int = 0
    hidden_home: str = ""
    hidden_over: str = ""


@dataclass(frozen=True)
class BlockChoice:
    """The fastest way with its plan; `tried` is ((weights, sync, seconds), ...)."""

    weights: str
    sync: str
    program: FuncOp
    timeline: Timeline
    tried: tuple[tuple[str, str, float], ...]


def emit_block(problem: BlockProblem, *, weights: str = "spread", sync: str = "needed", name: str = "step") -> FuncOp:
    """The plan of a block schedule. Raises ValueError for ways that do not exist and problems without batches."""
    if weights not in WEIGHTS or sync not in SYNC:
        raise ValueError(f"expected weights of {WEIGHTS} and sync of {SYNC}, got {weights!r} and {sync!r}")
    if problem.batches < 1 or problem.tokens < 1 or not problem.layers:
        raise ValueError("a block has one batch, one token and one layer or more")
    return _Emitter(problem, weights, sync, StreamWriter(name)).run()


def choose_block(problem: BlockProblem, target: Target, prices: Prices | None = None) -> BlockChoice:
    """The fastest of the ways by simulation; of equal ones the first tried: spread before first, needed before each."""
    tried: list[tuple[str, str, float]] = []
    best: BlockChoice | None = None
    for weights in WEIGHTS:
        for sync in SYNC:
            program = emit_block(problem, weights=weights, sync=sync)
            timeline = simulate(program, target, prices)
            tried.append((weights, sync, timeline.seconds))
            if best is None or timeline.seconds < best.timeline.seconds:
                best = BlockChoice(weights, sync, program, timeline, ())
    assert best is not None
    return replace(best, tried=tuple(tried))


At = tuple[int, int, int]  # token, layer, batch


@dataclass
class _Held:
    """Slots of something and the tokens of what brings it."""

    slots: list[Value] = field(default_factory=list)
    tokens: list[Value] = field(default_factory=list)


class _Emitter:
    def __init__(self, problem: BlockProblem, weights: str, sync: str, writer: StreamWriter) -> None:
        self.problem, self.weights_way, self.sync_each = problem, weights, sync == "each"
        self.writer = writer
        self.parked = bool(problem.hidden_bytes and problem.hidden_over and problem.batches > 1)
        self.weights: dict[tuple[int, int], _Held] = {}
        self.caches: dict[At, _Held] = {}
        self.hidden: dict[At, _Held] = {}
        self.stores: dict[str, Value] = {}  # piece -> its last store
        self.leaving: list[tuple[Value, Value]] = []  # (slot, store) of what is on its way home
        self.new_cache: dict[At, Value] = {}
        self.started: list[Value] = []

    def run(self) -> FuncOp:
        p, writer = self.problem, self.writer
        for layer in p.layers:
            for piece in layer.weights:
                for part in self.parts(piece):
                    writer.segment(part)
        stay = [] if self.parked or not p.hidden_bytes else [
            writer.slot(p.unit, p.tier, p.hidden_bytes, f"hidden.{k}") for k in range(p.batches)
        ]  # fmt: skip
        for k in range(p.batches):
            self.load_weight((0, 0), k)
        self.load_cache((0, 0, 0))
        self.load_hidden((0, 0, 0))
        self.sync()
        for i in range(p.tokens):
            for j in range(len(p.layers)):
                for k in range(p.batches):
                    self.step((i, j, k), stay)
        last = (p.tokens - 1, len(p.layers) - 1, p.batches - 1)
        self.store_hidden(last)
        self.store_cache(last)
        self.let_go()
        writer.evict(p.unit, *stay)
        return writer.finish()

    def step(self, at: At, stay: list[Value]) -> None:
        i, j, k = at
        following = self.after_layer(i, j)
        if following is not None:
            self.load_weight(following, k)
        self.load_cache(self.moved(at, 1))
        self.store_hidden(self.moved(at, -1))
        self.load_hidden(self.moved(at, 1))
        self.store_cache(self.moved(at, -1))
        self.compute(at, stay)
        self.sync()

    # -- indices -----------------------------------------------------------------------------------------------------

    def after_layer(self, i: int, j: int) -> tuple[int, int] | None:
        if j + 1 < len(self.problem.layers):
            return i, j + 1
        return (i + 1, 0) if i + 1 < self.problem.tokens else None

    def moved(self, at: At, by: int) -> At | None:
        """The step after or before this one; None beyond the ends."""
        i, j, k = at
        layers, batches = len(self.problem.layers), self.problem.batches
        number = (i * layers + j) * batches + k + by
        if not 0 <= number < self.problem.tokens * layers * batches:
            return None
        return number // batches // layers, number // batches % layers, number % batches

    # -- what is copied ----------------------------------------------------------------------------------------------

    def parts(self, piece: Piece) -> list[Piece]:
        """A piece of weights as it is copied: whole, or a part for each batch."""
        if not piece.over:
            return [piece]
        piece = replace(piece, stream=piece.stream or "weights")
        count = self.problem.batches if self.weights_way == "spread" else 1
        if count == 1:
            return [piece]
        bounds = [piece.nbytes * n // count for n in range(count + 1)]
        return [replace(piece, name=f"{piece.name}.{n}", nbytes=bounds[n + 1] - bounds[n]) for n in range(count)]

    def fetch(self, piece: Piece, held: _Held) -> None:
        slot = self.writer.slot(self.problem.unit, self.problem.tier, piece.nbytes, piece.name)
        token = self.writer.fetch(self.problem.unit, piece, slot)
        held.slots.append(slot)
        held.tokens.append(token)
        self.started.append(token)

    def load_weight(self, layer: tuple[int, int], k: int) -> None:
        """The part of a layer's weights that is copied during batch k of the layer before."""
        held = self.weights.setdefault(layer, _Held())
        for piece in self.problem.layers[layer[1]].weights:
            parts = self.parts(piece)
            if piece.over and k < len(parts):
                self.fetch(parts[k], held)

    def cache_piece(self, at: At, new: bool = False) -> Piece:
        p, layer = self.problem, self.problem.layers[at[1]]
        name, nbytes = f"{layer.name}.kv.{at[2]}", layer.new_cache_bytes if new else layer.cache_bytes
        return Piece(f"{name}.new" if new else name, nbytes, p.cache_home, p.cache_over, "cache")

    def load_cache(self, at: At | None) -> None:
        if at is None or not self.problem.cache_over or not self.problem.layers[at[1]].cache_bytes:
            return
        self.arrived_home(self.cache_piece(at, new=True).name)  # what the token before has added
        self.fetch(self.cache_piece(at), self.caches.setdefault(at, _Held()))

    def store_cache(self, at: At | None) -> None:
        slot = self.new_cache.pop(at, None) if at is not None else None
        if at is not None and slot is not None:
            self.store(slot, self.cache_piece(at, new=True))

    def hidden_piece(self, k: int) -> Piece:
        p = self.problem
        return Piece(f"hidden.{k}", p.hidden_bytes, p.hidden_home, p.hidden_over, "hidden")

    def load_hidden(self, at: At | None) -> None:
        if at is None or not self.parked:
            return
        piece = self.hidden_piece(at[2])
        self.arrived_home(piece.name)
        self.fetch(piece, self.hidden.setdefault(at, _Held()))

    def store_hidden(self, at: At | None) -> None:
        held = self.hidden.pop(at, None) if at is not None else None
        if at is not None and held is not None:
            for slot in held.slots:
                self.store(slot, self.hidden_piece(at[2]))

    def store(self, slot: Value, piece: Piece) -> None:
        token = self.writer.store(self.problem.unit, slot, piece)
        self.stores[piece.name] = token
        self.leaving.append((slot, token))
        self.started.append(token)

    def arrived_home(self, name: str) -> None:
        """Waits for the last store of a piece before it is read again."""
        token = self.stores.pop(name, None)
        if token is not None and any(token is started for started in self.started):
            self.wait([token])

    # -- the unit ----------------------------------------------------------------------------------------------------

    def compute(self, at: At, stay: list[Value]) -> None:
        p, writer, (i, j, k) = self.problem, self.writer, at
        layer, weights = p.layers[j], self.weights[i, j]
        cache, hidden = self.caches.pop(at, _Held()), self.hidden.get(at, _Held())
        self.wait([*weights.tokens, *cache.tokens, *hidden.tokens])
        reads = [*weights.slots, *(writer.segment(x) for x in layer.weights if not x.over), *cache.slots]
        if layer.cache_bytes and not p.cache_over and p.cache_home:
            reads.append(writer.segment(self.cache_piece(at)))
        writes = [*hidden.slots, *(stay[k : k + 1])]
        if layer.new_cache_bytes and p.cache_over:
            self.new_cache[at] = writer.slot(p.unit, p.tier, layer.new_cache_bytes, f"{layer.name}.kv.new")
            writes.append(self.new_cache[at])
        writer.compute(p.unit, layer.name, layer.work, reads, writes)
        writer.evict(p.unit, *cache.slots)
        if k == p.batches - 1:
            writer.evict(p.unit, *self.weights.pop((i, j)).slots)
        if not self.sync_each:
            self.let_go(keep=2)  # stores of the steps before run on

    def wait(self, tokens: Sequence[Value]) -> None:
        """Waits for those of the tokens that nothing has waited for yet."""
        pending = [t for t in tokens if any(t is started for started in self.started)]
        self.writer.wait(self.problem.unit, *pending)
        self.started = [s for s in self.started if not any(s is t for t in pending)]

    def sync(self) -> None:
        """The end of a step."""
        if self.sync_each:
            self.wait(list(self.started))
            self.let_go()

    def let_go(self, keep: int = 0) -> None:
        """Frees the slots whose data are home, all but the youngest."""
        going = self.leaving[: max(0, len(self.leaving) - keep)]
        self.leaving = self.leaving[len(going) :]
        for slot, token in going:
            self.wait([token])
            self.writer.evict(self.problem.unit, slot)
