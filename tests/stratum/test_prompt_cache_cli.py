"""`run --prompt-cache`: the same text with and without, what it says, and files that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stratum
from stratum.cli import main

TEXT = "a prompt that is long enough to be worth keeping, said twice: a prompt that is long enough"


def run(capfd: pytest.CaptureFixture[str], artifact: Path, *arguments: str) -> tuple[str, str]:
    assert main(["run", str(artifact), *arguments, "-n", "6", "-t", "1"]) == 0
    captured = capfd.readouterr()
    return captured.out, captured.err


def test_a_prompt_is_kept_and_used(llama_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.kv"
    alone, _ = run(capfd, llama_artifact, TEXT)
    first, told = run(capfd, llama_artifact, TEXT, "--prompt-cache", str(file))
    assert first == alone and "prompt cache: 0 positions were there" in told
    again, told = run(capfd, llama_artifact, TEXT, "--prompt-cache", str(file))
    with stratum.load(llama_artifact, threads=1) as model:
        count = len(model.encode(TEXT))
        assert again == alone and f"prompt cache: {count - 1} positions were there" in told
        longer = model.generate(TEXT + " and more", max_tokens=6).text
    assert run(capfd, llama_artifact, TEXT + " and more", "--prompt-cache", str(file), "-q") == (longer + "\n", "")
    out, _ = run(capfd, llama_artifact, TEXT, "--prompt-cache", str(file), "--json")
    events = {event["event"]: event for event in map(json.loads, out.splitlines())}
    assert events["prompt_cache"]["positions"] == count - 1 and events["done"]["text"] == alone[:-1]


def test_files_that_are_refused(
    llama_artifact: Path, moe_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.kv"
    run(capfd, moe_artifact, "hello", "--prompt-cache", str(file))
    assert main(["run", str(llama_artifact), "hello", "--prompt-cache", str(file)]) == 2
    told = capfd.readouterr().err
    assert f"{file}: error: this file was made with another model" in told and told.count("\n") <= 3
    out, told = run(capfd, llama_artifact, "hello", "--prompt-cache", str(tmp_path / "none" / "file"))
    assert out and "warning: the prompt cache cannot be written" in told
