"""Bodies of answers, in the order and with the names that OpenAI's clients read. Knows no engine.

Structs are encoded with msgspec. Chunks of streams are put together from bytes prepared once per choice, because a
streamed token should cost microseconds.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

_encode = msgspec.json.Encoder().encode


class PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(prompt, completion, prompt + completion, PromptDetails(cached))


class CompletionLogprobs(msgspec.Struct):
    """One entry a token; None where nothing came before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(msgspec.Struct, tag_field="object", tag="text_completion"):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChunkWriter:
    """Events of one stream. `head` is what every chunk begins with: id, object, created, model."""

    def __init__(self, id: str, object: str, created: int, model: str, with_usage: bool):
        """`with_usage`: chunks carry a `usage` field, null where there is nothing to say."""
        self._head = b"data: " + _encode({"id": id, "object": object, "created": created, "model": model})[:-1]
        self._plain_tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._openings: dict[int, bytes] = {}

    def opening(self, index: int) -> bytes:
        """A chunk up to and with the index of its choice."""
        found = self._openings.get(index)
        if found is None:
            found = self._openings[index] = self._head + b',"choices":[{"index":%d' % index
        return found

    def tail(self, usage: Usage | None) -> bytes:
        return self._plain_tail if usage is None else b'],"usage":' + _encode(usage) + b"}\n\n"

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream with `include_usage`."""
        return self._head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"


def field(name: bytes, value: Any) -> bytes:
    """A further field of an object whose text is being written."""
    return b',"%b":%b' % (name, _encode(value))


text = _encode
"""A string as JSON."""
