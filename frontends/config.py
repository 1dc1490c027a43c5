"""What a model is, from its config.json: every number validated and bounded, both spellings read.

`read_decoder(fields, ...)` reads what all decoder families share (before and after transformers v5: `dtype` or
`torch_dtype`, `rope_parameters` or `rope_theta` and `rope_scaling`) into a frozen `ModelConfig`; a family's recipe
adds its own fields with `dataclasses.replace`. Values that transformers fills in when a field is absent differ by
family, so the recipe passes them. `open_config` finds the family's name and refuses what is no text decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from frontends.checkpoint_files import check_directory, companion
from frontends.config_reader import ConfigReader
from frontends.json_file import read_json_object
from frontends.rope_config import read_rope
from ir.attributes import Rope
from ir.diagnostics import DiagnosticError

# Far above every model known, far below what makes arithmetic or allocation dangerous.
MAX_VOCAB = 1 << 22
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_CONTEXT = 1 << 27
MAX_EXPERTS = 1 << 13

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class MoeConfig:
    """The experts of a model. `layers[i]` tells whether layer i has them; the others have a dense MLP."""

    num_experts: int
    top_k: int
    expert_size: int  # intermediate width of one expert
    normalize: bool  # the weights of a token's experts are divided by their sum
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes are counts of elements; `windows[i]` is the sliding window of layer i, 0 for none."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_context: int
    norm_eps: float
    tied: bool  # the head is the embedding table
    rope: Rope
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float = 0.0  # 0 = no clipping
    moe: MoeConfig | None = None
    dtype: str = ""  # what the config says the weights are in; the files decide
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    pad_ids: tuple[int, ...] = ()


def open_config(directory: Path) -> ConfigReader:
    """The config.json of a model directory."""
    path = companion(check_directory(directory), "config.json")
    if path is None:
        raise DiagnosticError(
            "has no config.json", where=str(directory), expected="a Hugging Face model directory with config.json"
        )
    return ConfigReader(read_json_object(path), str(path))


def model_type(fields: ConfigReader) -> str:
    """The name of the family. Models that wrap a text model (vision, audio) are refused by what they wrap."""
    name = fields.text("model_type")[:100]
    for part in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = fields.value(part)
        if isinstance(inner, Mapping):
            raise fields.fault(
                f"the model {name!r} wraps a text model ({part}, of type {str(inner.get('model_type'))[:60]!r})",
                "a model of text only",
                "save the text model alone with transformers and compile that",
            )
    return name


def check_architecture(fields: ConfigReader, family: str, known: tuple[str, ...]) -> None:
    """Refuses heads other than the language model's, such as classifiers."""
    found = fields.value("architectures")
    if found is None or found == []:
        return
    if not isinstance(found, list) or not all(type(x) is str for x in found):
        raise fields.wrong(("architectures",), found, "a list of names")
    if not any(name in known for name in found):
        raise fields.fault(
            f"the architecture is {', '.join(found)[:120]}", f"{' or '.join(known)} for model_type {family!r}"
        )


def read_decoder(
    fields: ConfigReader,
    family: str,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_context: int = 2048,
    norm_eps: float = 1e-6,
    theta: float = 10000.0,
) -> ModelConfig:
    """The fields that all decoders share. The keywords are what holds where a field is absent; None derives it."""
    hidden = fields.integer("hidden_size", low=1, high=MAX_WIDTH)
    layers = fields.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    heads = fields.integer("num_attention_heads", low=1, high=MAX_HEADS)
    kv = fields.integer("num_key_value_heads", low=1, high=MAX_HEADS, default=heads if kv_heads is None else kv_heads)
    if heads % kv:
        raise fields.fault(f"there are {heads} query heads for {kv} key-value heads", "a whole number for each")
    if head_dim is None and fields.value("head_dim") is None and hidden % heads:
        raise fields.fault(f"hidden_size {hidden} is no multiple of {heads} heads", "one, or the field 'head_dim'")
    width = fields.integer("head_dim", low=2, high=MAX_HEAD_DIM, default=head_dim or hidden // heads)
    if not 2 <= width <= MAX_HEAD_DIM:
        raise fields.fault(f"hidden_size {hidden} makes {heads} heads of width {width}", f"2 to {MAX_HEAD_DIM}")
    context = fields.integer("max_position_embeddings", low=1, high=MAX_CONTEXT, default=max_context)
    activation = fields.text("hidden_act", "hidden_activation", default="silu")
    if activation not in ("silu", "swish"):
        raise fields.fault(f"field 'hidden_act' is {activation[:60]!r}", "'silu'")
    vocab = fields.integer("vocab_size", low=1, high=MAX_VOCAB)
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=width,
        ffn_size=fields.integer("intermediate_size", low=1, high=MAX_WIDTH),
        max_context=context,
        norm_eps=fields.real("rms_norm_eps", low=1e-12, high=1.0, default=norm_eps),
        tied=fields.flag("tie_word_embeddings", default=False),
        rope=read_rope(fields, width, context, theta),
        windows=(0,) * layers,
        dtype=_dtype(fields),
        bos_ids=token_ids(fields, "bos_token_id"),
        eos_ids=token_ids(fields, "eos_token_id"),
        pad_ids=token_ids(fields, "pad_token_id"),
    )


