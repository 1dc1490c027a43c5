"""Bad input at the front door: exit code 2, one diagnostic that names the fault, no traceback, soon, nothing left.

The parts test their own refusals in detail; here each kind goes through the whole command as a user would see it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stratum.cli import main

SECONDS = 20.0  # of the processor, generous: most take milliseconds
Spoil = Callable[[Path], object]


@pytest.fixture
def model(llama_directory: Path, tmp_path: Path) -> Path:
    """A copy of a good model, to be spoiled."""
    return Path(shutil.copytree(llama_directory, tmp_path / "model"))


@pytest.fixture
def artifact(llama_artifact: Path, tmp_path: Path) -> Path:
    """A copy of a good artifact, to be spoiled."""
    return Path(shutil.copytree(llama_artifact, tmp_path / "artifact"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command, which must fail as it should; the message."""
    started = time.process_time()
    code = main([str(a) for a in arguments])
    took = time.process_time() - started
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err and "internal error" not in captured.err
    faults = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(faults) == 1, captured.err
    assert took < SECONDS
    return captured.err


# --- checkpoints ---------------------------------------------------------------------------------------------------


def change_config(**changes: Any) -> Spoil:
    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config.update(changes)
        config = {name: value for name, value in config.items() if value is not ...}
        (model / "config.json").write_text(json.dumps(config))

    return spoil


def change_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return spoil


