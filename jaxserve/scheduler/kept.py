"""Pages that nobody holds and somebody may come back for. Knows no plans, policies or programs.

They lie among the cached pages, under names of their own where the prefix index has none, and are evicted in their
turn. So what a preempted sequence or an idle program had is lost only to who needs the room, with prefix caching or
without.
"""

from __future__ import annotations

from jaxserve.scheduler.pages import Pages
from jaxserve.scheduler.request import Seq, Table
from jaxserve.types import SeqId

_OWN = b"own/"
Names = list[bytes | None]
"""By table entry; None where the sequence held no page."""


class Kept:
    """What a sequence left in the cache. `names` and `first` are by pool; the first `full` pages are never written
    again,
    so they keep their names from one residence to the next."""

    __slots__ = ("first", "full", "names")

    def __init__(self, names: tuple[Names, ...], first: tuple[int, ...], full: int) -> None:
        self.names = names
        self.first = first
        self.full = full


def keep(pages: Pages, seq: Seq) -> Kept:
    """Names the pages of a sequence and lets them go. Its first `seq.computed` tokens are in them, and what rows in
    flight will add."""
    full = pages.whole(seq.computed)
    names = tuple(
        [_name(pages, seq, i, index, page, index < full) for index, page in enumerate(table.refs)]
        for i, table in enumerate(seq.tables)
    )
    kept = Kept(names, tuple(table.first for table in seq.tables), full)
    pages.drop(seq)
    return kept


def _name(pages: Pages, seq: Seq, i: int, index: int, page: int | None, full: bool) -> bytes | None:
    """The name under which a page will be found: the one that the prefix index has, or one that says whose it is."""
    if page is None:
        return None
    pool = pages.flat[i]
    own, name = own_name(seq.id, i, index, -1 if full else seq.preemptions), pool.name(page)
    if name is not None and name != own and name.startswith(_OWN + b"%d/" % seq.id):
        pool.withdraw(name)  # of an earlier residence, when less of the page was written
        name = None
    if name is None:
        pool.publish(page, own)
    return pool.name(page)


def own_name(seq: SeqId, pool: int, index: int, residence: int = -1) -> bytes:
    """Of a page that the prefix index has no name for: entry `index` of a table. Its content is the same whenever it is
    full; until then it is that of one residence."""
    return _OWN + b"%d/%d/%d/%d" % (seq, pool, index, residence)


def found(pages: Pages, kept: Kept) -> tuple[Table, ...]:
    """Tables of what is still there, each up to the first page that was evicted."""
    tables = []
    for pool, names, first in zip(pages.flat, kept.names, kept.first, strict=True):
        table = Table()
        table.first = first
        for name in names:
            page = None if name is None else pool.find(name)
            if name is not None and page is None:
                break
            table.refs.append(page)
        tables.append(table)
    return tuple(tables)


def private(name: bytes) -> bool:
    """Whether only the sequence itself can look for this name."""
    return name.startswith(_OWN)


def forget(pages: Pages, kept: Kept, first: int = 0) -> None:
    """Nobody will come for the pages from entry `first` on; those in the prefix index stay there."""
    for pool, names in zip(pages.flat, kept.names, strict=True):
        for name in reversed(names[first:]):
            if name is not None and private(name):
                pool.withdraw(name)
