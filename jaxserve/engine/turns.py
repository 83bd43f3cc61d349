"""Tokens of the turns that programs ended last, to be compared with their next prompts. Knows no pages, no device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from jaxserve.types import SeqId

PRUNE_ABOVE = 64


class Turns:
    """By program: the sequence whose pages the scheduler holds for it, and its tokens."""

    def __init__(self, pinned: Callable[[str], SeqId | None]) -> None:
        """`pinned`: which sequence the scheduler holds for a program."""
        self._pinned = pinned
        self._last: dict[str, tuple[SeqId, array[int]]] = {}
        self._prune_at = PRUNE_ABOVE

    def ended(self, program: str, seq: SeqId, tokens: Sequence[int]) -> None:
        """A turn is over. It counts if the scheduler holds its pages."""
        if self._pinned(program) != seq:
            return
        self._last[program] = (seq, array("i", tokens))
        if len(self._last) > self._prune_at:
            self._last = {key: turn for key, turn in self._last.items() if self._pinned(key) == turn[0]}
            self._prune_at = PRUNE_ABOVE + 2 * len(self._last)

    def shared(self, program: str, prompt: Sequence[int]) -> int:
        """Leading tokens that `prompt` has in common with what the scheduler holds for the program."""
        seq, tokens = self._last.get(program, (None, array("i")))
        return common_prefix(tokens, array("i", prompt)) if seq is not None and self._pinned(program) == seq else 0


def common_prefix(a: array[int], b: array[int]) -> int:
    """Length of the longest beginning of both. Compares in C: prompts are long and mostly equal."""
    known, end = 0, min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    while end - known > 1:  # equal below `known`, different below `end`
        middle = (known + end) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            end = middle
    return known
