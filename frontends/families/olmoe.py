"""olmoe: OLMoE (arXiv:2409.02060): experts; queries and keys normalised over all heads; q, k, v may be clipped."""

from __future__ import annotations

from dataclasses import replace

from frontends import blocks
from frontends.config import ModelConfig, MoeConfig, read_decoder, read_experts
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family
from frontends.step import StepBuilder
from ir.core import Value

_NAMES = blocks.ExpertNames()


@register_family
class Olmoe(Family):
    """Every layer has experts, as wide as `intermediate_size`; `norm_topk_prob` is false in the published models."""

    model_type = "olmoe"
    architectures = ("OlmoeForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, max_context=4096, norm_eps=1e-5)
        if base.head_dim * base.num_heads != base.hidden_size:
            raise fields.fault(
                f"{base.num_heads} heads of width {base.head_dim} do not make up hidden_size {base.hidden_size}",
                "heads that do; queries are normalised over hidden_size",
            )
        count, top_k = read_experts(fields, experts=64, top_k=8)
        bias = fields.flag("attention_bias", default=False)
        clip = 0.0 if fields.value("clip_qkv") is None else fields.real("clip_qkv", low=1e-6, high=1e30)
        return replace(
            base,
            qkv_bias=bias,
            o_bias=bias,
            clip_qkv=clip,
            moe=MoeConfig(
                count,
                top_k,
                base.ffn_size,
                normalize=fields.flag("norm_topk_prob", default=False),
                layers=(True,) * base.num_layers,
            ),
        )

    def layer(self, step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
        return blocks.experts(step, blocks.attention(step, x, layer, rope, qk_norm="row"), _NAMES)
