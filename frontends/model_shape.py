"""What a model is made of, as numbers: tensors of every layer, KV cache and arithmetic, without any weight.

    shape = load_shape("meta-llama/Llama-3.1-8B")  # a built-in name, a config.json, a checkpoint directory
    shape.parameters(), shape.active_parameters()
    for layer, count in shape.groups():               # runs of equal layers
        shape.tensors(layer), layer.kv_elements_per_token, layer.kv_tokens(context)

Takes config.json fields of every imported family and of families that are only described here (see
`frontends.shape_families`), in both spellings of transformers. Refuses families that nobody described, with the list of
those that are. Sizes are counts of elements; bytes come from a number format (`TensorShape.nbytes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol


class SizedFormat(Protocol):
    """What is asked of a number format here; all of `ir.formats` fit."""

    def nbytes(self, shape: tuple[int, ...]) -> int: ...


@dataclass(frozen=True)
class TensorShape:
    """One tensor, or `copies` equal ones (an expert each), of which a token uses `used`.

    `role` is as recipes name it: `attention.q`, `mlp.gate`, `experts.down`, `router`, `head`, `embedding`; further
    `shared.gate` (an expert that every token uses), `attention.q_a`, `.kv_b` (latent attention) and `vector` (norms,
    biases). A matrix is [outputs, inputs]; vectors of one layer are one entry. Of an `embedding` a token reads a row.
    """

    role: str
    shape: tuple[int, ...]
    copies: int = 1
    used: int = 1

    @property
    def elements(self) -> int:
        """Of all copies."""
        return math.prod(self.shape) * self.copies

    @property
    def used_elements(self) -> int:
        """Of the copies that one token uses; one row of an embedding."""
        return self.shape[-1] if self.role == "embedding" else math.prod(self.shape) * self.used

    @property
    def is_product(self) -> bool:
        """Whether activations are multiplied by it, so that it takes two FLOP for each element and token."""
        return len(self.shape) == 2 and self.role != "embedding"

    def nbytes(self, format: SizedFormat) -> int:
        """Bytes of all copies in a number format."""
        return format.nbytes(self.shape) * self.copies


@dataclass(frozen=True)
class AttentionShape:
    """Attention of one layer. `kind` is `gqa` (also multi-head, multi-query) or `mla` (one latent cache for all heads).

    For `mla`, `head_dim` is the width of queries and keys (its last `rope_dim` are the shared rotary part), the cache
    holds `kv_rank + rope_dim` elements a token, and `q_rank` is 0 when queries are made in one step. `window` 0: none.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    bias_elements: int = 0  # biases, query and key norms, sinks

    @property
    def kv_elements(self) -> int:
        """Elements that one token adds to the cache."""
        if self.kind == "mla":
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim + self.value_dim)

    def flops_per_pair(self, *, absorbed: bool) -> int:
        """FLOP for one query token and one cached token: scores and values, all heads.

        `absorbed` concerns `mla`: queries are moved into the latent space (what decoding does), rather than keys and
        values out of it (what long prefills do).
        """
        if self.kind == "mla" and absorbed:
            return 2 * self.heads * (2 * self.kv_rank + self.rope_dim)
        return 2 * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class MlpShape:
    """The feed-forward part: one dense of width `intermediate`, or `experts` of which a token uses `top_k`.

    `shared` is the width of the experts that every token uses, all together; `gated` tells of gate, up and down
    rather than up and down.
    """

    intermediate: int = 0
    experts: int = 0
    top_k: int = 0
    expert_intermediate: int = 0
    shared: int = 0
    gated: bool = True
    bias_elements: int = 0
    expert_bias_elements: int = 0  # of one expert
    shared_gate: bool = False

    @property
    def is_moe(self) -> bool:
        return self.experts > 0


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer; equal layers compare equal."""

    attention: AttentionShape
    mlp: MlpShape
    norm_elements: int

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to this layer's cache."""
        return self.attention.kv_elements

    def kv_tokens(self, context: int) -> int:
        """Tokens that the cache holds after `context` of them: the window, where there is one."""
        return min(context, self.attention.window) if self.attention.window else context


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model. `layers` has one entry a layer; equal entries are the same object."""

    name: str
    family: str
    hidden: int
    vocab: int
    max_context: int
    tied_head: bool
    layers: tuple[LayerShape, ...]
    dtype: str = "bf16"  # what the checkpoint's floats are stored in: f32, f16, bf16
    position_rows: int = 0  # rows of a learned table of positions
    outer_elements: int = 0  # vectors outside of the layers: the last norm, norms of embeddings, biases of the head
    embedding_width: int = 0  # of a token, where it differs from `hidden`; 0 = the same
    warnings: tuple[str, ...] = ()

    def groups(self) -> tuple[tuple[LayerShape, int], ...]:
        """Runs of equal layers, in order: ((layer, how many), ...)."""
        return tuple((layer, len(list(run))) for layer, run in groupby(self.layers))

    def kinds(self) -> tuple[tuple[LayerShape, int], ...]:
        """Different layers in order of first use, each with how many there are."""
        return self._counted

    @cached_property
    def _counted(self) -> tuple[tuple[LayerShape, int], ...]:
        counts: dict[LayerShape, int] = {}
        for layer in self.layers:
            counts[layer] = counts.get(layer, 0) + 1
        return tuple(counts.items())

    def tensors(self, layer: LayerShape) -> tuple[TensorShape, ...]:
        """The tensors of a layer, in the order they are used; vectors last."""
        return tuple(_layer_tensors(self.hidden, layer))

    def outer_tensors(self) -> tuple[TensorShape, ...]:
        """Embeddings, the head (when it is no other use of the embeddings) and vectors outside of the layers."""
        width = self.embedding_width or self.hidden
        found = [TensorShape("embedding", (self.vocab, width))]
        if self.position_rows:
            found.append(TensorShape("embedding", (self.position_rows, self.hidden)))
        if width != self.hidden:
            found += [TensorShape("mlp.up", (self.hidden, width)), TensorShape("mlp.down", (width, self.hidden))]
        if not self.tied_head:
            found.append(TensorShape("head", (self.vocab, width)))
        if self.outer_elements:
            found.append(TensorShape("vector", (self.outer_elements,)))
        return tuple(found)

    def head(self) -> TensorShape:
        """The product that gives logits; it shares its bytes with the embedding when the head is tied."""
        return TensorShape("head", (self.vocab, self.embedding_width or self.hidden))

    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        inner = sum(count * sum(t.elements for t in self.tensors(layer)) for layer, count in self.kinds())
        return inner + sum(t.elements for t in self.outer_tensors())

    def active_parameters(self) -> int:
        """Parameters that one token is multiplied by or passes through: of embeddings one row, of experts `top_k`."""
        inner = sum(count * sum(t.used_elements for t in self.tensors(layer)) for layer, count in self.kinds())
        outer = sum(t.used_elements for t in self.outer_tensors())
        return inner + outer + (self.head().elements if self.tied_head else 0)

    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the caches of all layers (windows are not full yet)."""
        return sum(layer.kv_elements_per_token for layer in self.layers)

    def kv_elements(self, context: int) -> int:
        """Elements of the caches of one sequence of `context` tokens: windows hold no more than their width."""
        return sum(n * layer.kv_elements_per_token * layer.kv_tokens(context) for layer, n in self.kinds())

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return sum(1 for layer in self.layers if layer.mlp.is_moe)


