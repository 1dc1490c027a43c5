"""Generation against the fake artifact, whose greedy continuation is known: one sequence, batches, ends, times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import GenerationParams, GenerationRequest, RuntimeDiagnostic, SamplingParams, Session, TokenEvent
from runtime.generation import generate, generate_batch
from tests.runtime.fake_artifact import DEAD_WORKER_ID, MAX_CONTEXT, PREFILL_TOKENS, VOCAB, greedy_tokens


@pytest.fixture(scope="module")
def session(artifact_path: Path) -> Iterator[Session]:
    with Session(artifact_path, threads=1, num_slots=3) as session:
        yield session


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token) for token in ids)


def tokens(events: list[TokenEvent], sequence: int = 0) -> list[int]:
    return [event.token for event in events if event.sequence == sequence]


@pytest.mark.parametrize("length", [1, 4, 5, PREFILL_TOKENS, PREFILL_TOKENS + 1, 100])
def test_greedy(session: Session, length: int) -> None:
    prompt = [(3 * i + 1) % VOCAB for i in range(length)]
    events = list(generate(session, prompt, GenerationParams(max_tokens=12), decode=letters))
    assert tokens(events) == greedy_tokens(prompt, 12)
    assert "".join(event.text for event in events) == letters(greedy_tokens(prompt, 12))
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    assert [event.statistics for event in events[:-1]] == [None] * 11


def test_a_generation_does_not_go_on_where_another_began(session: Session) -> None:
    """It would read the other one's keys and values."""
    params = GenerationParams(max_tokens=6)
    first, other = generate(session, [1, 2], params), generate(session, [3, 4], params, slot=1)
    next(first)
    assert tokens([next(other), *other]) == greedy_tokens([3, 4], 6)  # in a slot of its own
    second = generate(session, [5, 6], params)
    next(second)
    with pytest.raises(RuntimeDiagnostic, match="another generation began in the same slot"):
        next(first)
    assert len(list(second)) == 5
    assert tokens(list(generate(session, [1, 2], params))) == greedy_tokens([1, 2], 6)


def test_events_come_as_they_are_made(session: Session) -> None:
    seen: list[TokenEvent] = []
    events = generate(session, [1, 2], GenerationParams(max_tokens=5), on_token=seen.append)
    assert seen == []
    first = next(events)
    assert seen == [first] and first.finish_reason is None and first.text == ""
    assert [*seen, *events] == [first, *seen[1:]]
    assert len(seen) == 5


def test_stop_id(session: Session) -> None:
    expected = greedy_tokens([5, 6], 20)
    stop = expected[7]
    first = expected.index(stop)
    events = list(generate(session, [5, 6], GenerationParams(20), stop_ids={stop}, decode=letters))
    assert tokens(events) == expected[: first + 1]
    assert events[-1].finish_reason == "stop"
    assert "".join(event.text for event in events) == letters(expected[:first])  # the mark itself is no text


def test_stop_string_over_token_borders(session: Session) -> None:
    expected = greedy_tokens([5, 6], 20)
    text = letters(expected)
    stop = text[6:9]
    assert text.find(stop) == 6
    events = list(generate(session, [5, 6], GenerationParams(20, stop_strings=(stop, "zz")), decode=letters))
    assert tokens(events) == expected[:9]
    assert events[-1].finish_reason == "stop"
    assert "".join(event.text for event in events) == text[:6]


def test_text_held_for_a_stop_string_is_shown_at_the_end(session: Session) -> None:
    expected = greedy_tokens([5, 6], 4)
    stop = letters(expected)[-1] + "?"
    events = list(generate(session, [5, 6], GenerationParams(4, stop_strings=(stop,)), decode=letters))
    assert "".join(event.text for event in events) == letters(expected)
    assert events[-1].finish_reason == "length"


