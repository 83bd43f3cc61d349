"""Copy: a list of words, a part of which is to be continued. Needs attention to exact positions, and no language."""

from __future__ import annotations

from random import Random

from jaxserve.eval.tasks import words
from jaxserve.eval.tasks.document import Document, Page, Room, Turn, spread

CUE, ANSWER = 16, 4
"""Words that say where in the list to begin, and words to be written after them."""
_WORDS = list(
    dict.fromkeys(
        words.NAMES + words.CITIES + words.PLACES + words.OBJECTS + words.FOODS + words.ANIMALS + words.COLOURS
    )
)


def copy(rng: Random, room: Room) -> Document:
    """Different words, as far as there are enough (about 240); then they come again in another order."""
    page = Page(room.count)
    items: list[str] = []
    page.add("List:")
    while page.tokens < room.tokens or len(items) < CUE + ANSWER + room.turns:
        if not len(items) % len(_WORDS):
            order = rng.sample(_WORDS, len(_WORDS))
        items.append(order[len(items) % len(order)])
        page.add(items[-1] + ",")
    turns = []
    for at in spread(rng, len(items) - CUE - ANSWER, room.turns):
        answer = ", ".join(items[at + CUE : at + CUE + ANSWER])
        turns.append(Turn(", ".join(items[at : at + CUE]), answer, page.depth(1 + at + CUE)))
    context = "List: " + ", ".join(items)
    return Document(context, tuple(turns), cue="Again: {},", request="Continue the list after: {},", extra_tokens=0)
