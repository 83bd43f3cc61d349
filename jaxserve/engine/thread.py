"""The engine core on a thread of this process: what the library and batch jobs use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from jaxserve.config import EngineConfig
from jaxserve.engine.client import DeltaSink, EngineDead
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.messages import CLOSED, MessageClient
from jaxserve.engine.platform import select_platform
from jaxserve.types import Control, Failed, FromCore, Ready, ToCore


class ThreadClient(MessageClient):
    """An EngineClient whose core shares this process. See client.EngineClient for the contract."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[str], None] = lambda _: None):
        super().__init__()
        self._config = config
        self._progress = on_progress
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None

    async def start(self, sink: DeltaSink) -> Ready:
        self._open(sink)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return await self._ready

    async def close(self, drain: float = 0.0) -> None:
        if self._thread is None or self._closing:
            return
        self._closing = True
        self._inbox.put(Control(verb="shutdown"))
        # No executor: this also runs while the interpreter exits, when executors accept no more work.
        end = self._loop.time() + drain + 30.0
        while self._thread.is_alive() and self._loop.time() < end:
            await asyncio.sleep(0.01)
        self._disappoint(CLOSED)

    def _send(self, message: ToCore) -> None:
        self._inbox.put(message)

    def _run(self) -> None:
        try:
            select_platform(self._config.runtime.device)
            from jaxserve.engine.load import load_core

            core = load_core(self._config, self._inbox, self._emit, self._progress)
        except (ValueError, OSError) as error:
            self._call(self._fail, str(error), error)
            return
        except Exception as error:  # whoever waits in start() gets it
            cause = f"{type(error).__name__}: {error}"
            self._call(self._fail, cause, EngineDead(cause))
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
