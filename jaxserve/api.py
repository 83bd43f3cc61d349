"""jaxserve as a library: AsyncLLM for asyncio programs and servers, LLM for scripts. Imports no jax: an engine does.

Text is handled here, on the caller's side of the engine: see text/ for what happens to prompts and deltas.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxserve import bundled
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.client import EngineClient, EngineDead
from jaxserve.text.intake import Intake, ParsedPrompt, Prompt, parse_prompt
from jaxserve.text.processor import RequestDelta, RequestState
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Delta, FinishReason, ModelLimits, ParamError, Ready, RequestOutput, SamplingParams, Stats

log = logging.getLogger(__name__)

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]

LONG_TEXT = 20_000
"""Characters above which text is tokenized on a thread: this many take a few milliseconds of the event loop."""


class QueueFull(RuntimeError):
    """More requests wait than `max_queued_requests` allows; try again later."""


class AsyncLLM:
    """One model behind an engine, for one event loop. `start()` comes first; everything else needs it."""

    def __init__(self, config: EngineConfig, client: EngineClient | None = None):
        """`client`: whose engine to use; without it, one on a thread of this process."""
        self.config = config
        self._client = client if client is not None else _thread_client(config)
        self._running: dict[str, _Running] = {}
        self._sequences = 0
        self._names = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads the tokenizer and starts the engine.

        Raises:
            ConfigError, CheckpointError: what cannot be served, and why.
            EngineDead: the engine failed to start.
        """
        self.intake = await asyncio.to_thread(_intake, self.config)
        self.ready: Ready = await self._client.start(self._take)
        self.intake.limits = self.ready.limits
        self._admitted = self.ready.max_num_seqs + self.config.scheduler.max_queued_requests
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.intake.tokenizer

    @property
    def limits(self) -> ModelLimits:
        return self.ready.limits

    @property
    def failure(self) -> str | None:
        """Why the engine ended, or None while it lives."""
        return self._client.failure

    @property
    def unfinished(self) -> int:
        """Sequences (choices of requests) that wait or run."""
        return self._sequences

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Parameters with the model's recommendations (generation_config.json) for what is not given."""
        return self.intake.sampling_params(given)

    def chat_prompt(self, messages: Messages, **options: Any) -> str:
        """The prompt for a chat; see text/chat.py for the options. Encode it with `add_special_tokens=False`."""
        return self.intake.chat_prompt(messages, **options)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, without holding up the event loop over a long one."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None,
                     priority: int = 0, tenant: str = "", salt: str = "", stream: bool = True,
                     prompt_text: str | None = None) -> Stream:
        """Hands a request to the engine; what it generates comes out of the Stream.

        `request_id` names the request to its caller: in outputs and for `abort`. `stream` False lets the engine deliver
        tokens late. `prompt_text` is reported as the prompt where `prompt` is token ids.

        Raises:
            ParamError: the request cannot be honoured.
            QueueFull: too many requests wait.
            EngineDead: the engine has ended.
        """
        parsed = parse_prompt(prompt)
        tokens = parsed.tokens if parsed.text is None else await self.encode(parsed.text)
        text = parsed.text if parsed.text is not None else prompt_text
        return self._launch(tokens or (), text, params, request_id=request_id, priority=priority, tenant=tenant,
                            salt=salt or parsed.salt, stream=stream)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None,
                       **options: Any) -> AsyncIterator[RequestOutput]:
        """The output so far, each time that it has grown; the last one is `finished`. Options and errors of `submit`.

        Closing the iterator, or cancelling the task that reads it, ends the request.
        """
        async with await self.submit(prompt, params, **options) as stream:
            async for _ in stream:
                yield stream.output()

    def abort(self, request_id: str) -> bool:
        """Ends the caller's requests of this name with finish_reason "abort". False when there is none."""
        found = [running for running in self._running.values() if running.state.request_id == request_id]
        for running in found:
            self._end(running, FinishReason.ABORT)
        return bool(found)

    async def stats(self) -> Stats:
        return await self._client.control("stats")

    async def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix that no running request uses."""
        await self._client.control("reset_prefix_cache")

    async def wait_failed(self) -> str:
        """Returns the cause when the engine dies without having been asked to."""
        return await self._client.wait_failed()

    async def close(self, drain: float = 0.0) -> None:
        """Ends the engine; running requests get up to `drain` seconds, then they end with "abort". Idempotent."""
        deadline = time.monotonic() + drain
        while self._running and self.failure is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._watcher is not None:
            self._watcher.cancel()
        for running in list(self._running.values()):
            self._end(running, FinishReason.ABORT)
        await self._client.close()

    def _launch(self, tokens: Sequence[int], text: str | None, params: SamplingParams | None, *,
                request_id: str | None = None, stream: bool = True, **options: Any) -> Stream:
        if self._client.failure is not None:
            raise EngineDead(self._client.failure)
        name = next(self._names)
        wanted = params if params is not None else self.sampling_params()
        request = self.intake.request(tokens, wanted, id=name, stream=stream or bool(wanted.stop), **options)
        if self._sequences + request.params.n > self._admitted:
            raise QueueFull(f"{self._sequences} sequences are waiting or running, and "
                            f"{self.config.scheduler.max_queued_requests} may wait")
        state = RequestState(request, self.tokenizer, self.limits.eos_token_ids, request_id=request_id or name,
                             prompt=text, now=time.monotonic())
        return self._submit(state)

    def _submit(self, state: RequestState) -> Stream:
        running = self._running[state.request.id] = _Running(state)
        self._sequences += state.request.params.n
        self._client.submit(state.request)
        return Stream(self, running)

    def _take(self, deltas: Sequence[Delta]) -> None:
        """The engine's sink: what one step produced, all requests together."""
        now = time.monotonic()
        cancelled = []
        for delta in deltas:
            running = self._running.get(delta.id)
            if running is None:
                continue
            try:
                name = running.state.push(delta, now)
            except Exception as error:  # one request cannot hurt another
                log.exception("request %s failed while its text was made", delta.id)
                running.state.end(FinishReason.ERROR, now, f"{type(error).__name__}: {error}")
                name = delta.id
            if name is not None:
                cancelled.append(name)
            if running.state.finished:
                self._forget(running)
            running.changed.set()
        if cancelled:
            self._cancel(cancelled)

    def _end(self, running: _Running, reason: FinishReason) -> None:
        if not running.state.finished:
            running.state.end(reason, time.monotonic())
            self._forget(running)
            running.changed.set()
            self._cancel([running.state.request.id])

    def _forget(self, running: _Running) -> None:
        if self._running.pop(running.state.request.id, None) is not None:
            self._sequences -= running.state.request.params.n

    def _cancel(self, names: Sequence[str]) -> None:
        if self._client.failure is None:
            self._client.cancel(names)

    async def _watch(self) -> None:
        await self._client.wait_failed()
        for running in self._running.values():
            running.changed.set()
        self._running.clear()
        self._sequences = 0


