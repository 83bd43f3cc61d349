"""Two hops: who has the thing, and where is that person? Both facts are told, far from each other."""

from __future__ import annotations

from random import Random

from jaxserve.eval.tasks import words
from jaxserve.eval.tasks.document import Document, Room, TooShort, Turn, hide
from jaxserve.eval.tasks.filler import Filler

FACT_SHARE = 0.75
"""Of the context, as far as there are words for; the rest is running text."""


def two_hop(rng: Random, room: Room) -> Document:
    """People are in places, things are with people; a turn asks where a thing is. The answer names both steps, since a
    small model finds the second from the first. `depth` is that of the earlier of the two facts."""
    pair = room.count(" Anna is in the kitchen.") + room.count(" The key is with Anna.")
    count = min(int(FACT_SHARE * room.tokens / pair), len(words.NAMES), len(words.OBJECTS))
    if count < room.turns:
        raise TooShort(f"there is room for {count} people with things, and {room.turns} turns ask for one each")
    people, things = rng.sample(words.NAMES, count), rng.sample(words.OBJECTS, count)
    where = {person: rng.choice(words.PLACES) for person in people}
    holder = {thing: rng.choice(people) for thing in things}
    is_in = {person: f"{person} is in the {place}." for person, place in where.items()}
    is_with = {thing: f"The {thing} is with {person}." for thing, person in holder.items()}
    facts = rng.sample([*is_in.values(), *is_with.values()], 2 * count)
    context, depths = hide(rng, room, facts, Filler(rng).sentence)
    depth = dict(zip(facts, depths, strict=True))

    def turn(thing: str) -> Turn:
        person = holder[thing]
        sentence = f"The {thing} is with {person}, and {person} is in the {where[person]}."
        first = min(depth[is_with[thing]], depth[is_in[person]])
        return Turn(f"Where is the {thing}?", f"with {person} in the {where[person]}", first, sentence)

    return Document(context, tuple(turn(thing) for thing in rng.sample(things, room.turns)))
