"""Perplexity of a text by strided windows, through the engine's prompt log-probs. Knows the library only.

A window of W tokens is scored on its last S tokens (the first on all), so every token but the first of the text is
scored once, with at least W - S tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.api import LLM
from jaxserve.config import ConfigError
from jaxserve.eval.cells import Done, finished
from jaxserve.eval.rows import Key, Row
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams

PERPLEXITY = "perplexity"
TOGETHER = 64
"""Windows handed to the engine at once: progress shows after each such batch."""


@dataclass(frozen=True)
class Window:
    """`tokens`, of which those from index `scored` on count; `bytes` of text that these stand for."""

    tokens: tuple[int, ...]
    scored: int
    bytes: int


def windows(tokens: Sequence[int], length: int, stride: int, tokenizer: Tokenizer) -> list[Window]:
    """
    Raises:
        ConfigError: the text is too short to score anything, or the stride leaves tokens out.
    """
    if not 0 < stride < length:
        raise ConfigError(f"--stride {stride} must lie between 1 and {length - 1}, below the window of {length} tokens")
    if len(tokens) < 2:
        raise ConfigError("the text has fewer than two tokens: there is nothing to predict")
    found, done = [], 1
    while done < len(tokens):
        end = min(done + (length - 1 if done == 1 else stride), len(tokens))
        start = max(0, end - length)
        size = sum(len(tokenizer.token_bytes(token)) for token in tokens[done:end])
        found.append(Window(tuple(tokens[start:end]), done - start, size))
        done = end
    return found


@dataclass(frozen=True)
class PerplexityCell:
    """A text, whole. Its rows score the mean log-prob of a token, in nats."""

    windows: tuple[Window, ...]
    length: int

    @property
    def key(self) -> Key:
        return (PERPLEXITY, self.length, "text")

    @property
    def items(self) -> int:
        return len(self.windows)

    @property
    def longest(self) -> int:
        return self.length

    def run(self, llm: LLM, done: Done) -> list[Row]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0, seed=0)
        rows: list[Row] = []
        for first in range(0, len(self.windows), TOGETHER):
            group = self.windows[first : first + TOGETHER]
            outputs = llm.generate([list(window.tokens) for window in group], params, use_tqdm=False)
            for window, output in zip(group, outputs, strict=True):
                entries = (finished(output).prompt_logprobs or [])[window.scored :]
                total = math.fsum(entry.logprobs[0] for entry in entries if entry is not None)
                rows.append(
                    Row(
                        task=PERPLEXITY,
                        length=self.length,
                        mode="text",
                        document=len(rows),
                        turn=0,
                        score=total / len(entries),
                        logprob=total,
                        tokens=len(entries),
                        bytes=window.bytes,
                        prompt_tokens=len(window.tokens),
                    )
                )
            done(len(group))
        return rows


@dataclass(frozen=True)
class Perplexity:
    """Of a token, and the two figures that models with different tokenizers can be compared by."""

    token: float
    byte: float
    bits_per_byte: float
    tokens: int
    bytes: int


def perplexity(rows: Sequence[Row]) -> Perplexity:
    """Of all rows of a PerplexityCell together."""
    nats = -math.fsum(row.logprob or 0.0 for row in rows)
    tokens, size = sum(row.tokens for row in rows), sum(row.bytes for row in rows)
    per_byte = nats / max(size, 1)
    return Perplexity(math.exp(nats / tokens), math.exp(per_byte), per_byte / math.log(2), tokens, size)
