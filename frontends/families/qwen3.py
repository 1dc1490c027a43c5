"""qwen3: Qwen 3 dense (arXiv:2505.09388): queries and keys of each head are normalised before the rotation."""

from __future__ import annotations

from dataclasses import replace

from frontends import blocks
from frontends.config import ModelConfig, read_decoder, window_by_layer
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family
from frontends.step import StepBuilder
from ir.core import Value


@register_family
class Qwen3(Family):
    """Heads are 128 wide unless the config says otherwise, whatever hidden_size / heads is."""

    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, kv_heads=32, head_dim=128, max_context=32768)
        bias = fields.flag("attention_bias", default=False)
        return replace(base, windows=window_by_layer(fields, base.num_layers), qkv_bias=bias, o_bias=bias)

    def layer(self, step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
        return blocks.dense_mlp(step, blocks.attention(step, x, layer, rope, qk_norm="head"))
