"""`POST /v1/chat/completions`: a conversation through the model's chat template, and its next turn."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.errors import invalid
from jaxserve.server.job import Job, finish_fields
from jaxserve.server.limits import read_body
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.protocol import ChatBody, parse
from jaxserve.server.responses import ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChunkWriter, field, text
from jaxserve.server.serving import Serving, serving_of
from jaxserve.text.processor import ChoiceDelta, RequestDelta, RequestState
from jaxserve.types import TokenLogprobs

router = APIRouter()

_ROLE = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    serving = serving_of(request)
    body = parse(ChatBody, await read_body(request, serving.max_body_bytes))
    return await (await start(serving, body)).respond(request)


async def start(serving: Serving, body: ChatBody) -> ChatJob:
    """
    Raises:
        ApiError, ParamError: what cannot be honoured.
    """
    model = serving.model_name(body.model)
    body.check_stream()
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = serving.llm.limits.max_logprobs
    if logprobs is not None and not 0 <= logprobs <= most:
        raise invalid(f"top_logprobs must be between 0 and {most} (it is {logprobs}).", "top_logprobs")
    given = body.given(max_tokens=body.budget(), logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)
    prompts = await serving.encode([await serving.render(body)], body, special=False)
    return await ChatJob.start(serving, body, model, prompts, [serving.llm.sampling_params(**given)])


class ChatJob(Job):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    body: ChatBody

    def answer(self) -> ChatCompletion:
        body, (state,) = self.body, self.states
        answer = ChatCompletion(self.id, self.created, self.model, self._choices(state), self.usage())
        if body.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(self.names, state.prompt_logprobs or [], body.prompt_logprobs)
        if body.return_token_ids:
            answer.prompt_token_ids = state.request.prompt
        return answer

    def _choices(self, state: RequestState) -> list[ChatChoice]:
        body = self.body
        found = []
        for output in state.output().outputs:
            tokens = output.token_ids if body.return_token_ids else None
            found.append(
                ChatChoice(
                    output.index,
                    ChatMessage(output.text),
                    self._logprobs(output.logprobs),
                    output.finish_reason,
                    output.stop_reason,
                    tokens,
                )
            )
        return found

    def chunk(self, writer: ChunkWriter, prompt: int, delta: RequestDelta) -> bytes:
        state = self.streams[prompt].state
        tail = writer.tail(self.usage() if self.continuous_usage else None)
        events = []
        if not self._begun:
            # Before anything of any choice: who speaks, and what is known of the prompt.
            extra = self._of_prompt(state)
            for index in range(self.choices):
                self._begun.add(index)
                events += [writer.opening(index), _ROLE, b"}" if index else extra + b"}", tail]
        for choice in delta.choices:
            content = self._content(choice)
            if content is not None:
                events += [writer.opening(choice.index), content, tail]
        return b"".join(events)

    def _of_prompt(self, state: RequestState) -> bytes:
        extra = b""
        if self.body.prompt_logprobs is not None:
            extra += field(
                b"prompt_logprobs", prompt_logprobs(self.names, state.prompt_logprobs or [], self.body.prompt_logprobs)
            )
        if self.body.return_token_ids:
            extra += field(b"prompt_token_ids", state.request.prompt)
        return extra

    def _content(self, choice: ChoiceDelta) -> bytes | None:
        """The fields of a chunk's choice after its index; None if there is nothing to say."""
        body = self.body
        if not (body.logprobs or body.return_token_ids):
            # The hot path: nothing but text.
            if choice.finish_reason is None:
                if not choice.text:
                    return None
                return b',"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % text(choice.text)
            return b',"delta":{"content":%b},"logprobs":null%b}' % (text(choice.text), finish_fields(choice))
        extra = field(b"token_ids", choice.token_ids) if body.return_token_ids else b""
        logprobs = field(b"logprobs", self._logprobs(choice.logprobs))
        return b',"delta":{"content":%b}%b%b%b}' % (text(choice.text), logprobs, finish_fields(choice), extra)

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        return chat_logprobs(self.names, entries or [], self.body.top_logprobs or 0) if self.body.logprobs else None
