"""qwen3_moe: Qwen 3 with experts (arXiv:2505.09388); chosen layers may keep a dense MLP."""

from __future__ import annotations

from dataclasses import replace

from frontends import blocks
from frontends.config import (
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    MoeConfig,
    read_decoder,
    read_experts,
    window_of_all,
)
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family
from frontends.step import StepBuilder
from ir.core import Value

_NAMES = blocks.ExpertNames()


@register_family
class Qwen3Moe(Family):
    """Layer i has experts when i + 1 is a multiple of `decoder_sparse_step` and i is not in `mlp_only_layers`."""

    model_type = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, kv_heads=4, max_context=32768)
        bias = fields.flag("attention_bias", default=False)
        return replace(
            base, qkv_bias=bias, o_bias=bias, moe=self._experts(fields, base), windows=self._windows(fields, base)
        )

    def layer(self, step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
        x = blocks.attention(step, x, layer, rope, qk_norm="head")
        moe = step.config.moe
        return blocks.experts(step, x, _NAMES) if moe and moe.layers[layer] else blocks.dense_mlp(step, x)

    def _experts(self, fields: ConfigReader, base: ModelConfig) -> MoeConfig:
        count, top_k = read_experts(fields, experts=128, top_k=8)
        every = fields.integer("decoder_sparse_step", low=1, high=MAX_LAYERS, default=1)
        dense = fields.value("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < base.num_layers for i in dense):
            raise fields.wrong(("mlp_only_layers",), dense, f"a list of layers in 0 .. {base.num_layers - 1}")
        return MoeConfig(
            num_experts=count,
            top_k=top_k,
            expert_size=fields.integer("moe_intermediate_size", low=1, high=MAX_WIDTH, default=768),
            normalize=fields.flag("norm_topk_prob", default=False),
            layers=tuple((i + 1) % every == 0 and i not in dense for i in range(base.num_layers)),
        )

    def _windows(self, fields: ConfigReader, base: ModelConfig) -> tuple[int, ...]:
        """With `use_sliding_window`, all layers have one, whatever `max_window_layers` says, as in transformers 5."""
        used = fields.flag("use_sliding_window", default=False)
        windows = window_of_all(fields, base.num_layers, default=4096, used=used)
        if fields.value("max_window_layers") and used:
            fields.warnings.append(
                f"{fields.where}: 'max_window_layers' is ignored, every layer has the sliding window"
            )
        return windows
