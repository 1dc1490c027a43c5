"""What is measured, of which engines, and which bar each row has to reach.

A `Section` is one question put to several engines in turns; its `Bar`s compare our best engine with a peer, or with
what the machine can do. Engines are spelled `stratum:RECIPE`, `llama.cpp:QUANT[+kv]`, `openvino:gGROUP[+genai]`.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS, LLAMA, OPENVINO = "stratum", "llama.cpp", "openvino"
DENSE, MOE = "llama-1.1b", "olmoe-1b-7b"
WARM_TOKENS = 2  # before those that are timed, in every turn: threads wake, caches fill
ALL_OPENVINO = ("openvino:g128", "openvino:g32", "openvino:g128+genai", "openvino:g32+genai")


@dataclass(frozen=True)
class Bar:
    """At least `least` times `against`: the name of a peer, "best peer", "bandwidth", "vnni" or "linear"."""

    against: str
    least: float


@dataclass(frozen=True)
class Section:
    """`action` is prefill, decode or batch; `tokens` at `depth`, or steps of a batch, in each of `turns` turns a round.

    Short turns and many of them: the memory of a shared machine is another one a second later.
    """

    key: str
    title: str
    model: str
    engines: tuple[str, ...]
    action: str
    tokens: int
    depth: int = 0
    bars: tuple[Bar, ...] = ()
    each: bool = False  # every engine of ours has to reach the bars, not the best alone
    turns: int = 1

    def request(self, engine: str, turns: int) -> dict[str, object]:
        """What an engine is asked for in one of `turns` turns. `ahead`: see `openvino_child`."""
        request: dict[str, object] = {"do": self.action, "tokens": self.tokens, "depth": self.depth}
        if self.action == "decode":
            request["warm"] = WARM_TOKENS
        if self.depth and engine.startswith(OPENVINO):
            request["ahead"] = min(self.depth, (self.tokens + WARM_TOKENS) * (turns + 1) // 2)
        return request


@dataclass(frozen=True)
class Effort:
    """How often and how long: rounds of every section, and whether its tests are cut short."""

    rounds: int
    quick: bool


SECTIONS = (
    Section(
        "dense-decode", "dense decode, 4.5 bit", DENSE,
        ("stratum:w4a8-g32", "llama.cpp:q4_0", *ALL_OPENVINO), "decode", 12, turns=4,
        bars=(Bar("best peer", 1.25), Bar("bandwidth", 0.90)),
    ),
    Section(
        "dense-prefill", "dense prefill 512", DENSE,
        ("stratum:w4a8-g32", "llama.cpp:q4_0", *ALL_OPENVINO), "prefill", 512,
        bars=(Bar(LLAMA, 2.5), Bar(OPENVINO, 1.3), Bar("vnni", 0.62)),
    ),
    Section(
        "dense-depth", "dense decode at depth 2048", DENSE,
        ("stratum:w4a8-g32", "stratum:w4a8-g32,kv8", "stratum:w4a8-g32,kv4",
         "llama.cpp:q4_0", "llama.cpp:q4_0+q8_0", "openvino:g128", "openvino:g128+genai"),
        "decode", 12, 2048, turns=2, bars=(Bar("best peer", 1.6),),
    ),
    Section(
        "moe-decode", "MoE decode, 4.5 bit", MOE,
        ("stratum:w4a8-g32", "llama.cpp:q4_0"), "decode", 12, turns=6,
        bars=(Bar(LLAMA, 1.25), Bar("bandwidth", 0.85)),
    ),
    Section(
        "moe-prefill", "MoE prefill 512", MOE, ("stratum:w4a8-g32", "llama.cpp:q4_0"), "prefill", 512,
        bars=(Bar(LLAMA, 4.0),),
    ),
    Section(
        "widths", "dense decode, other widths", DENSE,
        tuple(f"stratum:{recipe}" for recipe in ("w2a8", "w3", "w5a8", "w6a8", "w8a8")), "decode", 12,
        turns=4,
        bars=(Bar("bandwidth", 0.80),), each=True,
    ),
    Section(
        "batch", "dense decode, ragged batches", DENSE, ("stratum:w4a8-g32",), "batch", 12, turns=5,
        bars=(Bar("linear", 0.7),),
    ),
)  # fmt: skip
BATCHES = (1, 2, 4, 8, 16)
JUDGED_BATCH = 8
QUANTIZE = "quantize"
KEYS = (*(section.key for section in SECTIONS), QUANTIZE)


def product_operations(config: dict[str, int], tokens: int) -> float:
    """Operations of the products with weights of a dense step: two a weight and token; the head for one token only."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    return 2.0 * (tokens * config["num_hidden_layers"] * layer + hidden * config["vocab_size"])
