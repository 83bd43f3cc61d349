"""From what callers say to what engines take: prompts, chats and parameters to a Request. Knows no engine."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import inf
from numbers import Real
from typing import Any

import msgspec

from jaxserve.text.chat import ChatTemplate
from jaxserve.text.params import SEED_BITS, check_prompt, resolve
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelLimits, ParamError, Request, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a dict with `prompt` or `prompt_token_ids`, and perhaps `cache_salt`."""

MAX_NAME_CHARS = 128
"""Of a salt or a tenant."""
MAX_PRIORITY = 2**31 - 1


class ParsedPrompt(msgspec.Struct, frozen=True):
    """A prompt before tokenization: `text` or `tokens`, not both."""

    text: str | None
    tokens: Sequence[int] | None
    salt: str


class Intake:
    """One model's way in: its tokenizer, chat template and recommended parameters, and what its engine can take."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: Mapping[str, Any] | None = None,
        *,
        longest_answer: int | None = None,
        seed: int = 0,
    ):
        """`defaults`: values of SamplingParams that the model's authors recommend. `longest_answer`: max_tokens of
        requests that leave it open, if not all the room there is. `seed` seeds the drawn seeds."""
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = dict(defaults or {})
        self._longest_answer = longest_answer
        self.limits: ModelLimits | None = None
        self._random = random.Random(seed)

    def sampling_params(self, given: Mapping[str, Any] | None = None) -> SamplingParams:
        """Parameters where the model's recommendations hold for what is not `given`."""
        return SamplingParams(**{**self.defaults, **(given or {})})

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """As ChatTemplate.render. Tokenize it without special tokens: the template has written them."""
        return self.template.render(messages, **options)

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        id: str,
        priority: int = 0,
        tenant: str = "",
        salt: str = "",
        stream: bool = True,
        program_id: str = "",
        last_turn: bool = False,
        tool: str = "",
        deadline_s: float | None = None,
    ) -> Request:
        """A request that the engine can take as it is.

        Raises:
            ParamError: the first thing about it that cannot be honoured.
        """
        if self.limits is None:
            raise RuntimeError("the engine has not said its limits yet")
        tokens = check_prompt(prompt, self.limits, answer=params.max_tokens != 0)
        if params.max_tokens is None and self._longest_answer is not None:
            room = self.limits.max_model_len - len(tokens)
            params = msgspec.structs.replace(params, max_tokens=min(room, self._longest_answer))
        resolved = resolve(params, self.limits, len(tokens), self.tokenizer, self._draw_seed)
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise ParamError("priority", f"priority must be a whole number of 32 bits, not {priority!r:.60}")
        _check_name("tenant", tenant)
        _check_name("cache_salt", salt)
        _check_program(program_id, last_turn, tool, resolved.params.n)
        if deadline_s is not None and not (isinstance(deadline_s, Real) and 0 < deadline_s < inf):
            raise ParamError("deadline_s", f"deadline_s must be a number of seconds above 0, not {deadline_s!r:.60}")
        return Request(
            id=id,
            prompt=tokens,
            params=resolved.params,
            banned=resolved.banned,
            priority=priority,
            tenant=tenant,
            salt=salt,
            stream=stream,
            program_id=program_id,
            last_turn=last_turn,
            tool=tool,
            deadline_s=None if deadline_s is None else float(deadline_s),
        )

    def _draw_seed(self) -> int:
        return self._random.getrandbits(SEED_BITS)


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Sorts out the spellings of a prompt.

    Raises:
        ParamError: none of them.
    """
    salt = ""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or len({"prompt", "prompt_token_ids"} & set(prompt)) != 1:
            raise ParamError(
                "prompt",
                "a prompt given as a dict holds `prompt` or `prompt_token_ids`, and perhaps "
                f"`cache_salt`, not {sorted(map(str, prompt))!r:.200}",
            )
        salt = prompt.get("cache_salt") or ""
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, Mapping):
            raise ParamError("prompt", "a prompt must be text or token ids, not a dict in a dict")
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None, salt)
    tokens: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(tokens, Sequence) or isinstance(tokens, bytes):
        raise ParamError("prompt", f"a prompt must be text or token ids, not {type(prompt).__name__}")
    return ParsedPrompt(None, tokens, salt)


def _check_program(program_id: str, last_turn: bool, tool: str, choices: int) -> None:
    _check_name("program_id", program_id)
    _check_name("tool", tool)
    if not isinstance(last_turn, bool):
        raise ParamError("last_turn", f"last_turn must be true or false, not {last_turn!r:.60}")
    if program_id and choices != 1:
        raise ParamError("n", f"a turn of a program has one choice, not {choices}")
    if not program_id and (last_turn or tool):
        raise ParamError("program_id", "last_turn and tool say something of a program: program_id is missing")


def _check_name(param: str, value: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
        raise ParamError(param, f"{param} must be text of at most {MAX_NAME_CHARS} characters")