def test_characters_over_token_borders(session: Session) -> None:
    """Two tokens make one character here: nothing broken is shown in between."""

    def pairs(ids: Sequence[int]) -> str:
        whole = "".join(f"<{a},{b}>" for a, b in zip(ids[::2], ids[1::2], strict=False))
        return whole + ("\ufffd" if len(ids) % 2 else "")

    expected = greedy_tokens([5, 6], 7)
    texts = [event.text for event in generate(session, [5, 6], GenerationParams(7), decode=pairs)]
    assert texts == ["", f"<{expected[0]},{expected[1]}>", "", f"<{expected[2]},{expected[3]}>", "",
                     f"<{expected[4]},{expected[5]}>", "\ufffd"]  # fmt: skip


def test_context_ends_generation(artifact_path: Path) -> None:
    with Session(artifact_path, threads=1, max_context=10) as session:
        events = list(generate(session, [1] * 7, GenerationParams(100)))
        # positions 7, 8, 9 take the first three tokens, the fourth is chosen from the last position's logits
        assert tokens(events) == greedy_tokens([1] * 7, 4)
        assert events[-1].finish_reason == "context"
        full = list(generate(session, [1] * 10, GenerationParams(100)))
        assert tokens(full) == greedy_tokens([1] * 10, 1) and full[-1].finish_reason == "context"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 21, "the prompt has 21 tokens, the context only 20(.|\n)*the model was made for 200"),
        ([1, VOCAB], f"token id {VOCAB}(.|\n)*0..{VOCAB - 1}"),
        ([-1], "token id -1"),
    ],
)
def test_bad_prompts_are_refused_at_once(artifact_path: Path, prompt: list[int], message: str) -> None:
    with Session(artifact_path, threads=1, max_context=20) as session:
        with pytest.raises(RuntimeDiagnostic, match=message):
            generate(session, prompt)
        with pytest.raises(RuntimeDiagnostic, match=message):
            generate_batch(session, [GenerationRequest([1]), GenerationRequest(prompt)])
        assert session.filled(0) == 0


def test_prompt_too_long_for_the_model(session: Session) -> None:
    with pytest.raises(RuntimeDiagnostic) as caught:
        generate(session, [1] * (MAX_CONTEXT + 1))
    assert str(caught.value).endswith("hint: shorten the prompt")


def test_bad_parameters(session: Session) -> None:
    for bad in (0, -1, 1.5):
        with pytest.raises(RuntimeDiagnostic, match=f"max_tokens is {bad}"):
            GenerationParams(max_tokens=bad)
    with pytest.raises(RuntimeDiagnostic, match="a stop string is empty"):
        GenerationParams(stop_strings=("a", ""))
    with pytest.raises(RuntimeDiagnostic, match="stop strings were given without a decoder"):
        generate(session, [1], GenerationParams(stop_strings=("a",)))


def test_sampling_repeats_with_its_seed(session: Session) -> None:
    params = GenerationParams(30, SamplingParams(temperature=1.0, top_p=0.9, seed=5))
    first = list(generate(session, [1, 2, 3], params))
    assert tokens(first) == tokens(list(generate(session, [1, 2, 3], params)))
    assert first[-1].statistics is not None and first[-1].statistics.seed == 5
    other = GenerationParams(30, SamplingParams(temperature=1.0, top_p=0.9, seed=6))
    assert tokens(first) != tokens(list(generate(session, [1, 2, 3], other)))


def test_repetition_penalty_sees_prompt_and_text(session: Session) -> None:
    """With an overwhelming penalty no token comes twice while others are left (all fake logits are positive)."""
    params = GenerationParams(30, SamplingParams(repetition_penalty=1e9))
    got = tokens(list(generate(session, [1, 2, 3], params)))
    assert len({1, 2, 3, *got}) == 33


def test_statistics(session: Session) -> None:
    statistics = list(generate(session, [1] * 50, GenerationParams(20)))[-1].statistics
    assert statistics is not None
    assert (statistics.prompt_tokens, statistics.generated_tokens) == (50, 20)
    assert 0 < statistics.ttft_s < statistics.total_s
    assert statistics.tpot_s == pytest.approx((statistics.total_s - statistics.ttft_s) / 19)
    assert statistics.prompt_tokens_per_s == pytest.approx(50 / statistics.ttft_s)
    assert statistics.decode_tokens_per_s == pytest.approx(1 / statistics.tpot_s)
    single = list(generate(session, [1], GenerationParams(1)))[-1].statistics
    assert single is not None and (single.tpot_s, single.decode_tokens_per_s) == (0.0, 0.0)


