"""mistral: the plain decoder with a sliding window on every layer (arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import replace

from frontends.config import ModelConfig, read_decoder, window_of_all
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family


@register_family
class Mistral(Family):
    """A `sliding_window` that is absent means 4096; null means none."""

    model_type = "mistral"
    architectures = ("MistralForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, kv_heads=8, max_context=131072)
        return replace(base, windows=window_of_all(fields, base.num_layers, default=4096))
