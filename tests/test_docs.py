"""What the documentation shows works: examples run, links lead somewhere, op pages are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ir
from frontends import family
from frontends.huggingface import expected_weights
from ir import op_docs
from passes import PassManager, pass_base
from tests.stratum.tiny_model import LLAMA

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def python_block(page: str) -> str:
    """The first Python example of a page."""
    match = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


def executed(code: str, name: str) -> None:
    exec(compile(code, f"{name}.py", "exec", dont_inherit=True), ModuleType(name).__dict__)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples register is forgotten afterwards."""
    pass_base.registered_passes()
    family.family_names()
    monkeypatch.setattr(pass_base, "PASSES", dict(pass_base.PASSES))
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))


CLIPS = """\
func @step(%x: tensor<4 x f32>) -> tensor<4 x f32> {
  %a = tensor.clip %x {low = -1e30, high = 1e30} : (tensor<4 x f32>) -> tensor<4 x f32>
  %b = tensor.clip %a {low = -1.0, high = 1.0} : (tensor<4 x f32>) -> tensor<4 x f32>
  return %b : tensor<4 x f32>
}
"""


@pytest.mark.usefixtures("registries")
def test_pass_example() -> None:
    executed(python_block("writing-a-pass.md"), "drop_idle_clip")
    module = ir.parse(CLIPS)
    report = PassManager("drop-idle-clip{limit=1e20}").run(module)
    text = ir.print_module(module)
    assert text.count("tensor.clip") == 1 and "low = -1.0" in text
    assert "clips to [-1, 1]" in report.explain()


@pytest.mark.usefixtures("registries")
def test_family_example() -> None:
    executed(python_block("adding-a-family.md"), "phrase")
    config: dict[str, Any] = {**LLAMA, "model_type": "phrase", "architectures": ["PhraseForCausalLM"]}
    names = expected_weights(config)
    assert "model.layers.0.self_attn.q_proj.bias" in names and "model.layers.0.self_attn.o_proj.bias" not in names


def links(page: Path) -> list[tuple[str, str]]:
    """(file, heading) of every link of a page that does not leave the repository; either may be empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    return [(file, heading) for file, _, heading in (t.partition("#") for t in targets) if "://" not in file]


def headings(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    titles = re.findall(r"^#+ +(.*?) *$", _prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for file, heading in links(page):
        target = page.parent / file if file else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(f"{file}#{heading}" if heading else file)
    assert not broken


def test_every_page_is_reached_from_the_first() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = [(page.parent / file).resolve() for file, _ in links(page) if file.endswith(".md")]
            waiting += [target for target in targets if target.exists()]
    assert set(PAGES) == reached & set(PAGES)


def test_op_pages_are_up_to_date() -> None:
    assert op_docs.differences() == [], "run 'make docs'"


def test_readme_opens_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("```")
    assert lines[start + 1].startswith("make demo") and lines[start + 2].startswith("make test")
    assert start <= 3


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z -]+)`", readme) + re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE)
    assert len(named) > 5
    assert {word for words in named for word in words.split()} <= targets
