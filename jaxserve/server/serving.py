"""What the routes share: the model behind its names, who may ask, and how prompts get into the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request

from jaxserve.api.async_llm import LONG_TEXT, AsyncLLM, Stream
from jaxserve.config import ServeConfig
from jaxserve.server.auth import Keys
from jaxserve.server.errors import ApiError, invalid, overloaded
from jaxserve.server.metrics import Metrics
from jaxserve.server.protocol import ChatBody, Generation, Prompt, TokenizeBody
from jaxserve.text.intake import MAX_NAME_CHARS
from jaxserve.types import SamplingParams

RETRY_AFTER_S = 2
"""What a refused client is told to wait. A queue takes longer to empty; this spreads retries, it promises nothing."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as tokens, with its text where the client gave one."""

    tokens: list[int]
    text: str | None


class Serving:
    """One model being served. `draining`: running requests may finish, new ones are refused."""

    def __init__(self, llm: AsyncLLM, config: ServeConfig):
        options = config.server
        self.llm = llm
        self.names = config.engine.model.served_model_name or (_own_name(config.engine.model.model),)
        self.metrics = Metrics(self.names[0], options.metrics_compat)
        self.keys = Keys(options.api_key)
        self.admin_keys = Keys([options.admin_api_key] if options.admin_api_key else [])
        self.max_body_bytes = options.max_body_bytes
        self.created = int(time.time())
        self.draining = False
        self._bytes_per_token: int | None = None

    def model_name(self, asked: str | None) -> str:
        """The name to report for a request that asks for model `asked`.

        Raises:
            ApiError: 404 for a model that is not served.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"The model {asked[:200]!r} is not served here; the models are {known}.",
                param="model",
                code="model_not_found",
            )
        return asked

    async def render(self, body: ChatBody | TokenizeBody) -> str:
        """The prompt of a conversation, as the model's template writes it, special tokens and all.

        Raises:
            ParamError: what the template cannot render.
        """
        messages = body.messages or []
        if sum(len(str(message.get("content"))) for message in messages) + 100 * len(messages) < LONG_TEXT:
            return self.llm.chat_prompt(messages, **body.rendering())
        return await asyncio.to_thread(self.llm.chat_prompt, messages, **body.rendering())

    async def encode(self, prompts: Sequence[Prompt], body: Generation, *, special: bool) -> list[Encoded]:
        """Tokens of `prompts`, in their order. `special`: whether texts get the tokenizer's BOS unless the body says.

        Raises:
            ApiError, ParamError: 400 for a text that cannot fit, or that is not Unicode.
        """
        add = special if body.add_special_tokens is None else body.add_special_tokens
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if body.truncate_prompt_tokens is None:
            self._refuse_hopeless(texts)
        encoded = iter(await self._encode_texts(texts, add))
        result = []
        for prompt in prompts:
            one = Encoded(next(encoded), prompt) if isinstance(prompt, str) else Encoded(prompt, None)
            result.append(self._truncated(one, body))
        return result

    async def _encode_texts(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if len(texts) == 1:
            return [await self.llm.encode(texts[0], add_special_tokens)]
        if not texts or sum(map(len, texts)) < LONG_TEXT:
            return self.llm.tokenizer.encode_batch(texts, add_special_tokens) if texts else []
        return await asyncio.to_thread(self.llm.tokenizer.encode_batch, texts, add_special_tokens)

    def _refuse_hopeless(self, texts: Sequence[str]) -> None:
        """Texts that no tokenization brings below the model's length cost no tokenization."""
        longest = max(map(len, texts), default=0)
        if longest <= LONG_TEXT:
            return
        if self._bytes_per_token is None:
            tokenizer = self.llm.tokenizer
            self._bytes_per_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        most = self.llm.limits.max_model_len * self._bytes_per_token
        if longest > most:
            raise invalid(
                f"The prompt has {longest} characters; not more than {most} can fit into this model's "
                f"{self.llm.limits.max_model_len} tokens.",
                "prompt",
            )

    def _truncated(self, prompt: Encoded, body: Generation) -> Encoded:
        keep = body.truncate_prompt_tokens
        if keep is None:
            return prompt
        longest = self.llm.limits.max_model_len
        if keep == -1:
            keep = max(1, longest - (body.max_tokens or 1))
        if not 1 <= keep <= longest:
            raise invalid(
                f"truncate_prompt_tokens must be -1 or between 1 and {longest} (it is {keep}).",
                "truncate_prompt_tokens",
            )
        return prompt if len(prompt.tokens) <= keep else Encoded(prompt.tokens[-keep:], None)

    async def submit(
        self, prompts: Sequence[Encoded], params: Sequence[SamplingParams], body: Generation, request_id: str
    ) -> list[Stream]:
        """Hands all prompts of a request to the engine, or none.

        Raises:
            ParamError: the first thing that cannot be honoured. ApiError: 503, the queue is full or the server closes.
        """
        self._check_room(sum(one.n for one in params if 1 <= one.n <= self.llm.limits.max_choices))
        options: dict[str, Any] = {
            "priority": body.priority or 0,
            "salt": body.cache_salt or "",
            "request_id": request_id,
            "stream": bool(body.stream),
            "program_id": body.program_id or "",
            "last_turn": bool(body.last_turn),
            "tool": body.tool or "",
            "deadline_s": body.deadline_s,
            "tenant": tenant_of(body.user),
        }
        if body.program_id and len(prompts) > 1:
            raise invalid("program_id names one job: send its turns one by one, each with one prompt.", "program_id")
        if len(prompts) > 1:  # a prompt that is refused must not find others running
            for prompt, one in zip(prompts, params, strict=True):
                self.llm.prepare(prompt.tokens, prompt.text, one, **options)
        # Nothing else runs between these submissions, so there is room for all or none.
        return [
            await self.llm.submit(prompt.tokens, one, prompt_text=prompt.text, **options)
            for prompt, one in zip(prompts, params, strict=True)
        ]

    def _check_room(self, sequences: int) -> None:
        """
        Raises:
            ApiError: 400 for more sequences than the server ever takes, 503 for more than it takes now.
        """
        most = self.llm.ready.max_num_seqs + self.llm.config.scheduler.max_queued_requests
        if sequences > most:
            raise invalid(
                f"This request asks for {sequences} choices in all; the server takes at most {most} at once.", "n"
            )
        if self.draining:
            self.metrics.rejected["shutting_down"] += 1
            raise overloaded("The server is shutting down.", RETRY_AFTER_S)
        if self.llm.unfinished + sequences > most:
            self.metrics.rejected["queue_full"] += 1
            raise overloaded(f"The server is full: {self.llm.unfinished} sequences run or wait.", RETRY_AFTER_S)


def tenant_of(user: str | None) -> str:
    """Whose share of the engine a request takes: `user` as the client names it, up to the length of a name."""
    return (user or "")[:MAX_NAME_CHARS]


def serving_of(request: Request) -> Serving:
    return cast(Serving, request.app.state.serving)


def _own_name(model: str | None) -> str:
    """What a model is called when nobody named it: a hub id as it is, a folder by its last part."""
    if model is None:
        return "bundled"
    path = Path(model)
    return path.resolve().name if path.exists() else model
