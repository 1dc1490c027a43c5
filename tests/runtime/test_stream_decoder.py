"""Streaming: the pieces put together are the text, no piece ends within a character, pieces come early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from runtime.stream_decoder import StreamDecoder
from tests.frontends.tokenizer_files import byte_fallback, byte_level

TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level without words": byte_level(700, pre_split=False),
    "byte fallback": byte_fallback(),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)


def _decode(name: str) -> Callable[[Sequence[int]], str]:
    return TOKENIZERS[name].decode


def _pieces(name: str, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    stream = StreamDecoder(_decode(name), context)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_pieces_are_the_text_and_hold_whole_characters(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    pieces = _pieces(name, ids)
    assert "".join(pieces) == TOKENIZERS[name].decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(before=TEXT, after=TEXT)
def test_text_goes_on_after_a_prompt(name: str, before: str, after: str) -> None:
    """With the prompt as context, the pieces are what decoding the whole adds to the prompt."""
    tokenizer = TOKENIZERS[name]
    prompt, ids = (tokenizer.encode(t, add_special_tokens=False).ids for t in (before, after))
    whole, shown = tokenizer.decode([*prompt, *ids]), tokenizer.decode(prompt)
    if whole.startswith(shown) and "\ufffd" not in whole:
        assert "".join(_pieces(name, ids, prompt)) == whole[len(shown) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, cut=st.integers(0, 200))
def test_a_text_cut_within_a_character_ends_in_replacements(name: str, text: str, cut: int) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    pieces = _pieces(name, ids[:cut])
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    shown = "".join(pieces).rstrip("\ufffd")
    assert TOKENIZERS[name].decode(ids).startswith(shown)
    assert len(shown) >= len(TOKENIZERS[name].decode(ids[:cut]).rstrip("\ufffd"))


@pytest.mark.parametrize("name", ["byte-level", "byte-level without words"])
@given(ids=st.lists(st.integers(2, 300), max_size=60))
def test_any_tokens_whatever_they_mean(name: str, ids: list[int]) -> None:
    """Byte-level decoding replaces invalid bytes where they stand, so even nonsense comes out as decoding does it."""
    assert "".join(_pieces(name, ids)) == TOKENIZERS[name].decode(ids)


@given(ids=st.lists(st.integers(3, 300), max_size=60))
def test_any_tokens_with_byte_fallback_end(ids: list[int]) -> None:
    """Here invalid runs of bytes have no one right text; what is shown stays, and valid parts appear."""
    tokenizer = TOKENIZERS["byte fallback"]
    text = "".join(_pieces("byte fallback", ids))
    letters = [tokenizer.id_to_token(i) for i in ids if i > 258]
    assert all(letter.replace("▁", " ").strip() in text for letter in letters)


def test_leading_blank_depends_on_the_context() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("the world").ids
    assert "".join(_pieces("byte fallback", ids)) == "the world"
    assert "".join(_pieces("byte fallback", ids, context=tokenizer.encode("see").ids)) == " the world"
    assert "".join(_pieces("byte fallback", ids, context=[1])) == "the world"  # a special token is no text


def test_pieces_come_with_their_token() -> None:
    ids = TOKENIZERS["byte-level"].encode("the quick é fox").ids
    stream = StreamDecoder(_decode("byte-level"))
    shown = ""
    for count, id in enumerate(ids, 1):
        shown += stream.push(id)
        assert shown == TOKENIZERS["byte-level"].decode(ids[:count]).rstrip("\ufffd")


def _byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer.token_to_id(f"<0x{b:02X}>") for b in data]


def test_a_character_of_four_single_bytes() -> None:
    stream = StreamDecoder(_decode("byte fallback"))
    ids = _byte_tokens(TOKENIZERS["byte fallback"], "🙂é".encode())
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂", "", "é"]
    assert stream.flush() == ""


def test_a_long_chain_of_tokens_that_end_within_characters() -> None:
    """Tokens of (end of one character, beginning of the next): no token ends with a character for a long time."""
    data = ("é" * 300).encode()
    parts = [data[:1], *(data[i : i + 2] for i in range(1, len(data) - 1, 2)), data[-1:]]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(parts[i] for i in ids).decode("utf-8", "replace")

    lengths: list[int] = []

    def measured(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    stream = StreamDecoder(measured)
    pieces = [stream.push(i) for i in range(len(parts))]
    assert pieces == ["", *["é"] * 300]
    assert stream.flush() == ""
    assert max(lengths) <= 65


def test_invalid_bytes_are_shown_before_long() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    stream = StreamDecoder(_decode("byte fallback"))
    shown = "".join(stream.push(i) for i in _byte_tokens(tokenizer, b"\xff" * 40))
    assert 30 <= len(shown) <= 40
    assert shown + stream.flush() == "\ufffd" * 40


def test_a_run_of_bytes_that_stays_broken_does_not_take_back_what_was_shown() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    stream = StreamDecoder(_decode("byte fallback"))
    ids = _byte_tokens(tokenizer, "é".encode() + b"\xff" * 12) + tokenizer.encode("hello").ids
    shown = "".join(stream.push(i) for i in ids) + stream.flush()
    assert shown.startswith("é\ufffd")
    assert shown.endswith("hello")


def test_the_cost_of_a_push_does_not_grow() -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return "x" * len(ids)

    stream = StreamDecoder(decode, context=list(range(1000)))
    assert "".join(stream.push(i) for i in range(500)) == "x" * 500
    assert max(lengths) <= 10


def test_tokens_without_text_do_not_grow_the_window() -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return "".join("x" for i in ids if i)

    stream = StreamDecoder(decode)
    assert "".join(stream.push(i) for i in [1, *[0] * 300, 1]) == "xx"
    assert max(lengths) <= 65


def test_a_flush_in_the_middle_goes_on() -> None:
    ids = TOKENIZERS["byte-level"].encode("hello world again").ids
    stream = StreamDecoder(_decode("byte-level"))
    shown = "".join(stream.push(i) + stream.flush() for i in ids)
    assert shown == "hello world again"
