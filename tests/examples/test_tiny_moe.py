"""examples/tiny-moe is a whole model directory, and its corpus is what its README says."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from examples import corpus
from examples.model_presets import config_fields, tensor_shapes

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"


def stored_entries() -> dict[str, dict]:
    with (FOLDER / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_the_weights_are_those_its_config_asks_for() -> None:
    wanted = {tensor.name: list(tensor.shape) for tensor in tensor_shapes(config_fields(str(FOLDER / "config.json")))}
    entries = stored_entries()
    assert {name: entry["shape"] for name, entry in entries.items()} == wanted
    assert {entry["dtype"] for entry in entries.values()} == {"BF16"}


def test_it_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12_000_000


def test_products_divide_into_groups_of_128() -> None:
    for name, entry in stored_entries().items():
        if name.endswith("proj.weight"):
            assert [size % 128 for size in entry["shape"]] == [0, 0]


def test_the_tokenizer_holds_every_id_and_gives_the_held_out_text_back() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    config = json.loads((FOLDER / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(corpus.END_OF_TEXT) == config["eos_token_id"] == config["bos_token_id"]
    text = (FOLDER / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(config["eos_token_id"]) == text.count(corpus.END_OF_TEXT) > 10
    assert len(text.encode()) / len(ids) > 3  # bytes per token: it knows the language


def test_the_corpus_is_the_same_twice_and_the_held_out_part_stays_out() -> None:
    documents = corpus.standard_library_documents()
    assert documents == corpus.standard_library_documents()
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert not any("/test/" in f"/{name}" for name in names)
    held_out = {text for name, text in documents if corpus.is_held_out(name)}
    assert held_out
    assert held_out.isdisjoint(text for name, text in documents if not corpus.is_held_out(name))


def test_documents_are_cleaned(tmp_path: Path) -> None:
    body = "x = 1\n" * 100
    for name, content in {
        "a.py": body,
        "b.py": body,
        "short.py": "x = 1\n",
        "test/c.py": body + "y",
        "d.py": body.replace("\n", "\r\n") + "if x:\r\n\ty\r\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode())
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 200)
    documents = dict(corpus.standard_library_documents(tmp_path))
    assert sorted(documents) == ["a.py", "d.py"]  # b is a copy of a
    assert documents["d.py"].endswith("if x:\n    y\n")
