"""Needles: a few facts in running text."""

from __future__ import annotations

from random import Random

from jaxserve.eval.tasks.document import Document, Room, TooShort, hide
from jaxserve.eval.tasks.facts import CODE, RELATIONS, Fact, Relation, draw
from jaxserve.eval.tasks.filler import Filler

NEEDLES = 16


def needle(rng: Random, room: Room) -> Document:
    """A fact for each turn, each of another kind, so that nothing in the context resembles the one asked for."""
    if room.turns > len(RELATIONS):
        raise TooShort(f"needle has {len(RELATIONS)} kinds of facts, one for each turn, not {room.turns}")
    return _hidden(rng, room, rng.sample(RELATIONS, room.turns))


def multi_needle(rng: Random, room: Room) -> Document:
    """16 facts of one kind in running text; each turn asks for one of them, the others distract.

    RULER's multi-key needle (arXiv:2404.06654).
    """
    return _hidden(rng, room, [CODE] * max(NEEDLES, room.turns))


def _hidden(rng: Random, room: Room, relations: list[Relation]) -> Document:
    keys: set[str] = set()
    facts: list[Fact] = []
    for relation in relations:
        fact = draw(rng, relation, keys)
        if fact is None:
            raise TooShort(f"there are no more keys for {len(relations)} facts of the kind {relation.name!r}")
        facts.append(fact)
    context, depths = hide(rng, room, [str(fact) for fact in facts], Filler(rng).sentence)
    turns = rng.sample([fact.turn(depth) for fact, depth in zip(facts, depths, strict=True)], room.turns)
    return Document(context, tuple(turns))
