"""Reads the text corpus: documents by file, a held-out part, sentences as filler. Knows no tasks and no tokens."""

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

SEPARATOR = "<|endoftext|>"
FILES = ("kids_stories", "dialogues", "books", "expository")
_HELD_OUT_EVERY = 25
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_ODD_TURN = "[user"  # placeholders such as "[user 2's name]" that some dialogues hold


@dataclass(frozen=True)
class Corpus:
    """Documents of one part (training, held out) by source; `dialogues` are `User: ... / Assistant: ...` lines."""

    documents: dict[str, tuple[str, ...]]

    def text(self, rng: Random, characters: int, sources: Sequence[str]) -> str:
        """About `characters` characters of running text, from a random paragraph of a random document on."""
        document = rng.choice(self.documents[rng.choice(sources)])
        starts = [0] + [m.end() for m in re.finditer(r"\n\n", document)]
        latest = max(len(document) - characters, 0)
        return document[rng.choice([s for s in starts if s <= latest]) :][:characters]

    def sentences(self, rng: Random, count: int, source: str = "kids_stories") -> list[str]:
        """`count` sentences that follow each other in one document (fewer where it ends); 10 to 200 characters each."""
        found = [
            s
            for s in _SENTENCE_END.split(self.text(rng, 120 * count + 200, (source,)).replace("\n", " "))
            if 10 <= len(s) <= 200
        ]
        return found[:count]

    def dialogue(self, rng: Random) -> list[tuple[str, str]]:
        """(role, text) turns of a random dialogue, beginning with the user and ending with the assistant."""
        lines = rng.choice(self.documents["dialogues"]).split("\n")
        turns = []
        for line in lines:
            speaker, _, said = line.partition(": ")
            turns.append((speaker.lower(), said))
        return turns if turns[-1][0] == "assistant" else turns[:-1]


def read_corpus(folder: Path) -> tuple[Corpus, Corpus]:
    """(training part, held-out part) of the corpus in `folder`: one `NAME.txt.gz` a source, documents ended by
    `<|endoftext|>` lines.

    Raises FileNotFoundError naming the missing file, ValueError for a file without documents.
    """
    train, held_out = {}, {}
    for name in FILES:
        path = folder / f"{name}.txt.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: --corpus wants a folder with {', '.join(f + '.txt.gz' for f in FILES)}."
            )
        with gzip.open(path, "rt", encoding="utf-8") as file:
            documents = [d.strip() for d in file.read().split(SEPARATOR)]
        documents = [d for d in documents if d and not (name == "dialogues" and (_ODD_TURN in d or "\n" not in d))]
        if not documents:
            raise ValueError(f"{path} holds no documents; each must be followed by a line {SEPARATOR}.")
        train[name] = tuple(d for i, d in enumerate(documents) if i % _HELD_OUT_EVERY or len(documents) == 1)
        held_out[name] = tuple(documents[::_HELD_OUT_EVERY])
    return Corpus(train), Corpus(held_out)
