"""Facts: a relation says how a key and its value are told, asked for and answered. Knows no tokens.

The forms are those that the bundled model learnt (scripts/bundled/facts.py), and plain enough for any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jaxserve.eval.tasks import words
from jaxserve.eval.tasks.document import Turn

Draw = Callable[[Random], str]


@dataclass(frozen=True)
class Relation:
    """`tell` holds {k} before {v}, `ask` holds {k}; keys and values are drawn independently."""

    name: str
    key: Draw
    value: Draw
    tell: str
    ask: str


@dataclass(frozen=True)
class Fact:
    relation: Relation
    key: str
    value: str

    def __str__(self) -> str:
        return self.relation.tell.format(k=self.key, v=self.value)

    def turn(self, depth: float) -> Turn:
        return Turn(self.relation.ask.format(k=self.key), self.value, depth, str(self))


def _of(*lists: list[str]) -> Draw:
    return lambda rng: " ".join(rng.choice(one) for one in lists)


def _digits(count: int) -> Draw:
    return lambda rng: "".join(rng.choice("0123456789") for _ in range(count))


CODE = Relation(
    "code",
    _of(words.COLOURS, words.OBJECTS),
    _digits(4),
    "The code of the {k} is {v}.",
    "What is the code of the {k}?",
)
RELATIONS = (
    CODE,
    Relation("city", _of(words.NAMES), _of(words.CITIES), "{k} lives in {v}.", "Where does {k} live?"),
    Relation("number", _of(words.NAMES), _digits(3), "{k}'s number is {v}.", "What is {k}'s number?"),
    Relation("food", _of(words.NAMES), _of(words.FOODS), "{k} likes {v}.", "What does {k} like?"),
    Relation("place", _of(words.OBJECTS), _of(words.PLACES), "The {k} is in the {v}.", "Where is the {k}?"),
    Relation("owner", _of(words.OBJECTS), _of(words.NAMES), "The {k} belongs to {v}.", "Who owns the {k}?"),
    Relation("pet", _of(words.NAMES), _of(words.ANIMALS), "{k} has a {v}.", "What animal does {k} have?"),
    Relation("colour", _of(words.OBJECTS), _of(words.COLOURS), "The {k} is {v}.", "What colour is the {k}?"),
)


def draw(rng: Random, relation: Relation, keys: set[str]) -> Fact | None:
    """A fact about a key that is not among `keys`, where it is then put; None where keys have run out."""
    for _ in range(50):
        key = relation.key(rng)
        if key not in keys:
            keys.add(key)
            return Fact(relation, key, relation.value(rng))
    return None
