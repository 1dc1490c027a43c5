"""Text of a growing sequence of tokens, piece by piece, never with half a character.

    stream = StreamDecoder(tokenizer.decode, prompt_ids)
    for id in generated:
        print(stream.push(id), end="")
    print(stream.flush())

A character of several bytes may be spread over several tokens; a decoder shows its beginning as U+FFFD until the rest
arrives. So the replacement characters at the end of the text are held back until what follows shows whether they are
final. The tokens before (the end of the prompt) are decoded along, because decoders treat the first token specially:
many drop its leading blank. Cost of a push: decoding a few tokens, however long the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_UNDECIDED = 3  # at most so many U+FFFD at the end can still turn into a character (of four bytes)
_CONTEXT = 8  # tokens of the prompt that are decoded along
_MAX_WINDOW = 64  # tokens after which the window is cut even though no character ended with a token


class StreamDecoder:
    """`decode` gives the text of a list of ids; `context` are the ids before the first one pushed."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._shown = self._usable(context)
        self._clean = len(self._window)  # tokens of the window up to the last place where a character ended

    def push(self, id: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        self._window.append(id)
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            return self._recover()
        final = self._final_part(text)
        new = final[len(self._shown) :]
        if new:
            self._shown = final
        if final == text and new:
            self._cut(self._clean)
        elif len(self._window) > _MAX_WINDOW:
            self._cut(len(self._window) - _CONTEXT)
        return new

    def flush(self) -> str:
        """The rest, U+FFFD where bytes are missing. The decoder then goes on from here."""
        text = self._decode(self._window) if self._window else ""
        rest = text[len(self._shown) :] if text.startswith(self._shown) else self._decode(self._window[self._clean :])
        self._clean = len(self._window)
        self._shown = text
        return rest

    def _usable(self, context: Sequence[int]) -> tuple[list[int], str]:
        """The last tokens of the context and their text; nothing when their text cannot be made out.

        Taken by number, they may begin within a character, so up to three more are tried.
        """
        tokens: list[int] = []
        text = ""
        for count in range(_CONTEXT, _CONTEXT + _UNDECIDED + 1):
            tokens = list(context[-count:])
            text = self._decode(tokens) if tokens else ""
            if _BROKEN not in text:
                break
        return ([], "") if text.endswith(_BROKEN) else (tokens, text)

    def _final_part(self, text: str) -> str:
        """`text` without the replacement characters at its end that may still become something else."""
        end = len(text)
        while end > 0 and len(text) - end < _UNDECIDED and text[end - 1] == _BROKEN:
            end -= 1
        return text[:end]

    def _cut(self, start: int) -> None:
        """Forgets the tokens of the window before `start`."""
        self._window = self._window[start:]
        self._shown = self._final_part(self._decode(self._window))
        self._clean = len(self._window)

    def _recover(self) -> str:
        """The text shown before is not the beginning any more.

        Decoders with byte tokens show a whole run of them as broken while its last character is incomplete. Wait for
        the rest; when it does not come, go on with the tokens that were held back alone.
        """
        pending = self._window[self._clean :]
        if len(pending) <= 2 * _UNDECIDED:
            return ""
        self._window = pending
        self._clean = 0
        self._shown = self._final_part(self._decode(pending))
        return self._shown
