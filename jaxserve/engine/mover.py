"""Carries pages between device and host memory, beside the loop. Knows no scheduler and no programs.

The loop's thread gathers pages into staging arrays and scatters them from there; a worker moves the staging arrays,
because a copy to the host waits for everything launched before it. What comes in waits on the host until it is sent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.engine.moved import Moved
from jaxserve.kv.state import KVState
from jaxserve.types import Move


class Mover:
    """Host pages of every pool and the thread that fills and empties them. Moves are done in the order they came in."""

    def __init__(
        self,
        kv: KVState,
        host_pages: Sequence[int],
        link_bytes_s: float | None,
        chunk: int,
        done: Callable[[Moved], None],
    ):
        """`kv`: shapes of the pools. `link_bytes_s`: no copy goes faster than this; None: as fast as the machine is.
        `chunk`: pages of a staging array. `done` is called on the worker's thread."""
        self._chunk = chunk
        self._link = link_bytes_s
        self._done = done
        self.copies = 0
        """Copies of staging arrays, either way."""
        self._host: dict[tuple[int, int], Any] = {}
        sizes = iter(host_pages)
        for group, format in enumerate(kv.formats):
            for cls in range(kv.tables[group].shape[0]):
                pages = next(sizes)
                part = format.part(kv.pools[group], cls)
                self._host[group, cls] = jax.tree.map(lambda x, n=pages: np.zeros((n, *x.shape[1:]), x.dtype), part)
        self._tasks: deque[Callable[[], None]] = deque()
        self._wake = threading.Semaphore(0)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="jaxserve-mover", daemon=True)
        self._thread.start()

    def take_out(self, move: Move, staged: Sequence[Any]) -> None:
        """Copies staging arrays, `chunk` pages each, to the move's places on the host."""
        self._put(lambda: self._out(move, staged))

    def bring_in(self, move: Move) -> None:
        """Copies the move's host pages to staging arrays on the device."""
        self._put(lambda: self._in(move))

    def close(self) -> None:
        self._closing = True
        self._wake.release()
        self._thread.join()

    def _put(self, task: Callable[[], None]) -> None:
        self._tasks.append(task)
        self._wake.release()

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            if self._closing:
                return
            self._tasks.popleft()()

    def _out(self, move: Move, staged: Sequence[Any]) -> None:
        for first, part in self._parts(move, staged):
            started = time.monotonic()
            places = np.array(move.host[first : first + self._chunk])
            size = 0
            for host, leaf in zip(self._leaves(move), jax.tree.leaves(part), strict=True):
                content = np.asarray(leaf)[: len(places)]
                host[places] = content
                size += content.nbytes
            self._copied(size, started)
        self._done(Moved(move))

    def _in(self, move: Move) -> None:
        staged = []
        for first in range(0, len(move.host), self._chunk):
            started = time.monotonic()
            places = np.array(move.host[first : first + self._chunk])
            padded = np.resize(places, self._chunk)  # what pads is dropped when it is scattered
            tree = self._host[move.group, move.cls]
            staged.append(jax.block_until_ready(jax.device_put(jax.tree.map(lambda x, p=padded: x[p], tree))))
            size = sum(x[:1].nbytes for x in jax.tree.leaves(tree)) * len(places)
            self._copied(size, started)
        self._done(Moved(move, tuple(staged)))

    def _copied(self, size: int, started: float) -> None:
        self.copies += 1
        if self._link is not None:
            time.sleep(max(0.0, size / self._link - (time.monotonic() - started)))

    def _parts(self, move: Move, staged: Sequence[Any]) -> list[tuple[int, Any]]:
        return list(zip(range(0, len(move.pages), self._chunk), staged, strict=True))

    def _leaves(self, move: Move) -> list[np.ndarray]:
        return jax.tree.leaves(self._host[move.group, move.cls])
