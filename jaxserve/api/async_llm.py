"""One model behind an engine, for asyncio programs and servers. Imports no jax; text/ does what is done to text."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from jaxserve.api.intake import read_intake
from jaxserve.config import EngineConfig
from jaxserve.engine.client import EngineClient, EngineDead
from jaxserve.engine.thread import ThreadClient
from jaxserve.text.intake import Prompt, parse_prompt
from jaxserve.text.processor import RequestDelta, RequestState
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import (
    CachedPrefix,
    Delta,
    FinishReason,
    ModelLimits,
    Ready,
    RequestOutput,
    SamplingParams,
    Stats,
    program_key,
)

log = logging.getLogger(__name__)

LONG_TEXT = 20_000
"""Characters above which text is tokenized on a thread: this many take a few milliseconds of the event loop."""


class QueueFull(RuntimeError):
    """More requests wait than `max_queued_requests` allows; try again later."""


class TransferError(RuntimeError):
    """KV that was not exported or imported, and why."""


class AsyncLLM:
    """One model behind an engine, for one event loop. `start()` comes first; everything else needs it."""

    def __init__(self, config: EngineConfig, client: EngineClient | None = None):
        """`client`: whose engine to use; without it, one on a thread of this process."""
        self.config = config
        self._client = client if client is not None else ThreadClient(config)
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
        self.intake = await asyncio.to_thread(read_intake, self.config)
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

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for a chat; see text/chat.py for the options. Encode it with `add_special_tokens=False`."""
        return self.intake.chat_prompt(messages, **options)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, without holding up the event loop over a long one."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        salt: str = "",
        stream: bool = True,
        prompt_text: str | None = None,
        program_id: str = "",
        last_turn: bool = False,
        tool: str = "",
        deadline_s: float | None = None,
    ) -> Stream:
        """Hands a request to the engine; what it generates comes out of the Stream.

        `request_id` names the request to its caller: in outputs and for `abort`. `stream` False lets the engine deliver
        tokens late. `prompt_text` is reported as the prompt where `prompt` is token ids.

        Requests with one `program_id` (and tenant and salt) are turns of one job: the KV of a turn is held for the next
        one, unless it is the `last_turn`; `tool` names what runs in between. `deadline_s`: seconds from now in which
        the caller wants the answer; policies that know deadlines go by it.

        Raises:
            ParamError: the request cannot be honoured.
            QueueFull: too many requests wait.
            EngineDead: the engine has ended.
        """
        parsed = parse_prompt(prompt)
        tokens = parsed.tokens if parsed.text is None else await self.encode(parsed.text)
        text = parsed.text if parsed.text is not None else prompt_text
        state = self.prepare(
            tokens or (),
            text,
            params,
            request_id=request_id,
            priority=priority,
            tenant=tenant,
            salt=salt or parsed.salt,
            stream=stream,
            program_id=program_id,
            last_turn=last_turn,
            tool=tool,
            deadline_s=deadline_s,
        )
        if self._sequences + state.request.params.n > self._admitted:
            raise QueueFull(
                f"{self._sequences} sequences wait or run already, and max_queued_requests is "
                f"{self.config.scheduler.max_queued_requests}"
            )
        return Stream(self, self._start(state))

    def prepare(
        self,
        tokens: Sequence[int],
        text: str | None,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        stream: bool = True,
        **options: Any,
    ) -> RequestState:
        """A request that has been checked and not been submitted. Errors of `submit`, but for QueueFull."""
        if self._client.failure is not None:
            raise EngineDead(self._client.failure)
        name = next(self._names)
        wanted = params if params is not None else self.sampling_params()
        # Stop strings are found here, so the engine must let tokens be seen early to be stopped early.
        request = self.intake.request(tokens, wanted, id=name, stream=stream or bool(wanted.stop), **options)
        return RequestState(
            request,
            self.tokenizer,
            self.limits.eos_token_ids,
            request_id=request_id or name,
            prompt=text,
            now=time.monotonic(),
        )

    async def complete(self, states: Sequence[RequestState]) -> list[RequestOutput]:
        """Runs prepared requests to their ends, however many they are; cancelling it cancels them.

        Raises:
            EngineDead: the engine has ended.
        """
        all_running: list[_Running] = []
        try:
            all_running.extend(map(self._track, states))
            self._client.submit_all([state.request for state in states])
            for running in all_running:
                while not running.state.finished:
                    if self.failure is not None:
                        raise EngineDead(self.failure)
                    running.changed.clear()
                    await running.changed.wait()
            return [state.output() for state in states]
        finally:
            for running in all_running:
                self._end(running, FinishReason.ABORT)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
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

    async def close_program(self, program_id: str, *, tenant: str = "", salt: str = "") -> None:
        """The program has no further turns: the KV held for it is let go. Unknown programs are ignored."""
        await self._client.control("close_program", program_key(tenant, salt, program_id))

    async def export_prefix(self, prompt: Prompt, *, salt: str = "") -> CachedPrefix:
        """The KV of the beginning of `prompt`, as far as whole pages of it are in the prefix cache: nothing is computed
        for it. Needs `kv_transfer`. Requests are served meanwhile.

        Raises:
            ParamError: what is no prompt.
            TransferError: the engine does not export.
            EngineDead: the engine has ended.
        """
        parsed = parse_prompt(prompt)
        tokens = tuple(parsed.tokens or ()) if parsed.text is None else tuple(await self.encode(parsed.text))
        answer = await self._client.export_prefix(tokens, salt or parsed.salt)
        if answer.error is not None:
            raise TransferError(answer.error)
        return CachedPrefix(tokens=tokens[: answer.count], pages=answer.pages)

    async def import_prefix(self, prefix: CachedPrefix, *, salt: str = "") -> int:
        """Puts into the prefix cache what an engine of the same model and KV options exported under the same `salt`.
        The next request that begins so finds it, as long as nobody needs the room. Needs `kv_transfer`.

        Returns: how many leading tokens are cached then.

        Raises:
            TransferError: nothing was imported: damaged pages, or of another engine or salt, or there is no room.
            EngineDead: the engine has ended.
        """
        answer = await self._client.import_prefix(prefix.tokens, prefix.pages, salt)
        if answer.error is not None:
            raise TransferError(answer.error)
        return answer.count

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

    def _start(self, state: RequestState) -> _Running:
        self._client.submit(state.request)
        return self._track(state)

    def _track(self, state: RequestState) -> _Running:
        running = self._running[state.request.id] = _Running(state)
        self._sequences += state.request.params.n
        return running

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
