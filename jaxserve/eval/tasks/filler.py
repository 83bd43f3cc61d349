"""Running text to hide facts in: consecutive sentences of a public-domain book. Knows no tokens."""

from __future__ import annotations

import gzip
import re
from functools import cache
from importlib.resources import files
from random import Random

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@cache
def book() -> str:
    """The text that comes with the package (data/README.md)."""
    return gzip.decompress((files("jaxserve.eval") / "data" / "oz.txt.gz").read_bytes()).decode()


@cache
def _sentences() -> tuple[str, ...]:
    found = (sentence for paragraph in book().split("\n\n") for sentence in _SENTENCE_END.split(paragraph))
    # No quotes: a quotation cut in two makes odd text. No figures: answers may be figures.
    return tuple(s for s in found if 20 <= len(s) <= 200 and not re.search(r'["\d]', s) and s[-1] in ".!?")


class Filler:
    """An endless run of sentences, from a random place of the book on."""

    def __init__(self, rng: Random):
        self._next = rng.randrange(len(_sentences()))

    def sentence(self) -> str:
        found = _sentences()[self._next % len(_sentences())]
        self._next += 1
        return found
