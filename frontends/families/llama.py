"""llama: Llama 1 to 3 and their many relatives (TinyLlama, SmolLM, Yi, ...)."""

from __future__ import annotations

from dataclasses import replace

from frontends.config import ModelConfig, read_decoder
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family


@register_family
class Llama(Family):
    """The plain decoder, with optional biases on all projections of the attention or of the MLP."""

    model_type = "llama"
    architectures = ("LlamaForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        bias = fields.flag("attention_bias", default=False)
        return replace(
            read_decoder(fields, self.model_type),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=fields.flag("mlp_bias", default=False),
        )
