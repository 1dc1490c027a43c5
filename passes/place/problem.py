"""What a plan is asked for: a model, a machine, formats and a session; and what is true of every answer.

`Session` says how the model is used: sequences at once, context to reserve, the prompt and the tokens after it. Its
prefill is that of one prompt (or of `prompts` at once), in chunks; its decode step gives every sequence one token in
the middle of what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from frontends.model_shape import LayerShape, ModelShape
from passes.place.expert_mix import misses_by_rank
from passes.place.format_menu import Menu
from passes.place.formats import Formats
from passes.place.kv_formats import KVMenu
from passes.place.machine import Machine
from passes.place.parts import Part, parts_of
from passes.place.routing_model import fixed_share, hit_rate

NEAR = "near"  # a pin of keys and values: in whatever memory they lie, a unit of that memory attends
HitRate = Callable[[int, int, int, int], float]  # experts, top_k, slots a layer, batch -> share found
# layers, their experts by rank, slots a layer -> misses by rank, in any unit
MissesByRank = Callable[[tuple[int, ...], tuple[tuple[int, ...], ...], int], tuple[float, ...]]


@dataclass(frozen=True)
class Session:
    """`batch` sequences of at most `context` tokens; each has a prompt, then makes `generate` tokens.

    `chunk` tokens of a prompt pass at once, `micro_batches` groups of sequences take turns, so that units work at the
    same time, and `depth` buffers of every stream are filled ahead. `prompts` of equal length pass together, so that
    what is moved for a pass is moved once for all of them (1: each by itself, the first token as early as can be).
    Of the experts that a cache lacks up to `ahead` of a layer are guessed and brought while the layer before computes.
    """

    context: int = 4096
    batch: int = 1
    prompt: int = 512
    generate: int = 128
    chunk: int = 512
    micro_batches: int = 1
    depth: int = 2
    prompts: int = 1
    ahead: int = 0

    @property
    def prompt_rows(self) -> int:
        """Tokens of the prompts that pass together."""
        return self.prompt * self.prompts

    @property
    def passes(self) -> int:
        """Chunks that a prompt takes."""
        return math.ceil(self.prompt / self.chunk)

    @property
    def decode_context(self) -> int:
        """Tokens that a decode step reads back, on average."""
        return max(1, min(self.context, self.prompt + self.generate // 2))


@dataclass(frozen=True)
class Pin:
    """A decision taken beforehand: `[layers.A-B.]group=where`. `text` is what the user wrote.

    `share`: of keys and values, how much of every layer's lies there; of experts, how many of every layer's have that
    recipe; None: all.
    """

    text: str
    group: str
    where: str
    layers: tuple[int, int] | None = None
    share: float | None = None

    def concerns(self, part: Part) -> bool:
        """Whether it is about this part."""
        group = "attention" if self.group == "kv" else self.group
        if self.group != "weights" and group != part.group:
            return False
        if self.layers is None:
            return True
        return bool(part.layers) and self.layers[0] <= part.layers[0] <= self.layers[1]


@dataclass(frozen=True)
class Slo:
    """Bounds in seconds: of the first token, of every further one. None: no bound."""

    ttft: float | None = None
    tpot: float | None = None

    def kept(self, ttft: float, tpot: float) -> bool:
        """Whether a first token after `ttft` seconds and `tpot` for each further one are within the bounds."""
        return (self.ttft is None or ttft <= self.ttft) and (self.tpot is None or tpot <= self.tpot)


@dataclass(frozen=True)
class Problem:
    """All that a placement depends on."""

    shape: ModelShape
    machine: Machine
    formats: Formats
    session: Session = Session()
    pins: tuple[Pin, ...] = ()
    slo: Slo = Slo()
    # Communication of units that work together on every layer: ((resource, seconds), ...) of a decode step, a prefill.
    together_decode: tuple[tuple[str, float], ...] = ()
    together_prefill: tuple[tuple[str, float], ...] = ()
    cached: HitRate = field(default=hit_rate, compare=False)
    popular: HitRate = field(default=fixed_share, compare=False)
    missing: MissesByRank | None = field(default=None, compare=False)  # None: by how often experts are asked for
    move_for_prompts: bool = True  # whether weights by a slow unit may be moved to another one for prompts
    compute_missed: bool = True  # whether experts that a cache lacks may be computed where they lie
    divide_kv: bool = True  # whether the cache of a layer may be divided between two places
    menu: Menu | None = None  # formats to choose among; None: `formats` throughout
    kv_menu: KVMenu | None = None  # formats of the cache to choose among; None: that of `formats`

    def parts(self) -> tuple[Part, ...]:
        """The parts to place; pins of single layers cut runs of equal ones."""
        return parts_of(self.shape, self.formats, self._cuts())

    def variants(self) -> tuple[tuple[Part, ...], ...]:
        """Of each part the ways to store it: one, or one for each format that may be chosen."""
        if self.menu is None:
            return tuple((part,) for part in self.parts())
        shares = {(pin.where, pin.share): None for pin in self.pins if pin.group == "experts" and pin.share is not None}
        return self.menu.variants(self.shape, self._cuts(), tuple(shares))

    def missed_bytes(self, part: Part, slots: int, hit: float) -> float:
        """Bytes of an expert that a cache of so many slots lacks, on average; `hit` is the share that it has."""
        if part.mix is None:
            return part.expert_bytes
        if self.missing is not None and self.session.batch == 1:
            return part.mix.missed(self.missing(part.layers, part.mix.orders, slots))
        return part.mix.missed(misses_by_rank(part.mix.chances, hit))

    def _cuts(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys(pin.layers for pin in self.pins if pin.layers is not None))

    def workspace_bytes(self) -> int:
        """Activations of the larger phase: rows of the stream, the widest layer, and the logits."""
        shape, session = self.shape, self.session
        rows = max(
            min(session.chunk, session.prompt) * session.prompts, math.ceil(session.batch / session.micro_batches)
        )
        widest = max(_width(layer) for layer, _ in shape.kinds())
        logits = session.batch * shape.vocab * 4
        return rows * (4 * shape.hidden + widest) * 4 + logits


def _width(layer: LayerShape) -> int:
    """Elements of a row in the widest part of a layer."""
    attention, mlp = layer.attention, layer.mlp
    qkv = attention.heads * (attention.head_dim + attention.value_dim) + attention.kv_elements
    return max(qkv, 2 * mlp.intermediate, 2 * mlp.shared, 2 * mlp.top_k * mlp.expert_intermediate + mlp.experts)
