"""mixtral: Mistral with experts in place of the MLP (arXiv:2401.04088)."""

from __future__ import annotations

from dataclasses import replace

from frontends import blocks
from frontends.config import ModelConfig, MoeConfig, read_decoder, read_experts, window_of_all
from frontends.config_reader import ConfigReader
from frontends.family import Family, register_family
from frontends.step import StepBuilder
from ir.core import Value

_NAMES = blocks.ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


@register_family
class Mixtral(Family):
    """Every layer has experts, as wide as `intermediate_size`; the weights of a token's experts add up to one."""

    model_type = "mixtral"
    architectures = ("MixtralForCausalLM",)

    def config(self, fields: ConfigReader) -> ModelConfig:
        base = read_decoder(fields, self.model_type, kv_heads=8, max_context=131072, norm_eps=1e-5, theta=1e6)
        count, top_k = read_experts(fields, experts=8, top_k=2)
        moe = MoeConfig(count, top_k, base.ffn_size, normalize=True, layers=(True,) * base.num_layers)
        return replace(base, windows=window_of_all(fields, base.num_layers, default=None), moe=moe)

    def layer(self, step: StepBuilder, x: Value, layer: int, rope: tuple[Value, Value]) -> Value:
        return blocks.experts(step, blocks.attention(step, x, layer, rope), _NAMES)
