"""Stop strings: text in pieces as it is decoded (`runtime.stream_decoder`), nothing shown after a stop string.

A stop string may be spread over several tokens: text that could be the beginning of one is held back until it is
decided. The text shown does not depend on where the token borders fall.
"""

from __future__ import annotations

from collections.abc import Sequence


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