def test_other_slots_are_left_alone(session: Session) -> None:
    session.step([1, 2], [0, 1], [2, 2], [])
    list(generate(session, [9], GenerationParams(5), slot=1))
    assert session.filled(2) == 2 and session.filled(1) == 5


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, DEAD_WORKER_ID - 1), min_size=1, max_size=40), st.integers(1, 8)),
        min_size=1,
        max_size=6,
    )
)
def test_batch_equals_each_alone(session: Session, work: list[tuple[list[int], int]]) -> None:
    """More requests than slots, prompts longer than a step: every sequence gets its own continuation."""
    requests = [GenerationRequest(prompt, GenerationParams(count)) for prompt, count in work]
    events = list(generate_batch(session, requests, decode=letters))
    for index, (prompt, count) in enumerate(work):
        own = [event for event in events if event.sequence == index]
        assert tokens(own, index) == greedy_tokens(prompt, count)
        assert "".join(event.text for event in own) == letters(greedy_tokens(prompt, count))
        assert own[-1].finish_reason == "length" and own[-1].statistics is not None
    assert len(events) == sum(count for _, count in work)


def test_batch_shares_steps(artifact_path: Path) -> None:
    """A long prompt is taken in pieces beside the tokens of the others, which never wait for it."""
    with Session(artifact_path, threads=1, num_slots=2) as session, session.profile() as profile:
        requests = [GenerationRequest([1], GenerationParams(6)), GenerationRequest([2] * 40, GenerationParams(1))]
        events = list(generate_batch(session, requests))
    assert [step.tokens for step in profile.steps][:3] == [PREFILL_TOKENS, PREFILL_TOKENS, 40 - 2 * PREFILL_TOKENS + 3]
    assert [event.sequence for event in events] == [0, 0, 0, 1, 0, 0, 0]


def test_a_long_prompt_does_not_hold_up_the_others(artifact_path: Path) -> None:
    with Session(artifact_path, threads=1, num_slots=2) as session:
        requests = [GenerationRequest([2] * 40, GenerationParams(1)), GenerationRequest([1], GenerationParams(4))]
        assert [event.sequence for event in generate_batch(session, requests)] == [1, 1, 1, 0, 1]


def test_batch_of_nothing(session: Session) -> None:
    assert list(generate_batch(session, [])) == []


def test_each_request_stops_by_its_own_rule(session: Session) -> None:
    expected = greedy_tokens([5, 6], 10)
    requests = [
        GenerationRequest([5, 6], GenerationParams(10), stop_ids={expected[3]}),
        GenerationRequest([5, 6], GenerationParams(3)),
        GenerationRequest([5, 6], GenerationParams(10, stop_strings=(letters(expected[4:6]),))),
    ]
    events = list(generate_batch(session, requests, decode=letters))
    assert tokens(events, 0) == expected[: expected.index(expected[3]) + 1]
    assert tokens(events, 1) == expected[:3]
    assert tokens(events, 2) == expected[:6]
    assert [e.finish_reason for e in events if e.finish_reason] == ["length", "stop", "stop"]


def test_logits_are_used_for_the_right_sequence(session: Session) -> None:
    """Three sequences that differ in one early token go different ways from the first step on."""
    prompts = [[token, *range(20)] for token in (1, 2, 3)]
    events = list(generate_batch(session, [GenerationRequest(p, GenerationParams(4)) for p in prompts]))
    got = [tokens(events, index) for index in range(3)]
    assert got == [greedy_tokens(prompt, 4) for prompt in prompts]
    assert len({tuple(np.array(sequence)) for sequence in got}) == 3
