"""The page about targets is true: its table, its example file, its package, and it names every field."""

import re
import sys

import pytest

import hw_targets
from hw_targets import registry, schema_tables, target_docs
from hw_targets.describe import describe, table_row
from hw_targets.schema import parse_target

PAGE = target_docs.PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
EXAMPLE = next(text for language, text in BLOCKS if language == "toml" and text.startswith("name ="))


def test_table_is_that_of_the_files():
    assert target_docs.main(["--check"]) == 0, "run 'python -m hw_targets.target_docs'"
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert rows == [name for name in hw_targets.names()[1:] if hw_targets.load(name).is_machine]


def test_old_table_is_noticed():
    assert target_docs.updated(PAGE.replace("3.35 TB/s", "9.99 TB/s")) == PAGE
    with pytest.raises(ValueError, match="lacks"):
        target_docs.updated("# another page")


def test_example_is_a_whole_file():
    target = parse_target(EXAMPLE, "workstation.toml")
    gpu, pcie = target.unit("gpu"), target.link_between("dram", "vram")
    assert gpu is not None and gpu.count == 2 and gpu.achieved_of("f16") == pytest.approx(0.7 * 165e12)
    assert pcie is not None and pcie.rate("vram") == pytest.approx(0.8 * 31.5e9) and pcie.rate(pinned=False) == 6e9


def test_page_names_every_field():
    tables = [t for t in vars(schema_tables).values() if isinstance(t, type) and issubclass(t, schema_tables.Table)]
    fields = {name for table in tables for name in table.__struct_encode_fields__}
    assert len(fields) > 40
    words = set(re.findall(r"[a-z_]+", PAGE))
    assert sorted(fields - words) == ["disabled"]  # explained with features in the schema


def test_package_with_its_own_machine(tmp_path, monkeypatch):
    """A distribution as pip would have installed it, made of the page's own text."""
    entry = next(text for language, text in BLOCKS if language == "toml" and "entry-points" in text)
    line = next(part for part in entry.splitlines() if part.startswith("workstation"))
    package = tmp_path / "acme_targets"
    package.mkdir()
    (package / "__init__.py").write_text(next(text for language, text in BLOCKS if language == "python"))
    (package / "workstation.toml").write_text(EXAMPLE)
    information = tmp_path / "acme_targets-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-targets\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[stratum.targets]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "workstation" in hw_targets.names()
    target = hw_targets.load("workstation{gpu.count=1 vram.count=1 pcie.count=1}")
    assert target.origin == str(package / "workstation.toml") and target.units[1].count == 1
    assert "workstation" not in target_docs.table()  # it is not one of ours
    sys.modules.pop("acme_targets", None)


def test_name_that_is_shipped_stays_what_it_is(monkeypatch):
    points = {"rtx-4090": object()}
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    assert hw_targets.load("rtx-4090").origin.endswith("rtx-4090.toml")
    assert hw_targets.names().count("rtx-4090") == 1


def test_description_of_a_node():
    text = "\n".join(describe(parse_target(EXAMPLE, "x")))
    assert "2 x gpu     gpu sm_89, f16 165 TFLOP/s, f8 330 TFLOP/s, of that f16 70%, launch 4 us, 450 W" in text
    assert "cores       16 cores, bf16 240 GFLOP/s a core" in text and "barrier 300 ns" in text
    assert "dram        128 GiB, 8 GiB of it reserved, read 180 GB/s, 20 GB/s with 1 thread" in text
    assert "flash-bus   flash to dram 3 GB/s, one way at a time" in text
    assert "root        switch, 31.5 GB/s together" in text
    assert (
        "nvme        2 TB, read up to 5 GB/s, single blocks of 4 KiB 60 MB/s, write 3 GB/s, first 20 GB at 7 GB/s"
        in text
    )
    assert "power       1200 W a node" in text and "white paper" not in text
    with_sources = "\n".join(describe(parse_target(EXAMPLE, "x"), sources=True))
    assert "peak: white paper" in with_sources and "efficiency: measured" in with_sources


def test_description_of_what_nobody_stated():
    target = hw_targets.load("x86-64-v3")
    text = "\n".join(describe(target))
    assert "cores not stated, peak not known" in text and "size not stated, bandwidth not known" in text
    assert table_row(target).startswith("| `x86-64-v3` |")
    priced = parse_target(EXAMPLE.replace("[llvm]", "[price]\nhour = 2.5\nsource = 'a list'\n[llvm]", 1), "x")
    assert "price       2.5 USD an hour" in "\n".join(describe(priced))