def change_header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Rewrites the JSON header of the weights; the data stay as they are."""

    def spoil(model: Path) -> None:
        data = (model / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def overlap(header: dict[str, Any]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second] = {**header[second], "data_offsets": header[first]["data_offsets"], "shape": header[first]["shape"]}


def cut(size: int) -> Spoil:
    return lambda model: os.truncate(model / "model.safetensors", size)


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_naming(file: str) -> Spoil:
    def spoil(model: Path) -> None:
        names = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def quantized_as(method: str, **more: Any) -> Spoil:
    return change_config(quantization_config={"quant_method": method, **more})


def config_text(text: str) -> Spoil:
    return lambda model: (model / "config.json").write_text(text)


NORM = "model.norm.weight"
HEAD = "lm_head.weight"
CHECKPOINT_FAULTS: dict[str, tuple[Spoil, str]] = {
    "missing tensor": (
        change_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "layers.1.mlp.up_proj.weight",
    ),
    "unmapped tensor": (change_tensors(lambda t: t.update({"model.extra": t[NORM]})), "model.extra"),
    "wrong shape": (change_tensors(lambda t: t.update({NORM: t[NORM][:-1].copy()})), NORM),
    "wrong dtype": (change_tensors(lambda t: t.update({NORM: np.zeros(64, np.int8)})), "I8"),
    "truncated data": (cut(20_000), "model.safetensors"),
    "truncated header": (cut(100), "model.safetensors"),
    "empty file": (cut(0), "too short"),
    "header longer than the file": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        "model.safetensors",
    ),
    "overlapping tensors": (change_header(overlap), "model.safetensors"),
    "shape of exabytes": (
        change_header(lambda h: h[HEAD].update(shape=[1 << 40, 1 << 40])),
        HEAD,
    ),
    "offsets beyond the file": (
        change_header(lambda h: h[HEAD].update(data_offsets=[0, 1 << 50])),
        HEAD,
    ),
    "header is no JSON": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops"),
        "model.safetensors",
    ),
    "pickle": (only_pickle, "pytorch_model.bin"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
    "index leaves the directory": (index_naming("../../etc/passwd"), "../../etc/passwd"),
    "index names an absent file": (
        index_naming("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
    "GPTQ": (quantized_as("gptq", bits=4), "GPTQ"),
    "AWQ": (quantized_as("awq", bits=4), "AWQ"),
    "FP8": (quantized_as("fp8"), "FP8"),
    "bitsandbytes": (quantized_as("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "compressed-tensors": (quantized_as("compressed-tensors"), "compressed-tensors"),
    "unknown family": (change_config(model_type="lama"), "llama"),
    "no family": (change_config(model_type=...), "model_type"),
    "unknown activation": (change_config(hidden_act="relu6"), "hidden_act"),
    "heads that do not divide": (change_config(num_key_value_heads=3), "4 query heads for 3"),
    "layers without end": (change_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "negative size": (change_config(hidden_size=-64), "hidden_size"),
    "size that is a text": (change_config(hidden_size="64"), "hidden_size"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "config is no JSON": (config_text("{"), "config.json"),
    "config is a list": (config_text("[]"), "config.json"),
    "config nested without end": (config_text("[" * 100_000), "config.json"),
    "classifier": (change_config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_bad_checkpoint(fault: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, named = CHECKPOINT_FAULTS[fault]
    spoil(model)
    message = refused(capsys, "build", model, "-o", tmp_path / "out", "-q")
    assert named in message and str(model) in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing half-written
    refused(capsys, "run", model, "hello", "-q")
    refused(capsys, "inspect", model)


def test_all_missing_and_unmapped_tensors_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for layer in (0, 1):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            tensors[name.replace("q_proj", "query_proj")] = tensors.pop(name)

    change_tensors(rename)(model)
    message = refused(capsys, "build", model, "-o", tmp_path / "out")
    lines = message.splitlines()
    assert any(line.startswith("missing: model.layers.*.self_attn.q_proj.weight") for line in lines), message
    assert any(line.startswith("unmapped: model.layers.*.self_attn.query_proj.weight") for line in lines), message


@pytest.mark.parametrize("kind", ["absent", "file", "empty directory"])
def test_not_a_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty directory":
        path.mkdir()
    for arguments in (["run", path, "x"], ["inspect", path], ["bench", path], ["build", path, "-o", tmp_path / "out"]):
        assert str(path) in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target", "x86-64-v9"], "x86-64-v9"),
        (["-p", "fuse-qvk"], "did you mean 'fuse-qkv'"),
        (["-p", "canonicalize{"], "canonicalize"),
        (["--dtype", "f8"], "f8"),
        (["--device", "cuda", "--target", "x86-64-v3"], "x86-64-v3, which is no NVIDIA GPU"),
        (["--target", "t4-gcp"], "no model can be built for the GPU of t4-gcp (sm_75)"),
        (["--device", "cuda", "--recipe", "kv2"], "no KV cache of q2_zp"),
    ],
)
def test_bad_build_options(
    options: list[str], named: str, llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, "build", llama_directory, "-o", tmp_path / "out", "-q", *options)
    assert not (tmp_path / "out").exists()


def test_output_that_is_no_artifact_is_not_replaced(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    message = refused(capsys, "build", llama_directory, "-o", tmp_path / "mine", "-q")
    assert "refusing to replace" in message
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 300], "300 tokens"),
        (["--prompt", "x" * 65, "-c", "64"], "65 tokens"),
        (["--prompt", "x", "-c", "100000"], "256"),
        (["--prompt", "x", "-t", "100000"], "threads"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-k", "-1"], "top_k"),
        (["--prompt", "x", "--seed", "-1"], "seed"),
        (["--prompt", "x", "--stop", ""], "stop string"),
        (["--prompt", "x", "-n", "0"], "max-tokens"),
        (["--prompt", "x", "--dtype", "f32"], "--dtype"),
        (["--prompt", "x", "x"], "twice"),
        (["--prompt", "\udcff"], "not valid Unicode"),
        ([], "no prompt"),
    ],
)
def test_bad_prompts_and_options(
    arguments: list[str], named: str, llama_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, "run", llama_artifact, *arguments, "-q")


def test_trace_that_cannot_be_written(llama_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(llama_artifact), "x", "-n", "2", "--trace", str(tmp_path / "no" / "trace.json")]) == 2
    assert "cannot write the trace" in capfd.readouterr().err


# --- artifacts -----------------------------------------------------------------------------------------------------


def flip(name: str, at: int = -1) -> Spoil:
    def spoil(artifact: Path) -> None:
        path = next(artifact.glob(name))
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return spoil


def change_manifest(change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> Spoil:
    """Changes the manifest; `sign` writes the hash that belongs to it, as a newer or foreign builder would."""

    def spoil(artifact: Path) -> None:
        manifest = json.loads((artifact / "manifest.json").read_text())
        change(manifest)
        if sign:
            manifest.pop("manifest_sha256")
            text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
            manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (artifact / "manifest.json").write_text(json.dumps(manifest))

    return spoil


def remove(name: str) -> Spoil:
    return lambda artifact: next(artifact.glob(name)).unlink()


def to_symlink(artifact: Path) -> None:
    (artifact / "graph.ir").rename(artifact.parent / "elsewhere.ir")
    (artifact / "graph.ir").symlink_to(artifact.parent / "elsewhere.ir")


ARTIFACT_FAULTS: dict[str, tuple[Spoil, str]] = {
    "weights changed": (flip("weights/weights.bin", 1000), "weights.bin"),
    "code changed": (flip("code/*.o"), "code/"),
    "graph changed": (flip("graph.ir", 40), "graph.ir"),
    "manifest changed": (change_manifest(lambda m: m["model"].update(vocab_size=1), sign=False), "manifest"),
    "weights cut": (lambda a: os.truncate(a / "weights/weights.bin", 4096), "weights.bin"),
    "code missing": (remove("code/*.o"), "code/"),
    "tokenizer missing": (remove("tokenizer.json"), "tokenizer.json"),
    "newer version": (change_manifest(lambda m: m.update(format_version=99)), "version 99"),
    "older version": (change_manifest(lambda m: m.update(format_version=0)), "version 0"),
    "version of no kind": (change_manifest(lambda m: m.update(format_version="1")), "version"),
    "foreign instructions": (
        change_manifest(lambda m: m["target"].update(features=["avx2", "amx-fp16", "avx10.2-512"])),
        "amx-fp16",
    ),
    "foreign architecture": (
        change_manifest(lambda m: m["target"].update(triple="riscv64-unknown-linux-gnu")),
        "riscv64",
    ),
    "manifest is no JSON": (lambda a: (a / "manifest.json").write_text("{"), "manifest"),
    "manifest is a list": (lambda a: (a / "manifest.json").write_text("[]"), "manifest"),
    "manifest lacks programs": (change_manifest(lambda m: m.pop("programs")), "programs"),
    "file outside": (
        change_manifest(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}})),
        "../x",
    ),
    "cache of petabytes": (change_manifest(lambda m: m["kv"].update(bytes_per_position=1 << 60)), "bytes_per_position"),
    "file is a link": (to_symlink, "graph.ir"),
}


@pytest.mark.parametrize("fault", ARTIFACT_FAULTS)
def test_bad_artifact(fault: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, named = ARTIFACT_FAULTS[fault]
    spoil(artifact)
    assert named in refused(capsys, "run", artifact, "hello", "-q")
    assert named in refused(capsys, "bench", artifact, "-p", "4", "-n", "2", "-q")


def test_inspect_shows_an_artifact_of_another_machine(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ARTIFACT_FAULTS["foreign instructions"][0](artifact)
    assert main(["inspect", str(artifact)]) == 2
    captured = capsys.readouterr()
    assert "pipeline" in captured.out and "amx-fp16" in captured.out
    assert "this CPU lacks instructions" in captured.err


def test_good_artifact_still_runs(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The spoiling tests would mean little if a copy did not run at all."""
    change_manifest(lambda m: None)(artifact)
    assert main(["run", str(artifact), "hello", "-n", "2", "-t", "1", "-q"]) == 0
    assert capfd.readouterr().err == ""
