"""A compact Qwen3-MoE decoder in torch, made to be trained on one CPU core, and its Hugging Face checkpoint form.

Tokens are sorted by expert, so each expert is one dense product over just its own tokens. The parameters of all
experts of a layer lie in one tensor while training; `save_checkpoint` writes them under the names of
`Qwen3MoeForCausalLM` (one tensor an expert and projection), and `load_checkpoint` reads them back.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class MoeShape:
    """Sizes of the model; the field names are those of Hugging Face's Qwen3-MoE config.json."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    moe_intermediate_size: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class Experts(nn.Module):
    """Router and SwiGLU experts; every token goes to its `num_experts_per_tok` best experts."""

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        hidden, inner, count = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
        self.count, self.chosen = count, shape.num_experts_per_tok
        self.router = nn.Parameter(torch.randn(count, hidden) * hidden**-0.5)
        self.gate_up = nn.Parameter(torch.randn(count, 2 * inner, hidden) * hidden**-0.5)  # gate rows, then up rows
        self.down = nn.Parameter(torch.randn(count, hidden, inner) * inner**-0.5 * 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (tokens, hidden) -> (mixed expert outputs (tokens, hidden), load-balancing loss, a scalar, 1 = even)."""
        probabilities = functional.linear(x, self.router).float().softmax(-1)
        weight, expert = probabilities.topk(self.chosen, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        counts = torch.bincount(expert.flatten(), minlength=self.count)
        balance = (counts / expert.numel() * probabilities.mean(0)).sum() * self.count

        order = expert.flatten().argsort(stable=True)
        token = order // self.chosen
        outputs = []
        for index, rows in enumerate(x[token].split(counts.tolist())):
            gate, up = functional.linear(rows, self.gate_up[index]).chunk(2, -1)
            outputs.append(functional.linear(functional.silu(gate) * up, self.down[index]))
        mixed = torch.cat(outputs) * weight.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, mixed.to(x.dtype)), balance


class Attention(nn.Module):
    """Grouped-query attention with per-head RMS norms on queries and keys, and rotary positions."""

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        scale = shape.hidden_size**-0.5
        self.qkv = nn.Parameter(torch.randn(queries + 2 * keys, shape.hidden_size) * scale)
        self.out = nn.Parameter(torch.randn(shape.hidden_size, queries) * scale * 0.3)
        self.q_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.k_norm = nn.Parameter(torch.ones(shape.head_dim))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x: (batch, time, hidden); cosine, sine: (time, head_dim) -> (batch, time, hidden)."""
        shape = self.shape
        batch, time, _ = x.shape
        heads = functional.linear(x, self.qkv).view(batch, time, -1, shape.head_dim).transpose(1, 2)
        q, k, v = heads.split([shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads], 1)
        q = functional.rms_norm(q, (shape.head_dim,), self.q_norm.to(q.dtype), shape.rms_norm_eps)
        k = functional.rms_norm(k, (shape.head_dim,), self.k_norm.to(k.dtype), shape.rms_norm_eps)
        q, k = _rotate(q, cosine, sine).to(v.dtype), _rotate(k, cosine, sine).to(v.dtype)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return functional.linear(mixed.transpose(1, 2).reshape(batch, time, -1), self.out)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        self.eps = shape.rms_norm_eps
        self.attention, self.experts = Attention(shape), Experts(shape)
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.experts_norm = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, time, hidden) -> (same shape, load-balancing loss)."""
        width = x.shape[-1:]
        x = x + self.attention(functional.rms_norm(x, width, self.attention_norm, self.eps), cosine, sine)
        normed = functional.rms_norm(x, width, self.experts_norm, self.eps)
        mixed, balance = self.experts(normed.flatten(0, 1))
        return x + mixed.view_as(x), balance


class MoeModel(nn.Module):
    """The whole decoder; input and output embeddings are tied."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden_size))
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angle = torch.arange(shape.max_position_embeddings, dtype=torch.float64)[:, None] * shape.rope_theta**-half
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cosine", angle.cos().float(), persistent=False)
        self.register_buffer("sine", angle.sin().float(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: (batch, time) int64 -> (logits (batch, time, vocab), mean load-balancing loss)."""
        time = ids.shape[1]
        x = functional.embedding(ids, self.embedding)
        balance = []
        for layer in self.layers:
            x, uneven = layer(x, self.cosine[:time], self.sine[:time])
            balance.append(uneven)
        x = functional.rms_norm(x, x.shape[-1:], self.final_norm, self.shape.rms_norm_eps)
        return functional.linear(x, self.embedding), torch.stack(balance).mean()


def hugging_face_tensors(model: MoeModel) -> dict[str, Tensor]:
    """The parameters under the names and shapes of `Qwen3MoeForCausalLM` checkpoints (views where possible)."""
    shape = model.shape
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{index}"
        q, k, v = layer.attention.qkv.split([queries, keys, keys])
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": layer.attention.out,
            f"{prefix}.self_attn.q_norm.weight": layer.attention.q_norm,
            f"{prefix}.self_attn.k_norm.weight": layer.attention.k_norm,
            f"{prefix}.input_layernorm.weight": layer.attention_norm,
            f"{prefix}.post_attention_layernorm.weight": layer.experts_norm,
            f"{prefix}.mlp.gate.weight": layer.experts.router,
        }
        for expert in range(shape.num_experts):
            gate, up = layer.experts.gate_up[expert].chunk(2)
            name = f"{prefix}.mlp.experts.{expert}"
            tensors |= {
                f"{name}.gate_proj.weight": gate,
                f"{name}.up_proj.weight": up,
                f"{name}.down_proj.weight": layer.experts.down[expert],
            }
    return tensors


def save_checkpoint(model: MoeModel, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(model.shape),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 2 * model.shape.moe_intermediate_size,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False, "max_new_tokens": 256}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in sorted(hugging_face_tensors(model).items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library makes it readable by its owner only


def load_checkpoint(folder: Path) -> MoeModel:
    """The model in `folder`, in float32; raises KeyError for a tensor the file lacks."""
    config = json.loads((folder / "config.json").read_text())
    model = MoeModel(MoeShape(**{key: config[key] for key in asdict(MoeShape())}))
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, target in hugging_face_tensors(model).items():
            target.copy_(stored[name])  # most targets are views, so this fills the fused parameters
    return model


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine
