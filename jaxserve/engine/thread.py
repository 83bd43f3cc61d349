"""The engine core on a thread of this process: what the library and batch jobs use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.client import DeltaSink, EngineDead
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.platform import select_platform
from jaxserve.types import Cancel, Control, Deltas, Failed, FromCore, Ready, Request, Stats, Submit


class ThreadClient:
    """An EngineClient whose core shares this process. See client.EngineClient for the contract."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[str], None] = lambda _: None):
        self._config = config
        self._progress = on_progress
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None
        self._controls: dict[int, asyncio.Future[Stats]] = {}
        self._failure: str | None = None
        self._closing = False

    async def start(self, sink: DeltaSink) -> Ready:
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._failed: asyncio.Future[str] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return await self._ready

    def submit(self, request: Request) -> None:
        self._put(Submit(request=request))

    def cancel(self, ids: Sequence[str]) -> None:
        self._put(Cancel(ids=tuple(ids)))

    async def control(self, verb: str) -> Stats:
        token = max(self._controls, default=0) + 1
        future = self._controls[token] = self._loop.create_future()
        self._put(Control(verb=verb, token=token))
        return await future

    @property
    def failure(self) -> str | None:
        return self._failure

    async def wait_failed(self) -> str:
        return await asyncio.shield(self._failed)

    async def close(self, drain: float = 0.0) -> None:
        if self._thread is None or self._closing:
            return
        self._closing = True
        self._inbox.put(Control(verb="shutdown"))
        # No executor: this also runs while the interpreter exits, when executors accept no more work.
        end = self._loop.time() + drain + 30.0
        while self._thread.is_alive() and self._loop.time() < end:
            await asyncio.sleep(0.01)

    def _put(self, message: Submit | Cancel | Control) -> None:
        if self._failure is not None:
            raise EngineDead(self._failure)
        self._inbox.put(message)

    def _run(self) -> None:
        try:
            select_platform(self._config.runtime.device)
            from jaxserve.engine.load import load_core

            core = load_core(self._config, self._inbox, self._emit, self._progress)
        except Exception as error:  # the caller of start() gets it
            self._call(self._refuse, error)
            return
        try:
            core.run()
        except Exception as error:
            self._emit(Failed(cause=f"{type(error).__name__}: {error}"))

    def _emit(self, message: FromCore) -> None:
        self._call(self._receive, message)

    def _call(self, function: Callable, *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The event loop is gone, so nobody is left to tell.
            self._inbox.put(Control(verb="shutdown"))

    def _refuse(self, error: Exception) -> None:
        self._failure = str(error)
        known = isinstance(error, ValueError | OSError | ConfigError)
        self._ready.set_exception(error if known else EngineDead(f"{type(error).__name__}: {error}"))

    def _receive(self, message: FromCore) -> None:
        if isinstance(message, Deltas):
            self._sink(message.deltas)
        elif isinstance(message, Ready):
            self._ready.set_result(message)
        elif isinstance(message, Stats):
            future = self._controls.pop(message.token, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Failed):
            self._failure = message.cause
            for future in self._controls.values():
                future.set_exception(EngineDead(message.cause))
            self._controls.clear()
            if not self._failed.done():
                self._failed.set_result(message.cause)
