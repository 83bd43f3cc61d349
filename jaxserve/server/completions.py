"""`POST /v1/completions`: texts or token ids, one or many, continued. The form that evaluation harnesses read."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.errors import invalid
from jaxserve.server.job import Job, finish_fields
from jaxserve.server.limits import read_body
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs
from jaxserve.server.protocol import CompletionBody, parse
from jaxserve.server.responses import ChunkWriter, Completion, CompletionChoice, CompletionLogprobs, field, text
from jaxserve.server.serving import Encoded, Serving, serving_of
from jaxserve.text.processor import ChoiceDelta, RequestDelta, RequestState
from jaxserve.types import SamplingParams, TokenLogprobs

router = APIRouter()

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    serving = serving_of(request)
    body = parse(CompletionBody, await read_body(request, serving.max_body_bytes))
    return await (await start(serving, body)).respond(request)


async def start(serving: Serving, body: CompletionBody) -> CompletionJob:
    """
    Raises:
        ApiError, ParamError: what cannot be honoured.
    """
    model = serving.model_name(body.model)
    body.check_stream()
    prompts = await serving.encode(body.prompt, body, special=True)
    params = [_params(serving, body, prompt) for prompt in prompts]
    return await CompletionJob.start(serving, body, model, prompts, params)


def _params(serving: Serving, body: CompletionBody, prompt: Encoded) -> SamplingParams:
    budget = body.max_tokens
    if budget is None:
        budget = min(DEFAULT_MAX_TOKENS, max(1, serving.llm.limits.max_model_len - len(prompt.tokens)))
    elif budget == 0:
        if not (body.echo or body.prompt_logprobs is not None):
            raise invalid("max_tokens 0 generates nothing; it needs echo or prompt_logprobs.", "max_tokens")
        budget = 1  # computed and not shown: the engine always takes a step
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scored = max(body.logprobs, scored or 0)
    given = body.given(max_tokens=budget, logprobs=body.logprobs, prompt_logprobs=scored)
    return serving.llm.sampling_params(**given)


class CompletionJob(Job):
    """Choice `i` of prompt `p` has the index `p * n + i`, as OpenAI numbers them."""

    id_prefix = "cmpl"
    chunk_object = "text_completion"
    body: CompletionBody

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._offsets: dict[int, int] = {}
        """Characters written so far, by choice."""

    @property
    def _shows_generated(self) -> bool:
        return self.body.max_tokens != 0

    def generated(self, state: RequestState) -> int:
        return state.generated if self._shows_generated else 0

    def answer(self) -> Completion:
        choices = [choice for prompt, state in enumerate(self.states) for choice in self._choices(prompt, state)]
        return Completion(self.id, self.created, self.model, choices, self.usage())

    def _choices(self, prompt: int, state: RequestState) -> list[CompletionChoice]:
        body = self.body
        echoed = self._prompt_text(state) if body.echo else ""
        found = []
        for output in state.output().outputs:
            tokens, entries, written = output.token_ids, output.logprobs, output.text
            if not self._shows_generated:
                tokens, entries, written = [], None if entries is None else [], ""
            logprobs = None
            if body.logprobs is not None:
                logprobs = self._logprobs(state, tokens, entries or [], 0, bool(body.echo))
            choice = CompletionChoice(
                prompt * self.choices + output.index,
                echoed + written,
                logprobs,
                output.finish_reason,
                output.stop_reason,
            )
            if not self._shows_generated:
                choice.finish_reason, choice.stop_reason = "length", None
            if body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(self.names, state.prompt_logprobs or [], body.prompt_logprobs)
            if body.return_token_ids:
                choice.prompt_token_ids, choice.token_ids = state.request.prompt, tokens
            found.append(choice)
        return found

    def _prompt_text(self, state: RequestState) -> str:
        if state.prompt is not None:
            return state.prompt
        return self.serving.llm.tokenizer.decode(state.request.prompt, skip_special_tokens=False)

    def _logprobs(
        self, state: RequestState, tokens: list[int], entries: list[TokenLogprobs], offset: int, with_prompt: bool
    ) -> CompletionLogprobs:
        """Of the tokens generated, after those of the prompt where it is echoed."""
        if not with_prompt:
            return completion_logprobs(self.names, tokens, entries, self.body.logprobs or 0, offset)
        known = state.prompt_logprobs or [None] * len(state.request.prompt)
        return completion_logprobs(
            self.names, [*state.request.prompt, *tokens], [*known, *entries], self.body.logprobs or 0, offset
        )

    def chunk(self, writer: ChunkWriter, prompt: int, delta: RequestDelta) -> bytes:
        state = self.streams[prompt].state
        tail = writer.tail(self.usage() if self.continuous_usage else None)
        events = []
        for choice in delta.choices:
            index = prompt * self.choices + choice.index
            content = self._content(state, index, choice)
            if content is not None:
                events += [writer.opening(index), content, tail]
        return b"".join(events)

    def _content(self, state: RequestState, index: int, choice: ChoiceDelta) -> bytes | None:
        """The fields of a chunk's choice after its index; None if there is nothing to say."""
        body = self.body
        first = index not in self._begun
        if not (first or body.logprobs is not None or body.return_token_ids):
            # The hot path: nothing but text.
            if choice.finish_reason is None:
                return b',"text":%b,"logprobs":null,"finish_reason":null}' % text(choice.text) if choice.text else None
            return b',"text":%b,"logprobs":null%b}' % (text(choice.text), finish_fields(choice))
        written, tokens, entries = choice.text, choice.token_ids, choice.logprobs or []
        if not self._shows_generated:
            written, tokens, entries = "", [], []
            if choice.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = "length", None
        echoes = first and bool(body.echo)
        if echoes:
            written = self._prompt_text(state) + written
        extra = b""
        if first:
            self._begun.add(index)
            if body.prompt_logprobs is not None:
                extra += field(
                    b"prompt_logprobs", prompt_logprobs(self.names, state.prompt_logprobs or [], body.prompt_logprobs)
                )
            if body.return_token_ids:
                extra += field(b"prompt_token_ids", state.request.prompt)
        if body.return_token_ids:
            extra += field(b"token_ids", tokens)
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs(state, tokens, entries, self._offsets.get(index, 0), echoes)
            self._offsets[index] = self._offsets.get(index, 0) + len(written)
        if not (written or tokens or extra or choice.finish_reason):
            return None
        return b',"text":%b%b%b%b}' % (text(written), field(b"logprobs", logprobs), finish_fields(choice), extra)
