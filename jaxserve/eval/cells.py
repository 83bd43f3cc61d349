"""What is measured, cell by cell: a part of a run that does not depend on any other. Knows the library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxserve.api import LLM
from jaxserve.config import ConfigError
from jaxserve.eval.memory import sequences_cached
from jaxserve.eval.modes import MULTI_TURN, SINGLE, Ask, waves
from jaxserve.eval.prompts import Style
from jaxserve.eval.rows import Key, Row
from jaxserve.eval.tasks import Document
from jaxserve.types import RequestOutput, SamplingParams

Done = Callable[[int], None]
"""Called with the number of items finished since the last call."""


class Cell(Protocol):
    """One cell of the result table."""

    @property
    def key(self) -> Key: ...

    @property
    def items(self) -> int:
        """Rows that `run` gives."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence, answer included."""
        ...

    def run(self, llm: LLM, done: Done) -> list[Row]:
        """Asks the engine, whose prefix cache is empty.

        Raises:
            RuntimeError: a request failed in the engine.
        """
        ...


@dataclass(frozen=True)
class RetrievalCell:
    """Questions of one generated task at one length, in one mode."""

    task: str
    length: int
    mode: str
    documents: tuple[Document, ...]
    style: Style
    program: bool = False
    """Turns of a document are turns of a program (multi-turn only: other modes have no turns)."""

    @property
    def key(self) -> Key:
        return (self.task, self.length, self.mode)

    @property
    def items(self) -> int:
        return sum(len(document.turns) for document in self.documents)

    @property
    def longest(self) -> int:
        return self.length

    def run(self, llm: LLM, done: Done) -> list[Row]:
        turns = len(self.documents[0].turns)
        # What later waves shall find cached must still be there when they come.
        together = len(self.documents) if self.mode == SINGLE else self._held(llm)
        programs = self.program and self.mode == MULTI_TURN
        rows: list[Row] = []
        for first in range(0, len(self.documents), together):
            group = range(first, min(first + together, len(self.documents)))
            for wave in waves(self.mode, group, turns):
                outputs = llm.generate(
                    [self._prompt(ask) for ask in wave],
                    [self._params(ask) for ask in wave],
                    use_tqdm=False,
                    program_id=[ask.scope for ask in wave] if programs else None,
                    last_turn=programs and wave[0].last,
                )
                rows += [self._row(ask, output) for ask, output in zip(wave, outputs, strict=True)]
                done(len(wave))
        return sorted(rows, key=lambda row: row.item)

    def _held(self, llm: LLM) -> int:
        # Half: the other half is for sequences that run; and programs may hold half (--program-share).
        return max(1, sequences_cached(llm.ready.page_classes, self.length) // 2)

    def _prompt(self, ask: Ask) -> dict[str, object]:
        tokens = self.style.prompt(self.documents[ask.document], ask.turn, ask.history)
        return {"prompt_token_ids": tokens, "cache_salt": ask.scope}

    def _params(self, ask: Ask) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.style.max_tokens(self.documents[ask.document], ask.turn),
            stop_token_ids=self.style.stop_token_ids,
            logprobs=0,
            seed=0,
        )

    def _row(self, ask: Ask, output: RequestOutput) -> Row:
        turn = self.documents[ask.document].turns[ask.turn]
        [choice] = finished(output).outputs
        return Row(
            task=self.task,
            length=self.length,
            mode=self.mode,
            document=ask.document,
            turn=ask.turn,
            score=float(self.style.right(choice.text, turn.answer)),
            depth=round(turn.depth, 4),
            question=turn.question,
            answer=turn.answer,
            output=choice.text,
            token_ids=tuple(choice.token_ids),
            logprob=choice.cumulative_logprob,
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens,
        )


def finished(output: RequestOutput) -> RequestOutput:
    """`output`, unless its request failed.

    Raises:
        RuntimeError: with the engine's reason.
    """
    if output.error is not None:
        raise RuntimeError(f"the engine refused request {output.request_id}: {output.error}")
    return output


def check_lengths(cells: list[Cell], max_model_len: int) -> None:
    """
    Raises:
        ConfigError: a cell that does not fit into the model's context.
    """
    for cell in cells:
        if cell.longest > max_model_len:
            raise ConfigError(
                f"{cell.key[0]} needs sequences of {cell.longest} tokens, and this model's context is {max_model_len}: "
                f"choose shorter --lengths"
            )
