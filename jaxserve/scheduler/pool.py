"""One pool of pages: references, free list, prefix index, eviction of the least recently used. Knows no sequences.

A page is in one of three states: referenced (count > 0), cached (count 0, its content is in the index, evictable in
order of last use) or free. Every verb is O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from jaxserve.types import PageClass


class IntegrityError(RuntimeError):
    """Page or slot accounting that does not add up: a bug of the scheduler, never of a request."""


class Pool:
    """`page_class.pages` page ids, from 0."""

    __slots__ = ("_cached", "_free", "_hashes", "_index", "_refs", "freed", "label", "size")

    def __init__(self, page_class: PageClass) -> None:
        self.label = page_class.name
        self.size = page_class.pages
        self.freed = 0
        """References that fell to zero since somebody set it back."""
        self._refs = [0] * self.size
        self._free = list(range(self.size - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hashes: list[bytes | None] = [None] * self.size
        self._index: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give: free or cached."""
        return len(self._free) + len(self._cached)

    def take(self) -> int:
        """A page without content and with one reference; the longest unused cached page when none is free.

        Raises:
            IndexError: nothing is available; callers ask `available` first.
        """
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            raise IndexError("the pool has no page available")
        self._refs[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more reference to a page that is cached or referenced."""
        if not self._refs[page]:
            del self._cached[page]
        self._refs[page] += 1

    def drop(self, page: int) -> None:
        """One reference less; the last one leaves the page cached if it has a name, else free."""
        self._refs[page] -= 1
        if not self._refs[page]:
            self.freed += 1
            if self._hashes[page] is not None:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, name: bytes) -> None:
        """The content of a referenced page can be found under `name`; a page already there keeps the name."""
        if self._hashes[page] is None and name not in self._index:
            self._index[name] = page
            self._hashes[page] = name

    def withdraw(self, name: bytes) -> None:
        """Its page has no name any more, and is free if it was cached."""
        page = self._index.pop(name, None)
        if page is not None:
            self._hashes[page] = None
            if not self._refs[page]:
                del self._cached[page]
                self._free.append(page)

    def find(self, name: bytes) -> int | None:
        return self._index.get(name)

    def name(self, page: int) -> bytes | None:
        return self._hashes[page]

    def references(self, page: int) -> int:
        return self._refs[page]

    def reset(self) -> None:
        """Forgets all names: cached pages become free, referenced ones stay with their owners."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._index.clear()
        self._hashes = [None] * self.size

    def check(self, where: str, expected: dict[int, int]) -> None:
        """`expected`: references by page, counted from their owners.

        Raises:
            IntegrityError: what does not add up.
        """
        referenced = {page: n for page, n in enumerate(self._refs) if n}
        if referenced != expected:
            wrong = {
                page: (referenced.get(page, 0), expected.get(page, 0))
                for page in referenced.keys() | expected.keys()
                if referenced.get(page, 0) != expected.get(page, 0)
            }
            raise IntegrityError(f"{where}: references (counted, held) differ for pages {wrong}")
        states = sorted([*self._free, *self._cached, *referenced])
        if states != list(range(self.size)):
            raise IntegrityError(f"{where}: free, cached and referenced pages do not partition the pool: {states}")
        if {name: page for page, name in enumerate(self._hashes) if name is not None} != self._index:
            raise IntegrityError(f"{where}: the prefix index and the names of pages disagree")
        if unnamed := [page for page in self._cached if self._hashes[page] is None]:
            raise IntegrityError(f"{where}: cached pages without a name: {unnamed}")

    def _forget(self, page: int) -> None:
        name = self._hashes[page]
        if name is not None:
            del self._index[name]
            self._hashes[page] = None
