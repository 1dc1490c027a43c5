"""The building blocks that decoder families share: linear layers, norms, attention, the dense MLP and the experts.

Each takes the StepBuilder and values of the residual stream, x f32 [tokens, hidden], inserts graph ops, and gives the
new value. `layer` is the number of the layer; the caller has opened its scope (`layers.N`).
"""

from __future__ import annotations

from dataclasses import dataclass

from frontends.step import TOKENS, StepBuilder
from ir.attributes import SymbolRef
from ir.core import Value
from ir.formats import F32
from ir.ops.attention import CombineOp as AttentionCombineOp
from ir.ops.attention import RopeOp, RopeTableOp, ScoresOp, SoftmaxOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp, KVStateOp
from ir.ops.moe import CombineOp, DispatchOp, GroupedGemmOp, RouteOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, ClipOp, EmbedOp, GatherRowsOp, MulOp, ReshapeOp, SiluOp
from ir.types import KVCacheType


@dataclass(frozen=True)
class ExpertNames:
    """How a family names the parts of its expert block: `block`.`router`, `block`.experts.N.`gate` and so on."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def linear(step: StepBuilder, x: Value, part: str, n: int, k: int, role: str, bias: bool = False) -> Value:
    """x [tokens, k] @ weight[n, k].T (+ bias) -> f32 [tokens, n]."""
    with step.scope(part):
        y = step(step.product(x, step.named("weight"), n, k, role=role), "y")
        return step(AddOp(y, step.weight(n, role="bias", leaf="bias")), "y") if bias else y


def norm(step: StepBuilder, x: Value, part: str, width: int) -> Value:
    """RMS norm over the last axis, of `width`."""
    with step.scope(part):
        return step(RmsNormOp(x, step.weight(width, role="norm"), eps=step.config.norm_eps), "n")


def embedding(step: StepBuilder) -> tuple[Value, Value]:
    """(residual stream f32 [tokens, hidden], the table [vocab, hidden] as stored)."""
    config = step.config
    name = "model.embed_tokens.weight"
    if config.tied and not step.has_tensor(name) and step.has_tensor("lm_head.weight"):
        name = "lm_head.weight"  # a tied model may be saved under either name
    with step.scope("embed_tokens"):
        table = step.constant(name, config.vocab_size, config.hidden_size, role="embedding")
        return step.as_f32(step(EmbedOp(step.ids, table), "x")), table


def rope_tables(step: StepBuilder) -> tuple[Value, Value]:
    """(cos, sin) f32 [tokens, head_dim / 2], the same for all layers."""
    with step.scope("rotary_emb"):
        return step.pair(RopeTableOp(step.positions, rope=step.config.rope))


def head(step: StepBuilder, x: Value, table: Value) -> Value:
    """Logits f32 [rows, vocab] of the rows that are asked for; `table` is the weight of a tied head."""
    config = step.config
    with step.scope("norm"):
        x = step(GatherRowsOp(x, step.rows), "x")
    x = norm(step, x, "norm", config.hidden_size)
    with step.scope("lm_head"):
        if config.tied:
            return step(MatmulOp(x, step.as_f32(table)), "logits")
        return step(step.product(x, "lm_head.weight", config.vocab_size, config.hidden_size, role="head"), "logits")


def attention(step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value], qk_norm: str = "") -> Value:
    """x + o_proj(attention(q, k, v of the normed x)).

    `qk_norm` normalises queries and keys: "head" each head by itself (after the split), "row" all heads of a token
    together (before it), "" not at all. Clipping (`clip_qkv`) comes after the norm of the row, as in OLMoE.
    """
    config = step.config
    width = config.num_heads * config.head_dim
    h = norm(step, x, "input_layernorm", config.hidden_size)
    with step.scope("self_attn"):
        q = _heads(step, h, "q", config.num_heads, qk_norm)
        k = _heads(step, h, "k", config.num_kv_heads, qk_norm)
        v = _heads(step, h, "v", config.num_kv_heads, "")
        cos, sin = rope
        q, k = step(RopeOp(q, cos, sin), "q"), step(RopeOp(k, cos, sin), "k")
        cache_type = KVCacheType(config.num_kv_heads, config.head_dim, F32)
        cache = step(KVStateOp(symbol=SymbolRef(f"layers.{layer}"), result_types=[cache_type]), "cache")
        cache = step(KVAppendOp(cache, k, v, step.positions, step.slots), "cache")
        scale, window = config.head_dim**-0.5, config.windows[layer]
        s = step(ScoresOp(q, cache, step.positions, step.slots, scale=scale, window=window), "s")
        o = step(AttentionCombineOp(step(SoftmaxOp(s), "p"), cache, step.slots), "o")
        o = step(ReshapeOp(o, shape=(TOKENS, width)), "o")
        y = linear(step, o, "o_proj", config.hidden_size, width, "attention.o", config.o_bias)
        return step(AddOp(x, y), "x")


def _heads(step: StepBuilder, h: Value, letter: str, heads: int, qk_norm: str) -> Value:
    """The projection `letter`_proj of h, f32 [tokens, heads, head_dim]."""
    config = step.config
    width = heads * config.head_dim
    role = f"attention.{letter}"
    y = linear(step, h, f"{letter}_proj", width, config.hidden_size, role, config.qkv_bias)
    if qk_norm == "row":
        y = norm(step, y, f"{letter}_norm", width)
    if config.clip_qkv:
        y = step(ClipOp(y, low=-config.clip_qkv, high=config.clip_qkv), letter)
    y = step(ReshapeOp(y, shape=(TOKENS, heads, config.head_dim)), letter)
    return norm(step, y, f"{letter}_norm", config.head_dim) if qk_norm == "head" else y


def dense_mlp(step: StepBuilder, x: Value) -> Value:
    """x + down(silu(gate(h)) * up(h)) with h the normed x (arXiv:2002.05202)."""
    config = step.config
    n, k = config.ffn_size, config.hidden_size
    h = norm(step, x, "post_attention_layernorm", k)
    with step.scope("mlp"):
        gate = linear(step, h, "gate_proj", n, k, "mlp.gate", config.mlp_bias)
        up = linear(step, h, "up_proj", n, k, "mlp.up", config.mlp_bias)
        inner = step(MulOp(step(SiluOp(gate), "g"), up), "h")
        y = linear(step, inner, "down_proj", k, n, "mlp.down", config.mlp_bias)
        return step(AddOp(x, y), "x")


def experts(step: StepBuilder, x: Value, names: ExpertNames) -> Value:
    """x + the weighted sum of the MLPs of each token's top_k experts; the tokens are grouped by expert in between."""
    config = step.config
    moe = config.moe
    assert moe is not None, f"{config.family} has a layer of experts but no MoeConfig"
    count, n, k = moe.num_experts, moe.expert_size, config.hidden_size
    h = norm(step, x, "post_attention_layernorm", k)
    with step.scope(names.block):
        logits = linear(step, h, names.router, count, k, "moe.router")
        ids, share = step.pair(RouteOp(logits, top_k=moe.top_k, normalize=moe.normalize))
        order, offsets = step.pair(DispatchOp(ids, num_experts=count))
        with step.scope("experts"):
            gate = _grouped(step, h, names.gate, (count, n, k), "moe.gate", order, offsets, moe.top_k)
            up = _grouped(step, h, names.up, (count, n, k), "moe.up", order, offsets, moe.top_k)
            inner = step(MulOp(step(SiluOp(gate), "g"), up), "h")
            y = _grouped(step, inner, names.down, (count, k, n), "moe.down", order, offsets, 0)
        z = step(CombineOp(y, share, order), "z")
        return step(AddOp(x, z), "x")


def _grouped(
    step: StepBuilder,
    x: Value,
    part: str,
    shape: tuple[int, int, int],
    role: str,
    order: Value,
    offsets: Value,
    gather: int,
) -> Value:
    """One matrix product per expert: f32 [tokens * top_k, n] in grouped order; `shape` is (experts, n, k)."""
    count, n, k = shape
    w = step.stack(count, part, n, k, role=role)
    with step.scope(part):
        return step(GroupedGemmOp(x, w, order, offsets, gather=gather), "y")
