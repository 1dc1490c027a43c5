"""Windows over a text, models side by side, and `compile-model eval` as a whole."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratum
from frontends.tokenizer import load_tokenizer
from ir.diagnostics import DiagnosticError
from runtime.session import Session
from stratum import evaluation
from stratum.cli import main
from stratum.evaluation import Plan, Text, encode_text, evaluate, plan_windows
from tests.own_cache import own_cache
from tests.plain_code import plain_code
from tests.stratum.tiny_model import LLAMA, write_model

TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()\n" * 3


@dataclass
class Table:
    """A model whose next token depends on the last two: row `a * vocab + b` of a table. Notes every step."""

    table: np.ndarray
    vocab_size: int
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    @classmethod
    def random(cls, vocab_size: int, seed: int) -> Table:
        shape = (vocab_size * vocab_size, vocab_size)
        return cls(np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32), vocab_size)

    def release(self, slot: int) -> int:
        self.seen = []
        return 0

    def step(self, ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        assert positions.tolist() == list(range(len(self.seen), len(self.seen) + len(ids)))
        before = len(self.seen)
        self.seen += ids.tolist()
        self.steps.append((ids.tolist(), rows.tolist()))
        return np.array([self.logits(self.seen[: before + row + 1]) for row in rows]).reshape(-1, self.vocab_size)

    def logits(self, seen: list[int]) -> np.ndarray:
        """After these tokens of a window; the one before the first is token 0."""
        return self.table[(seen[-2] if len(seen) > 1 else 0) * self.vocab_size + seen[-1]]


def text_of(ids: np.ndarray, bos: int | None = None) -> Text:
    return Text(ids.astype(np.int32), bos, num_bytes=3 * (len(ids) - (bos is not None)))


def expected_losses(model: Table, text: Text, windows: list[tuple[int, int, int]]) -> list[float]:
    """Windows (start, stop, first scored token), one position after another."""
    losses = []
    for start, stop, first in windows:
        ids = text.ids[start:stop].tolist()
        if text.bos is not None:
            ids[0] = text.bos
        for at in range(first, stop - start):
            row = model.logits(ids[:at]).astype(np.float64)
            losses.append(math.log(math.fsum(np.exp(row))) - row[ids[at]])
    return losses


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_side_by_side_score_their_second_half() -> None:
    """As llama-perplexity: of n tokens those behind the middle one, n - 1 - n // 2; what is left over is not scored."""
    assert plan_windows(1100, 512) == Plan(512, (0, 512), 255)
    assert plan_windows(1100, 512).tokens == 510
    assert plan_windows(1100, 512, limit=1).starts == (0,)
    assert plan_windows(9, 4) == Plan(4, (0, 4), 1)


def test_windows_with_a_stride_score_each_token_once() -> None:
    assert plan_windows(10, 4, stride=2) == Plan(4, (0, 2, 4, 6), 2)
    assert plan_windows(1025, 513, stride=512) == Plan(513, (0, 512), 512)


@given(tokens=st.integers(2, 300), context=st.integers(2, 64), stride=st.integers(0, 63))
def test_windows_stay_in_the_text(tokens: int, context: int, stride: int) -> None:
    plan = plan_windows(tokens, context, stride=min(stride, context - 1) or None)
    assert plan.starts and plan.starts[-1] + plan.length <= tokens and 1 <= plan.scored < plan.length
    scored = [s + t for s in plan.starts for t in range(plan.length - plan.scored, plan.length)]
    assert len(set(scored)) == len(scored) == plan.tokens
    if stride:
        assert scored == list(range(scored[0], scored[-1] + 1))


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "words"),
    [
        (0, 8, None, "the text has 0 tokens"),
        (1, 8, None, "the text has 1 token\n"),
        (9, 1, None, "a window of 1 tokens predicts nothing"),
        (9, 4, 4, "a stride of 4 does not fit windows of 4 tokens"),
        (9, 4, 0, "a stride of 0"),
    ],
)
def test_windows_that_predict_nothing(tokens: int, context: int, stride: int | None, words: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        plan_windows(tokens, context, stride=stride)
    assert words in str(caught.value)


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_losses_are_those_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch, bos: int | None, piece: int) -> None:
    """Whatever the pieces that a window is run in."""
    monkeypatch.setattr(evaluation, "_LOGITS_BYTES", piece)
    monkeypatch.setattr(evaluation, "_LEAST_PIECE", 3)
    model, other, reference = (Table.random(7, seed) for seed in range(3))
    text = text_of(np.random.default_rng(9).integers(0, 7, 50), bos)
    for stride, windows in (
        (None, [(0, 20, 11), (20, 40, 11)]),
        (6, [(s, s + 20, 14) for s in range(0, 31, 6)]),
    ):
        plan = plan_windows(50, 20, stride=stride)
        told: list[tuple[int, int]] = []
        found = evaluate(
            [model, other], text, plan, reference=reference, tell=lambda done, total, to=told: to.append((done, total))
        )
        for result, of in zip(found, (model, other), strict=True):
            assert result.scores.loss == pytest.approx(expected_losses(of, text, windows), rel=1e-9)
            assert result.scores.reference_loss == pytest.approx(expected_losses(reference, text, windows), rel=1e-9)
            assert result.perplexity.tokens == plan.tokens
        assert told[-1] == (19 * len(windows), 19 * len(windows)) and told == sorted(told)
    widest = max(len(rows) for _, rows in model.steps)
    assert widest <= (3 if piece == 16 else 19)


