"""The loader against damaged, foreign and hostile artifacts: each ends in one diagnostic, before any of it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic, Session, host, is_artifact, open_artifact
from runtime import artifact as artifact_module
from runtime.manifest import TargetInfo
from runtime.manifest_reader import MAX_MANIFEST_BYTES, manifest_digest, parse_manifest
from tests.runtime.fake_artifact import default_files, default_manifest, fake_object, write_artifact

FILES = sorted(default_files())


@pytest.fixture
def copy(artifact_path: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(artifact_path, tmp_path / "copy"))


def refusal(path: Path, **options: bool) -> str:
    """The full text of the refusal to open `path`."""
    with pytest.raises(RuntimeDiagnostic) as caught:
        open_artifact(path, **options)
    return str(caught.value)


def test_opens(artifact_path: Path) -> None:
    artifact = open_artifact(artifact_path, verify=True)
    assert is_artifact(artifact_path) and not is_artifact(artifact_path.parent)
    assert artifact.code == fake_object()
    assert artifact.read_bytes("tokenizer.json") == default_files()["tokenizer.json"]
    assert artifact.has_file("graph.ir") and not artifact.has_file("chat_template.jinja")
    assert [p.name for p in artifact.manifest.programs] == ["decode", "prefill"]
    weights = artifact.map_weights()
    assert weights.view().tobytes() == default_files()["weights/weights.bin"]
    assert weights.address % 4096 == 0 and not weights.view().flags.writeable
    weights.read_ahead()
    weights.close()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_bit_in_any_file(copy: Path, name: str, where: float) -> None:
    content = bytearray((copy / name).read_bytes())
    content[int(len(content) * where)] ^= 0x10
    (copy / name).write_bytes(content)
    text = refusal(copy)
    assert f"{copy / name}: error: {name} was changed after the artifact was written" in text
    assert "hint: build the artifact again" in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, +1])
def test_truncated_or_grown(copy: Path, name: str, change: int) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size + change)
    assert f"has {size + change} bytes instead of {size}" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{copy / name}: error: cannot read this file of the artifact: No such file" in refusal(copy)


def test_large_weights_are_hashed_only_on_request(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "FULL_HASH_BELOW_BYTES", 100)
    weights = copy / "weights/weights.bin"
    content = bytearray(weights.read_bytes())
    content[4000] ^= 1
    weights.write_bytes(content)
    open_artifact(copy)  # the size is right, and that is all that is promised without verify
    assert "its sha256 differs" in refusal(copy, verify=True)
    os.truncate(weights, 4096)
    assert "has 4096 bytes instead of 8192" in refusal(copy)


def test_changed_between_opening_and_reading(copy: Path) -> None:
    artifact = open_artifact(copy)
    (copy / "tokenizer.json").write_bytes(b'{"model": []}')
    with pytest.raises(RuntimeDiagnostic, match=r"tokenizer\.json was changed"):
        artifact.read_bytes("tokenizer.json")
    with pytest.raises(RuntimeDiagnostic, match="the artifact has no file 'secret'"):
        artifact.read_bytes("secret")
    os.truncate(copy / "weights/weights.bin", 100)
    with pytest.raises(RuntimeDiagnostic, match="has 100 bytes instead of 8192"):
        artifact.map_weights()


@pytest.mark.parametrize("name", ["graph.ir", "weights/weights.bin", "code/step.host.o", "manifest.json"])
def test_links(copy: Path, tmp_path: Path, name: str) -> None:
    """A link out of the artifact is refused even when the content is right; a link inside it is fine."""
    outside = tmp_path / "outside"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside)
    assert f"{copy / name}: error: a link leads out of the artifact" in refusal(copy)
    (copy / name).unlink()
    shutil.move(outside, copy / "inside")
    (copy / name).symlink_to(copy / "inside")
    open_artifact(copy)


def test_linked_folder(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "code", tmp_path / "code")
    (copy / "code").symlink_to(tmp_path / "code")
    assert "a link leads out of the artifact" in refusal(copy)


def test_a_link_to_the_artifact_itself_is_fine(artifact_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact_path)
    open_artifact(tmp_path / "link")


def test_pipe_and_folder_in_a_files_place(copy: Path) -> None:
    (copy / "graph.ir").unlink()
    os.mkfifo(copy / "graph.ir")
    assert "not a regular file" in refusal(copy)
    (copy / "graph.ir").unlink()
    (copy / "graph.ir").mkdir()
    assert "not a regular file" in refusal(copy)


@pytest.mark.parametrize("name", ["../graph.ir", "/etc/passwd", "a/../../x", "a//b", "./x", "", "a\\b", "a\0b"])
def test_path_traversal(tmp_path: Path, name: str) -> None:
    def change(manifest: dict) -> None:
        manifest["files"] = {name: manifest["files"]["graph.ir"], **manifest["files"]}

    assert "the manifest lists the path" in refusal(write_artifact(tmp_path / "a", change=change))


def test_path_traversal_by_the_weights_field(tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["weights"]["file"] = "../weights.bin"
        manifest["files"]["../weights.bin"] = manifest["files"].pop("weights/weights.bin")

    path = write_artifact(tmp_path / "a", change=change)
    (tmp_path / "weights.bin").write_bytes(default_files()["weights/weights.bin"])
    assert "the manifest lists the path '../weights.bin'" in refusal(path)


def test_not_an_artifact(tmp_path: Path) -> None:
    assert "no such artifact directory" in refusal(tmp_path / "nothing")
    assert "it has no manifest.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert f"this is a checkpoint; build it first: compile-model build {tmp_path} -o OUT" in refusal(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("version", "shown", "hint"),
    [(3, "3", "use the newer stratum"), (1, "1", "build the artifact again"), (None, "missing", "build"),
     ("1", '"1"', "build"), (True, "true", "build"), ([1] * 100, "[1, 1, 1", "build")],
)  # fmt: skip
def test_other_version(tmp_path: Path, version: object, shown: str, hint: str) -> None:
    """The version is looked at first: of a future format nothing else may be expected to hold."""

    def change(manifest: dict) -> None:
        manifest.clear()
        manifest.update(format_version=version, stratum_version="9.9")

    text = refusal(write_artifact(tmp_path / "a", change=change))
    assert f"artifact format version {shown}" in text and "(written by stratum 9.9)" in text
    assert "expected: format version 2" in text and hint in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a readable manifest"), (b"{", "not a readable manifest"), (b"\xff\xfe{}", "not a readable manifest"),
     (b"[]", "an object, got a list"), (b"null", "an object, got null"), (b"[" * 100_000, "nested too deeply"),
     (b'{"format_version": ' + b"1" * 10_000 + b"}", "not a readable manifest")],
)  # fmt: skip
def test_unreadable_manifest(copy: Path, content: bytes, reason: str) -> None:
    (copy / "manifest.json").write_bytes(content)
    text = refusal(copy)
    assert reason in text and text.startswith(str(copy / "manifest.json"))


def test_deeply_nested_value_in_a_manifest(copy: Path) -> None:
    manifest = (copy / "manifest.json").read_text().rstrip()[:-1]
    (copy / "manifest.json").write_text(manifest + ', "x": ' + "[" * 900 + "]" * 900 + "}")
    assert "its own hash does not match" in refusal(copy)


def test_oversized_manifest(copy: Path) -> None:
    os.truncate(copy / "manifest.json", MAX_MANIFEST_BYTES + 1)
    assert f"the manifest has {MAX_MANIFEST_BYTES + 1} bytes" in refusal(copy)


def test_edited_manifest(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["vocab_size"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "the manifest was changed after it was written" in refusal(copy)


def edit(*path: str, value: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        *folders, last = path
        for folder in folders:
            manifest = manifest[folder]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.vocab_size", None, "manifest field 'model.vocab_size' is missing"),
        ("model.vocab_size", 0, "an integer in 1.."),
        ("model.vocab_size", 1 << 40, "'model.vocab_size' is 1099511627776"),
        ("model.vocab_size", True, "'model.vocab_size' is true"),
        ("model.vocab_size", 1.5, "'model.vocab_size' is 1.5"),
        ("model.max_context", -1, "'model.max_context' is -1"),
        ("model", [], "manifest field 'model' is []"),
        ("dtype", 3, "manifest field 'dtype' is 3"),
        ("target.features", "avx", "a list of texts"),
        ("target.features", [1], "a list of texts"),
        ("programs", {}, "at least one program"),
        ("programs.decode", None, "no error"),
        ("programs.decode.symbol", "a b", "a C identifier"),
        ("programs.decode.max_tokens", 0, "'programs.decode.max_tokens' is 0"),
        ("programs.decode.arena_bytes", 1 << 60, "'programs.decode.arena_bytes' is"),
        ("programs.decode.launches", [1], "a list of at most"),
        ("programs.decode.launches", [{"name": "k", "bytes": -1}], "'programs.decode.launches[0].bytes' is -1"),
        ("programs.decode.launches", [{"name": "k", "bytes": float("nan")}], "launches[0].bytes' is NaN"),
        ("programs.decode.launches", [{"origin": "k"}], "'programs.decode.launches[0].name' is missing"),
        ("kv.format", "q4", "f32, f16, bf16 or a low-bit format like q8_sym<...>"),
        ("kv.bytes_per_slot", 8, "a multiple of the layers, at most 0"),
        ("kv.ring", -1, "an integer in 0..1073741824"),
        ("kv.bytes_per_position", 33, "layers * kv heads * head_dim * 2 * 4 = 32"),
        ("kv.layers", 1 << 20, "'kv.layers' is 1048576"),
        ("weights.bytes", 8191, "'weights.tensors[0].bytes' is 8192"),
        ("weights.tensors", [], "no error"),
        ("weights.tensors", [{"name": "w", "offset": 8000, "bytes": 193, "format": "f32"}], "offset + bytes <= 8192"),
        ("weights.tensors", [{"name": "w", "offset": -1, "bytes": 1, "format": "f32"}], "[0].offset' is -1"),
        ("weights.file", "other.bin", "a file listed under 'files'"),
        ("weights.file", "graph.ir", "the size listed under 'files'"),
        ("files", [], "manifest field 'files' is []"),
        ("files.graph\0ir", {"bytes": 1, "sha256": "0" * 64}, "the manifest lists the path"),
        ("files.tokenizer", {"bytes": 1}, "'files.tokenizer.sha256' is missing"),
        ("files.tokenizer", {"bytes": 1, "sha256": "X" * 64}, "64 hexadecimal digits"),
        ("files.tokenizer", {"bytes": 1 << 60, "sha256": "0" * 64}, "'files.tokenizer.bytes' is"),
        ("files.code/second.o", {"bytes": 1, "sha256": "0" * 64}, "the artifact lists 2 object files"),
    ],
)
def test_hostile_manifest_values(tmp_path: Path, path: str, value: object, message: str) -> None:
    keys = path.split(".", 1 if path.startswith("files.") else -1)
    path_to = write_artifact(tmp_path / "a", change=edit(*keys, value=value))
    if message == "no error":
        open_artifact(path_to)
    else:
        assert message in refusal(path_to)


def test_no_object_file(tmp_path: Path) -> None:
    files = default_files()
    files.pop("code/step.host.o")
    assert "the artifact lists 0 object files" in refusal(write_artifact(tmp_path / "a", files=files))


def test_oversized_object_file(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", change=edit("files", "code/step.host.o", "bytes", value=1 << 40))
    assert "code/step.host.o is larger than" in refusal(path)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest(content: bytes) -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"^m: error: "):
        parse_manifest(content, "m")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _paths(value: object, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in _paths(item, (*path, key))]


@given(st.data())
def test_any_value_in_any_field(data: st.DataObject) -> None:
    """A manifest with one wrong field and a right hash is either understood or refused, never a crash."""
    manifest = default_manifest(default_files())
    *folders, last = data.draw(st.sampled_from(_paths(manifest)))
    place = manifest
    for folder in folders:
        place = place[folder]
    place[last] = data.draw(_JSON)
    manifest["manifest_sha256"] = manifest_digest(manifest)
    try:
        parsed = parse_manifest(json.dumps(manifest).encode(), "m")
    except RuntimeDiagnostic as fault:
        assert str(fault).startswith("m: error: ")
    else:
        assert parsed.raw["format_version"] == 2


# --- the instruction set -------------------------------------------------------------------------------------------


def features_of(level: str) -> frozenset[str]:
    return frozenset(dict(host.X86_LEVELS)[level])


def x86_host(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    monkeypatch.setattr(host, "host_architecture", lambda: "x86_64")
    monkeypatch.setattr(host, "host_features", lambda: features)


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x86_host(monkeypatch, features_of("x86-64-v3"))
    target = TargetInfo("x86-64-v4", "x86_64-unknown-linux-gnu", "x86-64-v4", ("avx2", "+avx512f", "avx512bf16"))
    with pytest.raises(RuntimeDiagnostic) as caught:
        artifact_module.check_target(target, "DIR")
    assert str(caught.value) == (
        "DIR: error: this CPU lacks instructions the artifact needs: avx512bf16, avx512f\n"
        "expected: a CPU with all features of target x86-64-v4\n"
        "hint: build it again for this machine: compile-model build MODEL -o OUT --target host, "
        "or --target x86-64-v3, which this CPU can run"
    )


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_levels(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    x86_host(monkeypatch, features_of(level) | {"something-else"})
    assert host.best_portable_target(host.host_features()) == level
    target = TargetInfo(level, "x86_64-unknown-linux-gnu", level, tuple(features_of(level)))
    artifact_module.check_target(target, "DIR")


def test_a_host_llvm_cannot_describe_is_promised_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x86_host(monkeypatch, frozenset())
    target = TargetInfo("x86-64-v2", "x86_64-unknown-linux-gnu", "x86-64-v2", ("popcnt",))
    with pytest.raises(RuntimeDiagnostic, match="lacks instructions the artifact needs: popcnt"):
        artifact_module.check_target(target, "DIR")


def test_other_architecture_and_system(monkeypatch: pytest.MonkeyPatch) -> None:
    x86_host(monkeypatch, frozenset())
    with pytest.raises(RuntimeDiagnostic, match=r"holds aarch64 code \(target neoverse\), this machine is x86_64"):
        artifact_module.check_target(TargetInfo("neoverse", "arm64-unknown-linux-gnu", "", ()), "DIR")
    with pytest.raises(RuntimeDiagnostic, match="was built for x86_64-apple-darwin"):
        artifact_module.check_target(TargetInfo("mac", "x86_64-apple-darwin", "", ()), "DIR")


def test_a_missing_feature_stops_the_session(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", change=edit("target", "features", value=["avx9000"]))
    with pytest.raises(RuntimeDiagnostic, match="lacks instructions the artifact needs: avx9000"):
        Session(path)
