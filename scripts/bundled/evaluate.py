"""Recall on fresh instances: the share of answers whose every token the model would choose greedily. Knows no training.

One full forward over the document and its answers: a token counts where it is the argmax after all that precedes it, so
an answer counts exactly where greedy decoding would write it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from jaxserve.models import Model, Params
from scripts.bundled.data import END_OF_TEXT_ID, RowSource
from scripts.bundled.facts import CITY, CODE, Lexicon
from scripts.bundled.step import Batch, next_token_logits
from scripts.bundled.tasks import World
from scripts.bundled.words import Words

TOKENS_AT_ONCE = 2048
Predict = Callable[[Params, jax.Array], jax.Array]
"""(params, tokens [rows, T]) -> the most likely next token of each position [rows, T]"""


@dataclass(frozen=True)
class Recall:
    """Counts over fresh rows."""

    right: int
    answers: int
    right_tokens: int
    answer_tokens: int

    @property
    def share(self) -> float:
        return self.right / max(self.answers, 1)

    @property
    def token_share(self) -> float:
        return self.right_tokens / max(self.answer_tokens, 1)


@cache
def make_predict(model: Model) -> Predict:
    """predict(params, tokens [rows, T]) -> argmax of the next token [rows, T]."""
    return jax.jit(lambda params, tokens: next_token_logits(model, params, tokens).argmax(-1).reshape(tokens.shape))


def recall(predict: Predict, params: Params, batches: Iterable[Batch]) -> Recall:
    right = answers = right_tokens = answer_tokens = 0
    for batch in batches:
        ok = np.asarray(predict(params, jnp.asarray(batch["tokens"])))[:, :-1] == batch["tokens"][:, 1:]
        for hits, numbers in zip(ok, batch["answers"][:, 1:], strict=True):
            asked = numbers > 0
            right_tokens += int(hits[asked].sum())
            answer_tokens += int(asked.sum())
            missed = set(numbers[asked & ~hits].tolist())
            every = set(numbers[asked].tolist())
            answers += len(every)
            right += len(every - missed)
    return Recall(right, answers, right_tokens, answer_tokens)


def task_batches(tokenizer: Tokenizer, world: World, task: str, length: int, documents: int, seed: str) -> list[Batch]:
    """`documents` rows of one document of `task` each, `length` tokens with its padding, in batches of TOKENS_AT_ONCE
    tokens.
    """
    source = RowSource(tokenizer, world, {task: 1.0}, length, seed, shortest=length)
    rows = max(1, TOKENS_AT_ONCE // length)
    items = [source[i] for i in range(-(-documents // rows) * rows)]
    return [
        {name: np.stack([item[name] for item in items[i : i + rows]]) for name in items[0]}
        for i in range(0, len(items), rows)
    ]


def bits_per_byte(
    model: Model, params: Params, tokenizer: Tokenizer, texts: Iterable[str], windows: int, length: int = 512
) -> float:
    """Mean over `windows` windows of `length` tokens, one from the start of each text that is long enough."""
    score = jax.jit(
        lambda p, t: optax.softmax_cross_entropy_with_integer_labels(
            next_token_logits(model, p, t)[:-1], t[0, 1:]
        ).sum()
    )
    nats = size = 0.0
    for text in texts:
        ids = tokenizer.encode(text).ids[: length - 1]
        if len(ids) == length - 1 and windows > 0:
            windows -= 1
            nats += float(score(params, jnp.asarray([[END_OF_TEXT_ID, *ids]], jnp.int32)))
            size += len(tokenizer.decode(ids).encode())
    return nats / max(size, 1.0) / float(np.log(2))


@dataclass(frozen=True)
class Cell:
    """One row of the table: a task in one format, over some words and relations, on `times` as many documents.

    `by_token` counts tokens instead of whole answers: for long ones.
    """

    name: str
    task: str
    format: str
    unseen: bool = False
    relation: str = ""
    times: int = 1
    by_token: bool = False

    def world(self, world: World, words: Words) -> World:
        """Held-out text comes with `world`, words and relations from the cell."""
        lexicon = Lexicon(words.unseen, 1.0) if self.unseen else Lexicon(words.seen, 0.6)
        relations = {"code": (CODE,), "city": (CITY,), "": world.relations}[self.relation]
        return replace(world, lexicon=lexicon, relations=relations, formats=(self.format,))


CELLS = tuple(
    Cell(name, task, style, unseen, relation, times, task == "copy")
    for name, task, unseen, relation, times in (
        ("key-value", "kv", False, "", 2),
        ("key-value, 4-digit code", "kv", False, "code", 1),
        ("key-value, city", "kv", False, "city", 1),
        ("needle", "needle", False, "", 5),
        ("two-hop, step-wise", "hop", False, "", 2),
        ("key-value, unseen key words", "kv", True, "", 2),
        ("two-hop, unseen words", "hop", True, "", 1),
        ("latest value", "var", False, "", 1),
        ("copy a list, tokens", "copy", False, "", 2),
    )
    for style in ("qa", "chat")
)


def table(
    predict: Predict,
    params: Params,
    tokenizer: Tokenizer,
    world: World,
    words: Words,
    lengths: tuple[int, ...],
    documents: int,
    seed: str,
    cells: tuple[Cell, ...] = CELLS,
) -> list[dict[str, object]]:
    """One record a cell and length: name, format, tokens, share, standard error, answers asked."""
    records: list[dict[str, object]] = []
    for cell, length in product(cells, lengths):
        fresh = f"{seed}/{cell.name}/{cell.format}/{length}"
        rows = task_batches(tokenizer, cell.world(world, words), cell.task, length, documents * cell.times, fresh)
        found = recall(predict, params, rows)
        where = {"task": cell.name, "format": cell.format, "tokens": length}
        right, asked = (found.right_tokens, found.answer_tokens) if cell.by_token else (found.right, found.answers)
        share = right / max(asked, 1)
        noise = (share * (1 - share) / max(asked, 1)) ** 0.5
        counts = {"share": round(share, 4), "standard_error": round(noise, 4), "answers": asked}
        records.append(where | counts)
    return records


@dataclass(frozen=True)
class Wanted:
    """A release gate: the share that the tasks must reach at a length, the two formats averaged."""

    tasks: tuple[str, ...]
    tokens: int
    share: float


_RECALL = ("key-value", "needle", "two-hop, step-wise")
RELEASE_GATES = (
    Wanted(_RECALL, 1024, 0.90),
    Wanted(_RECALL, 2048, 0.75),
    Wanted(("key-value, unseen key words",), 512, 0.75),
)


def verdicts(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """Each release gate and task: what was wanted, what was reached, whether it passed."""
    result: list[dict[str, object]] = []
    for wanted in RELEASE_GATES:
        for task in wanted.tasks:
            shares = [float(str(r["share"])) for r in records if (r["task"], r["tokens"]) == (task, wanted.tokens)]
            if shares:
                reached = sum(shares) / len(shares)
                result.append(
                    {
                        "task": task,
                        "tokens": wanted.tokens,
                        "wanted": wanted.share,
                        "reached": round(reached, 4),
                        "passed": reached > wanted.share,
                    }
                )
    return result


def markdown(records: list[dict[str, object]]) -> str:
    """The records as a table: one line a task and format, one column a length, percentages."""
    lengths = sorted({int(str(r["tokens"])) for r in records})
    lines = ["| task | format | " + " | ".join(map(str, lengths)) + " |", "|---|---|" + "---:|" * len(lengths)]
    for task, style in dict.fromkeys((r["task"], r["format"]) for r in records):
        cells = {r["tokens"]: r["share"] for r in records if (r["task"], r["format"]) == (task, style)}
        lines.append(
            f"| {task} | {style} | "
            + " | ".join(f"{100 * float(str(cells[n])):.0f}" if n in cells else "" for n in lengths)
            + " |"
        )
    return "\n".join(lines)
