"""Stop strings in streamed text. Knows nothing of tokens.

The stop that is complete first ends the text, wherever pieces of the stream begin and end; of two that are complete
with the same character, the longer. Text that may be the beginning of a stop is held back until it is known not to be.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

MAX_STOP_CHARS = 1024
"""Longest stop string."""


@lru_cache(maxsize=256)
def _borders(stop: str) -> array[int]:
    """For each beginning of `stop`: the length of its longest proper beginning that is also its end (Knuth, Morris and
    Pratt)."""
    borders = array("h", [0] * len(stop))
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length - 1]
        length += stop[index] == stop[length]
        borders[index] = length
    return borders


class StopFinder:
    """Finds the first of `stops` in text that comes in pieces; linear in the text, whatever is in it."""

    __slots__ = ("_stops", "_first", "_include", "_matched", "_held")

    def __init__(self, stops: tuple[str, ...], include_in_output: bool = False):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._first = frozenset(stop[0] for stop in stops)
        self._include = include_in_output
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop that ended it or None). Nothing may be pushed after a stop."""
        if not self._held and self._first.isdisjoint(text):
            return text, None
        for index, character in enumerate(text):
            stop = self._step(character)
            if stop is not None:
                shown = self._held + text[: index + 1]
                self._held = ""
                return shown if self._include else shown[: -len(stop)], stop
        shown = self._held + text
        cut = len(shown) - max(self._matched)
        self._held = shown[cut:]
        return shown[:cut], None

    def flush(self) -> str:
        """What was held back, when the text ends without a stop."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Advances every stop by a character; the longest that is complete with it."""
        found = None
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self._matched[number] = matched
            if matched == len(stop) and (found is None or matched > len(found)):
                found = stop
        return found
