"""Where the cache of one layer lies, in one part or two: what each part holds, and what steps and prompts read of it.

kv_parts(problem, option)      # the older part first, as attention comes to it
"""

from __future__ import annotations

from dataclasses import dataclass

from passes.place.kv_losses import kv_row_bytes
from passes.place.option import Option
from passes.place.problem import Problem


@dataclass(frozen=True)
class KVPart:
    """Of a layer's cache the part at `home`, attended to by `unit`: `positions` of each sequence, `newer` others being
    newer than all of them. Of `seen` a decode step reads. Each position takes `row_bytes` in `format`."""

    home: str
    unit: str
    newer: int
    positions: int
    seen: int
    row_bytes: int = 0
    format: str = ""

    def pairs(self, window: int, prompt: int) -> float:
        """Pairs of a causal prompt's tokens and what they attend to in this part."""
        return _nearer_pairs(window, self.newer + self.positions, prompt) - _nearer_pairs(window, self.newer, prompt)

    def fresh(self, tokens: int) -> int:
        """Positions that come to it when a sequence of `tokens` is there."""
        return max(0, tokens - self.newer)


def attended_pairs(window: int, prompt: int) -> float:
    """Pairs of a token and one it attends to in a causal prompt."""
    if not window or window >= prompt:
        return prompt * (prompt + 1) / 2
    return window * (window + 1) / 2 + (prompt - window) * window


def _nearer_pairs(window: int, positions: int, prompt: int) -> float:
    """Of those pairs the ones that are less than so many positions apart."""
    return attended_pairs(min(window or positions, positions), prompt) if positions else 0.0


def kv_parts(problem: Problem, option: Option) -> tuple[KVPart, ...]:
    """Where the cache of one layer lies: the older part first, as attention comes to it."""
    layer, session = option.part.layer, problem.session
    assert layer is not None
    whole, seen = layer.kv_tokens(session.context), layer.kv_tokens(session.decode_context)
    near = whole - option.kv_old
    newest = KVPart(
        option.kv_home, option.kv_unit, 0, near, min(seen, near), *_stored(problem, option, option.kv_format)
    )  # fmt: skip
    if not option.kv_old:
        return (newest,)
    older = KVPart(
        option.old_home, option.old_unit, near, option.kv_old, seen - newest.seen,
        *_stored(problem, option, option.old_format),
    )  # fmt: skip
    return older, newest


def _stored(problem: Problem, option: Option, text: str) -> tuple[int, str]:
    """Bytes of a position, and the format that they are in."""
    if not text:
        return option.part.kv_bytes_per_token, problem.formats.kv_name
    assert option.part.layer is not None
    return kv_row_bytes(problem, option.part.layer, text), text
