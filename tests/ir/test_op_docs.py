"""The reference pages in docs/ops are those of the op classes."""

from __future__ import annotations

from pathlib import Path

import pytest

import ir
from ir import op_docs
from ir.op_def import OPS


def test_pages_are_current() -> None:
    assert op_docs.differences() == [], "run: python -m ir.op_docs"


def test_every_op_and_field_is_on_its_page() -> None:
    pages = op_docs.pages()
    for name, cls in OPS.items():
        page = pages[f"{name.split('.')[0]}.md"]
        assert f"\n## {name}\n" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "```text" in section, f"the example of {name} is not shown"
        assert f"[`{name}`]" in pages["README.md"]
        for field in (*cls.operand_fields, *cls.attr_fields, *cls.result_fields, *cls.region_fields):
            assert f"`{field.name}`" in section


def test_check_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert op_docs.main([str(tmp_path)]) == 0
    assert op_docs.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "gemm.md").write_text("old")
    (tmp_path / "norm.md").unlink()
    (tmp_path / "gone.md").write_text("x")
    capsys.readouterr()
    assert op_docs.main(["--check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    for line in ("gemm.md is stale", "norm.md is missing", "gone.md belongs to no family", "python -m ir.op_docs"):
        assert line in out
    assert op_docs.main([str(tmp_path)]) == 0
    assert op_docs.differences(tmp_path) == []


def test_the_example_of_the_text_form_is_current() -> None:
    page = (op_docs.DOCS.parent / "ir-text.md").read_text(encoding="utf-8")
    text = page.split("```text\n", 1)[1].split("```", 1)[0]
    module = ir.parse(text)
    ir.verify(module)
    assert ir.print_module(module) == text
