"""Asks the engine the questions of a set: answers are generated, options ranked by prompt log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.api import LLM
from jaxserve.eval.cells import Done, finished
from jaxserve.eval.datasets import Choice, Item, Question
from jaxserve.eval.rows import Key, Row
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import RequestOutput, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class DatasetCell:
    """A set, or its first questions. `encode` makes the prompt of a generated answer: plain, or a chat."""

    name: str
    questions: tuple[Item, ...]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]

    @property
    def key(self) -> Key:
        return (self.name, self.longest, "dataset")

    @property
    def items(self) -> int:
        return len(self.questions)

    @property
    def longest(self) -> int:
        return max(
            len(tokens) + (params.max_tokens or 0) for item in self.questions for tokens, params in self._asks(item)
        )

    def run(self, llm: LLM, done: Done) -> list[Row]:
        asks = [self._asks(item) for item in self.questions]
        flat = [ask for several in asks for ask in several]
        outputs = iter(llm.generate([tokens for tokens, _ in flat], [params for _, params in flat], use_tqdm=False))
        rows = []
        for number, (item, several) in enumerate(zip(self.questions, asks, strict=True)):
            answers = [finished(next(outputs)) for _ in several]
            row = self._generated(item, answers[0]) if isinstance(item, Question) else self._ranked(item, answers)
            rows.append(Row(task=self.name, length=self.longest, mode="dataset", document=number, turn=0, **row))
            done(1)
        return rows

    def _asks(self, item: Item) -> list[tuple[list[int], SamplingParams]]:
        if isinstance(item, Question):
            params = SamplingParams(temperature=0.0, max_tokens=item.max_tokens, logprobs=0, seed=0)
            return [(self.encode(item.prompt), params)]
        scored = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0, seed=0)
        return [(self.tokenizer.encode(item.context + option), scored) for option in item.options]

    def _generated(self, item: Question, output: RequestOutput) -> dict:
        [choice] = output.outputs
        return {
            "score": item.judge(choice.text),
            "question": item.prompt,
            "answer": item.golden,
            "output": choice.text,
            "token_ids": tuple(choice.token_ids),
            "logprob": choice.cumulative_logprob,
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
        }

    def _ranked(self, item: Choice, outputs: list[RequestOutput]) -> dict:
        tails = [self._tail(item, output) for output in outputs]
        sums = [math.fsum(entry.logprobs[0] for entry in tail) for tail in tails]
        best = sums.index(max(sums))
        greedy = all(entry.rank == 1 for entry in tails[best])
        return {
            "score": float(greedy if len(sums) == 1 else best == item.golden),
            "question": item.context,
            "answer": item.options[item.golden],
            "output": item.options[best],
            "logprob": sums[item.golden],
            "tokens": len(tails[item.golden]),
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        }

    def _tail(self, item: Choice, output: RequestOutput) -> list[TokenLogprobs]:
        """The entries of the option's tokens: those after what the prompt has in common with its context alone."""
        context = self.tokenizer.encode(item.context)
        start = 0
        while start < len(context) and context[start] == output.prompt_token_ids[start]:
            start += 1
        return [entry for entry in (output.prompt_logprobs or [])[max(start, 1) :] if entry is not None]
