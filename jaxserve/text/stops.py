"""Stop strings in streamed text. Knows nothing of tokens.

The stop that is complete first ends the text, wherever pieces of the stream begin and end; of two that are complete
with the same character, the longer. Text that may be the beginning of a stop is held back until it is known not to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

MAX_STOP_CHARS = 1024
"""Longest stop string: the automaton has a state for each character."""


class _Automaton:
    """Aho-Corasick: a state is the longest end of the text that begins some stop."""

    def __init__(self, stops: Sequence[str]):
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match = [0]
        """Length of the longest stop that ends in a state; 0: none."""
        for stop in stops:
            self._add(stop)
        self.fail = [0] * len(self.next)
        self._link()
        self.first = frozenset(self.next[0])

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self.next[state]:
                self.next[state][character] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(0)
            state = self.next[state][character]
        self.match[state] = len(stop)

    def _link(self) -> None:
        level = list(self.next[0].values())
        while level:
            below = []
            for state in level:
                self.match[state] = self.match[state] or self.match[self.fail[state]]
                for character, child in self.next[state].items():
                    self.fail[child] = self.step(self.fail[state], character)
                    below.append(child)
            level = below

    def step(self, state: int, character: str) -> int:
        while state and character not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(character, 0)


_automaton = lru_cache(maxsize=256)(_Automaton)


class StopFinder:
    """Finds the first of `stops` in text that comes in pieces; linear in the text."""

    __slots__ = ("_automaton", "_include", "_state", "_held")

    def __init__(self, stops: tuple[str, ...], include_in_output: bool = False):
        self._automaton = _automaton(stops)
        self._include = include_in_output
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop that ended it or None). Nothing may be pushed after a stop."""
        automaton, state = self._automaton, self._state
        if not state and automaton.first.isdisjoint(text):
            return text, None
        for index, character in enumerate(text):
            state = automaton.step(state, character)
            length = automaton.match[state]
            if length:
                shown = self._held + text[: index + 1]
                stop = shown[-length:]
                self._held = ""
                return shown if self._include else shown[:-length], stop
        self._state = state
        shown = self._held + text
        cut = len(shown) - automaton.depth[state]
        self._held = shown[cut:]
        return shown[:cut], None

    def flush(self) -> str:
        """What was held back, when the text ends without a stop."""
        held, self._held = self._held, ""
        return held
