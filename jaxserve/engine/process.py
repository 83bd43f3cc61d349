"""The engine core as a process of its own behind a Unix socket, so that HTTP and text never hold its interpreter lock.

The front end's side (`ProcessClient`) imports no jax. The core's side is `python -m jaxserve.engine.process FD`: its
socket end arrives as an inherited descriptor, the config as the first frame. Either side ends when the other is gone.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import socket
import subprocess
import sys
import threading

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine import wire
from jaxserve.engine.client import DeltaSink, EngineDead
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.messages import CLOSED, MessageClient
from jaxserve.engine.platform import select_platform
from jaxserve.types import Control, Failed, FromCore, Ready, ToCore


class ProcessClient(MessageClient):
    """An EngineClient whose core is a child process. See client.EngineClient for the contract."""

    def __init__(self, config: EngineConfig):
        super().__init__()
        self._config = config
        self._child: subprocess.Popen | None = None

    async def start(self, sink: DeltaSink) -> Ready:
        self._open(sink)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxserve.engine.process", str(theirs.fileno())]
            # A session of its own: Ctrl-C reaches the front end alone, which decides how to end the core.
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
        config = msgspec.json.encode(self._config)
        self._writer.write(wire.LENGTH.pack(len(config)) + config)
        self._reading = self._loop.create_task(self._read(reader, self._child))
        return await self._ready

    @property
    def pid(self) -> int:
        """Of the engine process."""
        if self._child is None:
            raise RuntimeError("the engine process has not been started")
        return self._child.pid

    async def close(self, drain: float = 0.0) -> None:
        if self._child is None or self._closing:
            return
        self._closing = True
        if not self._ready.done():
            self._child.kill()  # it would look at its socket only after loading
        self._writer.close()
        try:
            await asyncio.to_thread(self._child.wait, drain + 5.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            await asyncio.to_thread(self._child.wait)
        self._reading.cancel()
        self._disappoint(CLOSED)

    def _send(self, message: ToCore) -> None:
        self._writer.write(wire.frame(message))

    async def _read(self, reader: asyncio.StreamReader, child: subprocess.Popen) -> None:
        try:
            while (message := await wire.read_from_core(reader)) is not None:
                self._receive(message)
        except ValueError as error:
            cause = f"the engine process sent something unreadable: {error}"
            self._fail(cause, EngineDead(cause))
            return
        if not self._closing and self._failure is None:
            cause = _cause_of(await asyncio.to_thread(child.wait))
            self._fail(cause, EngineDead(cause))


def _cause_of(code: int) -> str:
    if code < 0:
        return f"the engine process was killed by signal {-code}"
    return f"the engine process ended with code {code}; its last words are in the log above"


class _Outbox:
    """Frames written by a thread of their own, so that a slow reader never holds up a step."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: FromCore) -> None:
        self._frames.put(wire.frame(message))

    def close(self) -> None:
        """Returns when everything has been written."""
        self._frames.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (data := self._frames.get()) is not None:
            try:
                self._sock.sendall(data)
            except OSError:
                return


def main(descriptor: int) -> int:
    """The core's side: serves until the socket closes."""
    sock = socket.socket(fileno=descriptor)
    config = _read_config(sock)
    if config is None:
        return 0
    inbox = Inbox()
    outbox = _Outbox(sock)

    def read() -> None:
        try:
            while (message := wire.read_to_core(sock)) is not None:
                inbox.put(message)
        except ValueError as error:
            outbox.put(Failed(cause=f"unreadable message from the front end: {error}"))
        inbox.put(Control(verb="shutdown"))

    threading.Thread(target=read, name="inbox", daemon=True).start()
    select_platform(config.runtime.device)
    from jaxserve.engine.load import load_core

    try:
        core = load_core(config, inbox, outbox.put, lambda text: print(text, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        outbox.put(Failed(cause=str(error), refused=True))
        outbox.close()
        return 2
    # What is loaded by now lives as long as the process: the collector need not walk it during steps.
    gc.collect()
    gc.freeze()
    try:
        core.run()
    except Exception as error:
        import traceback

        traceback.print_exc()
        outbox.put(Failed(cause=f"{type(error).__name__}: {error}"))
        outbox.close()
        return 1
    outbox.close()
    return 0


def _read_config(sock: socket.socket) -> EngineConfig | None:
    head = wire.read_exactly(sock, wire.LENGTH.size)
    body = None if head is None else wire.read_exactly(sock, wire.LENGTH.unpack(head)[0])
    return None if body is None else msgspec.json.decode(body, type=EngineConfig)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
