"""Random valid graph modules: ops drawn one after another, each reading values that exist and fit it.

Unlike `step_modules` these look like no model: values are used many times or never, shapes and elements change on the
way, fusable patterns stand beside near misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from hypothesis import strategies as st

from ir.attributes import Rope, SymbolRef
from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.formats import BF16, F16, F32, I32, PlainFormat
from ir.kv_state import KVState
from ir.ops import attention, cascades, moe, tensor
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp, KVStateOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from tests.strategies.batches import Batch, batches
from tests.strategies.generated import GeneratedModule

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")
VOCAB = 11
WIDTHS = (4, 8, 12, 16)
FLOATS = (F32, BF16, F16)
_TOO_LARGE = 50.0  # products of values beyond this would leave f16, or drown every difference


class _Graph:
    """A function that grows. `sizes` estimates the largest magnitude of each value."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.weights: dict[str, np.ndarray] = {}
        self.caches: dict[str, KVCacheType] = {}
        self.sizes: dict[Value, float] = {}
        rows = TensorType((TOKENS,), I32)
        names = ("ids", "positions", "slots", "rows", "x")
        width = self.pick(WIDTHS)
        types = [rows, rows, rows, TensorType((ROWS,), I32), TensorType((TOKENS, width), F32)]
        self.func = FuncOp.create("main", types, names)
        self.ids, self.positions, self.slots, self.rows, self.x = self.func.arguments
        self.b = Builder.at_end(self.func.block)
        self.values: list[Value] = []
        self.keep(self.x, 3.0)

    def pick(self, choices: Sequence):
        return self.draw(st.sampled_from(list(choices)))

    def keep(self, value: Value, size: float) -> Value:
        """Offers `value` to later ops."""
        self.sizes[value] = size
        self.values.append(value)
        return value

    def add(self, op: Op, size: float, name: str = "") -> Value:
        return self.keep(self.b(op, name), size)

    def matching(self, fits: Callable[[TensorType], bool]) -> list[Value]:
        return [v for v in self.values if isinstance(v.type, TensorType) and fits(v.type)]

    def matrix(self, element: PlainFormat | None = None) -> Value | None:
        """A value [tokens, n]."""
        found = self.matching(
            lambda t: t.rank == 2 and t.shape[0] == TOKENS and (element is None or t.element == element)
        )
        return self.pick(found) if found else None

    def constant(
        self, name: str, shape: tuple[int, ...], element: PlainFormat, scale: float, offset: float = 0
    ) -> Value:
        self.weights[name] = (self.rng.standard_normal(shape) * scale + offset).astype(element.dtype)
        return self.b(ConstantOp(symbol=SymbolRef(name), result_types=[TensorType(shape, element)]), "w")

    def weight(self, n: int, k: int) -> Value:
        """A matrix [n, k], in f32 or another element, sometimes cast, sometimes one that was used before."""
        old = [v for v in self.matching(lambda t: t.shape == (n, k) and t.static) if self.draw(st.booleans())]
        if old:
            return old[0]
        made = self.constant(f"w{len(self.weights)}.weight", (n, k), self.pick(FLOATS), k**-0.5)
        if made.type.element != F32 and self.draw(st.booleans()):
            made = self.b(tensor.CastOp(made, to=F32), "w")
        return self.keep(made, 1.0)

    def vector(self, n: int, element: PlainFormat = F32, offset: float = 0.0) -> Value:
        return self.keep(self.constant(f"v{len(self.weights)}", (n,), element, 0.3, offset), 1.5)

    # -- steps: each adds one op or a small pattern, or nothing when no value fits -----------------------------------

    def unary(self) -> None:
        x = self.pick(self.values)
        size = self.sizes[x]
        match self.draw(st.integers(0, 3)):
            case 0:
                self.add(tensor.SiluOp(x), size)
            case 1:
                limit = self.pick([0.5, 2.0])
                self.add(tensor.ClipOp(x, low=-limit, high=limit), min(size, limit))
            case 2:
                self.add(tensor.CastOp(x, to=self.pick(FLOATS)), size)
            case 3 if isinstance(x.type.shape[-1], int) and x.type.shape[-1] % 2 == 0:
                self.add(tensor.SwigluOp(x), size * size if size < _TOO_LARGE else size)

    def binary(self) -> None:
        a = self.pick(self.values)
        same = self.matching(lambda t: t == a.type)
        width = a.type.shape[-1]
        if isinstance(width, int) and self.draw(st.booleans()):
            b = self.vector(width, a.type.element)
        else:
            b = self.pick(same)
        left, right = (a, b) if self.draw(st.booleans()) else (b, a)
        product = self.sizes[a] * self.sizes[b]
        if product < _TOO_LARGE and self.draw(st.booleans()):
            self.add(tensor.MulOp(left, right), product)
        elif self.sizes[a] + self.sizes[b] < _TOO_LARGE:
            self.add(tensor.AddOp(left, right), self.sizes[a] + self.sizes[b])

    def norm(self) -> None:
        x = self.pick(self.values)
        n = x.type.shape[-1]
        if isinstance(n, int):
            self.add(RmsNormOp(x, self.vector(n, self.pick(FLOATS), 1.0), eps=self.pick([1e-5, 1e-6])), 4.0, "n")

    def matmul(self) -> None:
        x = self.matrix()
        if x is None:
            return
        y = self.add(MatmulOp(x, self.weight(self.pick(WIDTHS), x.type.shape[1])), 2 * self.sizes[x], "y")
        if self.draw(st.booleans()):
            self.add(tensor.AddOp(y, self.vector(y.type.shape[1])), self.sizes[y] + 1)

    def shared_matmuls(self) -> None:
        """Two or three products of one activation: what the horizontal fusions look for."""
        x = self.matrix(F32)
        if x is None:
            return
        n = self.pick(WIDTHS)
        k = x.type.shape[1]
        count = self.draw(st.integers(2, 3))
        ys = [self.add(MatmulOp(x, self.weight(n, k)), 2 * self.sizes[x], "g") for _ in range(count)]
        if self.draw(st.booleans()) and self.sizes[ys[0]] ** 2 < _TOO_LARGE:
            self.add(tensor.MulOp(self.b(tensor.SiluOp(ys[0])), ys[1]), self.sizes[ys[0]] ** 2, "h")

    def movement(self) -> None:
        x = self.pick(self.values)
        shape, size = x.type.shape, self.sizes[x]
        axis = self.draw(st.integers(0, len(shape) - 1))
        extent = shape[axis]
        match self.draw(st.integers(0, 3)):
            case 0 if isinstance(extent, int) and extent > 1:
                start = self.draw(st.integers(0, extent - 1))
                count = self.draw(st.integers(1, extent - start))
                self.add(tensor.SliceOp(x, axis=axis, start=start, size=count), size)
            case 1 if isinstance(extent, int) and extent <= 32:
                others = self.matching(
                    lambda t: (
                        t.element == x.type.element
                        and t.rank == len(shape)
                        and t.shape[:axis] + t.shape[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
                        and isinstance(t.shape[axis], int)
                    )
                )
                if self.draw(st.booleans()):
                    self.slices_of(x, axis, extent)
                else:
                    other = self.pick(others)
                    self.add(tensor.ConcatOp(x, other, axis=axis), max(size, self.sizes[other]))
            case 2 if isinstance(shape[-1], int) and shape[-1] % 2 == 0:
                self.add(tensor.ReshapeOp(x, shape=(*shape[:-1], 2, shape[-1] // 2)), size)
            case 3 if len(shape) == 3 and isinstance(shape[1], int) and isinstance(shape[2], int):
                self.add(tensor.ReshapeOp(x, shape=(shape[0], shape[1] * shape[2])), size)

    def slices_of(self, x: Value, axis: int, extent: int) -> None:
        """The whole of x, in pieces, put together again: what canonicalize should see through."""
        cut = self.draw(st.integers(1, extent - 1)) if extent > 1 else 0
        if not cut:
            return
        pieces = [
            self.b(tensor.SliceOp(x, axis=axis, start=0, size=cut)),
            self.b(tensor.SliceOp(x, axis=axis, start=cut, size=extent - cut)),
        ]
        self.add(tensor.ConcatOp(*pieces, axis=axis), self.sizes[x])

    def gather(self) -> None:
        x = self.matrix()
        if x is not None:
            self.add(tensor.GatherRowsOp(x, self.rows), self.sizes[x])

    def embed(self) -> None:
        element = self.pick(FLOATS)
        table = self.constant(f"t{len(self.weights)}", (VOCAB, self.pick(WIDTHS)), element, 1.0)
        y = self.add(tensor.EmbedOp(self.ids, table), 3.0, "e")
        if element != F32:
            self.add(tensor.CastOp(y, to=F32), 3.0)

    def duplicate(self) -> None:
        """An op a second time, for cse."""
        old = [op for op in self.func.block.ops if op.name.startswith("tensor.") and op.operands and not op.regions]
        if not old:
            return
        op = self.pick(old)
        kept = self.sizes.get(op.results[0])
        if kept is not None:
            self.add(type(op)(*op.operands, **op.attributes), kept)

    def attention(self) -> None:
        x = self.matrix(F32)
        if x is None:
            return
        kv_heads, group, d = self.pick([1, 2]), self.pick([1, 2]), self.pick([2, 4])
        heads = kv_heads * group
        hidden = x.type.shape[1]
        symbol = f"layers.{len(self.caches)}"
        cos, sin = self.b(attention.RopeTableOp(self.positions, rope=self.pick(_ropes(d))))
        parts = []
        for count, name in ((heads, "q"), (kv_heads, "k"), (kv_heads, "v")):
            y = self.b(MatmulOp(x, self.weight(count * d, hidden)), name)
            y = self.b(tensor.ReshapeOp(y, shape=(TOKENS, count, d)), name)
            if name != "v" and self.draw(st.booleans()):
                y = self.b(RmsNormOp(y, self.vector(d, offset=1.0), eps=1e-6), name)
            parts.append(self.b(attention.RopeOp(y, cos, sin), name) if name != "v" else y)
        type = KVCacheType(kv_heads, d, self.pick(FLOATS))
        cache = self.b(KVStateOp(symbol=SymbolRef(symbol), result_types=[type]), "cache")
        self.caches[symbol] = type
        cache = self.b(KVAppendOp(cache, parts[1], parts[2], self.positions, self.slots), "cache")
        window = self.pick([0, 0, 2])
        rows = (self.positions, self.slots)
        build = self.pick([None, None, None, *_CASCADES])
        if build is None:
            s = self.b(attention.ScoresOp(parts[0], cache, *rows, scale=d**-0.5, window=window), "s")
            o = self.b(attention.CombineOp(self.b(attention.SoftmaxOp(s), "p"), cache, self.slots), "o")
        else:
            op = attention.AttentionOp(parts[0], cache, *rows, regions=[build(d)], scale=d**-0.5, window=window)
            o = self.b(op, "o")
        self.add(tensor.ReshapeOp(o, shape=(TOKENS, heads * d)), 2 * self.sizes[x])

    def experts(self) -> None:
        x = self.matrix(F32)
        if x is None:
            return
        hidden, experts = x.type.shape[1], self.pick([1, 2, 4])
        top_k, ffn = self.draw(st.integers(1, experts)), self.pick([4, 6])
        logits = self.b(MatmulOp(x, self.weight(experts, hidden)), "logits")
        ids, share = self.b(moe.RouteOp(logits, top_k=top_k, normalize=self.draw(st.booleans())))
        order, offsets = self.b(moe.DispatchOp(ids, num_experts=experts))
        gate = self.stack(experts, ffn, hidden)
        g = self.b(moe.GroupedGemmOp(x, gate, order, offsets, gather=top_k), "g")
        if self.sizes[x] < 7:
            up = self.stack(experts, ffn, hidden)
            u = self.b(moe.GroupedGemmOp(x, up, order, offsets, gather=top_k), "u")
            g = self.b(tensor.MulOp(self.b(tensor.SiluOp(g)), u), "h")
        y = self.b(moe.GroupedGemmOp(g, self.stack(experts, hidden, ffn), order, offsets, gather=0), "y")
        self.add(moe.CombineOp(y, share, order), _TOO_LARGE, "z")

    def stack(self, experts: int, n: int, k: int) -> Value:
        element = self.pick(FLOATS)
        name = f"e{len(self.weights)}.*.weight"
        type = TensorType((experts, n, k), element)
        for i in range(experts):
            data = self.rng.standard_normal((n, k)) * k**-0.5
            self.weights[name.replace("*", str(i))] = data.astype(element.dtype)
        made = self.b(ConstantStackOp(symbol=SymbolRef(name), count=experts, result_types=[type]), "w")
        return made if element == F32 else self.b(tensor.CastOp(made, to=F32), "w")

    def fused(self) -> None:
        """A fused region of one to three elementwise ops on one or two operands."""
        x = self.pick(self.values)
        y = self.pick(self.matching(lambda t: t == x.type))
        block = Block([x.type, y.type], ["a", "b"])
        b = Builder.at_end(block)
        inner: list[Value] = list(block.arguments)
        size = self.sizes[x] + self.sizes[y]
        for _ in range(self.draw(st.integers(1, 3))):
            left, right = self.pick(inner), self.pick(inner)
            size *= 2
            inner.append(b(tensor.AddOp(left, right) if self.draw(st.booleans()) else tensor.SiluOp(left)))
        if size > _TOO_LARGE:
            return
        given = inner[-2:] if self.draw(st.booleans()) else inner[-1:]
        b(YieldOp(*given))
        made = self.b(FusedOp(x, y, regions=[Region(block)], kind="elementwise"))
        for value in made if isinstance(made, tuple) else (made,):
            self.keep(value, size)

    def finish(self) -> ModuleOp:
        count = self.draw(st.integers(1, min(3, len(self.values))))
        returned = [self.values[-1], *(self.pick(self.values) for _ in range(count - 1))]
        self.b(ReturnOp(*returned))
        return ModuleOp.create(self.func)


def _ropes(dim: int) -> list[Rope]:
    return [
        Rope(dim),
        Rope(dim, theta=500.0, scaling="linear", factor=2.0),
        Rope(dim, scaling="llama3", factor=8.0, original_context=64),
        Rope(dim, scaling="yarn", factor=4.0, original_context=32, attention_factor=1.14),
    ]


_CASCADES = (cascades.build_softmax_cascade, cascades.build_deferred_division, cascades.build_online_softmax)
_STEPS: dict[str, tuple[Callable[[_Graph], None], ...]] = {
    "elementwise": (_Graph.unary, _Graph.binary),
    "norm": (_Graph.norm,),
    "matmul": (_Graph.matmul, _Graph.shared_matmuls),
    "movement": (_Graph.movement, _Graph.gather),
    "embed": (_Graph.embed,),
    "duplicate": (_Graph.duplicate,),
    "attention": (_Graph.attention,),
    "experts": (_Graph.experts,),
    "fused": (_Graph.fused,),
}
FEATURES = tuple(_STEPS)


@st.composite
def graph_modules(
    draw: st.DrawFn, *, features: Iterable[str] = FEATURES, max_steps: int = 8, max_tokens: int = 5
) -> GeneratedModule:
    """A function `@main(ids, positions, slots, rows, x)` of up to `max_steps` drawn ops and patterns, with inputs.

    `features` limits what is drawn to some of FEATURES. Magnitudes stay moderate, so that results can be compared.
    """
    graph = _Graph(draw)
    steps = [step for feature in features for step in _STEPS[feature]]
    for _ in range(draw(st.integers(1, max_steps))):
        draw(st.sampled_from(steps))(graph)
    module = graph.finish()
    batch = draw(batches(vocab=VOCAB, max_tokens=max_tokens, ctx=9))
    x = graph.rng.standard_normal((batch.tokens, graph.x.type.shape[1])).astype(np.float32)
    return GeneratedModule(module, [*batch.inputs(), x], graph.weights, _filled(graph, batch))


def _filled(graph: _Graph, batch: Batch) -> dict[str, KVState]:
    states = {}
    for name, type in graph.caches.items():
        shape = (batch.num_slots, batch.ctx, type.num_kv_heads, type.head_dim)
        keys, values = (graph.rng.standard_normal(shape).astype(type.element.dtype) for _ in range(2))
        states[name] = KVState(keys, values)
    return states
