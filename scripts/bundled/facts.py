"""Facts for look-up tasks: a relation says how a (key, value) pair is told, asked for and answered. Knows no tokens.

The key always comes before the value: facts told the other way round were not learnt at this size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scripts.bundled import words as lists


@dataclass(frozen=True)
class Lexicon:
    """Where a document's words come from.

    open_share: chance that a word slot is filled from `open_words` instead of a closed list.
    single_share: chance that an open word is one of `single_words`, those of one token: matching longer ones is learnt
    later.
    made_up_share: chance that an open word is made up letter by letter, so that no list can hold it.
    """

    open_words: tuple[str, ...]
    open_share: float = 0.6
    single_words: tuple[str, ...] = ()
    single_share: float = 0.0
    made_up_share: float = 0.0

    def open(self, rng: Random) -> str:
        if rng.random() < self.made_up_share:
            return lists.made_up(rng)
        return rng.choice(self.single_words if rng.random() < self.single_share else self.open_words)

    def word(self, rng: Random, closed: list[str]) -> str:
        return self.open(rng) if rng.random() < self.open_share else rng.choice(closed)

    def name(self, rng: Random) -> str:
        """A person: an open word with a capital letter (rarer than elsewhere), or a name of the closed list."""
        return self.open(rng).capitalize() if rng.random() < self.open_share**2 else rng.choice(lists.NAMES)


Slot = Callable[[Random, Lexicon], str]


def _digits(count: int) -> Slot:
    return lambda rng, lexicon: "".join(rng.choice("0123456789") for _ in range(count))


def _closed(words: list[str]) -> Slot:
    return lambda rng, lexicon: lexicon.word(rng, words)


def _open(rng: Random, lexicon: Lexicon) -> str:
    return lexicon.open(rng)


def _name(rng: Random, lexicon: Lexicon) -> str:
    return lexicon.name(rng)


def _coloured(rng: Random, lexicon: Lexicon) -> str:
    return f"{rng.choice(lists.COLOURS)} {lexicon.word(rng, lists.OBJECTS)}"


@dataclass(frozen=True)
class Relation:
    """`tell` templates hold {k} before {v}; `ask` templates hold {k}. A chat answer is `answer`, a short one the value
    alone.
    """

    name: str
    key: Slot
    value: Slot
    tell: tuple[str, ...]
    ask: tuple[str, ...]
    answer: str = ""

    def __post_init__(self) -> None:
        for template in (*self.tell, self.sentence):
            if not -1 < template.find("{k}") < template.find("{v}"):
                raise ValueError(f"relation {self.name}: {template!r} must hold {{k}} before {{v}}.")

    @property
    def sentence(self) -> str:
        return self.answer or self.tell[0]


@dataclass(frozen=True)
class Fact:
    relation: Relation
    key: str
    value: str
    template: str

    def parts(self) -> tuple[str, str, str]:
        """The telling as (before the value, the value with its leading space, after it)."""
        before, after = self.template.replace("{k}", self.key).split("{v}")
        space = " " if before.endswith(" ") else ""
        return before.removesuffix(" "), space + self.value, after

    def __str__(self) -> str:
        return "".join(self.parts())

    def question(self, rng: Random) -> str:
        return rng.choice(self.relation.ask).replace("{k}", self.key)

    def sentence(self) -> str:
        return self.relation.sentence.replace("{k}", self.key).replace("{v}", self.value)


CODE = Relation(
    "code",
    _coloured,
    _digits(4),
    ("The code of the {k} is {v}.", "The {k} has the code {v}."),
    ("What is the code of the {k}?",),
)
CITY = Relation(
    "city",
    _name,
    _closed(lists.CITIES),
    ("{k} lives in {v}.", "{k} has a house in {v}."),
    ("Where does {k} live?", "In which city does {k} live?"),
)
RELATIONS = (
    CODE,
    CITY,
    Relation(
        "number",
        _name,
        _digits(3),
        ("{k}'s number is {v}.", "{k} has the number {v}."),
        ("What is {k}'s number?", "What is the number of {k}?"),
    ),
    Relation("room", _name, _closed(lists.PLACES), ("{k} is in the {v}.", "{k} sits in the {v}."), ("Where is {k}?",)),
    Relation("food", _name, _closed(lists.FOODS), ("{k} likes {v}.", "{k} eats {v}."), ("What does {k} like?",)),
    Relation(
        "place",
        _closed(lists.OBJECTS),
        _closed(lists.PLACES),
        ("The {k} is in the {v}.", "The {k} lies in the {v}."),
        ("Where is the {k}?", "In which place is the {k}?"),
    ),
    Relation(
        "owner",
        _closed(lists.OBJECTS),
        _name,
        ("The {k} belongs to {v}.", "The {k} was bought by {v}."),
        ("Who owns the {k}?", "Who has the {k}?"),
    ),
    Relation(
        "colour",
        _closed(lists.OBJECTS),
        _closed(lists.COLOURS),
        ("The {k} is {v}.", "The colour of the {k} is {v}."),
        ("What colour is the {k}?", "What is the colour of the {k}?"),
        "The {k} is {v}.",
    ),
    Relation(
        "pet", _name, _closed(lists.ANIMALS), ("{k} has a {v}.", "{k} owns a {v}."), ("What animal does {k} have?",)
    ),
    Relation(
        "word",
        _open,
        _open,
        ("The word for {k} is {v}.", "The word that goes with {k} is {v}."),
        ("What is the word for {k}?",),
    ),
    Relation(
        "pair", _open, _open, ("{k}: {v}.", "{k} = {v};", "{k} -> {v}\n"), ("What goes with {k}?", "{k}?"), "{k}: {v}."
    ),
    Relation(
        "password",
        _closed(lists.PLACES),
        _open,
        ("The password of the {k} is {v}.", "The {k} has the password {v}."),
        ("What is the password of the {k}?",),
    ),
    Relation(
        "price",
        _open,
        _digits(2),
        ("The {k} costs {v} coins.", "One {k} sells for {v} coins."),
        ("What does the {k} cost?", "How much is the {k}?"),
        "The {k} costs {v} coins.",
    ),
)


def draw_facts(rng: Random, lexicon: Lexicon, relation: Relation, count: int, one_template: bool) -> list[Fact]:
    """Up to `count` facts with different keys (fewer where the key slot runs out of words)."""
    keys: dict[str, None] = {}
    for _ in range(3 * count):
        if len(keys) == count:
            break
        keys[relation.key(rng, lexicon)] = None
    fixed = rng.choice(relation.tell)
    return [
        Fact(relation, key, relation.value(rng, lexicon), fixed if one_template else rng.choice(relation.tell))
        for key in keys
    ]
