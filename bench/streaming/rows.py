"""The rows of the table: models, limits of memory and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass

from hw_targets.routing import MIXED, Router

GIB = 1 << 30
# As `examples.session_router` makes it: of 64 experts two change places every sixteen tokens.
DRIFTING = Router(exponent=1.4, drift=2 / 16)


@dataclass(frozen=True)
class Row:
    """One model under one limit. `cap` in bytes, 0 for none; `prompt` tokens are one prompt instead of decoded tokens.

    `topics`: tokens follow a conversation over so many topics, for models whose router knows them; `router`: what is
    assumed of the routing before anything runs, None where there are no experts.
    """

    name: str
    title: str
    model: str
    recipe: str
    gguf: str
    cap: int
    prompt: int = 0
    topics: int = 1
    router: Router | None = None

    @property
    def scattered(self) -> bool:
        """Whether it reads experts here and there, and not the file from its beginning to its end."""
        return self.router is not None and not self.prompt


ROWS = (
    Row("uniform-none", "near uniform, no limit", "olmoe-1b-7b", "w4a8-g32", "q4_0", 0, router=MIXED),
    Row("uniform-2g", "near uniform, 2 GiB", "olmoe-1b-7b", "w4a8-g32", "q4_0", 2 * GIB, router=MIXED),
    Row("uniform-1g", "near uniform, 1 GiB", "olmoe-1b-7b", "w4a8-g32", "q4_0", GIB, router=MIXED),
    Row("prompt-1g", "prompt of 512, 1 GiB", "olmoe-1b-7b", "w4a8-g32", "q4_0", GIB, prompt=512, router=MIXED),
    Row("session-1g", "session, 1 GiB", "olmoe-1b-7b-session", "w4a8-g32", "q4_0", GIB, topics=8, router=DRIFTING),
    Row("dense-1g", "dense bf16, 1 GiB", "llama-1.1b", "bf16", "bf16", GIB),
)


def chosen(names: str) -> tuple[Row, ...]:
    """The rows that one of the comma-separated texts occurs in. Raises ValueError where there is none."""
    found = tuple(row for row in ROWS if any(text in row.name for text in names.split(",")))
    if not found:
        raise ValueError(f"no row is called {names!r}; there are {', '.join(row.name for row in ROWS)}")
    return found
