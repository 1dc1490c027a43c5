"""The whole line: directory to text, through the Python API and through `compile-model run`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import stratum
from ir.diagnostics import DiagnosticError
from runtime.errors import RuntimeDiagnostic
from stratum import api, building, model_cache
from stratum.checkpoint_report import artifact_text, describe_artifact
from stratum.cli import main
from stratum.progress import format_bytes
from tests.own_cache import own_cache
from tests.stratum.tiny_model import BOS, EOS


@pytest.fixture
def model(llama_artifact: Path):
    with stratum.load(llama_artifact, threads=1, max_context=128) as loaded:
        yield loaded


def test_pieces_make_the_text(model: stratum.Model) -> None:
    generation = model.generate("hello", max_tokens=24)
    pieces = list(generation)
    assert "".join(pieces) == generation.text and generation.text
    assert 1 <= len(generation.token_ids) <= 24
    assert generation.statistics.generated_tokens == len(generation.token_ids)
    assert generation.finish_reason in ("stop", "length")


def test_greedy_is_the_argmax_of_the_logits(model: stratum.Model) -> None:
    """Generation against plain steps of the session: one whole prompt a time, no cache in between."""
    generation = model.generate("abc", max_tokens=6)
    assert generation.text
    ids = list(generation.prompt_ids)
    for token in generation.token_ids:
        model.session.release(0)
        count = len(ids)
        logits = model.session.step(ids, range(count), [0] * count, [count - 1])
        assert int(logits[0].argmax()) == token
        ids.append(token)


def test_same_seed_same_text(model: stratum.Model) -> None:
    def text(seed: int) -> list[int]:
        generation = model.generate("hello", max_tokens=16, temperature=1.5, seed=seed)
        assert generation.statistics.seed == seed
        return generation.token_ids

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(5)}) > 1


def test_stop_string_ends_the_text(model: stratum.Model) -> None:
    whole = model.generate(list(b"hello"), max_tokens=24).text
    stop = whole[2:4]
    generation = model.generate(list(b"hello"), max_tokens=24, stop=[stop])
    assert generation.text == whole[: whole.index(stop)] and generation.finish_reason == "stop"


def test_prompts_of_every_kind(model: stratum.Model) -> None:
    assert model.encode([1, 2, 3]) == [1, 2, 3]
    assert len(model.encode("hé")) == 3
    messages = [{"role": "user", "content": "hi"}]
    assert model.encode(messages) == model.encode("hi", chat=True)
    assert model.encode(messages)[0] == BOS  # written by the template, once
    assert model.encode(messages).count(BOS) == 1


def test_generation_config_is_followed(llama_artifact: Path, tmp_path: Path, llama_directory: Path) -> None:
    directory = tmp_path / "sampled"
    shutil.copytree(llama_directory, directory)
    wish = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [5, EOS]}
    (directory / "generation_config.json").write_text(json.dumps(wish))
    with stratum.load(directory, threads=1) as model:
        default = model.default_sampling()
        assert (default.temperature, default.top_p, default.top_k) == (0.7, 0.9, 50)
        assert model.defaults.eos_ids == (5, EOS)
        assert model.sampling(temperature=0.0).greedy
        assert model.sampling(top_k=3).top_k == 3
    with stratum.load(llama_artifact, threads=1) as model:
        assert model.default_sampling().greedy
        assert model.sampling(top_k=3).temperature == 1.0
        assert model.sampling(repetition_penalty=1.5).greedy


@pytest.fixture(autouse=True)
def _sources_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is edited while the tests run must not change the keys."""
    monkeypatch.setattr(model_cache, "sources_digest", lambda: "constant")


def test_second_load_takes_the_cache(llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path / "cache"))
    builds: list[Path] = []

    def build(model: Path, out: Path, **_: object) -> None:
        builds.append(out)
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{}")

    monkeypatch.setattr(building, "build", build)
    first = api.ensure_built(llama_directory)
    assert first.is_relative_to(tmp_path / "cache") and "tiny-llama" in first.name
    assert api.ensure_built(llama_directory) == first and len(builds) == 1
    others = [
        api.ensure_built(llama_directory, dtype="f32"),
        api.ensure_built(llama_directory, target="x86-64-v3"),
        api.ensure_built(llama_directory, pipeline="cpu"),
    ]
    assert len({first, *others}) == 4 == len(builds)


def test_a_cache_that_cannot_be_written(llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiagnosticError, match="cache cannot be written") as caught:
        api.ensure_built(llama_directory)
    assert "STRATUM_CACHE" in str(caught.value)