def test_without_reference() -> None:
    text = text_of(np.arange(12) % 7)
    (found,) = evaluate([Table.random(7, 0)], text, plan_windows(12, 8))
    assert found.reference is None and found.divergence is None and found.perplexity.tokens == 3
    assert found.perplexity.bits_per_byte == pytest.approx(found.perplexity.nats_per_token / math.log(2) / 3)


def test_vocabularies_must_be_equal() -> None:
    text = text_of(np.arange(12) % 7)
    with pytest.raises(DiagnosticError, match="vocabularies of 7 and 8 tokens"):
        evaluate([Table.random(7, 0)], text, plan_windows(12, 8), reference=Table.random(8, 0))
    with pytest.raises(DiagnosticError, match="token id 6"):
        evaluate([Table.random(6, 0)], text, plan_windows(12, 8))


# -- the whole line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reference(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with plain_code():
        return stratum.build(llama_directory, tmp_path_factory.mktemp("artifacts") / "reference", dtype="f32")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path_factory.getbasetemp() / "eval-cache"))


def test_native_models_equal_plain_numpy(llama_artifact: Path, reference: Path, text_file: Path) -> None:
    """The sessions' own logits, all at once, through the formulas of a textbook."""
    tokenizer = load_tokenizer(llama_artifact)
    text = encode_text(text_file.read_text(), tokenizer)
    assert text.bos is None and text.num_bytes == len(TEXT) == len(text.ids) and text.bytes_per_token == 1.0
    plan = plan_windows(len(text.ids), 64, stride=32, limit=4)
    with (
        Session(llama_artifact, threads=1, max_context=64) as ours,
        Session(reference, threads=1, max_context=64) as theirs,
    ):
        (found,) = evaluate([ours], text, plan, reference=theirs)
        losses, divergences, same = [], [], []
        for start in (0, 32, 64, 96):
            ids = text.ids[start : start + 64]
            every = np.arange(64, dtype=np.int32)
            logs = []
            for session in (ours, theirs):
                logits = session.step(ids, every, np.zeros(64, np.int32), every).astype(np.float64)
                shifted = logits - logits.max(axis=1, keepdims=True)
                logs.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
            for row in range(31, 63):
                q, p = logs[0][row], logs[1][row]
                losses.append(-q[ids[row + 1]])
                divergences.append(float(np.exp(p) @ (p - q)))
                same.append(q.argmax() == p.argmax())
    assert found.scores.loss == pytest.approx(losses, rel=1e-3)
    assert found.scores.divergence == pytest.approx(divergences, rel=0.05, abs=1e-6)
    assert found.divergence is not None and found.divergence.mean == pytest.approx(np.mean(divergences), rel=0.01)
    assert 0 < found.divergence.mean < 0.01
    assert found.divergence.top1 == pytest.approx(np.mean(same), abs=0.02)
    assert found.perplexity.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)


