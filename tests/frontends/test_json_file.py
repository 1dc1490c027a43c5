"""Strict JSON: every kind of file that is refused, and that the message says where and why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from frontends.json_file import read_json_object
from ir.diagnostics import DiagnosticError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1,}', "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice in one object"),
        (b'{"x": {"a": 1, "a": 2}}', "key 'a' appears twice in one object"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7"),
        (b"[1]", "holds a JSON list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "the nesting is too deep"),
        (b'{"a": "' + b"x" * 300_000 + b'"}', "is 300009 bytes long"),
    ],
)
def test_bad_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DiagnosticError) as caught:
        read_json_object(path, limit=250_000)
    assert str(caught.value).startswith(f"{path}: error: ")
    assert message in str(caught.value)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError, match="cannot be read: No such file"):
        read_json_object(tmp_path / "absent.json")
    with pytest.raises(DiagnosticError, match="is no regular file"):
        read_json_object(tmp_path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DiagnosticError, match="is no regular file"):
        read_json_object(tmp_path / "config.json")


def test_a_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true, "é"]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1, 2.5, None, True, "é"]}
