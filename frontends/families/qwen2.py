"""qwen2: Qwen 2 and 2.5 (arXiv:2407.10671): biases on q, k and v; optional windows on the upper layers."""

from __future__ import annotations

from dataclasses import replace

from frontends.config import ModelConfig, read_decoder, window_by_layer
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family


@register_family
class Qwen2(Family):
    """The biases are always there; the config does not mention them."""

    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, kv_heads=32, max_context=32768)
        return replace(base, windows=window_by_layer(fields, base.num_layers), qkv_bias=True)
