"""Token ids for a trace that has none: prompts that agree exactly as far as the trace says. Knows no tokenizer."""

from __future__ import annotations

import random

from jaxserve.sim.workload import Job

FIRST, END = 300, 1000
"""Ids that every vocabulary has, above the special tokens that small ones begin with."""


def prompt_tokens(job: Job, index: int, number: int) -> list[int]:
    """The prompt of turn `index` of a job, the same every time. `number` tells jobs apart that share nothing.

    What an engine answered is not part of later turns: they bring an answer of their own, so that prompts do not depend
    on the model, and a session finds the KV of its prompts but not of its answers.
    """
    turn = job.turns[index]
    made: list[int] = []
    for end, label in turn.spans:
        stop = min(end, turn.prompt)
        if len(made) < stop:
            made += _stretch(f"{job.copy}/{label}", len(made), stop)
    if len(made) < turn.prompt:
        made += _stretch(f"{number}/{index}/own", len(made), turn.prompt)
    return made


def _stretch(name: str, start: int, end: int) -> list[int]:
    """Tokens [start, end) of the endless text called `name`. Texts differ from each other at every position's page."""
    block = 512
    tokens: list[int] = []
    for part in range(start // block, (end - 1) // block + 1):
        draw = random.Random(f"{name}/{part}")
        tokens += [draw.randrange(FIRST, END) for _ in range(block)]
    offset = start // block * block
    return tokens[start - offset : end - offset]
