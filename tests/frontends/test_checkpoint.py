"""Model directories: which files are read, what is refused, and that reading gives the right bytes and no more."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from frontends.checkpoint import open_checkpoint
from frontends.checkpoint_files import companion
from ir.diagnostics import DiagnosticError
from tests.frontends.model_files import safetensors_bytes, write_index, write_shards

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.array([1.5, -2.25, 3.0], ml_dtypes.bfloat16)
C = np.array(7.0, np.float16)


def _refused(directory: Path) -> str:
    with pytest.raises(DiagnosticError) as caught:
        open_checkpoint(directory)
    return str(caught.value)


def test_single_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": A, "b": B, "c": C}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.nbytes == A.nbytes + B.nbytes + C.nbytes
        for name, wanted in (("a", A), ("b", B), ("c", C)):
            got = checkpoint.read(name)
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)
        assert np.array_equal(checkpoint.read_rows("a", 1, 3), A[1:3])
        assert checkpoint.read_rows("a", 2, 2).shape == (0, 4)
        assert checkpoint.read_rows("c", 0, 1) == C
        assert bytes(checkpoint.byte_view("b")) == B.tobytes()


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": A}))
    with open_checkpoint(tmp_path) as checkpoint:
        first = checkpoint.read("a")
        first[:] = 0
        assert np.array_equal(checkpoint.read("a"), A)
        assert checkpoint.byte_view("a").readonly


def test_rows_out_of_range_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": A}))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match="rows 2 to 4 of a, which has 3"):
        checkpoint.read_rows("a", 2, 4)


def test_shards_are_read_and_few_files_stay_open(tmp_path: Path) -> None:
    names = [f"model-{i:05}-of-00020.safetensors" for i in range(20)]
    write_shards(tmp_path, {file: {f"t{i}": A + i} for i, file in enumerate(names)})
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with open_checkpoint(tmp_path) as checkpoint:
        for i in (*range(20), 3, 0, 19):
            assert np.array_equal(checkpoint.read(f"t{i}"), A + i)
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) <= before + 8
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_tensor_and_dtype_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"norm.weight": A, "mask": ("I64", (2,))}))
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(DiagnosticError, match=r"no tensor 'norm\.weigth'; did you mean 'norm\.weight'\?"):
            checkpoint.read("norm.weigth")
        with pytest.raises(DiagnosticError, match=r"tensor 'mask' has dtype I64\nexpected: F32, F16, BF16"):
            checkpoint.read("mask")


def test_a_file_that_shrinks_is_a_diagnostic(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": A, "b": A}))
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 8)
        assert np.array_equal(checkpoint.read("a"), A)
        with pytest.raises(DiagnosticError, match="the file ends within tensor 'b'"):
            checkpoint.read("b")
        with pytest.raises(DiagnosticError, match="the file ends within tensor 'b'"):
            checkpoint.byte_view("b")


def test_missing_directory_and_files_instead_of_directories(tmp_path: Path) -> None:
    assert "there is no such directory" in _refused(tmp_path / "absent")
    for name, message in (
        ("m.gguf", "is a GGUF file, which cannot be read yet"),
        ("m.bin", "is a pickle; reading one runs any code it holds"),
        ("m.pth", "save_pretrained(DIR, safe_serialization=True)"),
        ("m.safetensors", "give the directory that holds it"),
        ("m.txt", "is a file"),
    ):
        (tmp_path / name).write_bytes(b"x")
        assert message in _refused(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json"], "holds no weights\nexpected: model.safetensors, or model.safetensors.index.json"),
        (["pytorch_model.bin", "config.json"], "pytorch_model.bin: error: is a pickle"),
        (["weights.pt"], "weights.pt: error: is a pickle"),
        (["model-q4.gguf"], "model-q4.gguf: error: is a GGUF file"),
        (["consolidated.safetensors"], "there are only consolidated.safetensors"),
        (["adapter_model.safetensors"], "holds an adapter (LoRA), not a model"),
    ],
)
def test_directories_without_usable_weights(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert message in _refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/s.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "a\0b", "C:x"],
)
def test_names_that_leave_the_directory_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes({"a": A}))
    model = tmp_path / "model"
    model.mkdir()
    write_index(model, {"a": name})
    text = _refused(model)
    assert "which is not a plain file name" in text
    assert "expected: names of files in the same directory" in text


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "is no index of shards: Object missing required field `weight_map`"),
        ('{"weight_map": {"a": 1}}', "is no index of shards: Expected `str`, got `int`"),
        ('{"weight_map": []}', "is no index of shards"),
        ('{"weight_map": {}}', "names 0 files"),
        ('{"weight_map": ' + "[" * 100_000, "is no index of shards"),
        ('{"x": ' + "[" * 100_000, "is no index of shards"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "pytorch_model.bin: error: is a pickle"),
        ('{"weight_map": {"a": "notes.txt"}}', "which is no safetensors file"),
        ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', "2 of 2 weight files are missing: x.safe"),
    ],
)  # fmt: skip
def test_bad_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert message in _refused(tmp_path)


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": {"a": A}, "y.safetensors": {"b": A}})
    write_index(tmp_path, {"a": "y.safetensors", "b": "y.safetensors", "c": "x.safetensors"})
    text = _refused(tmp_path)
    assert "2 tensors are not in the files that the index names for them" in text
    assert "missing: a in y.safetensors" in text
    assert "missing: c in x.safetensors" in text


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": {"a": A, "b": A}, "y.safetensors": {"b": A}})
    assert "tensor 'b' is in x.safetensors already" in _refused(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(safetensors_bytes({"a": A}))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(outside)
    text = _refused(model)
    assert f"is a link to {outside}, outside of the model directory" in text
    assert "copy the file into the directory" in text
    (model / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(DiagnosticError, match="is a link to /etc/passwd"):
        companion(model, "config.json")


def test_links_inside_and_into_the_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0f3e").write_bytes(safetensors_bytes({"a": A}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f3e")
    with open_checkpoint(snapshot) as checkpoint:
        assert np.array_equal(checkpoint.read("a"), A)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "real.safetensors").write_bytes(safetensors_bytes({"a": A}))
    (plain / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to(plain)
    with open_checkpoint(tmp_path / "alias") as checkpoint:
        assert np.array_equal(checkpoint.read("a"), A)


def test_broken_links_loops_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.symlink_to("absent")
    assert "cannot be read: No such file" in _refused(tmp_path)
    weights.unlink()
    weights.symlink_to("model.safetensors")
    assert "cannot be read: Too many levels of symbolic links" in _refused(tmp_path)
    weights.unlink()
    os.mkfifo(weights)
    assert "is no regular file" in _refused(tmp_path)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    assert "is no regular file" in _refused(tmp_path)


def test_a_truncated_shard_names_the_file_the_tensor_and_the_place(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": {"a": A}, "y.safetensors": {"layers.7.up": A}})
    path = tmp_path / "y.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 20)
    text = _refused(tmp_path)
    assert text.startswith(f"{path}: error: tensor 'layers.7.up' needs bytes {size - 48} to {size}")
    assert f"the file ends at byte {size - 20}" in text
    assert "a download that was interrupted" in text


def test_total_number_of_tensors_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frontends.checkpoint.MAX_TENSORS", 3)
    write_shards(tmp_path, {f"{i}.safetensors": {f"t{i}": C, f"u{i}": C} for i in range(2)})
    assert "has more than 3 tensors" in _refused(tmp_path)


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": A}))
    content: dict[str, Any] = {"weight_map": {"b": "absent.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
