"""Reference pages of the ops, made from their classes: one Markdown file a family, and an index.

python -m ir.op_docs            # writes docs/ops
python -m ir.op_docs --check    # exit code 1 and a list when a page is missing, stale or left over
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ir.op_def import OPS, Field, Op

DOCS = Path(__file__).resolve().parent.parent / "docs" / "ops"
_NOTE = "<!-- Made by `python -m ir.op_docs` from the op classes; change those. -->"


def pages() -> dict[str, str]:
    """File name -> text, for every family that is registered, and README.md."""
    importlib.import_module("ir.ops")  # registers every op
    families: dict[str, list[type[Op]]] = {}
    for name in OPS:
        families.setdefault(name.split(".")[0], []).append(OPS[name])
    made = {f"{family}.md": _family_page(family, ops) for family, ops in sorted(families.items())}
    made["README.md"] = _index(families)
    return made


def _index(families: dict[str, list[type[Op]]]) -> str:
    lines = [_NOTE, "", "# Ops", ""]
    lines += ["Every op of the IR, by family. The text form and its rules are those of `ir/grammar.lark`.", ""]
    for family, ops in sorted(families.items()):
        lines += [f"## [{family}]({family}.md)", ""]
        lines += [f"- [`{op.name}`]({family}.md#{_anchor(op.name)}): {_summary(op)}" for op in _by_name(ops)]
        lines.append("")
    return "\n".join(lines)


def _family_page(family: str, ops: Sequence[type[Op]]) -> str:
    lines = [_NOTE, "", f"# {family}", ""]
    modules = list(dict.fromkeys(op.__module__ for op in ops))
    for module in sorted(modules):
        lines += [inspect.cleandoc(sys.modules[module].__doc__ or ""), ""]
    for op in _by_name(ops):
        lines += [f"## {op.name}", "", *_docstring(op), ""]
        rows = [
            *_rows("operand", op.operand_fields),
            *_rows("attribute", op.attr_fields),
            *_rows("region", op.region_fields),
            *_rows("result", op.result_fields),
        ]
        if rows:
            lines += ["| | name | meaning |", "|---|---|---|", *rows, ""]
        traits = ", ".join(trait.__name__ for trait in op.traits)
        lines += [f"Traits: {traits or 'none'}.", ""]
    return "\n".join(lines)


def _by_name(ops: Sequence[type[Op]]) -> list[type[Op]]:
    return sorted(ops, key=lambda op: op.name)


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _summary(op: type[Op]) -> str:
    """The first sentence of the docstring."""
    first = inspect.cleandoc(op.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s", first)[0]


def _docstring(op: type[Op]) -> list[str]:
    """The docstring with its example in a fence. An example is indented below `Example:`, or a paragraph of IR."""
    lines = inspect.cleandoc(op.__doc__ or "").splitlines()
    use = re.compile(rf"(%.* = )?{re.escape(op.name)}\b")
    made: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        indented = line.strip() == "Example:"
        if indented or use.match(line):
            block = lines[index + 1 :] if indented else lines[index:]
            end = next((i for i, text in enumerate(block) if not text.strip()), len(block))
            made += ["```text", *inspect.cleandoc("\n" + "\n".join(block[:end])).splitlines(), "```"]
            index += end + indented
        else:
            made.append(line)
            index += 1
    return made


def _rows(kind: str, fields: Sequence[Field]) -> list[str]:
    rows = []
    for field in fields:
        name = f"`{field.name}`" + (" ..." if field.variadic else "")
        what = field.doc
        if field.kind == "attr":
            what = f"{_type_name(field)}: {what}" + ("" if field.required else f"; default `{field.default}`")
        rows.append(f"| {kind} | {name} | {what.replace('|', chr(92) + '|')} |")
    return rows


def _type_name(field: Field) -> str:
    kinds = field.type if isinstance(field.type, tuple) else (field.type,)
    return " or ".join(kind.__name__ for kind in kinds)


def differences(directory: Path = DOCS) -> list[str]:
    """What is wrong with the pages of a directory, one line each."""
    made = pages()
    found = [f"{name} is missing" for name in made if not (directory / name).exists()]
    for path in sorted(directory.glob("*.md")):
        if path.name not in made:
            found.append(f"{path.name} belongs to no family")
        elif path.read_text(encoding="utf-8") != made[path.name]:
            found.append(f"{path.name} is stale")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ir.op_docs", description="Writes the reference pages of the ops.")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are current")
    parser.add_argument("directory", nargs="?", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(options.directory)
        for line in found:
            print(line)
        if found:
            print("run: python -m ir.op_docs")
        return 1 if found else 0
    options.directory.mkdir(parents=True, exist_ok=True)
    made = pages()
    for path in sorted(options.directory.glob("*.md")):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (options.directory / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
