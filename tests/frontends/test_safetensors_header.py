"""The safetensors header: what is read, and every crafted file that must be refused, quickly and in bounded memory."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from frontends.safetensors_header import read_header
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import entry, raw_safetensors, safetensors_bytes


def _one(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> str:
    return json.dumps({"t": entry(dtype, shape if isinstance(shape, str) else list(shape), begin, end)})


TWO = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}
# name -> (file, what the message must say)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is 0 bytes long, too short"),
    "seven bytes": (b"\x01" * 7, "is 7 bytes long, too short"),
    "no header at all": (raw_safetensors(""), "does not begin with '{'"),
    "header beyond the file": (raw_safetensors("{}", length=100), "the header claims 100 bytes at byte 0"),
    "header length 2^63": (raw_safetensors("{}", length=1 << 63), "the header claims 9223372036854775808 bytes"),
    "header is a list": (raw_safetensors("[]"), "does not begin with '{'"),
    "leading blanks": (raw_safetensors("  {}"), "does not begin with '{'"),
    "text after the header": (raw_safetensors("{} x"), "text follows the closing '}'"),
    "header not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "the header is not UTF-8 at byte 10"),
    "header cut short": (raw_safetensors(_one()[:-1], bytes(8)), "expected ',' or '}'"),
    "no colon": (raw_safetensors('{"a" 1}'), "expected ':' after 'a'"),
    "no name": (raw_safetensors("{1: 2}"), "bad header at byte 9: expected a string"),
    "empty name": (raw_safetensors(_one().replace('"t"', '""'), bytes(8)), "has a name of 0 characters"),
    "very long name": (raw_safetensors(_one().replace("t", "t" * 2000, 1), bytes(8)), "a name of 2000 characters"),
    "unknown dtype": (raw_safetensors(_one("F7"), bytes(8)), "tensor 't' has the unknown dtype 'F7'"),
    "dtype is a number": (raw_safetensors(_one(4), bytes(8)), "unknown dtype '4'"),  # pyright: ignore
    "missing field": (raw_safetensors('{"t": {"dtype": "F32", "shape": []}}', bytes(4)), "has the fields dtype, shape"),
    "additional field": (
        raw_safetensors('{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}', bytes(4)),
        "has the fields data_offsets, dtype, shape, x",
    ),
    "entry is a number": (raw_safetensors('{"t": 4}'), "tensor 't' has no entry"),
    "entry is nested": (raw_safetensors('{"t": {"dtype": {"a": {"b": 1}}}}'), "is not valid JSON"),
    "duplicate tensor": (
        raw_safetensors(f'{{"t": {json.dumps(TWO["a"])}, "t": {json.dumps(TWO["b"])}}}', bytes(8)),
        "tensor 't' appears twice",
    ),
    "duplicate field": (
        raw_safetensors('{"t": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        "key 'dtype' appears twice",
    ),
    "duplicate metadata": (raw_safetensors('{"__metadata__": {"a": "1", "a": "2"}}'), "metadata key 'a' appears twice"),
    "metadata not strings": (raw_safetensors('{"__metadata__": {"a": 1}}'), "expected a string"),
    "metadata is a list": (raw_safetensors('{"__metadata__": []}'), "expected one '__metadata__'"),
    "negative dimension": (raw_safetensors(_one(shape=(-2,)), bytes(8)), "has the shape [-2]"),
    "fractional dimension": (raw_safetensors(_one(shape=(2.0,)), bytes(8)), "has the shape [2.0]"),
    "true as dimension": (raw_safetensors(_one(shape=(True, 2)), bytes(8)), "has the shape [True, 2]"),
    "shape is a string": (raw_safetensors(_one(shape="2"), bytes(8)), "has the shape 2"),
    "nine dimensions": (raw_safetensors(_one(shape=(1,) * 9), bytes(8)), "expected: at most 8 numbers"),
    "product wraps to 0": (raw_safetensors(_one(shape=(1 << 32, 1 << 32), end=0)), "tensor 't' has 0 bytes"),
    "product wraps to 8": (raw_safetensors(_one(shape=(1 << 62, 2, 4), end=8), bytes(8)), "tensor 't' has 8 bytes"),
    "too few bytes for the shape": (raw_safetensors(_one(shape=(3,)), bytes(8)), "expected: 12 bytes, the product"),
    "half a byte": (raw_safetensors(_one("F4", (3,), 0, 1), bytes(1)), "tensor 't' has 1 bytes"),
    "negative offset": (raw_safetensors(_one(begin=-8, end=0)), "has data_offsets [-8, 0]"),
    "offsets reversed": (raw_safetensors(_one(begin=8, end=0), bytes(8)), "has data_offsets [8, 0]"),
    "three offsets": (
        raw_safetensors('{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}', bytes(8)),
        "has data_offsets [0, 8, 8]",
    ),
    "data beyond the end": (raw_safetensors(_one(), bytes(7)), "but the file ends at byte"),
    "data of 2^60 bytes": (raw_safetensors(_one(shape=(1 << 58,), end=1 << 60)), "but the file ends at byte"),
    "gap before the data": (raw_safetensors(_one(begin=4, end=12), bytes(12)), "4 bytes between the header and"),
    "gap between tensors": (
        raw_safetensors(json.dumps({"a": TWO["a"], "b": entry("F32", [1], 8, 12)}), bytes(12)),
        "4 bytes between tensor 'a' and tensor 'b'",
    ),
    "overlap": (
        raw_safetensors(json.dumps({"a": TWO["a"], "b": entry("F32", [1], 2, 6)}), bytes(6)),
        "tensor 'b' at byte",
    ),
    "the same bytes twice": (raw_safetensors(json.dumps({"a": TWO["a"], "b": TWO["a"]}), bytes(4)), "overlaps tensor"),
    "bytes after the data": (raw_safetensors(_one(), bytes(9)), "1 bytes after tensor 't'"),
    "only data": (raw_safetensors("{}", bytes(5)), "5 bytes after the header"),
    "deep nesting": (raw_safetensors('{"t": ' + "[" * 100_000), "tensor 't' has no entry"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" + bytes(40), "the header claims"),
    "a zip": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(40), "the header claims"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused(kind: str, tmp_path: Path) -> None:
    content, message = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(DiagnosticError) as caught:
        read_header(path)
    assert time.process_time() - start < 1.0
    assert str(caught.value).startswith(f"{path}: error: ") or str(caught.value).startswith(f"{path}: tensor")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"t":' + "[" * 4_000_000,
        '{"t":{"dtype":' * 300_000,
        '{"t":{"shape":[' + "1," * 2_000_000,
        '{"' + "t" * 4_000_000,
        "{" + " " * 4_000_000,
        '{"__metadata__":{' + '"a":"",' * 600_000,
        '{"t":{"dtype":"F32","shape":[' + "9" * 3_000_000 + '],"data_offsets":[0,0]}}',
    ],
    ids=["lists", "objects", "shape", "name", "blanks", "metadata", "number"],
)
def test_large_garbage_is_refused_in_bounded_time_and_memory(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors(text))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(DiagnosticError):
        read_header(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 40 * len(text)


def test_header_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(100_000_100)  # a sparse file: nothing is written
    with pytest.raises(DiagnosticError, match="expected: at most 100000000"):
        read_header(path)


def test_number_of_tensors_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frontends.safetensors_header.MAX_TENSORS", 3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({f"t{i}": np.zeros(1, np.float32) for i in range(4)}))
    with pytest.raises(DiagnosticError, match="more than 3 tensors"):
        read_header(path)


def test_places_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": np.zeros((2, 3), np.float32), "b": ("F8_E4M3", (5,)), "c": ("I64", ())}))
    tensors, metadata = read_header(path)
    size = path.stat().st_size
    assert [(t.name, t.dtype, t.shape, t.nbytes, t.offset) for t in tensors.values()] == [
        ("a", "F32", (2, 3), 24, size - 37),
        ("b", "F8_E4M3", (5,), 5, size - 13),
        ("c", "I64", (), 8, size - 8),
    ]
    assert metadata == {"format": "pt"}


def test_padding_escapes_and_empty_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    empty, full = json.dumps(entry("F32", [0, 4], 0, 0)), json.dumps(entry("F32", [2], 0, 8))
    header = f'{{ "e" : {empty},\t"\\u00e9}}" :{full}}}   \n'
    path.write_bytes(raw_safetensors(header, bytes(8)))
    tensors, _ = read_header(path)
    assert {n: t.nbytes for n, t in tensors.items()} == {"e": 0, "é}": 8}


def test_an_empty_checkpoint_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors("{}"))
    assert read_header(path) == ({}, {})


_ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
        lambda n: n != "__metadata__"
    ),
    st.lists(st.integers(0, 4), max_size=4),
    max_size=6,
)


@given(_ARRAYS)
def test_files_of_the_reference_implementation_are_read(shapes: dict[str, list[int]]) -> None:
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(save(arrays))
        tensors, _ = read_header(path)
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {n: ("F16", a.shape) for n, a in arrays.items()}


@settings(max_examples=200)
@given(st.data())
def test_any_damage_is_harmless_or_a_diagnostic(data: st.DataObject) -> None:
    """Random bytes changed in a good file: the reader either reads it or says what is wrong, nothing else."""
    good = bytearray(safetensors_bytes({"a.weight": np.zeros((2, 3), np.float32), "b.bias": np.zeros(4, np.float16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(good[:cut])
        try:
            tensors, _ = read_header(path)
        except DiagnosticError as error:
            assert str(path) in str(error)
        else:
            assert all(t.offset + t.nbytes <= cut for t in tensors.values())
