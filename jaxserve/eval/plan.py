"""From options to cells. Everything that can be wrong with what was asked for is found here, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import ConfigError
from jaxserve.eval.cells import Cell, RetrievalCell, check_lengths
from jaxserve.eval.dataset_cell import DatasetCell
from jaxserve.eval.datasets import Item, read
from jaxserve.eval.options import DEFAULT_TASKS, EvalOptions
from jaxserve.eval.perplexity import PERPLEXITY, PerplexityCell, windows
from jaxserve.eval.prompts import Chat, Plain, Style, fit
from jaxserve.eval.recall_fixture import INDUCTION, induction
from jaxserve.eval.tasks import RETRIEVAL
from jaxserve.eval.tasks.filler import book
from jaxserve.text.intake import Intake
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """What the cells are made from and is read before an engine starts."""

    text: str
    sets: dict[str, tuple[Item, ...]]


def read_inputs(options: EvalOptions) -> Inputs:
    """
    Raises:
        ConfigError: a file that cannot be read, or options that exclude each other.
    """
    if INDUCTION in options.task and set(options.task) != {INDUCTION}:
        raise ConfigError("--task induction brings a model of its own: run it alone")
    return Inputs(book() if options.text is None else _read(Path(options.text)), _read_sets(options))


def _read_sets(options: EvalOptions) -> dict[str, tuple[Item, ...]]:
    found: dict[str, tuple[Item, ...]] = {}
    for spec in options.data:
        name, equals, path = spec.partition("=")
        if not equals:
            raise ConfigError(f"--data {spec} is not NAME=FILE")
        if name in found:
            raise ConfigError(f"--data names {name} twice")
        found[name] = tuple(read(name, Path(path))[: options.items])
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is not UTF-8: {error}") from None


def plan(options: EvalOptions, inputs: Inputs, intake: Intake, max_model_len: int) -> list[Cell]:
    """The cells that `options` ask for, in the order of the table; no engine is needed.

    Raises:
        ConfigError: a length that the model or a task does not have.
    """
    cells: list[Cell] = []
    for name, questions in inputs.sets.items():
        cells.append(_dataset(options, name, questions, intake))
    for name in dict.fromkeys(options.task) if options.task != DEFAULT_TASKS or not inputs.sets else ():
        if name == PERPLEXITY:
            cells.append(_perplexity(options, inputs.text, intake.tokenizer))
        else:
            cells += _retrieval(options, name, intake)
    check_lengths(cells, max_model_len)
    return cells


def _dataset(options: EvalOptions, name: str, questions: tuple[Item, ...], intake: Intake) -> Cell:
    tokenizer = intake.tokenizer

    def chat(prompt: str) -> list[int]:
        text = intake.chat_prompt([{"role": "user", "content": prompt}])
        return tokenizer.encode(text, add_special_tokens=False)

    return DatasetCell(name, questions, tokenizer, tokenizer.encode if options.style == "plain" else chat)


def _perplexity(options: EvalOptions, text: str, tokenizer: Tokenizer) -> Cell:
    tokens = tokenizer.encode(text)[: options.max_text_tokens]
    return PerplexityCell(tuple(windows(tokens, options.window, options.stride, tokenizer)), options.window)


def _retrieval(options: EvalOptions, name: str, intake: Intake) -> list[Cell]:
    tokenizer = intake.tokenizer
    task = induction if name == INDUCTION else RETRIEVAL[name]
    style: Style = Plain(tokenizer) if options.style == "plain" else Chat(tokenizer, intake.chat_prompt)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    turns = min(options.turns, options.items)
    cells: list[Cell] = []
    for length in dict.fromkeys(options.lengths):
        seeds = [f"{options.task_seed}/{name}/{length}/{number}" for number in range(-(-options.items // turns))]
        documents = tuple(fit(name, task, style, count, length, turns, seed) for seed in seeds)
        cells += [
            RetrievalCell(name, length, mode, documents, style, options.reuse == "program")
            for mode in dict.fromkeys(options.mode)
        ]
    return cells