def token_ids(fields: ConfigReader, name: str) -> tuple[int, ...]:
    """One id, a list of ids, or none. A negative id stands for none."""
    found = fields.value(name)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if len(ids) > 1000 or not all(type(i) is int and i < MAX_VOCAB for i in ids):
        raise fields.wrong((name,), found, f"a token id below {MAX_VOCAB} or a list of them")
    return tuple(dict.fromkeys(i for i in ids if i >= 0))


def read_experts(fields: ConfigReader, *, experts: int, top_k: int) -> tuple[int, int]:
    """(number of experts, experts per token); the keywords hold where the config says nothing."""
    count = fields.integer("num_experts", "num_local_experts", low=1, high=MAX_EXPERTS, default=experts)
    chosen = fields.integer("num_experts_per_tok", low=1, high=MAX_EXPERTS, default=top_k)
    if chosen > count:
        raise fields.fault(f"every token goes to {chosen} experts, but there are {count}", f"1 to {count}")
    return count, chosen


def window_of_all(fields: ConfigReader, layers: int, *, default: int | None, used: bool = True) -> tuple[int, ...]:
    """Windows of a family where every layer has the same one. `layer_types`, where present, must say the same."""
    window = _window(fields, default)
    windows = (window if used else 0,) * layers
    kinds = fields.texts("layer_types", layers, (FULL, SLIDING))
    implied = tuple(SLIDING if w else FULL for w in windows)
    if kinds is not None and kinds != implied:
        raise fields.fault(f"'layer_types' asks for {' and '.join(dict.fromkeys(kinds))}", f"{implied[0]} everywhere")
    return windows


def window_by_layer(fields: ConfigReader, layers: int) -> tuple[int, ...]:
    """Windows of qwen2 and qwen3: off unless `use_sliding_window`; `layer_types` or `max_window_layers` say where."""
    used = fields.flag("use_sliding_window", default=False)
    window = _window(fields, 4096)
    first = fields.integer("max_window_layers", low=0, high=MAX_LAYERS, default=28)
    kinds = fields.texts("layer_types", layers, (FULL, SLIDING))
    if kinds is None:
        return tuple(window if used and i >= first else 0 for i in range(layers))
    if SLIDING in kinds and not (used and window):
        raise fields.fault(
            f"'layer_types' has {SLIDING!r}, but 'use_sliding_window' is false or 'sliding_window' is absent",
            "a window for these layers",
        )
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def _window(fields: ConfigReader, default: int | None) -> int:
    """`sliding_window`; null, which differs from absent, means none."""
    absent = "sliding_window" not in fields.fields
    if fields.fields.get("sliding_window") is None and not (absent and default):
        fields.value("sliding_window")
        return 0
    return fields.integer("sliding_window", low=1, high=MAX_CONTEXT, default=default or 0)


def _dtype(fields: ConfigReader) -> str:
    """The stated dtype; when the two spellings differ, the newer one, as in transformers."""
    found = fields.fields.get("dtype") or fields.fields.get("torch_dtype") or ""
    return found[:40] if isinstance(found, str) else ""
