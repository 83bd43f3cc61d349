"""Packs documents into rows and feeds them through Grain, the same for the same seed. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import grain
import numpy as np
from tokenizers import Tokenizer

from scripts.bundled.tasks import COPIED, TASKS, Span, World

END_OF_TEXT_ID, SPECIAL_TOKENS = 0, 4
RANDOM = "rand"  # the one task made of token ids instead of text
_WHOLE_REST = 0.4


@dataclass(frozen=True)
class Row:
    """tokens [T] int32, weights [T] float32 and answers [T] int32 (0: none) of one row; weights[i] belongs to tokens[i]
    as a target.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens, "weights": self.weights, "answers": self.answers}


class TokenCounter:
    """Number of tokens of a piece of a document. A space at its end belongs to the next piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        return len(self._tokenizer.encode(text.rstrip(" ")))


def encode(tokenizer: Tokenizer, spans: list[Span], budget: int) -> tuple[list[int], list[float], list[int]]:
    """Token ids, loss weights and answer numbers of a document, cut to `budget` tokens; an answer that was cut loses
    its number.

    The text is encoded whole, as a server encodes a prompt; a token belongs to the span that holds its last character.
    """
    encoding = tokenizer.encode("".join(span.text for span in spans))
    ends = np.cumsum([len(span.text) for span in spans])
    last = np.asarray([max(end - 1, start) for start, end in encoding.offsets], np.int64)
    owners = [spans[i] for i in np.searchsorted(ends, last, side="right").clip(max=len(spans) - 1)]
    cut = {span.answer for span in owners[budget:]}
    owners = owners[:budget]
    return encoding.ids[:budget], [s.weight for s in owners], [0 if s.answer in cut else s.answer for s in owners]


def random_repeats(rng: Random, vocabulary: int, budget: int) -> tuple[list[int], list[float], list[int]]:
    """32 to 64 random tokens told two to four times: the primer that makes induction form."""
    period = [rng.randrange(SPECIAL_TOKENS, vocabulary) for _ in range(min(rng.randint(32, 64), max(budget // 2, 1)))]
    repeats = rng.randint(1, 3)
    tokens = (period * (1 + repeats))[:budget]
    first = min(len(period), len(tokens))
    rest = len(tokens) - first
    return tokens, [0.0] * first + [COPIED] * rest, [0] * first + [1] * rest


@dataclass(frozen=True)
class RowSource:
    """Rows of a stage by number: a Grain random-access source without end.

    mix: task name -> share of documents. Documents are packed behind `<|endoftext|>`; each takes the whole rest of the
    row with
    chance 0.4, otherwise a length drawn from [shortest, rest], so that long rows keep short documents.
    """

    tokenizer: Tokenizer
    world: World
    mix: Mapping[str, float]
    length: int
    seed: str
    shortest: int = 64

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = Random(f"{self.seed}/{index}")
        tokens, weights, answers = [], [], []
        number = 0
        while len(tokens) < self.length:
            rest = self.length - len(tokens) - 1
            budget = rest if rest <= self.shortest or rng.random() < _WHOLE_REST else rng.randint(self.shortest, rest)
            ids, weight, answer = self.document(rng, budget)
            tokens += [END_OF_TEXT_ID, *ids]
            weights += [1.0 if tokens else 0.0, *weight]
            answers += [0, *(a + number if a else 0 for a in answer)]
            number = max(answers)
        return Row(
            np.asarray(tokens[: self.length], np.int32),
            np.asarray(weights[: self.length], np.float32),
            np.asarray(answers[: self.length], np.int32),
        ).as_dict()

    def document(self, rng: Random, budget: int) -> tuple[list[int], list[float], list[int]]:
        task = rng.choices(list(self.mix), list(self.mix.values()))[0]
        if task == RANDOM:
            return random_repeats(rng, self.tokenizer.get_vocab_size(), budget)
        return encode(self.tokenizer, TASKS[task](rng, self.world, budget), budget)


def batches(source: RowSource, rows: int, start: int) -> grain.DatasetIterator:
    """Batches [rows, T] of a stage from step `start` on; the same step always gives the same batch."""
    dataset = grain.MapDataset.source(source)[start * rows :].batch(rows)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
