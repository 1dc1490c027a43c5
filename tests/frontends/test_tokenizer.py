"""tokenizer.json: encoding, special tokens only where the post-processor adds them, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frontends.tokenizer import load_tokenizer
from ir.diagnostics import DiagnosticError
from tests.frontends.tokenizer_files import byte_fallback, byte_level, with_bos, write_tokenizer


@pytest.mark.parametrize("text", ["", "hello world", " two  spaces\n\ttab ", "日本語 🙂 ünï", "a\u0000b", "x" * 3000])
def test_round_trip(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, byte_level()))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_tokens_are_added_as_the_post_processor_says(tmp_path: Path) -> None:
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain", byte_level()))
    bos = plain.id_of("<|bos|>")
    assert bos not in plain.encode("hello")
    adding = load_tokenizer(write_tokenizer(tmp_path / "adding", with_bos(byte_level(), "<|bos|>")))
    assert adding.encode("hello") == [bos, *plain.encode("hello")]
    assert adding.encode("hello", add_special_tokens=False) == plain.encode("hello")
    # text that has the token already is not given a second one
    assert adding.encode("<|bos|>hello", add_special_tokens=False) == [bos, *plain.encode("hello")]
    assert adding.decode([bos, *plain.encode("hello")]) == "hello"
    assert adding.decode([bos], skip_special_tokens=False) == "<|bos|>"
    assert adding.special_ids == {0, 1}
    assert adding.token(0) == "<|bos|>"
    assert adding.token(10**6) is None


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    wanted = backend.encode("hello wonderful world").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert load_tokenizer(write_tokenizer(tmp_path, backend)).encode("hello wonderful world") == wanted


def test_names_of_special_tokens(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|bos|>", "lstrip": False}, "eos_token": "<|eos|>", "pad_token": None}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, byte_level(), config))
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.mark.parametrize(
    ("asked", "adds", "said"), [(True, True, 0), (True, False, 1), (False, True, 1), (False, False, 0)]
)
def test_disagreement_about_bos_is_said(asked: bool, adds: bool, said: int, tmp_path: Path) -> None:
    backend = with_bos(byte_level(), "<|bos|>") if adds else byte_level()
    config = {"bos_token": "<|bos|>", "add_bos_token": asked}
    lines = load_tokenizer(write_tokenizer(tmp_path, backend, config)).warnings()
    assert len(lines) == said
    assert all("the post-processor is followed" in line for line in lines)


def test_vocabulary_larger_than_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, byte_level()))
    size = tokenizer.vocab_size
    assert load_tokenizer(tmp_path, vocab_size=size).vocab_size == size
    assert load_tokenizer(tmp_path, vocab_size=size + 100).vocab_size == size
    with pytest.raises(DiagnosticError) as caught:
        load_tokenizer(tmp_path, vocab_size=size - 1)
    text = str(caught.value)
    assert f"has id {size - 1}, but the model has {size - 1} embeddings" in text
    assert "the tokenizer belongs to another model" in text


def test_added_tokens_count(tmp_path: Path) -> None:
    backend = byte_fallback()
    size = backend.get_vocab_size()
    backend.add_tokens(["<extra>"])
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, backend))
    assert tokenizer.vocab_size == size + 1
    assert size in tokenizer.encode("a <extra> b")


def test_missing_tokenizer_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DiagnosticError) as caught:
        load_tokenizer(tmp_path)
    assert "has no tokenizer.json; there are tokenizer.model" in str(caught.value)
    assert "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "Nonsense"}}', "not json", "{" * 50_000])
def test_bad_tokenizers_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DiagnosticError, match="is no tokenizer: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", ["[]", "{", json.dumps({"x": 1})[:-1]])
def test_bad_tokenizer_config_is_refused(config: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DiagnosticError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path, byte_level())
    monkeypatch.setattr("frontends.tokenizer.MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(DiagnosticError, match="expected: at most 100 bytes"):
        load_tokenizer(tmp_path)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, byte_level()))
    with pytest.raises(DiagnosticError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\udcff")


def test_strange_special_tokens_are_left_out(tmp_path: Path) -> None:
    config: dict[str, Any] = {"bos_token": 5, "eos_token": {"content": 7}, "unk_token": ["x"]}
    assert load_tokenizer(write_tokenizer(tmp_path, byte_level(), config)).special_tokens == {}