def test_key_changes_with_what_decides_the_result(llama_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(llama_directory, directory)
    keys = [model_cache.cache_entry(directory, ["a", "bc"])]
    assert model_cache.cache_entry(directory, ["a", "bc"]) == keys[0]
    keys.append(model_cache.cache_entry(directory, ["ab", "c"]))
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    keys.append(model_cache.cache_entry(directory, ["a", "bc"]))
    (directory / "generation_config.json").write_text("{}")
    keys.append(model_cache.cache_entry(directory, ["a", "bc"]))
    (directory / "notes.md").write_text("not part of the model")
    os.mkfifo(directory / "other.safetensors")  # nobody writes to it: opening it would wait for ever
    assert model_cache.cache_entry(directory, ["a", "bc"]) == keys[-1]
    assert len(set(keys)) == len(keys)


def test_a_damaged_cache_entry_is_built_again(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRATUM_CACHE", own_cache(tmp_path / "cache"))
    entry = api.ensure_built(llama_directory)
    (entry / "weights" / "weights.bin").write_bytes(b"short")
    told: list[str] = []
    with stratum.load(llama_directory, threads=1, warn=told.append) as model:
        assert model.generate("a", max_tokens=2).token_ids
    assert len(told) == 1 and "damaged" in told[0]
    with pytest.raises(RuntimeDiagnostic, match="context"):
        stratum.load(llama_directory, max_context=10**6)


def test_an_artifact_is_taken_as_it_is(llama_artifact: Path) -> None:
    assert api.ensure_built(llama_artifact) == llama_artifact


def test_run_streams_text_to_stdout_and_the_rest_to_stderr(
    llama_artifact: Path, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["run", str(llama_artifact), "hello", "-n", "12", "-t", "1", "--token-ids"]
    assert main([*arguments, "--profile", "--trace", str(trace)]) == 0
    out, err = capfdbinary.readouterr()
    with stratum.load(llama_artifact, threads=1) as model:
        assert out.decode() == model.generate("hello", max_tokens=12).text + "\n"
    told = err.decode()
    assert "1 thread" in told and "bf16" in told and "weights" in told and "KV cache" in told and "greedy" in told
    assert "prompt ids:" in told and "lm_head" in told
    assert any(event.get("name") == "norm+lm_head" for event in json.loads(trace.read_text())["traceEvents"])


def test_run_with_json_events(llama_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(llama_artifact), "--prompt", "hello", "-n", "4", "-t", "1", "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == "" and events[0]["event"] == "chosen" and events[0]["threads"] == 1
    assert "".join(e["text"] for e in events if e["event"] == "token") == events[-1]["text"]
    assert events[-1]["finish_reason"] in ("length", "stop")


def test_run_quietly(llama_artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(llama_artifact), "hello", "-n", "4", "-t", "1", "-q"]) == 0
    assert capfd.readouterr().err == ""


def test_run_builds_a_directory_first(moe_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(moe_directory), "hello", "-n", "4", "-t", "1"]) == 0
    assert "weights: done" in capfd.readouterr().err
    assert main(["run", str(moe_directory), "hello", "-n", "4", "-t", "1"]) == 0
    assert "weights: done" not in capfd.readouterr().err


def test_build_verb_and_dumps(llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, dump = tmp_path / "out", tmp_path / "dump"
    arguments = ["build", str(llama_directory), "-o", str(out), "--dtype", "f32", "--dump-ir", str(dump)]
    assert main([*arguments, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done" and events[-1]["path"] == str(out)
    assert {e["stage"] for e in events if e["event"] == "stage"} >= {"passes", "code", "weights"}
    assert (dump / "000_input.ir").is_file() and (dump / "plan.ir").is_file()
    with stratum.load(out, threads=1) as model:
        assert model.manifest.dtype == "f32"
        assert model.generate("a", max_tokens=3).token_ids


def test_own_pipeline(llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(llama_directory), "-o", str(tmp_path / "out"), "-p", "cpu", "-q"]) == 0
    assert main(["build", str(llama_directory), "-o", str(tmp_path / "out"), "-p", "nonsense", "-q"]) == 2
    assert "unknown pass 'nonsense'" in capsys.readouterr().err


def test_inspect_both_kinds(moe_directory: Path, llama_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(moe_directory), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "qwen3_moe" in text and "4, 2 a token" in text and "lm_head.weight" in text
    assert main(["inspect", str(moe_directory), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == 4 and facts["dtypes"]["BF16"]["tensors"] == len(facts["tensors"])
    assert main(["inspect", str(llama_artifact), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "fuse-qkv" in text and "weights/weights.bin" in text and "all hashes checked" in text
    assert main(["inspect", str(llama_artifact), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "llama" and facts["kv_ring"] == facts["kv_recent"] == facts["kv_bytes_per_slot"] == 0


def test_inspect_shows_the_ring_of_a_cache(llama_directory: Path, tmp_path: Path) -> None:
    artifact = stratum.build(llama_directory, tmp_path / "out", recipe="none,kv4")
    facts = describe_artifact(artifact)
    assert facts["kv_recent"] == 16 and facts["kv_ring"] == 512 + 16 + 16
    # Two layers, two heads, keys and values of 16 columns, padded to 32, of two bytes.
    assert facts["kv_bytes_per_slot"] == 2 * 2 * 2 * 32 * 2 * facts["kv_ring"]
    size = format_bytes(facts["kv_bytes_per_slot"])
    assert f"newest 16 positions are read in bf16, from a ring of 544, {size} a sequence" in artifact_text(facts)


def test_targets_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    assert "x86-64-v3" in capsys.readouterr().out
    assert main(["targets", "show", "x86-64-v4", "--json"]) == 0
    assert "avx512f" in json.loads(capsys.readouterr().out)["llvm_features"]
    assert main(["targets", "show", "x86-64-v4"]) == 0
    assert "vectors of 512 bits" in capsys.readouterr().out
    assert main(["targets", "show", "x86-64-v9"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_empty_prompt_and_missing_template(model: stratum.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiagnosticError, match="the prompt is empty"):
        model.generate("")
    monkeypatch.setitem(model.__dict__, "chat_template", None)
    with pytest.raises(DiagnosticError, match="no chat template"):
        model.generate("hi", chat=True)
