"""Pages on their way between device and host memory (after FastSwitch, arXiv:2411.18424). Knows no plans, no policies.

A move takes pages of one pool at once: one gathered copy. Out: the step that carries it gathers the pages before it
writes anything, so their device pages are at once for whoever needs them; the host copy counts when MoveDone says so.
In: device pages are held until MoveDone, then they lie among the cached ones, where their sequence finds them. Host
copies stay: what a sequence sends the next time is what is new, because full pages keep their names.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxserve.scheduler.costs import prefill_s
from jaxserve.scheduler.host import HostPool
from jaxserve.scheduler.kept import Kept, own_name, private
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pages import Pages
from jaxserve.scheduler.request import Seq
from jaxserve.scheduler.view import View
from jaxserve.types import Move, PageClasses


class Moving(NamedTuple):
    """A move under way: pages of pool `i`, one of each tuple per page."""

    i: int
    kind: str
    names: tuple[bytes, ...]
    pages: tuple[int, ...]
    seq: Seq | None
    """Who waits for it."""
    stays: tuple[tuple[int, int], ...]
    """(pool, page) of other pages that are held until it is done."""


class Wanted(NamedTuple):
    """What brings a sequence back, by pool: names of pages that must come from the host, pages that the device has."""

    absent: list[list[bytes]]
    present: list[list[int]]


class Swap:
    """Host pools and moves. Without host pages it does nothing."""

    def __init__(self, pages: Pages, groups: tuple[PageClasses, ...], limits: Limits) -> None:
        """
        Raises:
            ValueError: host pools that do not fit the device's.
        """
        classes = [c for group in groups for c in group.classes]
        if limits.host_pages and len(limits.host_pages) != len(classes):
            raise ValueError(f"host_pages has {len(limits.host_pages)} pools; the device has {len(classes)}")
        self.hosts = tuple(HostPool(size) for size in limits.host_pages)
        self.out_bytes = 0
        self.in_bytes = 0
        self.out_moves = 0
        self.in_moves = 0
        self.resent = 0
        """Pages that needed no copy, because their host copy was still valid."""
        self._pages = pages
        self._bytes = [c.bytes for c in classes]
        self._link = limits.host_link_bytes_s
        self._moving: dict[int, Moving] = {}
        self._stale: set[int] = set()
        """Moves whose content was forgotten on the way."""
        self._next = 0

    @property
    def under_way(self) -> int:
        return len(self._moving)

    @property
    def holds(self) -> bool:
        """Whether moves hold pages of the device, which will be free without anybody's doing."""
        return any(moving.kind == "in" for moving in self._moving.values())

    # Out

    def out(self, seq: Seq, kept: Kept, view: View) -> list[Move]:
        """Copies what a sequence left behind to the host, where that is cheaper to get back than to compute."""
        if not self.hosts or self._seconds(kept.names) >= prefill_s(view, seq.left_tokens):
            return []
        moves = []
        for i, (host, pool, names) in enumerate(zip(self.hosts, self._pages.flat, kept.names, strict=True)):
            taken: list[tuple[bytes, int, int]] = []
            for name in filter(None, names):
                page = pool.find(name)
                if page is None:
                    continue
                if host.knows(name):
                    self.resent += 1
                elif (place := host.reserve(name)) is not None:
                    taken.append((name, page, place))
            if taken:
                moves.append(self._start(i, "out", taken))
        return moves

    def _seconds(self, names: tuple[list[bytes | None], ...]) -> float:
        """On the link, for the pages that the host does not have."""
        size = 0
        for host, each, column in zip(self.hosts, self._bytes, names, strict=True):
            size += each * sum(name is not None and not host.knows(name) for name in column)
        return size / self._link

    # In

    def wanted(self, kept: Kept, tokens: int) -> Wanted | None:
        """What must come from the host for a sequence to have back as many of its first `tokens` as host and device
        hold
        together; None when the device holds as many alone."""
        reach = self._pages.prefilled(tokens).entries
        for host, pool, names in zip(self.hosts, self._pages.flat, kept.names, strict=True):
            there = (name is None or pool.find(name) is not None or host.find(name) is not None for name in names)
            reach = min(reach, next((i for i, found in enumerate(there) if not found), reach))
        absent, present = [], []
        for pool, names in zip(self._pages.flat, kept.names, strict=True):
            pages = [(name, pool.find(name)) for name in names[:reach] if name is not None]
            absent.append([name for name, page in pages if page is None])
            present.append([page for _, page in pages if page is not None])
        return Wanted(absent, present) if any(absent) else None

    def pays(self, wanted: Wanted, tokens: int, view: View) -> bool:
        """Whether fetching is faster than computing `tokens`."""
        size = sum(each * len(names) for each, names in zip(self._bytes, wanted.absent, strict=True))
        return size / self._link < prefill_s(view, tokens)

    def room_for(self, wanted: Wanted) -> list[int]:
        """Pages by pool that `fetch` takes out of those that are available."""
        return [
            len(absent) + sum(1 for page in present if not pool.references(page))
            for pool, absent, present in zip(self._pages.flat, wanted.absent, wanted.present, strict=True)
        ]

    def fetch(self, seq: Seq, wanted: Wanted) -> list[Move]:
        """Starts to bring pages in; `seq` is not ready until they are there, and what the device has stays till then.
        Needs `room_for` pages."""
        moves = []
        for pool, present in zip(self._pages.flat, wanted.present, strict=True):
            for page in present:
                pool.hold(page)
        stays = tuple((i, page) for i, present in enumerate(wanted.present) for page in present)
        for i, (host, pool, absent) in enumerate(zip(self.hosts, self._pages.flat, wanted.absent, strict=True)):
            taken = []
            for name in absent:
                place = host.find(name)
                assert place is not None
                host.hold(name)
                taken.append((name, pool.take(), place))
            if taken:
                moves.append(self._start(i, "in", taken, seq, stays))
                stays = ()
                seq.fetching += 1
        return moves

    # Both

    def _start(
        self,
        i: int,
        kind: str,
        taken: list[tuple[bytes, int, int]],
        seq: Seq | None = None,
        stays: tuple[tuple[int, int], ...] = (),
    ) -> Move:
        names, pages, places = zip(*taken, strict=True)
        number = self._next
        self._next += 1
        self._moving[number] = Moving(i, kind, names, pages, seq, stays)
        size = self._bytes[i] * len(pages)
        if kind == "out":
            self.out_bytes += size
            self.out_moves += 1
        else:
            self.in_bytes += size
            self.in_moves += 1
        rule = self._pages.rules[i]
        return Move(number, kind, rule.group, rule.cls, pages, places)

    def done(self, number: int) -> Seq | None:
        """A move is complete. Returns the sequence that has nothing to wait for any more.

        Raises:
            ValueError: no such move is under way.
        """
        moving = self._moving.pop(number, None)
        if moving is None:
            raise ValueError(f"MoveDone names move {number}, but that is not under way")
        stale = number in self._stale
        self._stale.discard(number)
        host, pool = self.hosts[moving.i], self._pages.flat[moving.i]
        for i, page in moving.stays:
            self._pages.flat[i].drop(page)
        for name, page in zip(moving.names, moving.pages, strict=True):
            if moving.kind == "out":
                host.arrived(name)
            else:
                host.let_go(name)
                if not stale and (moving.seq is not None and moving.seq.kept is not None):
                    pool.publish(page, name)
                pool.drop(page)
        if moving.seq is None:
            return None
        moving.seq.fetching -= 1
        return None if moving.seq.fetching else moving.seq

    def forget(self, kept: Kept, first: int = 0) -> None:
        """Nobody comes back for these pages; what the prefix index may name again stays."""
        for host, names in zip(self.hosts, kept.names, strict=False):
            for name in filter(None, names[first:]):
                if private(name):
                    host.forget(name)

    def ended(self, seq: Seq) -> None:
        """Nobody else looks for the full pages that it sent, those among them that it let go before its end."""
        for i, host in enumerate(self.hosts):
            for index in range(self._pages.whole(seq.known) + 1):
                host.forget(own_name(seq.id, i, index))

    def reset(self) -> None:
        """What is here and what is on its way was computed with other weights."""
        self._stale.update(self._moving)
        for host in self.hosts:
            host.reset()

    def held(self) -> list[tuple[int, int]]:
        """(pool, page) of device pages that moves hold."""
        moving = [moving for moving in self._moving.values() if moving.kind == "in"]
        return [(one.i, page) for one in moving for page in one.pages] + [held for one in moving for held in one.stays]

    def usage(self) -> float:
        return max((host.used / host.size for host in self.hosts if host.size), default=0.0)

    def check(self) -> None:
        """
        Raises:
            IntegrityError: what does not add up.
        """
        for i, host in enumerate(self.hosts):
            host.check(f"host pool {i}")
