"""Prefixes on their way between engines: cached pages out by tokens, and in. Knows no device and no transport.

An importer names pages by its own model, options and salt, so it takes what an engine of the same kind computed for the
same tokens, and nothing else. What came in is cached like any prefix: the next request that begins so finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from jaxserve.engine.hashing import chain_root, extend_chain
from jaxserve.kv import KVFormat
from jaxserve.kv.wire import BadPageError, export_page, import_page
from jaxserve.scheduler import Scheduler
from jaxserve.types import PAGE_TOKENS, ExportPrefix, ImportPrefix, KVGroup, PagesCame, Plan, Prefix, PrefixPage


class PageStore(Protocol):
    """What moves pages between pools and host arrays."""

    def read_pages(self, group: int, cls: int, pages: Sequence[int]) -> Any: ...
    def write_pages(self, group: int, cls: int, pages: Sequence[int], content: Sequence[Any]) -> None: ...


class Transfer:
    """Exports and imports for one engine core, on its loop's thread: an export waits for the steps in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: PageStore,
        groups: Sequence[KVGroup],
        formats: Sequence[KVFormat],
        identity: str,
    ) -> None:
        """`identity`: what cached KV depends on beside tokens and salt."""
        self._scheduler = scheduler
        self._store = store
        self._groups = groups
        self._formats = formats
        self._identity = identity
        self._next = 0
        self._waiting: dict[int, tuple[ImportPrefix, list[Any]]] = {}

    def export(self, ask: ExportPrefix) -> Prefix:
        """The longest cached prefix, whole pages of it."""
        names = self._names(ask.tokens, ask.salt)
        length, held = self._scheduler.cached(names)
        pages = []
        for group, cls in sorted({place[:2] for place in held}):
            own = [(index, page) for g, c, index, page in held if (g, c) == (group, cls)]
            content = self._store.read_pages(group, cls, [page for _, page in own])
            for number, (index, _) in enumerate(own):
                one = jax.tree.map(lambda x, n=number: x[n : n + 1], content)
                record = export_page(self._formats[group], cls, one, _identity(names[index], group))
                pages.append(PrefixPage(group, cls, index, record))
        return Prefix(token=ask.token, count=length * PAGE_TOKENS, pages=tuple(pages))

    def take(self, came: ImportPrefix, now: float) -> None:
        """Checks the pages and asks the scheduler for places; the next plan has them.

        Raises:
            BadPageError: a page that cannot be what it says, and why. None of them is imported then.
        """
        names = self._names(came.tokens, came.salt)
        content = [self._checked(page, names) for page in came.pages]
        places = tuple((page.group, page.cls, page.index) for page in came.pages)
        if len(set(places)) != len(places):
            raise BadPageError("a page came twice for one place")
        self._scheduler.on_event(PagesCame(now=now, id=self._next, hashes=names, pages=places))
        self._waiting[self._next] = came, content
        self._next += 1

    def land(self, plan: Plan) -> list[Prefix]:
        """Puts pages where the plan says, before anything of it is launched. Answers for all that is done."""
        answers = []
        for landing in plan.landings:
            came, content = self._waiting.pop(landing.id)
            for group, cls in sorted({place[1:3] for place in landing.pages}):
                own = [(item, page) for item, g, c, page in landing.pages if (g, c) == (group, cls)]
                self._store.write_pages(group, cls, [page for _, page in own], [content[item] for item, _ in own])
            if landing.fits:
                count = self._scheduler.cached(self._names(came.tokens, came.salt))[0] * PAGE_TOKENS
                answers.append(Prefix(token=came.token, count=count))
            else:
                error = f"the KV cache has no room for {len(came.pages)} more pages; sequences that run hold it"
                answers.append(Prefix(token=came.token, error=error))
        return answers

    def _names(self, tokens: Sequence[int], salt: str) -> tuple[bytes, ...]:
        return tuple(extend_chain(chain_root(self._identity, salt), tokens, 0, len(tokens) // PAGE_TOKENS))

    def _checked(self, page: PrefixPage, names: Sequence[bytes]) -> Any:
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
