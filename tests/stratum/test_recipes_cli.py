"""Recipes on the command line and in the artifact: listing, showing, building, what is refused, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stratum
from ir.diagnostics import DiagnosticError
from passes.quantize.recipe import load_recipe, read_recipe, shipped_recipes
from stratum import api
from stratum.cli import main
from tests.own_cache import own_cache


def test_every_recipe_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 2 for line in lines)


def test_shown_recipes_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "w4a8-g32,kv8"]) == 0
    assert read_recipe(capsys.readouterr().out, "shown") == load_recipe("w4a8-g32,kv8")
    out = tmp_path / "mine.toml"
    assert main(["recipes", "show", "w8a8", "-o", str(out)]) == 0
    assert load_recipe(str(out)) == load_recipe("w8a8")
    assert main(["recipes", "show", "w8a8", "-o", str(tmp_path / "no" / "mine.toml")]) == 2
    assert "the recipe cannot be written: No such file or directory" in capsys.readouterr().err


def test_unknown_recipes_are_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "w4a8"]) == 2
    assert "there is no recipe 'w4a8'" in capsys.readouterr().err


def test_unknown_recipes_build_nothing(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["build", str(llama_directory), "-o", str(out), "--recipe", "w9a9"]) == 2
    assert "there is no recipe 'w9a9'" in capsys.readouterr().err
    assert not out.exists()


def test_a_recipe_and_a_pipeline_are_refused(llama_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError, match="a recipe and a pipeline are given"):
        stratum.build(llama_directory, tmp_path / "out", recipe="none", pipeline="cpu")


def test_an_artifact_takes_no_recipe(llama_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(llama_artifact), "x", "--recipe", "w8a8"]) == 2
    assert "--recipe cannot change an artifact that is built already" in capsys.readouterr().err


def test_a_build_says_and_records_its_formats(
    llama_directory: Path, llama_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["build", str(llama_directory), "-o", str(out), "--recipe", "none"]) == 0
    assert " bits per weight: " in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"] == "none"
    assert read_recipe((out / "recipe.toml").read_text(), "artifact") == load_recipe("none")
    weights = manifest["weights"]
    assert {use["format"] for use in weights["formats"]} == {"bf16", "f32"}
    assert 16 < weights["bits_per_weight"] < 17
    floats = json.loads((llama_artifact / "manifest.json").read_text())
    assert floats["recipe"] == "" and floats["weights"]["formats"] == weights["formats"]
    assert (out / "weights" / "weights.bin").read_bytes() == (llama_artifact / "weights" / "weights.bin").read_bytes()


def test_changed_recipe_files_are_other_cache_entries(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path / "cache"))
    path = tmp_path / "mine.toml"
    path.write_text('[weights]\nformat = "float"\n')
    first = api.ensure_built(llama_directory, recipe=str(path))
    assert api.ensure_built(llama_directory, recipe=str(path)) == first
    path.write_text('[weights]\nformat = "f32"\n')
    second = api.ensure_built(llama_directory, recipe=str(path))
    assert first != second
    formats = [json.loads((p / "manifest.json").read_text())["weights"]["formats"] for p in (first, second)]
    assert formats[0] != formats[1]
