"""Variable tracking: values that are set again and again; the latest one counts."""

from __future__ import annotations

from random import Random

from jaxserve.eval.tasks import words
from jaxserve.eval.tasks.document import Document, Page, Room, TooShort, Turn

TOKENS_A_PERSON = 40
MOST_PEOPLE = 50


def variable_tracking(rng: Random, room: Room) -> Document:
    """People walk from place to place; a turn asks where one of them is now. `depth` is that of the last word on them;
    everything told about the same person before is a distractor."""
    people = rng.sample(words.NAMES, min(max(room.tokens // TOKENS_A_PERSON, 2), MOST_PEOPLE))
    page = Page(room.count)
    now: dict[str, str] = {}
    last: dict[str, int] = {}
    while page.tokens < room.tokens:
        person = rng.choice(people)
        now[person], last[person] = rng.choice(words.PLACES), page.tokens
        page.add(f"{person} went to the {now[person]}.")
    if len(now) < room.turns:
        raise TooShort(f"there is room for {len(now)} people, and {room.turns} turns ask for one each")
    turns = [
        Turn(
            f"Where is {person} now?", now[person], last[person] / page.tokens, f"{person} is in the {now[person]} now."
        )
        for person in rng.sample(list(now), room.turns)
    ]
    return Document(page.text(), tuple(turns))
