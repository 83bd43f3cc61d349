"""Key-value recall: a context of nothing but facts of one kind, any of which may be asked for."""

from __future__ import annotations

from random import Random

from jaxserve.eval.tasks.document import Document, Page, Room, spread
from jaxserve.eval.tasks.facts import CODE, Fact, draw
from jaxserve.eval.tasks.filler import Filler


def kv_recall(rng: Random, room: Room) -> Document:
    """Codes of coloured things, as many as there is room for: every other fact is a distractor for the one asked.

    Where the words run out (about 250 facts), running text takes the rest of the room.
    """
    keys: set[str] = set()
    page = Page(room.count)
    facts: list[Fact] = []
    while page.tokens < room.tokens and len(facts) < _MOST and (fact := draw(rng, CODE, keys)) is not None:
        facts.append(fact)
        page.add(str(fact))
    filler = Filler(rng)
    while page.tokens < room.tokens:
        page.add(filler.sentence())
    turns = [facts[i].turn(page.depth(i)) for i in spread(rng, len(facts), room.turns)]
    return Document(page.text(), tuple(turns))


_MOST = 250
