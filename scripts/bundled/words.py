"""Word lists of the generated tasks: closed lists written here, open lists drawn from a corpus. Knows no tokens."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

NAMES = """Anna Paul Lucy Tom Clara Ben Mary Jack Emma Sam Rosa Peter Nina Oscar Ella Hugo Fiona Adam Julia Max Laura
Felix Alice David Grace Henry Sarah Leo Martha Simon Ruth Victor Helen Oliver Jane Frank Kate George Eva Daniel Sophie
Martin Irene Philip Maya Robert Lily Arthur Diana Edward Nora Walter Iris
Thomas Vera Albert Olga Charles Molly James""".split()
CITIES = """Paris London Rome Berlin Madrid Oslo Vienna Athens Dublin Cairo Lima Tokyo Boston Delhi Prague Moscow
Lisbon Warsaw Milan Venice Geneva Naples Havana Chicago Sydney Toronto Nairobi Dallas Denver Seattle""".split()
PLACES = """kitchen garden cellar attic barn church school market library office bedroom hall tower forest mill station
harbour castle shop park bath stable yard bakery museum theatre bank hotel cave field""".split()
OBJECTS = """key lamp box book ring clock cup knife hat coat bag ball chair table mirror candle bottle basket
letter coin drum bell rope shoe pillow brush spoon plate map pen flute kite doll wheel ladder bucket blanket
sword crown watch""".split()
COLOURS = "red blue green yellow black white brown grey pink purple orange golden silver".split()
FOODS = """bread milk cheese apples soup rice fish cake honey eggs butter tea coffee plums grapes nuts pears beans corn
salad pasta lemons carrots onions berries sugar meat jam figs dates""".split()
ANIMALS = (
    "fox dog cat horse cow bear wolf lion mouse bird duck goose pig goat sheep rabbit owl frog deer donkey".split()
)
EVERY = NAMES + CITIES + PLACES + OBJECTS + COLOURS + FOODS + ANIMALS
CLOSED = frozenset(word.lower() for word in EVERY)

_WORD = re.compile(r"(?<=[ ])[a-z]{3,10}(?=[ ,.])")
_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Words:
    """Open words of a corpus. `seen` may be keys and values in training; `unseen` never are (they do occur in running
    text).
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @classmethod
    def from_texts(cls, texts: Iterable[str], at_least: int = 8) -> "Words":
        """Lower-case words of 3 to 10 letters that occur `at_least` times; one in eight (by a hash) is held out."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_WORD.findall(text))
        words = sorted(word for word, count in counts.items() if count >= at_least and word not in CLOSED)
        held_out = [zlib.crc32(word.encode()) % _HELD_OUT_ONE_IN == 0 for word in words]
        return cls(
            tuple(w for w, out in zip(words, held_out, strict=True) if not out),
            tuple(w for w, out in zip(words, held_out, strict=True) if out),
        )


def made_up(rng: Random) -> str:
    """A word that no dictionary has, two or three syllables long."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) + rng.choice(
        "nrstlx"
    )
