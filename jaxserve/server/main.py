"""`jaxserve serve`: an engine process, the application over it, and their common end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import uvicorn
import uvloop
from fastapi import FastAPI

from jaxserve.api import AsyncLLM
from jaxserve.config import ConfigError, ServeConfig, ServerOptions
from jaxserve.engine.client import EngineDead
from jaxserve.engine.process import ProcessClient
from jaxserve.server.app import create_app
from jaxserve.server.connection import HttpProtocol
from jaxserve.server.health import package_version
from jaxserve.server.serving import Serving

FLUSH_S = 5.0
"""What open responses get to leave once everything has been generated or aborted."""


def run(config: ServeConfig) -> int:
    """Serves until SIGTERM or Ctrl-C (0, after running requests have finished; 130 before it could serve).

    Raises:
        ConfigError, CheckpointError: what cannot be served, and why.
        EngineDead: the engine has ended, with the cause.
    """
    level = config.server.log_level.upper()
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_serve(config))
        except asyncio.CancelledError:
            return 130


async def _serve(config: ServeConfig) -> int:
    options = config.server
    _on_signals(cast(asyncio.Task, asyncio.current_task()).cancel)  # until there is something to drain
    listener = _bind(options)
    print(f"jaxserve {package_version()}: starting the engine", flush=True)
    llm = AsyncLLM(config.engine, ProcessClient(config.engine))
    app = create_app(llm, config)
    try:
        # Started here, not by uvicorn, so that what is wrong reaches the command line as one line.
        async with app.router.lifespan_context(app):
            ready = llm.ready
            print(
                f"serving {', '.join(app.state.serving.names)}: up to {ready.max_num_seqs} sequences of "
                f"{ready.limits.max_model_len} tokens at once; KV cache of {ready.num_pages[0]} pages of "
                f"{ready.page_tokens} tokens",
                flush=True,
            )
            server = _Server(_uvicorn(app, options), _address(options, listener))
            # What exists now lives as long as the server; the collector need not look at it again.
            gc.collect()
            gc.freeze()
            return await _until_end(server, app.state.serving, listener, options.drain_timeout)
    finally:
        if listener is not None:
            listener.close()
        elif options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


async def _until_end(server: _Server, serving: Serving, listener: socket.socket | None, drain_s: float) -> int:
    """Runs the server until a signal or the engine's death. Returns the exit code."""
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            os._exit(130)  # the second time at once; the engine process ends when its socket closes
        asked.set()

    _on_signals(on_signal)
    serving_http = asyncio.ensure_future(server.serve(None if listener is None else [listener]))
    engine_death = asyncio.ensure_future(serving.llm.wait_failed())
    signalled = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait((serving_http, engine_death, signalled), return_when=asyncio.FIRST_COMPLETED)
        if serving_http.done():
            serving_http.result()
            return 1
        serving.draining = True
        if not engine_death.done():
            running = serving.llm.unfinished
            print(
                f"shutting down; {running} running sequences may take {drain_s:g} s (Ctrl-C again ends at once)",
                flush=True,
            )
            drained = asyncio.ensure_future(serving.llm.close(drain_s))
            await asyncio.wait((drained, engine_death), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving_http
        if engine_death.done():
            raise EngineDead(engine_death.result())
        return 0
    finally:
        for task in (engine_death, signalled):
            task.cancel()


def _on_signals(handler: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, handler)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: signals mean draining first (see `_until_end`)."""

    def __init__(self, config: uvicorn.Config, address: str):
        super().__init__(config)
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"listening on {self._address}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        uds=options.uds,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # type: ignore[arg-type]
        access_log=options.log_level == "debug",
        server_header=False,
        proxy_headers=False,
        root_path=options.root_path,
        timeout_graceful_shutdown=int(FLUSH_S),
        timeout_keep_alive=30,
    )


def _bind(options: ServerOptions) -> socket.socket | None:
    """The listening address, taken, or tried, before the model is loaded: a port in use should be known at once.

    Raises:
        ConfigError: the address cannot be had.
    """
    if options.uds is not None:
        _try_uds(Path(options.uds))
        return None
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host {options.host} --port {options.port}: {error.strerror or error}") from None
    return listener


def _try_uds(path: Path) -> None:
    """
    Raises:
        ConfigError: no server can listen there, or one does already. A socket that a dead one left behind is replaced.
    """
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            if path.is_socket():
                with contextlib.suppress(ConnectionRefusedError):
                    trial.connect(str(path))
                    raise ConfigError(f"--uds {path}: another server listens there")
            else:
                trial.bind(str(path))
                path.unlink()
        except OSError as error:
            raise ConfigError(f"--uds {path}: {error.strerror or error}") from None


def _address(options: ServerOptions, listener: socket.socket | None) -> str:
    if listener is None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
