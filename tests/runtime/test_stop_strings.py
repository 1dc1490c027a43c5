"""Stop strings wherever the borders of the pieces fall."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from runtime.stop_strings import StopStrings

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
    short = StopStrings(["ab"])
    assert [short.push(piece) for piece in ["xa", "b"]] == ["x", ""] and short.stopped  # all but one character came
    assert StopStrings([]).push("everything") == "everything"
    assert StopStrings([""]).push("an empty stop string never stops") != ""
