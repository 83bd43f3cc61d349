"""Corpus, tokenizer, words and worlds from a corpus folder: what training and evaluation draw from. Knows no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from scripts.bundled import words as lists
from scripts.bundled.corpus import Corpus, read_corpus
from scripts.bundled.curriculum import Stage
from scripts.bundled.data import RowSource, TokenCounter
from scripts.bundled.facts import Lexicon
from scripts.bundled.tasks import TASKS, World
from scripts.bundled.tokenizer import train_tokenizer
from scripts.bundled.words import Words

_TOKENIZER_CHARACTERS = 6_000_000  # of each source; the small ones are used whole
_SYNTHETIC = ("kv", "hop", "var", "copy", "talk", "restate")
_SYNTHETIC_DOCUMENTS = 3000
_CLOSED_REPEATS = 1000


@dataclass(frozen=True)
class Prepared:
    """`train` and `held_out` text, the words of keys and values, the tokenizer."""

    train: Corpus
    held_out: Corpus
    words: Words
    tokenizer: Tokenizer

    def source(self, stage: Stage, seed: str) -> RowSource:
        """Training rows of a stage."""
        world = World(
            self.train,
            self.lexicon(stage.open_share, stage.single_share, stage.made_up_share),
            TokenCounter(self.tokenizer),
        )
        return RowSource(self.tokenizer, world, stage.mix, stage.length, f"{seed}/{stage.name}", stage.shortest)

    def test_world(self, stage: Stage) -> World:
        """Held-out text, words as in the stage."""
        return World(
            self.held_out,
            self.lexicon(stage.open_share, stage.single_share, stage.made_up_share),
            TokenCounter(self.tokenizer),
        )

    def lexicon(self, open_share: float, single_share: float, made_up_share: float) -> Lexicon:
        return Lexicon(self.words.seen, open_share, self.single_words, single_share, made_up_share)

    @cached_property
    def single_words(self) -> tuple[str, ...]:
        """Training words that are one token behind a space."""
        return tuple(w for w in self.words.seen if len(self.tokenizer.encode(" " + w)) == 1)


def _tokenizer_texts(corpus: Corpus, words: Words) -> Iterator[str]:
    for documents in corpus.documents.values():
        used = 0
        for document in documents:
            used += len(document)
            if used > _TOKENIZER_CHARACTERS:
                break
            yield document
    yield from ["".join(f" {word}" for word in lists.EVERY)] * _CLOSED_REPEATS  # one token each
    rng, world = Random("tokenizer"), World(corpus, Lexicon(words.seen, 0.2), lambda text: 1 + len(text) // 4)
    for _ in range(_SYNTHETIC_DOCUMENTS):
        spans = TASKS[rng.choice(_SYNTHETIC)](rng, world, 256)
        yield "".join(span.text for span in spans).replace("<|im_start|>", "\n").replace("<|im_end|>", "\n")


def prepare(corpus_folder: Path, tokenizer_file: Path, vocabulary: int) -> Prepared:
    """Reads the corpus; trains the tokenizer and writes it to `tokenizer_file` unless it is there already."""
    train, held_out = read_corpus(corpus_folder)
    words = Words.from_texts(train.documents["kids_stories"] + train.documents["dialogues"])
    if not tokenizer_file.exists():
        tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(_tokenizer_texts(train, words), vocabulary).save(str(tokenizer_file))
    return Prepared(train, held_out, words, Tokenizer.from_file(str(tokenizer_file)))
