"""Tokens in, displayable text out: whole characters only, and nothing after a stop string.

Takes a `decode` callable (token ids -> text) and one token at a time. A character may be spread over several tokens:
text that ends in U+FFFD is held back until the character is whole. (Bytes that never become a character are shown as
U+FFFD; how many of them may depend on the token borders.) A stop string may be spread over several tokens
too: text that could be the beginning of one is held back until it is decided. The text shown does not depend on where
the token borders fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes and a token at least one: more undecodable tokens than this are no beginning.
_MOST_INCOMPLETE_TOKENS = 3
_CONTEXT_TOKENS = 8
_MOST_WINDOW_TOKENS = 64


class CharacterStream:
    """Incremental decoding. Only a window of the last few tokens is decoded again, whatever the length of the text.

    `context` are the tokens before the first one pushed: a tokenizer drops the space before a text's first word, and
    only the context tells that this is not the first word.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-_CONTEXT_TOKENS:])  # the window: tokens already shown, then tokens not yet shown
        self._shown_ids = len(self._ids)

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, sometimes empty."""
        self._ids.append(token)
        text = self._pending(len(self._ids))
        if not text and len(self._ids) < _MOST_WINDOW_TOKENS:
            return ""  # a special token: keep what was before it as the context
        if not text.endswith(_REPLACEMENT):
            return self._show(text, len(self._ids))
        oldest_certain = len(self._ids) - _MOST_INCOMPLETE_TOKENS
        if oldest_certain > self._shown_ids:  # invalid bytes, or a real U+FFFD: they will not become a character
            return self._show(self._pending(oldest_certain), oldest_certain)
        return ""

    def finish(self) -> str:
        """The rest, U+FFFD for a character that never became whole."""
        return self._show(self._pending(len(self._ids)), len(self._ids))

    def _pending(self, end: int) -> str:
        """What tokens up to `end` of the window add to what is shown; a leading space depends on those before."""
        return self._decode(self._ids[:end])[len(self._decode(self._ids[: self._shown_ids])) :]

    def _show(self, text: str, end: int) -> str:
        self._ids = self._ids[self._shown_ids :]
        self._shown_ids = end - self._shown_ids
        return text


class StopStrings:
    """Cuts a text at the first completed stop string.

    Of several, the one completed first counts; of those completed by the same character the longest. That makes the
    result independent of the pieces in which the text arrives.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part that can be shown now; after a stop string nothing more."""
        if self.stopped:
            return ""
        self._held += text
        end, start = min(
            ((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=(-1, -1)
        )
        if end >= 0:
            self.stopped = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._longest_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
