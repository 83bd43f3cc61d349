"""The declared set of device programs: what exists, what is compiled, which one a step takes. Knows no plans."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxserve.engine.executables import ExecutableCache
from pallas_kernels.native.build import lookups

log = logging.getLogger(__name__)

WORKERS = 2
"""Programs compiled at a time while nobody is served."""


@dataclass(frozen=True)
class Program:
    """A function to be compiled for arguments of fixed shapes.

    Attributes:
        name: unique; says kind and bucket, e.g. `forward[16,0]`.
        function: pure.
        args: pytrees of jax.ShapeDtypeStruct (with shardings) or arrays.
        donate: positions of arguments whose buffers the results take over.
        out: pytree of the results' structure; leaves are never looked at.
        static: what `function` was made of, if it does not follow from name and args. Values whose repr says all.
    """

    name: str
    function: Callable
    args: tuple
    donate: tuple[int, ...]
    out: Any
    static: tuple = ()

    @cached_property
    def key(self) -> str:
        """What a compiled program is kept under: engines that differ elsewhere share it. The name is the first line."""
        leaves, tree = jax.tree.flatten(self.args)
        return "\n".join([self.name, *map(repr, (self.static, self.donate, tree, leaves))])


class ProgramSet:
    """Compiles declared programs, now or in the background, and hands out what is ready."""

    def __init__(self, cache: ExecutableCache | None):
        self._cache = cache
        self._ready: dict[str, Any] = {}
        self._declared: dict[str, Program] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._background: list[Future] = []
        self.loaded = 0
        self.compiled = 0

    def declare(self, programs: Iterable[Program]) -> None:
        for program in programs:
            self._declared[program.name] = program

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of declaration."""
        return tuple(self._declared)

    def ready(self, name: str) -> Any | None:
        """The executable, or None while it is not compiled."""
        return self._ready.get(name)

    def compile_now(self, names: Sequence[str]) -> None:
        """Returns when all of `names` are ready."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="compile") as pool:
            list(pool.map(self._compile, names))

    def compile_in_background(self, names: Sequence[str], at_once: int = 1) -> None:
        """Compiles in order of `names`, `at_once` at a time; each is swapped in when it is done. Once in a life."""

        def one(name: str) -> None:
            try:
                self._compile(name)
            except Exception:
                # A smaller bucket that fails to compile costs speed, not service: larger ones stand in for it.
                log.exception("compiling %s failed; larger buckets stand in for it", name)

        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="compile")
        self._background = [self._pool.submit(one, name) for name in names]

    def wait(self) -> None:
        """Returns when the background is done."""
        for future in self._background:
            future.result()

    @property
    def pending(self) -> int:
        """Programs that the background has still to compile."""
        return sum(not future.done() for future in self._background)

    def close(self) -> None:
        """Compiles nothing more and lets all programs go: the kernels of each hold some hundred of the 65,530 memory
        maps that Linux allows a process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._ready.clear()

    def _compile(self, name: str) -> None:
        if name in self._ready:
            return
        program = self._declared[name]
        start = time.perf_counter()
        executable = self._cache.load(program.key, program.args, program.out) if self._cache else None
        if executable is not None:
            self.loaded += 1
        else:
            lowered = jax.jit(program.function, donate_argnums=program.donate).lower(*program.args)
            with lookups():
                executable = lowered.compile()
            self.compiled += 1
            if self._cache:
                self._cache.store(program.key, executable)
            _return_memory()
        self._ready[name] = executable
        log.debug("%s ready after %.2f s", name, time.perf_counter() - start)


def _return_memory() -> None:
    """Gives back what the compiler used: glibc would keep some hundred MiB for the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
