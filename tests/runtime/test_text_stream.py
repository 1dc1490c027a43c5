"""Streaming text: whole characters at token borders, stop strings wherever the borders fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.text_stream import CharacterStream, StopStrings

Decode = Callable[[Sequence[int]], str]


def byte_level(ids: Sequence[int]) -> str:
    """A decoder like byte-level BPE with one token a byte: a broken sequence becomes one U+FFFD."""
    return bytes(ids).decode("utf-8", errors="replace")


def byte_fallback(ids: Sequence[int]) -> str:
    """A decoder like sentencepiece's: a run of byte tokens is text only when all of it is valid; the first word of a
    text loses its space. Ids below 256 are bytes, 256 + n is the n-th word."""
    pieces, run = [], bytearray()
    for token in [*ids, -1]:
        if 0 <= token < 256:
            run.append(token)
            continue
        try:
            pieces.append(run.decode())
        except UnicodeDecodeError:
            pieces.append("\ufffd" * len(run))
        run.clear()
        if token >= 0:
            pieces.append(f" word{token - 256}")
    text = "".join(pieces)
    return text.removeprefix(" ")


def stream(decode: Decode, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    characters = CharacterStream(decode, context)
    return [characters.push(token) for token in ids] + [characters.finish()]


@given(st.text())
@pytest.mark.parametrize("decode", [byte_level, byte_fallback])
def test_whole_characters(decode: Decode, text: str) -> None:
    """Every piece is whole characters and together they are the text, one token a byte."""
    if decode is byte_fallback:
        text = text.lstrip(" ")
    pieces = stream(decode, text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=30))
def test_invalid_bytes_are_shown_and_delay_nothing_for_long(content: bytes) -> None:
    pieces = stream(byte_level, content)
    # what is a character is shown; how many replacement characters stand for the rest is not promised
    assert "".join(pieces).replace("\ufffd", "") == byte_level(content).replace("\ufffd", "")
    held = 0
    for index, piece in enumerate(pieces[:-1]):
        held = 0 if piece else held + 1
        assert held <= 3, (index, pieces)


def test_an_emoji_comes_with_its_last_byte() -> None:
    assert stream(byte_level, "a😀b".encode()) == ["a", "", "", "", "😀", "b", ""]
    assert stream(byte_fallback, [256, *"€".encode(), 257]) == ["word0", "", "", "€", " word1", ""]


def test_a_character_that_never_completes() -> None:
    assert stream(byte_level, b"a\xf0\x9f") == ["a", "", "", "\ufffd"]


def test_spaces_depend_on_the_context() -> None:
    assert stream(byte_fallback, [256, 257]) == ["word0", " word1", ""]
    assert stream(byte_fallback, [256, 257], context=[300]) == [" word0", " word1", ""]


def test_special_tokens_do_not_lose_the_context() -> None:
    def decode(ids: Sequence[int]) -> str:
        return byte_fallback([token for token in ids if token < 1000])

    assert stream(decode, [256, 1000, 257, 1001, 1002, 258]) == ["word0", "", " word1", "", "", " word2", ""]
    assert "".join(stream(decode, [1000] * 300)) == ""


def test_work_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level(ids)

    assert "".join(stream(decode, b"abc" * 1000)) == "abc" * 1000
    assert longest <= 12


# --- stop strings --------------------------------------------------------------------------------------------------

TEXTS = st.text(alphabet="ab", max_size=20)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: read character by character, end where the first stop string completes."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@given(st.lists(TEXTS, max_size=8), STOPS)
def test_stop_strings_at_any_border(pieces: list[str], stops: list[str]) -> None:
    filter_ = StopStrings(stops)
    shown = [filter_.push(piece) for piece in pieces]
    expected, stopped = cut("".join(pieces), stops)
    assert filter_.stopped is stopped
    assert "".join(shown) + filter_.finish() == expected
    # what was shown at any time was right, and nothing certain was held back
    for count in range(len(pieces) + 1):
        text, stopped = cut("".join(pieces[:count]), stops)
        so_far = "".join(shown[:count])
        assert text.startswith(so_far)
        held = text[len(so_far) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_stop_string_examples() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert [stops.push(piece) for piece in ["Hello", "\n", "\nUse", " it", "\n\nUs", "er: x", "y"]] == [
        "Hello", "", "", "\n\nUse it", "", "", "",
    ]  # fmt: skip
    assert stops.stopped
    assert StopStrings([]).push("everything") == "everything"
    assert StopStrings([""]).push("an empty stop string never stops") != ""