def test_begin_token_stands_in_front_of_every_window(llama_directory: Path, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", LLAMA)
    tokenizer = load_tokenizer(directory)
    assert encode_text("abc", tokenizer).bos is None
    settings = json.loads((directory / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    text = encode_text("abc</s>d", load_tokenizer(directory))
    assert text.bos == 256 and text.ids[0] == 256 and text.ids[4] == 257 and len(text.ids) == 6
    assert text.num_bytes == 4 and text.bytes_per_token == pytest.approx(4 / 5)  # </s> is no text
    model = Table.random(300, 0)
    evaluate([model], text_of(np.arange(12), bos=256), plan_windows(12, 4))
    assert [ids[0] for ids, _ in model.steps] == [256, 256, 256]


def arguments(model: Path, text: Path, *more: str) -> list[str]:
    return ["eval", str(model), "--text", str(text), "-t", "1", *more]


def test_command(
    llama_directory: Path,
    llama_artifact: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A directory against itself in f32, as JSON, as text, and as a picture; the same twice."""
    asked = arguments(llama_directory, text_file, "--reference", str(llama_directory), "-c", "64", "--chunks", "2")
    reports = []
    for _ in range(2):
        assert main([*asked, "--json", "--layer-tokens", "24"]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert any(e["event"] == "stage" and e["stage"] == "evaluate" for e in events)
        reports.append(events[-1])
    assert reports[0] == reports[1]
    found = reports[0]
    assert found["event"] == "done" and found["windows"] == 2 and found["tokens"] == 62 and found["context"] == 64
    assert 0 < found["divergence"]["mean"] < found["divergence"]["max"] < 1 and found["divergence"]["top1"] > 0.9
    assert found["reference"]["dtype"] == "f32" and found["dtype"] == "bf16"
    assert found["divergence"]["ratio"] == pytest.approx(found["perplexity"] / found["reference"]["perplexity"])
    places = ["embedding", "layers.0.self_attn", "layers.0", "layers.1.self_attn", "layers.1", "logits"]
    assert [layer["name"] for layer in found["layers"]] == places
    assert found["layers"][0]["error"] == 0.0 and all(0 < layer["error"] < 0.1 for layer in found["layers"][1:])
    assert main([*asked, "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and f"perplexity  {found['perplexity']:.4f} ±" in captured.out
    assert "top-1" in captured.out and "layers.1.self_attn" in captured.out


def test_artifact_alone(llama_artifact: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(llama_artifact, text_file, "-q")) == 0
    out = capsys.readouterr().out
    # The context of 256 is the window; a text of 231 bytes is one shorter window.
    assert "in 1 window of 231, the last 115 of each" in out and "divergence" not in out


def test_bad_texts(llama_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    for content, words in (
        (b"", f"{path}: error: the text is empty"),
        (b"\xef\xbb\xbf", "the text is empty"),
        (b"a", f"{path}: error: the text has 1 token\n"),
        (b"abc\xff", "not UTF-8 (byte 3)"),
    ):
        path.write_bytes(content)
        assert main(arguments(llama_artifact, path)) == 2
        assert words in capsys.readouterr().err
    assert main(arguments(llama_artifact, tmp_path / "absent")) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(arguments(llama_artifact, tmp_path)) == 2
    assert "directory" in capsys.readouterr().err


def test_bad_options(
    llama_artifact: Path, reference: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--reference", str(reference))
    for more, words in (
        (("-c", "257"), "a context of 257 positions was asked for"),
        (("-c", "1"), "a window of 1 tokens predicts nothing"),
        (("--stride", "300"), "a stride of 300"),
        (("--dtype", "f32"), "--dtype cannot change an artifact"),
        (("--recipe", "w8a8"), "--recipe cannot change an artifact"),
        (("--plot", "x.png"), "give --reference"),
        (("--layer-tokens", "4"), "give --reference"),
        ((*both, "--layer-tokens", "4"), "a built artifact cannot be looked into"),
        ((*both, "--plot", str(tmp_path / "picture.txt")), "cannot draw a picture in a file named 'picture.txt'"),
        ((*both, "--plot", str(tmp_path / "absent" / "picture.png")), "the folder of the picture does not exist"),
    ):
        assert main(arguments(llama_artifact, text_file, *more)) == 2
        assert words in capsys.readouterr().err


def test_reference_of_another_vocabulary(
    llama_artifact: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plain_code():
        other = stratum.build(write_model(tmp_path / "other", {**LLAMA, "vocab_size": 320}), tmp_path / "built")
    assert main(arguments(llama_artifact, text_file, "--reference", str(other))) == 2
    assert "the models have vocabularies of 258 and 320 tokens" in capsys.readouterr().err


def test_reference_with_another_tokenizer(
    llama_artifact: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_model(tmp_path / "other", LLAMA)
    settings = json.loads((directory / "tokenizer.json").read_text())
    names = list(settings["model"]["vocab"])
    settings["model"]["vocab"] = {name: i for i, name in enumerate([*names[1:], names[0]])}
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    other = stratum.build(directory, tmp_path / "built")
    assert main(arguments(llama_artifact, text_file, "--reference", str(other))) == 2
    assert "make different tokens of the text" in capsys.readouterr().err


def test_picture_without_matplotlib(
    llama_artifact: Path,
    reference: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    path = tmp_path / "picture.png"
    assert main(arguments(llama_artifact, text_file, "--reference", str(reference), "--plot", str(path))) == 2
    err = capsys.readouterr().err
    assert "drawing needs matplotlib" in err and "pip install 'stratum[plot]'" in err and not path.exists()


@pytest.mark.extra
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_picture(
    llama_artifact: Path,
    reference: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    pytest.importorskip("matplotlib")
    asked = arguments(llama_artifact, text_file, "-q", "-c", "32", "--chunks", "2", "--reference", str(reference))
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for path in paths:
        assert main([*asked, "--plot", str(path)]) == 0
    first, second = (path.read_bytes() for path in paths)
    assert first == second and len(first) > 1000
    capsys.readouterr()