class _Running:
    """A request in flight and the flag that wakes whoever waits for it."""

    __slots__ = ("state", "changed")

    def __init__(self, state: RequestState):
        self.state = state
        self.changed = asyncio.Event()


class Stream:
    """What a request generates, as an async iterator of RequestDelta; `output()` is everything so far.

    Leaving its context, `close()` or dropping it before the end cancels the request. One reader.
    """

    def __init__(self, llm: AsyncLLM, running: _Running):
        self._llm = llm
        self._running = running
        self._loop = asyncio.get_running_loop()

    @property
    def state(self) -> RequestState:
        return self._running.state

    def output(self) -> RequestOutput:
        return self._running.state.output()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestDelta:
        """
        Raises:
            EngineDead: the engine ended before the request did.
        """
        state, changed = self._running.state, self._running.changed
        while (delta := state.take()) is None:
            if state.finished:
                raise StopAsyncIteration
            if self._llm.failure is not None:
                raise EngineDead(self._llm.failure)
            changed.clear()
            await changed.wait()
        return delta

    def close(self) -> None:
        """Ends the request if it runs."""
        self._llm._end(self._running, FinishReason.ABORT)

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._running.state.finished and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._llm._end, self._running, FinishReason.ABORT)


class LLM:
    """A model for scripts and notebooks. The engine runs on threads of this process until `close()`, or the end.

    >>> with LLM() as llm:
    ...     [output] = llm.generate("Once upon a time", SamplingParams(max_tokens=32))
    """

    def __init__(self, model: str | None = None, **options: Any):
        """`model`: a folder in Hugging Face layout or a hub id; without it the bundled model. `options`: EngineConfig's,
        by their flat names (`max_num_seqs=16`).

        Raises:
            ConfigError, CheckpointError: what cannot be served, and why.
            EngineDead: the engine failed to start.
        """
        self._loop = _LoopThread()
        self._llm = AsyncLLM(EngineConfig.of(model=model, **options))
        self._finalizer = weakref.finalize(self, _shut, self._loop, self._llm)
        try:
            self._loop.run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
                 priority: int = 0) -> list[RequestOutput]:
        """Completes prompts, in their order. One of them is text, a list of token ids, or a dict with `prompt` or
        `prompt_token_ids`; parameters are one for all or one each (None: the model's recommendations).

        Raises:
            ParamError: naming the prompt by its index. Nothing runs then.
            EngineDead: the engine ended.
        """
        parsed = [_numbered(index, parse_prompt, prompt) for index, prompt in enumerate(_as_list(prompts))]
        params = self._params(sampling_params, len(parsed), self._llm.sampling_params())
        return self._complete(parsed, params, use_tqdm, priority, add_special_tokens=True)

    def chat(self, messages: Messages | Sequence[Messages],
             sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
             tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
             continue_final_message: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None,
             priority: int = 0) -> list[RequestOutput]:
        """Answers one conversation or several, in their order. Without parameters an answer may take all the room there
        is. Errors as `generate`."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        chats: Sequence[Any] = messages if several else [messages]

        def render(chat: Messages) -> ParsedPrompt:
            text = self._llm.chat_prompt(chat, tools=tools, add_generation_prompt=add_generation_prompt,
                                         continue_final_message=continue_final_message, options=chat_template_kwargs)
            return ParsedPrompt(text, None, "")

        parsed = [_numbered(index, render, chat) for index, chat in enumerate(chats)]
        default = self._llm.sampling_params(**{"max_tokens": None, **self._llm.intake.defaults})
        return self._complete(parsed, self._params(sampling_params, len(parsed), default), use_tqdm, priority,
                              add_special_tokens=False)

    def get_tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends."""
        return self._llm.sampling_params()

    @property
    def limits(self) -> ModelLimits:
        return self._llm.limits

    def stats(self) -> Stats:
        """The engine's counters and gauges."""
        return self._loop.run(self._llm.stats())

    def reset_prefix_cache(self) -> None:
        self._loop.run(self._llm.reset_prefix_cache())

    def close(self) -> None:
        """Ends the engine and frees its memory. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int,
                default: SamplingParams) -> list[SamplingParams]:
        if given is None:
            return [default] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ParamError("sampling_params", f"{len(given)} sampling_params for {count} prompts: give one for all or "
                                                f"one each")
        return list(given)

    def _complete(self, parsed: Sequence[ParsedPrompt], params: Sequence[SamplingParams], use_tqdm: bool, priority: int,
                  *, add_special_tokens: bool) -> list[RequestOutput]:
        if not self._finalizer.alive:
            raise EngineDead("this LLM has been closed")
        texts = [prompt.text for prompt in parsed if prompt.text is not None]
        encoded = iter(self._llm.tokenizer.encode_batch(texts, add_special_tokens) if texts else ())
        states = []
        for index, (prompt, one) in enumerate(zip(parsed, params, strict=True)):
            tokens = next(encoded) if prompt.tokens is None else prompt.tokens
            states.append(_numbered(index, self._llm.prepare, tokens, prompt.text, one, request_id=str(index),
                                    priority=priority, salt=prompt.salt, stream=False))
        return self._loop.run(self._llm.complete(states), _progress(states) if use_tqdm else None)
