"""Prefixes on their way between engines: cached pages out by tokens, and in. Knows no device and no transport.

An importer names pages by its own model, options and salt, so it takes what an engine of the same kind computed for the
same tokens, and nothing else. What came in is cached like any prefix: the next request that begins so finds it.

The loop's thread looks pages up, gathers and scatters them. A worker does what takes long: it waits for what was
gathered, makes records, and checks the records of others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxserve.engine.hashing import chain_root, extend_chain
from jaxserve.engine.moved import Checked, Transferred
from jaxserve.kv import KVFormat
from jaxserve.kv.wire import BadPageError, export_page, import_page
from jaxserve.scheduler import Scheduler
from jaxserve.types import ExportPrefix, ImportPrefix, KVGroup, PagesCame, Plan, Prefix, PrefixPage

log = logging.getLogger(__name__)


class PageStore(Protocol):
    """What moves pages between pools and staging or host arrays."""

    def stage_pages(self, group: int, cls: int, pages: Sequence[int]) -> list[Any]: ...
    def write_pages(self, group: int, cls: int, pages: Sequence[int], content: Sequence[Any]) -> None: ...


@dataclass(frozen=True)
class _Gathered:
    """Pages of one pool on their way out. `indices`: of each in its sequence; `staged`: arrays of some pages each."""

    group: int
    cls: int
    indices: list[int]
    staged: list[Any]


class Transfer:
    """Exports and imports for one engine core. Called on its loop's thread, but for `done`."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: PageStore,
        groups: Sequence[KVGroup],
        formats: Sequence[KVFormat],
        identity: str,
        done: Callable[[Transferred], None],
    ) -> None:
        """`identity`: what cached KV depends on beside tokens and salt. `done` is called on the worker's thread, once
        for each `export` and `check`; the loop gives what it was told to `hear`."""
        self._scheduler = scheduler
        self._store = store
        self._groups = groups
        self._page_tokens = groups[0].page_tokens
        self._formats = formats
        self._identity = identity
        self._done = done
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-transfer")
        self._next = 0
        self._waiting: dict[int, Checked] = {}
        self.under_way = 0
        """What the worker has been asked for and `hear` has not heard of."""

    def export(self, ask: ExportPrefix) -> None:
        """Gathers the longest cached prefix, whole pages of it, as they are now; the rest goes on beside the loop."""
        names = self._names(ask.tokens, ask.salt)
        length, held = self._scheduler.cached(names)
        gathered = []
        for group, cls in sorted({place[:2] for place in held}):
            own = [(index, page) for g, c, index, page in held if (g, c) == (group, cls)]
            staged = self._store.stage_pages(group, cls, [page for _, page in own])
            gathered.append(_Gathered(group, cls, [index for index, _ in own], staged))
        self._begin(ask.token, lambda: self._encoded(ask.token, names, length, gathered))

    def check(self, came: ImportPrefix) -> None:
        """Has the pages looked at. Unless they are refused, `hear` asks for places for them."""
        self._begin(came.token, lambda: self._checked(came))

    def hear(self, told: Transferred, now: float) -> Prefix | None:
        """Takes what `done` was told: the answer to who asked, or pages that are whole, for which the scheduler is
        asked for places. The next plan has them."""
        self.under_way -= 1
        if isinstance(told, Prefix):
            return told
        places = tuple((page.group, page.cls, page.index) for page in told.came.pages)
        self._scheduler.on_event(PagesCame(now=now, id=self._next, hashes=told.hashes, pages=places))
        self._waiting[self._next] = told
        self._next += 1
        return None

    def land(self, plan: Plan) -> list[Prefix]:
        """Puts pages where the plan says, before anything of it is launched. Answers for all that is done."""
        answers = []
        for landing in plan.landings:
            checked = self._waiting.pop(landing.id)
            came, content = checked.came, checked.content
            for group, cls in sorted({place[1:3] for place in landing.pages}):
                own = [(item, page) for item, g, c, page in landing.pages if (g, c) == (group, cls)]
                self._store.write_pages(group, cls, [page for _, page in own], [content[item] for item, _ in own])
            if landing.fits:
                count = self._scheduler.cached(checked.hashes)[0] * self._page_tokens
                answers.append(Prefix(token=came.token, count=count))
            else:
                error = f"the KV cache has no room for {len(came.pages)} more pages; sequences that run hold it"
                answers.append(Prefix(token=came.token, error=error))
        return answers

    def close(self) -> None:
        """Forgets what has not begun, and waits for what has."""
        self._worker.shutdown(cancel_futures=True)

    def _names(self, tokens: Sequence[int], salt: str) -> tuple[bytes, ...]:
        size = self._page_tokens
        return tuple(extend_chain(chain_root(self._identity, salt), tokens, 0, len(tokens) // size, size))

    def _begin(self, token: int, errand: Callable[[], Transferred]) -> None:
        def run() -> None:
            try:
                told = errand()
            except Exception as error:  # whoever asked gets it
                if not isinstance(error, ValueError):
                    log.exception("moving a prefix failed")
                told = Prefix(token=token, error=str(error))
            self._done(told)

        self._worker.submit(run)
        self.under_way += 1

    # On the worker's thread

    def _encoded(self, token: int, names: Sequence[bytes], length: int, gathered: Sequence[_Gathered]) -> Prefix:
        pages: list[PrefixPage] = []
        for pool in gathered:
            format, indices = self._formats[pool.group], iter(pool.indices)
            while pool.staged:
                staged = jax.tree.map(np.asarray, pool.staged.pop(0))  # its device memory is free after this round
                size = len(jax.tree.leaves(staged)[0])
                for number, index in zip(range(size), indices, strict=False):  # what pads the last one stays behind
                    one = jax.tree.map(lambda x, n=number: x[n : n + 1], staged)
                    record = export_page(format, pool.cls, one, _identity(names[index], pool.group))
                    pages.append(PrefixPage(pool.group, pool.cls, index, record))
        return Prefix(token=token, count=length * self._page_tokens, pages=tuple(pages))

    def _checked(self, came: ImportPrefix) -> Checked:
        names = self._names(came.tokens, came.salt)
        content = tuple(self._content(page, names) for page in came.pages)
        if len({(page.group, page.cls, page.index) for page in came.pages}) != len(came.pages):
            raise BadPageError("a page came twice for one place")
        return Checked(came, names, content)

    def _content(self, page: PrefixPage, names: Sequence[bytes]) -> Any:
        if not (0 <= page.group < len(self._groups) and 0 <= page.index < len(names)):
            raise BadPageError(
                f"page {page.index} of group {page.group}: there are {len(names)} whole pages in these tokens and "
                f"{len(self._groups)} groups in this engine"
            )
        header, content = import_page(self._formats[page.group], self._groups[page.group], page.record)
        if header.cls != page.cls or header.identity != _identity(names[page.index], page.group):
            raise BadPageError(
                f"page {page.index} of group {page.group} was computed for other tokens, or by an engine with another "
                "model, salt or KV options"
            )
        return content


def _identity(name: bytes, group: int) -> bytes:
    """Of what a page holds: tokens and everything else in its chain hash, and which layers."""
    return name + group.to_bytes(2, "little")
