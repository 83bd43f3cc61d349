"""From options to cells. Everything that can be wrong with what was asked for is found here, before any work."""

from __future__ import annotations

from jaxserve.api import LLM
from jaxserve.eval.cells import Cell, RetrievalCell, check_lengths
from jaxserve.eval.options import EvalOptions
from jaxserve.eval.prompts import Chat, Plain, Style, fit
from jaxserve.eval.tasks import RETRIEVAL


def plan(options: EvalOptions, llm: LLM) -> list[Cell]:
    """The cells that `options` ask for, in the order of the table.

    Raises:
        ConfigError: a length that the model or a task does not have.
    """
    tokenizer = llm.get_tokenizer()
    style: Style = Plain(tokenizer) if options.style == "plain" else Chat(tokenizer, llm.chat_prompt)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    turns = min(options.turns, options.items)
    cells: list[Cell] = []
    for name in dict.fromkeys(options.task):
        for length in dict.fromkeys(options.lengths):
            seeds = [f"{options.task_seed}/{name}/{length}/{number}" for number in range(-(-options.items // turns))]
            documents = tuple(fit(name, RETRIEVAL[name], style, count, length, turns, seed) for seed in seeds)
            cells += [
                RetrievalCell(name, length, mode, documents, style, options.reuse == "program")
                for mode in dict.fromkeys(options.mode)
            ]
    check_lengths(cells, llm.limits.max_model_len)
    return cells
