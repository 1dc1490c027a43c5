"""The table of shipped machines in docs/targets.md, written from their files.

python -m hw_targets.target_docs            # writes it
python -m hw_targets.target_docs --check    # says whether it is up to date
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hw_targets.describe import TABLE_HEAD, table_row
from hw_targets.registry import load, names

PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
BEGIN, END = "<!-- machines: begin -->", "<!-- machines: end -->"


def table() -> str:
    """The Markdown table of every shipped machine."""
    machines = [t for t in (load(name) for name in names() if name != "host") if t.is_machine and _is_shipped(t.origin)]
    return "\n".join([*TABLE_HEAD, *(table_row(target) for target in machines)])


def updated(text: str) -> str:
    """The page with its table written anew. ValueError when the marks are missing."""
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"{PAGE.name} lacks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when --check finds differences."""
    text = PAGE.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def _is_shipped(origin: str) -> bool:
    return Path(origin).parent == Path(__file__).parent / "targets"


if __name__ == "__main__":
    sys.exit(main())
