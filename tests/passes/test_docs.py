"""The pages about passes: their example works, and no pass or option is missing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import ir
from passes import PassManager, pass_base
from passes.pass_base import find_pass

FOLDER = Path(__file__).parents[2] / "docs" / "passes"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}


def test_every_pass_of_ours_has_its_place():
    find_pass("cse")
    for name, cls in pass_base.PASSES.items():
        if not cls.__module__.startswith("passes."):
            continue
        assert f"`{name}`" in PAGES["README.md"], name
        options = [field.name.replace("_", "-") for field in dataclasses.fields(cls)]
        word = re.compile(rf"(?<![\w-]){name}(?![\w-])")
        pages = [text for file, text in PAGES.items() if file != "README.md" and word.search(text)]
        assert pages, name
        assert any(all(option in text for option in options) for text in pages), f"{name} has options {options}"


def test_pages_link_to_pages_that_exist():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (FOLDER / target).exists(), f"{name} links to {target}"


def test_the_example_pass_works(monkeypatch):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL) if "register_pass" in c)
    find_pass("cse")
    monkeypatch.setattr(pass_base, "PASSES", dict(pass_base.PASSES))
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "example"})
    module = ir.parse(
        "func @main(%x: tensor<4 x f32>) -> tensor<4 x f32> {\n"
        "  %a = tensor.clip %x {low = -1e31, high = 1e31} : (tensor<4 x f32>) -> tensor<4 x f32>\n"
        "  %b = tensor.clip %a {low = 0.0, high = 1e31} : (tensor<4 x f32>) -> tensor<4 x f32>\n"
        "  return %b : tensor<4 x f32>\n"
        "}\n"
    )
    report = PassManager("drop-wide-clips").run(module)
    assert [op.name for op in module.function("main").block.ops] == ["tensor.clip", "func.return"]
    assert "DropWideClip left tensor.clip alone: 0.0 .. 1e+31 may be left" in report.explain()
