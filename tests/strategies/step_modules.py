"""Step functions of random small transformers with ragged batches: what fusions and code generation are made for."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ir.formats import BF16, F16, F32
from ir.kv_state import KVState
from tests.passes.step_graphs import StepShape, build_step, random_weights
from tests.strategies.batches import batches
from tests.strategies.generated import GeneratedModule


@st.composite
def step_shapes(draw: st.DrawFn, *, max_layers: int = 2, elements: tuple = (F32, BF16, F16)) -> StepShape:
    """Dense and mixture-of-experts models; every head arrangement; sizes that are no multiple of any tile."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    experts = draw(st.sampled_from([0, 0, 1, 3, 5]))
    return StepShape(
        layers=draw(st.integers(1, max_layers)),
        hidden=draw(st.sampled_from([8, 12, 16, 33])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 10])),
        ffn=draw(st.sampled_from([6, 16, 24])),
        vocab=draw(st.sampled_from([7, 16, 40])),
        element=draw(st.sampled_from(elements)),
        bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["", "head", "row"])),
        clip=draw(st.sampled_from([0.0, 0.0, 1.5])),
        window=draw(st.sampled_from([0, 0, 1, 3])),
        experts=experts,
        top_k=draw(st.integers(1, max(1, min(experts, 3)))),
        tied=draw(st.booleans()),
    )


@st.composite
def step_modules(draw: st.DrawFn, *, fresh: bool = False, ctx: int = 12, **shape_options: object) -> GeneratedModule:
    """A step function `@step(ids, positions, slots, rows) -> logits`, its weights, a batch, and caches filled so far.

    `fresh` makes the caches empty and every sequence begin with this step.
    """
    shape = draw(step_shapes(**shape_options))  # type: ignore[arg-type]
    module = build_step(shape)
    batch = draw(batches(vocab=shape.vocab, ctx=ctx, fresh=fresh))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    states = {}
    for layer in range(shape.layers):
        size = (batch.num_slots, ctx, shape.kv_heads, shape.head_dim)
        keys, values = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
        for slot, start in enumerate(batch.starts):
            keys[slot, start:] = values[slot, start:] = 0
        states[f"layers.{layer}"] = KVState(keys, values)
    return GeneratedModule(module, batch.inputs(), random_weights(module, seed), states)