def _layer_tensors(hidden: int, layer: LayerShape) -> Iterator[TensorShape]:
    a, m = layer.attention, layer.mlp
    if a.kind == "mla":
        nope = a.head_dim - a.rope_dim
        if a.q_rank:
            yield TensorShape("attention.q_a", (a.q_rank, hidden))
        yield TensorShape("attention.q", (a.heads * a.head_dim, a.q_rank or hidden))
        yield TensorShape("attention.kv_a", (a.kv_rank + a.rope_dim, hidden))
        yield TensorShape("attention.kv_b", (a.heads * (nope + a.value_dim), a.kv_rank))
    else:
        yield TensorShape("attention.q", (a.heads * a.head_dim, hidden))
        yield TensorShape("attention.k", (a.kv_heads * a.head_dim, hidden))
        yield TensorShape("attention.v", (a.kv_heads * a.value_dim, hidden))
    yield TensorShape("attention.o", (hidden, a.heads * a.value_dim))
    if m.intermediate:
        yield from _mlp_tensors("mlp", hidden, m.intermediate, m.gated)
    if m.is_moe:
        yield TensorShape("router", (m.experts, hidden))
        if m.shared:
            yield from _mlp_tensors("shared", hidden, m.shared, m.gated)
        if m.shared_gate:
            yield TensorShape("router", (1, hidden))
        yield from _mlp_tensors("experts", hidden, m.expert_intermediate, m.gated, m.experts, m.top_k)
        if m.expert_bias_elements:
            yield TensorShape("experts.vector", (m.expert_bias_elements,), m.experts, m.top_k)
    vectors = layer.norm_elements + a.bias_elements + m.bias_elements
    if vectors:
        yield TensorShape("vector", (vectors,))


def _mlp_tensors(
    prefix: str, hidden: int, width: int, gated: bool, copies: int = 1, used: int = 1
) -> Iterator[TensorShape]:
    for part in ("gate", "up") if gated else ("up",):
        yield TensorShape(f"{prefix}.{part}", (width, hidden), copies, used)
    yield TensorShape(f"{prefix}.down", (hidden, width), copies, used)
