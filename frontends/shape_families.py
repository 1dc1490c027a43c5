"""config.json -> `ModelShape`: which fields say how large the tensors of a family are.

Takes fields that may be hostile (every number is bounded), gives a shape. A family is
one function in `FAMILIES`; those that the compiler imports are among them, the others are only planned for. Fields that
concern arithmetic alone (activations, scales, rope) are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from frontends.config_reader import ConfigReader
from frontends.model_shape import AttentionShape, LayerShape, MlpShape, ModelShape
from ir.spelling import did_you_mean

# Far above every model known, far below what makes arithmetic or allocation dangerous.
MAX_VOCAB = 1 << 22
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 12
MAX_CONTEXT = 1 << 27
MAX_EXPERTS = 1 << 13

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def shape_of(fields: Mapping[str, Any], where: str, name: str = "") -> ModelShape:
    """The shape that the fields of a config.json describe. `where` names them in diagnostics."""
    reader = ConfigReader(fields, where)
    inner = fields.get("text_config")
    if isinstance(inner, Mapping) and "hidden_size" not in fields:
        reader = ConfigReader(inner, where, "text_config.")
    family = reader.text("model_type")[:100]
    make = FAMILIES.get(family)
    if make is None:
        raise reader.fault(
            f"nobody described the shape of model_type {family!r}{did_you_mean(family, FAMILIES)}",
            ", ".join(sorted(FAMILIES)),
            "a family is one function in frontends/shape_families.py",
        )
    shape = make(reader, family)
    given = fields.get("_name_or_path")
    dtype = reader.value("dtype", "torch_dtype") if "dtype" in reader.fields else reader.value("torch_dtype")
    return replace(
        shape,
        name=name or (given if isinstance(given, str) and given else family)[:200],
        dtype=_DTYPES.get(dtype, "bf16") if isinstance(dtype, str) else "bf16",
    )


def _whole(r: ConfigReader, *names: str, high: int = MAX_WIDTH, low: int = 1, default: int | None = None) -> int:
    if default is None:
        return r.integer(*names, low=low, high=high)
    return r.integer(*names, low=low, high=high, default=default)


def _layers(r: ConfigReader, *names: str) -> int:
    return _whole(r, *(names or ("num_hidden_layers",)), high=MAX_LAYERS)


def _gqa(
    r: ConfigReader,
    hidden: int,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    bias: tuple[bool, bool] = (False, False),
    qk_norm: str = "",
) -> AttentionShape:
    """`bias` of (query, key and value; output). `qk_norm`: "" none, "head" one weight a head dimension, "full"."""
    heads = _whole(r, "num_attention_heads", high=MAX_HEADS)
    kv = _whole(r, "num_key_value_heads", high=MAX_HEADS, default=heads if kv_heads is None else kv_heads)
    if heads % kv:
        raise r.fault(f"there are {heads} query heads for {kv} key-value heads", "a whole number for each")
    width = _whole(r, "head_dim", high=1 << 12, default=head_dim or max(1, hidden // heads))
    vectors = bias[0] * (heads + 2 * kv) * width + bias[1] * hidden
    vectors += {"": 0, "head": 2 * width, "full": (heads + kv) * width}[qk_norm]
    return AttentionShape("gqa", heads, kv, width, width, bias_elements=vectors)


def _windows(r: ConfigReader, count: int, *, every: int = 0, default: int = 0, used: bool = True) -> list[int]:
    """The window of every layer: `layer_types` says where, else all but each `every`-th layer (0: all)."""
    window = _whole(r, "sliding_window", high=MAX_CONTEXT, default=default)
    kinds = r.value("layer_types")
    if isinstance(kinds, list) and len(kinds) == count:
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    if not (used and window):
        return [0] * count
    return [0 if every and (i + 1) % every == 0 else window for i in range(count)]


def _model(
    r: ConfigReader,
    family: str,
    hidden: int,
    layers: list[LayerShape],
    *,
    tied: bool = False,
    outer: int | None = None,
    context: int = 2048,
    position_rows: int = 0,
    embedding_width: int = 0,
) -> ModelShape:
    """Puts the parts together; equal layers become one object."""
    same: dict[LayerShape, LayerShape] = {}
    return ModelShape(
        name=family,
        family=family,
        hidden=hidden,
        vocab=_whole(r, "vocab_size", high=MAX_VOCAB),
        max_context=_whole(
            r, "max_position_embeddings", "n_positions", "seq_length", high=MAX_CONTEXT, default=context
        ),
        tied_head=r.flag("tie_word_embeddings", default=tied),
        layers=tuple(same.setdefault(layer, layer) for layer in layers),
        outer_elements=hidden if outer is None else outer,
        position_rows=position_rows,
        embedding_width=embedding_width,
    )


def _dense(r: ConfigReader, hidden: int, *, gated: bool = True, bias: bool = False) -> MlpShape:
    width = _whole(r, "intermediate_size")
    return MlpShape(width, gated=gated, bias_elements=bias * ((1 + gated) * width + hidden))


def _llama(r: ConfigReader, family: str) -> ModelShape:
    """RMS norms before attention and MLP, rotary attention, gated MLP: llama, mistral, qwen2, qwen3, gemma, phi3."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    flag = r.flag("attention_bias", default=False)
    bias = (True, False) if family == "qwen2" else (flag, flag)
    qk_norm = "head" if family in ("qwen3", "gemma3_text") else ""
    gemma = family.startswith("gemma")
    default_dim = 256 if gemma else 128 if family == "qwen3" else None
    attention = _gqa(r, hidden, head_dim=default_dim, bias=bias, qk_norm=qk_norm)
    mlp = _dense(r, hidden, bias=r.flag("mlp_bias", default=False))
    norms = hidden * (4 if family in ("gemma2", "gemma3_text") else 2)
    if family in ("qwen2", "qwen3"):
        first = _whole(r, "max_window_layers", low=0, high=MAX_LAYERS, default=28)
        used = r.flag("use_sliding_window", default=False)
        windows = [w if i >= first else 0 for i, w in enumerate(_windows(r, count, default=4096, used=used))]
    elif family in ("mistral", "phi3"):
        windows = _windows(r, count)
    elif family == "gemma2":
        windows = _windows(r, count, every=2, default=4096)
    elif family == "gemma3_text":
        pattern = _whole(r, "sliding_window_pattern", "_sliding_window_pattern", high=MAX_LAYERS, default=6)
        windows = _windows(r, count, every=pattern, default=4096)
    else:
        windows = [0] * count
    layers = [LayerShape(replace(attention, window=w), mlp, norms) for w in windows]
    return _model(r, family, hidden, layers, tied=gemma)


