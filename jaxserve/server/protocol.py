"""Request bodies: what may be said, in which types. Knows OpenAI's and vLLM's fields; knows no model, no limits of one.

Types are strict (no "0.5" for a number, no true for 1) and numbers finite. A field that OpenAI or vLLM define and that
is not supported is refused unless it has its default value; a field that nobody defines is kept aside and named in a
response header. Ranges that depend on the model are checked where parameters are resolved (text/params.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from jaxserve.server.errors import ApiError, invalid
from jaxserve.server.limits import MAX_PROMPTS

B = TypeVar("B", bound="Body")

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Ints = Annotated[list[Int], Field(fail_fast=True)]
Prompt = str | list[int]

_TOKEN_ARRAY = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string", "minLength": 1}},
        _TOKEN_ARRAY,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKEN_ARRAY},
    ]
}


def _prompts(value: Any) -> list[Prompt]:
    """OpenAI's four spellings of prompts as one list of strings or token ids."""
    wanted = "a string, a list of strings, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be {wanted}, and not empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts; at most {MAX_PROMPTS} fit in one request")
    if kinds == {str}:
        return value
    if kinds == {list} and all(set(map(type, ids)) == {int} for ids in value):
        return value
    raise ValueError(f"must be {wanted}; lists must not be empty and must not mix types")


class Body(BaseModel):
    """Base of every request body. `REFUSED`: fields that are defined elsewhere and not supported here, with the values
    that ask for nothing (null always does)."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())
    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def ignored(self) -> list[str]:
        """Names of the fields that nobody defines."""
        return [name for name in self.model_extra or {} if name not in self.REFUSED]

    def refuse_unsupported(self) -> None:
        """
        Raises:
            ApiError: 400, naming the first field that asks for something we do not do.
        """
        for name, value in (self.model_extra or {}).items():
            neutral = self.REFUSED.get(name)
            if neutral is None or value is None or any(value == n and type(value) is type(n) for n in neutral):
                continue
            raise invalid(f"{name} is not supported by this server{_hint(name, neutral)}.", name)


def _hint(name: str, neutral: tuple[Any, ...]) -> str:
    if name == "request_id":
        return "; send the header X-Request-Id, which is repeated in the response"
    if name == "chat_template":
        return ": templates come from the model, not from requests"
    return f" (its value may only be {' or '.join(repr(n) for n in neutral)})" if neutral else ""


def parse(body: type[B], raw: bytes) -> B:
    """A validated body.

    Raises:
        ApiError: 400 for malformed JSON, a wrong type, a field that is missing or not supported.
    """
    try:
        parsed = body.model_validate_json(raw)
    except ValidationError as error:
        raise _explain(error) from None
    parsed.refuse_unsupported()
    return parsed


def _explain(error: ValidationError) -> ApiError:
    # Of the branches of a union the one that got furthest says what the client meant.
    first = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    path = [str(part) for part in first["loc"]]
    if kind == "json_invalid":
        message = message.removeprefix("Invalid JSON: ")
        return ApiError(400, f"The body is not valid JSON: {message}.", code="invalid_json")
    if not path:
        return invalid(f"The body must be a JSON object: {message}.")
    # Branches of unions are part of pydantic's path; a client knows the field only.
    param = ".".join(part for part in path if "[" not in part and part not in ("str", "int", "float", "bool"))
    if kind == "value_error":
        return invalid(f"{param} {message}.", param)
    if kind in ("too_short", "string_too_short"):  # no field asks for more than one
        return invalid(f"{param} must not be empty.", param)
    got = "" if kind == "missing" else f" (it is {_shorten(first['input'])})"
    return invalid(f"{param}: {message}{got}.", param)


def _shorten(value: Any) -> str:
    plain = isinstance(value, int | float | str | bool | type(None))
    text = repr(value) if plain else f"of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# Defined by OpenAI, vLLM or both; not supported. Values that ask for nothing are listed.
_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "best_of": (),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "kv_transfer_params": (),
    "request_id": (),
    "prompt_embeds": (),
    "lora_request": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "logprob_token_ids": (),
    "response_format": ({"type": "text"},),
}


class Generation(Body):
    """What completions and chats share: sampling and delivery. None means the server's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Ints | None = None
    bad_words: Strings | None = None
    seed: Int | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop: str | Strings | None = None
    stop_token_ids: Ints | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")] | None = None
    program_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    last_turn: bool | None = None
    tool: Annotated[str, Field(max_length=128)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    # A label of the caller: it asks nothing of the answer. Policies that share fairly take it for the tenant.
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_stream(self) -> None:
        """
        Raises:
            ApiError: 400 when stream_options comes without stream.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options may only be set when stream is true.", "stream_options")

    def given(self, **own: Any) -> dict[str, Any]:
        """The sampling parameters that were given; `own` are those that the routes spell differently."""
        return {**{name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}, **own}


_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "seed",
    "min_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


class CompletionBody(Generation):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: Int | None = None

    REFUSED: ClassVar = {**_REFUSED_EVERYWHERE, "suffix": ("",), "best_of": (1,)}


_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                ]
            },
        },
    },
}


Messages = Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True), WithJsonSchema(_MESSAGES_SCHEMA)]
"""Turns as JSON has them; text/messages.py checks what they hold."""


def _rendering(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    return {
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
        "options": body.chat_template_kwargs,
    }


class ChatBody(Generation):
    """`POST /v1/chat/completions`."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    max_completion_tokens: Int | None = None

    REFUSED: ClassVar = {
        **_REFUSED_EVERYWHERE,
        "best_of": (1,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "include_reasoning": (True,),
        "chat_template": (),
        "documents": (),
        "echo": (False,),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
        "moderation": (),
    }

    def rendering(self) -> dict[str, Any]:
        """Arguments of `ChatTemplate.render` beside the messages."""
        return _rendering(self)

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for index, message in enumerate(self.messages):
            for name in ("audio", "function_call", "refusal"):
                if message.get(name) is not None:
                    raise invalid(f"messages[{index}].{name} is not supported by this server.", "messages")

    def budget(self) -> int | None:
        """How many tokens to generate, or None for as many as fit.

        Raises:
            ApiError: 400 when max_tokens and max_completion_tokens disagree.
        """
        given = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(given) > 1:
            raise invalid("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
        return given.pop() if given else None


class TokenizeBody(Body):
    """`POST /tokenize`: a text (`prompt`) or a conversation (`messages`)."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    REFUSED: ClassVar = {"chat_template": (), "tools": ([],), "mm_processor_kwargs": ({},)}

    def rendering(self) -> dict[str, Any]:
        """Arguments of `ChatTemplate.render` beside the messages."""
        return _rendering(self)


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Ints
    skip_special_tokens: bool | None = None


class CloseProgramBody(Body):
    """`POST /close_program`: as the requests of the program named it."""

    program_id: Annotated[str, Field(min_length=1, max_length=128)]
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")] | None = None


class AbortBody(Body):
    """`POST /abort_requests`: ids of responses, as the responses gave them."""

    request_ids: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
