"""The options of `jaxserve eval` that are not the engine's. One definition: flags and YAML keys derive from it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import EngineConfig, human_int, option
from jaxserve.eval.modes import MODES
from jaxserve.eval.perplexity import PERPLEXITY
from jaxserve.eval.recall_fixture import INDUCTION
from jaxserve.eval.tasks import RETRIEVAL

DEFAULT_TASKS = tuple(RETRIEVAL)


@dataclass(frozen=True)
class EvalOptions:
    task: tuple[str, ...] = option(
        DEFAULT_TASKS,
        "What to measure: retrieval tasks, perplexity of --text, or induction, a recall test with a model of its own "
        "(alone, without --model). Default: all retrieval tasks.",
        choices=(*RETRIEVAL, INDUCTION, PERPLEXITY),
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048), "Tokens of a retrieval task's longest sequence, answers included.", parse=human_int, low=64
    )
    mode: tuple[str, ...] = option(
        MODES, "How questions come: each with its context alone, turn by turn, or many on one context.", choices=MODES
    )
    items: int = option(100, "Questions for each task, length and mode.", parse=human_int, low=1)
    turns: int = option(5, "Questions about one document.", low=1, high=16)
    style: str = option(
        "plain",
        "plain: text with Q: and A:, the answer must equal the golden one. chat: the model's chat template, the answer "
        "must contain it.",
        choices=("plain", "chat"),
    )
    reuse: str = option(
        "prefix",
        "How later turns find the KV of earlier ones. prefix: in the prefix cache. program: held for their program, "
        "with the prefix cache off; the one way for KV that is private to a sequence.",
        choices=("prefix", "program"),
    )
    data: tuple[str, ...] = option(
        (),
        "Question sets, as NAME=FILE of JSON lines (or .gz): gsm8k, lambada, multiple-choice, json-schema, "
        "function-call. The first --items of each. Alone they replace the retrieval tasks.",
    )
    text: str | None = option(
        None, "File for perplexity and agreement, UTF-8. Default: the book that comes with the package."
    )
    window: int = option(512, "Tokens of a window of perplexity, or of a prompt of agreement.", parse=human_int, low=2)
    stride: int = option(256, "Tokens scored in each window after the first.", parse=human_int, low=1)
    max_text_tokens: int | None = option(None, "Only this many tokens of the text.", parse=human_int, low=2)
    task_seed: int = option(0, "Seeds what is generated.")
    out: str | None = option(None, "Folder for results; run the same command again to go on after an interruption.")


@dataclass(frozen=True)
class EvalConfig:
    """An engine and what to ask it."""

    engine: EngineConfig = EngineConfig()
    eval: EvalOptions = EvalOptions()
