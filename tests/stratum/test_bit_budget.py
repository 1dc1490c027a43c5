"""--bits-per-weight and --size through the whole command: kept budgets, recipes that build the same again, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hw_targets.routing import write_trace
from ir.diagnostics import DiagnosticError
from passes.place.cache_choice import session_trace
from passes.quantize.recipe import load_recipe
from stratum import bit_budget
from stratum.bit_budget import BitBudget, find_recipe
from stratum.calibration_tokens import tokens_of_text
from stratum.cli import main
from stratum.weights_file import weights_file_bytes
from tests.plain_code import plain_code
from tests.stratum.tiny_model import VOCAB

SMALL = "w3,w4a8-g32,w8a8"  # candidates, so that measuring is quick


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} green bottles, standing on the wall. " for n in range(99, 0, -1)))
    return path


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bit_budget, "SEQUENCES", 4)
    monkeypatch.setattr(bit_budget, "LENGTH", 24)
    monkeypatch.setattr(
        bit_budget, "cache_root", lambda: tmp_path / "cache"
    )  # compiled kernels are shared by all tests


def files_of(artifact: Path) -> dict[str, bytes]:
    return {str(p.relative_to(artifact)): p.read_bytes() for p in sorted(artifact.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_the_saved_recipe_builds_the_same_artifact(
    llama_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, saved = tmp_path / "first", tmp_path / "second", tmp_path / "elsewhere" / "saved.toml"
    saved.parent.mkdir()
    options = {"bits-per-weight": 5, "calibration": text, "recipe": "w4a8-g32", "save-recipe": saved}
    budget = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with plain_code():
        assert main(["build", str(llama_directory), "-o", str(first), *budget]) == 0
    told = capsys.readouterr().err
    for words in ("bits per weight", "text.txt", "taken", "10 % more bytes", "attention.q+k+v", "sensitivity"):
        assert words in told
    with plain_code():
        assert main(["build", str(llama_directory), "-o", str(second), "--recipe", str(saved), "-q"]) == 0
    assert files_of(first) == files_of(second)
    assert load_recipe(str(first / "recipe.toml")) == load_recipe(str(saved))
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["recipe"] == load_recipe(str(saved)).name
    assert str(tmp_path) not in (first / "manifest.json").read_text()


@pytest.mark.parametrize("calibration", ["none", "text"])
def test_a_size_is_that_of_the_whole_file(
    llama_directory: Path, text: Path, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [weights_file_bytes(llama_directory, load_recipe(r)) for r in ("w3", "w8a8")]
    size = sum(ends) // 2
    given = calibration if calibration == "none" else str(text)
    found = find_recipe(llama_directory, BitBudget(size=size, recipe=SMALL, calibration=given))
    taken = weights_file_bytes(llama_directory, found.recipe)
    assert taken == found.facts["file_bytes"] <= size
    assert taken > ends[0]  # it was used
    monkeypatch.setattr(bit_budget, "import_model", None)  # what was found is kept
    again = find_recipe(llama_directory, BitBudget(size=size, recipe=SMALL, calibration=given))
    assert (again.recipe, again.report) == (found.recipe, found.report)
    Path(again.path).write_text("[")
    with pytest.raises(TypeError):  # a damaged entry is not taken
        find_recipe(llama_directory, BitBudget(size=size, recipe=SMALL, calibration=given))


def test_more_bits_never_lose_more(llama_directory: Path) -> None:
    losses = []
    for bits in (2.5, 3.5, 4.5, 6.0, 8.5, 16.0, 32.0):
        found = find_recipe(llama_directory, BitBudget(bits_per_weight=bits, calibration="none"))
        assert found.facts["bits_per_weight"] <= bits
        losses.append(found.facts["modelled_loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0  # bf16, as the checkpoint has it


def test_a_model_writes_its_own_text_once(llama_directory: Path, tmp_path: Path) -> None:
    budget = BitBudget(bits_per_weight=6.0, recipe=SMALL)
    found = find_recipe(llama_directory, budget)
    assert "a text of the model's own" in found.report
    (tokens,) = (tmp_path / "cache" / "sensitivity").glob("*.npy")
    first = np.load(tokens)
    assert first.shape == (bit_budget.SEQUENCES, 24) and first.min() >= 0 and first.max() < VOCAB
    assert len(np.unique(first)) > 20
    tokens.write_bytes(b"damaged")
    (table,) = (tmp_path / "cache" / "sensitivity").glob("*.jsonl")
    table.unlink()
    for path in (tmp_path / "cache" / "recipes").iterdir():
        path.unlink()
    again = find_recipe(llama_directory, budget)
    assert np.array_equal(np.load(tokens), first)
    assert again.recipe == found.recipe


def test_texts_are_cut_evenly(llama_directory: Path, text: Path) -> None:
    found = tokens_of_text(llama_directory, text, vocab_size=VOCAB, sequences=5, length=100)
    ids = tokens_of_text(llama_directory, text, vocab_size=VOCAB, sequences=1, length=100)
    assert found.shape == (5, 100) and np.array_equal(found[0], ids[0])
    assert bytes(found[-1].astype(np.uint8)[-12:]) != bytes(found[0].astype(np.uint8)[-12:])
    with pytest.raises(DiagnosticError, match="too short"):
        tokens_of_text(llama_directory, text, vocab_size=VOCAB, sequences=5, length=100_000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits-per-weight", "4", "--size", "1MiB"], "both given"),
        (["--bits-per-weight", "4", "-p", "cpu"], "a budget and a pipeline"),
        (["--bits-per-weight", "0"], "a number above 0"),
        (["--bits-per-weight", "nan"], "a number above 0"),
        (["--bits-per-weight", "1", "--calibration", "none"], "bytes or more"),
        (["--size", "1KB", "--calibration", "none"], "embedding table"),
        (["--size", "big"], "16GiB"),
        (["--size", "0"], "one byte or more"),
        (["--calibration", "none"], "--bits-per-weight or --size"),
        (["--save-recipe", "x.toml"], "--bits-per-weight or --size"),
        (["--bits-per-weight", "4", "--calibration", "no-such-file"], "no-such-file"),
        (["--bits-per-weight", "4", "--recipe", "w4a9"], "w4a8"),
    ],
)
def test_budgets_that_cannot_be(
    llama_directory: Path, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(llama_directory), "-o", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_an_artifact_has_its_formats_already(llama_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(llama_artifact), "hello", "--bits-per-weight", "4"]) == 2
    assert "--bits-per-weight cannot change an artifact" in capsys.readouterr().err


def test_traces_that_say_nothing_are_refused(llama_directory: Path, tmp_path: Path) -> None:
    """None of this model, no trace at all, and one that nobody asks."""
    trace = tmp_path / "trace.csv"
    with pytest.raises(DiagnosticError, match=r"trace\.csv"):
        find_recipe(llama_directory, BitBudget(4.0, recipe=SMALL, calibration="none", by_expert=True, trace=trace))
    write_trace(session_trace(4, 2), trace)
    with pytest.raises(DiagnosticError, match="the routing trace is of 4 experts"):
        find_recipe(llama_directory, BitBudget(4.0, recipe=SMALL, calibration="none", by_expert=True, trace=trace))
    with pytest.raises(DiagnosticError, match="by_expert as well"):
        BitBudget(4.0, trace=trace)
    given = ["build", str(llama_directory), "-o", str(tmp_path / "out"), "--bpw", "4", "--expert-trace", str(trace)]
    assert main(given) == 2