def _experts(r: ConfigReader, *, experts: int, top_k: int) -> tuple[int, int]:
    count = _whole(r, "num_experts", "num_local_experts", "n_routed_experts", high=MAX_EXPERTS, default=experts)
    chosen = _whole(r, "num_experts_per_tok", high=MAX_EXPERTS, default=top_k)
    if chosen > count:
        raise r.fault(f"every token goes to {chosen} experts, but there are {count}", f"1 to {count}")
    return count, chosen


def _mixtral(r: ConfigReader, family: str) -> ModelShape:
    """mixtral and olmoe: experts in every layer, each of `intermediate_size`."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    olmoe = family == "olmoe"
    flag = r.flag("attention_bias", default=False)
    attention = _gqa(r, hidden, bias=(flag, flag), qk_norm="full" if olmoe else "", kv_heads=None if olmoe else 8)
    experts, top_k = _experts(r, experts=64 if olmoe else 8, top_k=8 if olmoe else 2)
    mlp = MlpShape(experts=experts, top_k=top_k, expert_intermediate=_whole(r, "intermediate_size"))
    windows = [0] * count if olmoe else _windows(r, count)
    layers = [LayerShape(replace(attention, window=w), mlp, 2 * hidden) for w in windows]
    return _model(r, family, hidden, layers)


def _qwen_moe(r: ConfigReader, family: str) -> ModelShape:
    """qwen2_moe and qwen3_moe: some layers may be dense."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    newer = family == "qwen3_moe"
    flag = r.flag("attention_bias", default=False)
    attention = _gqa(
        r, hidden, bias=(flag, flag) if newer else (True, False), qk_norm="head" if newer else "",
        kv_heads=4 if newer else None,
    )  # fmt: skip
    experts, top_k = _experts(r, experts=128 if newer else 60, top_k=8 if newer else 4)
    shared = 0 if newer else _whole(r, "shared_expert_intermediate_size", default=5632)
    moe = MlpShape(
        experts=experts, top_k=top_k, shared=shared, shared_gate=bool(shared),
        expert_intermediate=_whole(r, "moe_intermediate_size", default=768 if newer else 1408),
    )  # fmt: skip
    dense = _dense(r, hidden)
    step = _whole(r, "decoder_sparse_step", high=MAX_LAYERS, default=1)
    only = r.value("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise r.wrong(("mlp_only_layers",), only, "a list of layers")
    plain = frozenset(only)
    layers = [
        LayerShape(attention, moe if i not in plain and (i + 1) % step == 0 else dense, 2 * hidden)
        for i in range(count)
    ]
    return _model(r, family, hidden, layers)


def _deepseek(r: ConfigReader, family: str) -> ModelShape:
    """deepseek_v2, deepseek_v3 and what is shaped like it: latent attention, first layers dense, shared experts."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    heads = _whole(r, "num_attention_heads", high=MAX_HEADS)
    q_rank = _whole(r, "q_lora_rank", low=0, default=0)
    kv_rank = _whole(r, "kv_lora_rank", default=512)
    rope, nope = _whole(r, "qk_rope_head_dim", default=64), _whole(r, "qk_nope_head_dim", default=128)
    attention = AttentionShape(
        "mla", heads, heads, rope + nope, _whole(r, "v_head_dim", default=128),
        q_rank=q_rank, kv_rank=kv_rank, rope_dim=rope, bias_elements=q_rank + kv_rank,
    )  # fmt: skip
    newer = family != "deepseek_v2"
    experts, top_k = _experts(r, experts=256 if newer else 64, top_k=8 if newer else 6)
    width = _whole(r, "moe_intermediate_size", default=2048 if newer else 1407)
    shared = _whole(r, "n_shared_experts", low=0, high=MAX_EXPERTS, default=1)
    moe = MlpShape(
        experts=experts, top_k=top_k, expert_intermediate=width, shared=shared * width,
        bias_elements=experts if newer else 0,
    )  # fmt: skip
    dense = _dense(r, hidden)
    first = _whole(r, "first_k_dense_replace", low=0, high=MAX_LAYERS, default=0)
    layers = [LayerShape(attention, dense if i < first else moe, 2 * hidden) for i in range(count)]
    return _model(r, family, hidden, layers)


def _gpt_oss(r: ConfigReader, family: str) -> ModelShape:
    """Experts in every layer, every other layer with a window, attention sinks, biases everywhere."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    attention = _gqa(r, hidden, head_dim=64, kv_heads=8, bias=(True, True))
    attention = replace(attention, bias_elements=attention.bias_elements + attention.heads)
    experts, top_k = _experts(r, experts=128, top_k=4)
    width = _whole(r, "intermediate_size")
    mlp = MlpShape(
        experts=experts, top_k=top_k, expert_intermediate=width, bias_elements=experts,
        expert_bias_elements=2 * width + hidden,
    )  # fmt: skip
    windows = _windows(r, count, every=2, default=128)
    return _model(r, family, hidden, [LayerShape(replace(attention, window=w), mlp, 2 * hidden) for w in windows])


def _opt(r: ConfigReader, family: str) -> ModelShape:
    """opt: learned positions, plain MLP, biases and layer norms; the head is the embedding table."""
    hidden, count = _whole(r, "hidden_size"), _layers(r)
    attention = _gqa(r, hidden, bias=(True, True))
    width = _whole(r, "ffn_dim")
    mlp = MlpShape(width, gated=False, bias_elements=width + hidden)
    context = _whole(r, "max_position_embeddings", high=MAX_CONTEXT, default=2048)
    embedding = _whole(r, "word_embed_proj_dim", default=hidden)
    layers = [LayerShape(attention, mlp, 4 * hidden)] * count
    last = 2 * hidden if r.flag("do_layer_norm_before", default=True) else 0
    return _model(
        r, family, hidden, layers, tied=True, outer=last, position_rows=context + 2,
        embedding_width=0 if embedding == hidden else embedding,
    )  # fmt: skip


def _gpt(r: ConfigReader, family: str) -> ModelShape:
    """gptj, gpt_neox, gpt2, bloom: multi-head attention and a plain MLP of four times the width."""
    hidden = _whole(r, "hidden_size", "n_embd")
    count = _layers(r, "num_hidden_layers", "n_layer")
    heads = _whole(r, "num_attention_heads", "n_head", high=MAX_HEADS)
    width = _whole(r, "intermediate_size", "n_inner", default=4 * hidden)
    dim = max(1, hidden // heads)
    qkv_bias = 0 if family == "gptj" else 4 * hidden
    attention = AttentionShape("gqa", heads, heads, dim, dim, bias_elements=qkv_bias)
    mlp = MlpShape(width, gated=False, bias_elements=width + hidden)
    layers = [LayerShape(attention, mlp, (2 if family == "gptj" else 4) * hidden)] * count
    outer = 2 * hidden
    if family == "gptj":
        outer += _whole(r, "vocab_size", high=MAX_VOCAB)  # the bias of the head
    if family == "bloom":
        outer += 2 * hidden  # the norm of the embeddings
    tied = family in ("gpt2", "bloom")
    context = _whole(r, "max_position_embeddings", "n_positions", "seq_length", high=MAX_CONTEXT, default=2048)
    positions = context if family == "gpt2" else 0
    return _model(r, family, hidden, layers, tied=tied, outer=outer, position_rows=positions)


def _falcon(r: ConfigReader, family: str) -> ModelShape:
    """falcon: one key-value head or groups of them, a parallel block, a plain MLP."""
    hidden, count = _whole(r, "hidden_size"), _layers(r, "num_hidden_layers", "n_layer")
    heads = _whole(r, "num_attention_heads", "n_head", high=MAX_HEADS)
    newer = r.flag("new_decoder_architecture", default=False)
    groups = _whole(r, "num_kv_heads", "n_head_kv", high=MAX_HEADS, default=heads)
    kv = groups if newer else 1 if r.flag("multi_query", default=True) else heads
    if heads % kv:
        raise r.fault(f"there are {heads} query heads for {kv} key-value heads", "a whole number for each")
    dim = max(1, hidden // heads)
    bias = r.flag("bias", default=False)
    attention = AttentionShape("gqa", heads, kv, dim, dim, bias_elements=bias * ((heads + 2 * kv) * dim + hidden))
    width = _whole(r, "ffn_hidden_size", default=4 * hidden)
    mlp = MlpShape(width, gated=False, bias_elements=bias * (width + hidden))
    norms = 4 if newer or not r.flag("parallel_attn", default=True) else 2
    return _model(r, family, hidden, [LayerShape(attention, mlp, norms * hidden)] * count, tied=True, outer=2 * hidden)


FAMILIES: dict[str, Callable[[ConfigReader, str], ModelShape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _llama),
    **dict.fromkeys(("mixtral", "olmoe"), _mixtral),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _qwen_moe),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _deepseek),
    "gpt_oss": _gpt_oss,
    "opt": _opt,
    **dict.fromkeys(("gptj", "gpt_neox", "gpt2", "bloom"), _gpt),
    "falcon": _falcon,
}
