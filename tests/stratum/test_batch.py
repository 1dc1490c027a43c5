"""Many prompts at once: the same tokens as alone, whatever runs beside them; faults end their own prompt only."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stratum
from ir.diagnostics import DiagnosticError
from runtime.errors import RuntimeDiagnostic
from runtime.kv_spill import SpillOptions
from runtime.process_memory import resident_bytes
from runtime.session import Session
from stratum.batch_lines import BadLine, Line, read_lines
from stratum.batch_run import run_batch, slots_needed
from stratum.cli import main
from stratum.memory_plan import plan_for
from stratum.model import Model, Slots

TEXTS = ("hello", "abc", "some longer text that goes on and on", "q", "one more of them", "zz top")
SAMPLED = {"temperature": 1.5, "seed": 7}


def lines_of(*entries: Any) -> list[Line | BadLine]:
    return list(read_lines(b"\n".join(json.dumps(entry).encode() for entry in entries)))


def opened(artifact: Path, lines: list[Line | BadLine], together: int, **spill: Any) -> Model:
    options = SpillOptions(**spill) if spill else None
    slots = Slots(slots_needed(lines, together), together, options)
    return Model(artifact, threads=1, max_context=128, slots=slots)


def results(model: Model, lines: list[Line | BadLine], together: int, **defaults: Any) -> dict[str, dict[str, Any]]:
    found = list(run_batch(model, lines, together=together, **{"max_tokens": 8, **defaults}))
    assert sorted(result["id"] for result in found) == sorted(line.name for line in lines)  # each once, in any order
    return {result["id"]: result for result in found}


@pytest.fixture(scope="module")
def alone(llama_artifact: Path) -> dict[str, list[int]]:
    with stratum.load(llama_artifact, threads=1, max_context=128) as model:
        return {text: model.generate(text, max_tokens=8, **SAMPLED).token_ids for text in TEXTS}


@pytest.fixture(scope="module")
def shared(llama_artifact: Path) -> Model:
    return Model(llama_artifact, threads=1, max_context=128, slots=Slots(6, 6))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9), together=st.integers(1, 6))
def test_tokens_do_not_depend_on_the_batch(
    shared: Model, alone: dict[str, list[int]], texts: list[str], together: int
) -> None:
    lines = lines_of(*(random.Random(i).choice([{"prompt": text}, text]) for i, text in enumerate(texts)))
    found = results(shared, lines, together, **SAMPLED)
    for number, text in enumerate(texts, 1):
        assert found[str(number)]["token_ids"] == alone[text]


def test_a_line_that_fails_is_the_only_one(shared: Model, alone: dict[str, list[int]]) -> None:
    good = {"id": "good", "prompt": "hello", **SAMPLED}
    raw = b"\n".join([
        b'{"prompt": "hello", "seed": 7, "temperature": 1.5}', b"not json", b'{"prompt": 3}', b'{"prompts": "x"}',
        b"[]", b'{"prompt": ""}', b'{"prompt": "%s"}' % (b"word " * 200), b'{"prompt_ids": [999999]}', b"",
        json.dumps(good).encode(), json.dumps(good).encode(), b'{"prompt": "x", "max_tokens": 0}',
        b'{"prompt": "x", "temperature": -1}', b'{"messages": [{"role": "user", "content": "x"}]}', b'"abc"', b"\xff",
    ])  # fmt: skip
    found = results(shared, list(read_lines(raw)), 3, **SAMPLED)
    assert found["1"]["token_ids"] == found["good"]["token_ids"] == alone["hello"]
    assert found["15"]["token_ids"] == alone["abc"]
    errors = {name: result["error"]["message"] for name, result in found.items() if "error" in result}
    assert set(errors) == {"2", "3", "4", "5", "6", "7", "8", "11", "12", "13", "16"}
    for name, said in (("2", "not JSON"), ("4", "'prompts'"), ("7", "context"), ("11", "twice"), ("12", "max_tokens")):
        assert said in errors[name]


def test_conversations_go_on_and_wait_on_disk(llama_artifact: Path, tmp_path: Path) -> None:
    """A turn reads what was said before, computes only what is new, and says what a whole prompt would."""
    turns = [{"session": name, "prompt": f"{name} turn {turn}"} for turn in range(3) for name in ("a", "b", "c")]
    lines = lines_of(*turns, "hello")
    with opened(llama_artifact, lines, 2) as model:
        plain = results(model, lines, 2)
        whole = model.encode("a turn 0") + plain["1"]["token_ids"]
        ends = model.defaults.eos_ids
        second = [token for token in whole if token not in ends or token == whole[0]]
        second += model.tokenizer.encode("a turn 1", add_special_tokens=False)
        assert plain["4"]["prompt_tokens"] == len(second) and plain["4"]["reused_tokens"] >= len(whole) - 2
        model.session.release(0)
        assert model.generate(second, max_tokens=8).token_ids == plain["4"]["token_ids"]
        assert isinstance(model.session, Session)
        limit = 2 * model.session.kv.used_bytes(64, 63)
    with opened(llama_artifact, lines, 2, limit_bytes=limit, directory=str(tmp_path)) as model:
        spilled = results(model, lines, 2)
        assert model.session.kv_spill is not None and model.session.kv_spill.report().spills > 0
    assert {n: r["token_ids"] for n, r in spilled.items()} == {n: r["token_ids"] for n, r in plain.items()}


def test_what_does_not_fit_together_waits(llama_artifact: Path, tmp_path: Path, alone: dict[str, list[int]]) -> None:
    lines = lines_of(*TEXTS, {"prompt": "x", "max_tokens": 120})
    with opened(llama_artifact, lines, 4) as model:
        assert isinstance(model.session, Session)
        limit = model.session.kv.used_bytes(64, 63)  # of one of them
    with opened(llama_artifact, lines, 4, limit_bytes=limit, directory=str(tmp_path)) as model:
        found = results(model, lines, 4, **SAMPLED)
    assert [found[str(n)]["token_ids"] for n in range(1, 7)] == [alone[text] for text in TEXTS]
    assert "--kv-memory" in found["7"]["error"]["hint"]


def test_under_a_budget(moe_artifact: Path, tmp_path: Path) -> None:
    """Room for the sequences of one step; conversations that wait go to disk. The same tokens."""
    lines = lines_of(*({"session": name, "prompt": f"{name} {turn}"} for turn in range(2) for name in ("a", "b", "c")))
    with opened(moe_artifact, lines, 2) as model:
        plain = results(model, lines, 2)
    slots = Slots(slots_needed(lines, 2), 2, SpillOptions(directory=str(tmp_path)))
    budget = resident_bytes() + (256 << 20)
    with Model(moe_artifact, threads=1, max_context=128, memory=budget, slots=slots) as model:
        assert isinstance(model.session, Session) and model.session.kv_spill is not None
        assert model.session.kv_spill.options.limit_bytes == 2 * model.session.kv.used_bytes(128, 127)
        found = results(model, lines, 2)
    assert {n: r["token_ids"] for n, r in found.items()} == {n: r["token_ids"] for n, r in plain.items()}


def test_a_plan_is_executed_with_its_cache_on_disk(
    llama_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan -o` and `batch --plan` as with `run`: room for the sequences of all steps, layers of the cache that go."""
    file, plan = tmp_path / "prompts.jsonl", tmp_path / "plan.json"
    file.write_text("".join(json.dumps(text) + "\n" for text in TEXTS[:3]))
    words = ["batch", str(llama_artifact), str(file), "-n", "4", "-t", "1", "-b", "2", "--temp", "0", "-c", "128"]
    budget = f"{resident_bytes() + (256 << 20)}B"
    assert main(words) == main([*words, "--memory", budget]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = plan_for(llama_artifact, resident_bytes() + (256 << 20), 128, num_slots=2)
    assert made.placement is not None and made.placement.session.batch == 2 and made.kv_bytes is None
    away = tuple(replace(entry, tier="disk") for entry in made.placement.kv)
    plan.write_text(replace(made.placement, kv=away).to_json())
    assert main([*words, "--plan", str(plan), "--kv-dir", str(tmp_path)]) == 0
    told = capsys.readouterr()
    lines += told.out.splitlines()
    assert "KV cache was in memory all the time" in told.err  # two layers are as many as are there at once
    texts = [{r["id"]: r["text"] for r in map(json.loads, lines[at : at + 3])} for at in (0, 3, 6)]
    assert texts[0] == texts[1] == texts[2]
    assert main([*words, "--plan", str(plan), "--kv-spill", str(tmp_path)]) == 2
    assert "one of the two" in capsys.readouterr().err
    assert main([*words, "--plan", str(plan), "--kv-spill", str(tmp_path), "--kv-dir", str(tmp_path)]) == 2


def test_a_step_that_fails_ends_those_that_fail_alone(
    shared: Model, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, lines = shared.session.step, lines_of(*({"prompt": text, "id": text} for text in TEXTS[:3]))
    bad = shared.encode("abc")

    def ill(ids: Any, positions: Any, slots: Any, rows: Any) -> Any:
        if list(ids[: len(bad)]) == bad or (len(set(slots)) > 1 and len(ids) > 6):
            raise RuntimeDiagnostic("the disk is ill")
        return step(ids, positions, slots, rows)

    monkeypatch.setattr(shared.session, "step", ill)
    found = results(shared, lines, 3, **SAMPLED)
    assert found["abc"]["error"] == {"message": "the disk is ill"}
    assert all(found[text]["token_ids"] == alone[text] for text in ("hello", TEXTS[2]))


@given(st.binary(max_size=80))
def test_any_bytes_are_lines_or_faults(data: bytes) -> None:
    for line in read_lines(data):
        assert isinstance(line, Line) or (isinstance(line, BadLine) and isinstance(line.fault, DiagnosticError))


def test_command(llama_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"id": "x", "prompt": "hello"}\n"abc"\n')
    words = ["batch", str(llama_artifact), str(file), "-n", "4", "-t", "1", "-c", "64", "-b", "2"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert {json.loads(line)["id"] for line in told.out.splitlines()} == {
        "x",
        "2",
    } and "2 prompts, 0 failed" in told.err
    assert main([*words, "--kv-spill", str(tmp_path), "--kv-memory", "64MiB", "-o", str(out), "-q"]) == 0
    texts = {json.loads(line)["id"]: json.loads(line)["text"] for line in out.read_text().splitlines()}
    assert texts == {json.loads(line)["id"]: json.loads(line)["text"] for line in told.out.splitlines()}
    file.write_text('{"id": "x", "prompt": "hello"}\n{}\n')
    assert main(words) == 2
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and "1 failed" in told.err
    file.write_text("")
    assert main(words) == 2 and main([*words, "--kv-memory", "1MiB"]) == 2
    assert main(["batch", str(llama_artifact), str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err
