"""Where something comes from: a span of source text, and the part of the model it stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """`origin` is the module path in the model (`layers.31.mlp.experts.7.up_proj`); it survives every pass.

    `file`, `line`, `column` (1-based) and `length` point into source text when the op was parsed; `source` is the line.
    """

    origin: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    length: int = 1
    source: str = ""

    def prefix(self) -> str:
        """`file:line:col`, or what is known of it."""
        if self.line:
            return f"{self.file or '<text>'}:{self.line}:{self.column}"
        return self.file or self.origin

    def caret_lines(self) -> list[str]:
        """The source line and a caret run below it, when the source is known."""
        if not (self.line and self.source):
            return []
        return [self.source, " " * (self.column - 1) + "^" * max(1, self.length)]


NOWHERE = Location()


def fuse_origins(*origins: str) -> str:
    """The origin of an op that stands for several: their common prefix with the distinct tails, in order.

    `layers.0.self_attn.q_proj`, `layers.0.self_attn.k_proj` -> `layers.0.self_attn.q_proj+k_proj`. An origin that holds
    another one says nothing more: `layers.0`, `layers.0.mlp` -> `layers.0.mlp`.
    """
    distinct = list(dict.fromkeys(o for o in origins if o))
    distinct = [o for o in distinct if not any(other.startswith(o + ".") for other in distinct)]
    if len(distinct) <= 1:
        return distinct[0] if distinct else ""
    parts = [o.split(".") for o in distinct]
    depth = 0
    while all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    head = ".".join(parts[0][:depth])
    tail = "+".join(dict.fromkeys(".".join(p[depth:]) for p in parts))
    return f"{head}.{tail}" if head else tail
