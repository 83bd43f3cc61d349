"""Log-probabilities as clients read them. Knows token names, not where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import TokenLogprobs

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TokenNames:
    """What tokens are called in an answer: their text, or `token_id:7` where the client asked for ids."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_text(token)

    def bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))

    def length(self, token: int) -> int:
        """Characters of the token's text."""
        return len(self._tokenizer.token_text(token))


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _best(entry: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens of a position, best first."""
    return [
        (token, _finite(p)) for token, p in zip(entry.ids[1 : count + 1], entry.logprobs[1 : count + 1], strict=True)
    ]


def completion_logprobs(
    names: TokenNames, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], count: int, offset: int = 0
) -> CompletionLogprobs:
    """For `tokens` with `count` alternatives each; the sampled token is among its alternatives in any case.

    `entries`: one a token, None where nothing came before. `offset`: characters of text in front of the first token.
    """
    result = CompletionLogprobs([], [], [], [])
    for token, entry in zip(tokens, entries, strict=True):
        result.tokens.append(names.text(token))
        result.text_offset.append(offset)
        offset += names.length(token)
        if entry is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        own = _finite(entry.logprobs[0])
        # Names of different tokens may be equal text; the better one keeps its place.
        top: dict[str, float] = {}
        for other, logprob in _best(entry, count):
            top.setdefault(names.text(other), logprob)
        top.setdefault(names.text(token), own)
        result.token_logprobs.append(own)
        result.top_logprobs.append(top)
    return result


def chat_logprobs(names: TokenNames, entries: Iterable[TokenLogprobs], count: int) -> ChatLogprobs:
    """With `count` alternatives for each token."""
    return ChatLogprobs(
        [
            ChatLogprob(
                names.text(e.ids[0]),
                _finite(e.logprobs[0]),
                names.bytes(e.ids[0]),
                [TopLogprob(names.text(t), p, names.bytes(t)) for t, p in _best(e, count)],
            )
            for e in entries
        ]
    )


def prompt_logprobs(names: TokenNames, entries: Iterable[TokenLogprobs | None], count: int) -> PromptLogprobs:
    """vLLM's form: by token id, the prompt's own token first."""
    result: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        own = entry.ids[0]
        found = {str(own): PromptLogprob(_finite(entry.logprobs[0]), entry.rank, names.text(own))}
        for rank, (token, logprob) in enumerate(_best(entry, count), 1):
            found.setdefault(str(token), PromptLogprob(logprob, rank, names.text(token)))
        result.append(found)
    return result
