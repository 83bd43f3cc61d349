"""Pages of sequences: granting, sharing, freeing behind windows, finding prefixes. Knows no policy and no plan order.

All groups of a sequence advance together, so one number (`Seq.table_end`) says how far its tables reach. Entries are
(class, page) pairs although formats of one class are the only ones so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pool import IntegrityError, Pool
from jaxserve.scheduler.request import NEVER, Seq, Table
from jaxserve.types import PAGE_TOKENS, Copy, Grant, PageClasses

ONE_CLASS = 0


class Start(NamedTuple):
    """Computed content that a sequence can begin with instead of prefilling it.

    Pages [first[g], tokens // PAGE_TOKENS) of group g are `shared[g]`; `copied[g]`, if any, holds the rest of `tokens`
    and belongs to another sequence.
    """

    tokens: int
    first: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    copied: tuple[int, ...] = ()
    resumed: bool = False
    """It is what the sequence's program held."""


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def pages_spanned(tokens: int) -> int:
    """Pages that `tokens` consecutive positions touch at most, wherever they begin."""
    return (tokens + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


class Pages:
    """The pools of all groups and who holds what in them."""

    def __init__(self, groups: Sequence[PageClasses], limits: Limits) -> None:
        for g, group in enumerate(groups):
            if len(group.classes) != 1:
                names = ", ".join(c.name for c in group.classes)
                raise ValueError(
                    f"KV group {g} has page classes ({names}); this scheduler accounts for formats with one class"
                )
            if group.page_tokens != PAGE_TOKENS:
                raise ValueError(f"KV group {g} has pages of {group.page_tokens} tokens; they have {PAGE_TOKENS}")
            if group.window is not None and group.window < 1:
                raise ValueError(f"KV group {g} has a window of {group.window} tokens; it must be at least 1")
        if not groups:
            raise ValueError("a model without KV groups has no pages to schedule")
        self.pools = tuple(tuple(Pool(c) for c in group.classes) for group in groups)
        self.windows = tuple(group.window for group in groups)
        self.queries = 0
        """Tokens looked up in the prefix index, counted when the sequence is first admitted."""
        self.hits = 0
        self._limits = limits
        self._pools = tuple(classes[ONE_CLASS] for classes in self.pools)
        self._caps = tuple(self._lone_need(window) for window in self.windows)
        self._windowed = any(window is not None for window in self.windows)
        self._held: list[tuple[int, int]] = []

    def _lone_need(self, window: int | None) -> int:
        """Pages of a windowed group with which a sequence can always go on: a tile or row and the window before it."""
        if window is None:
            return NEVER
        rows = window + (self._limits.q - 1) * (self._limits.lag + 1)
        return max(pages_spanned(rows), pages_for(window - 1) + 1)

    # Room

    def available(self, group: int) -> int:
        return self._pools[group].available

    def room(self) -> int:
        """Pages that every group can still grant."""
        return min(pool.available for pool in self._pools)

    def usage(self) -> float:
        """Share of the fullest pool that is referenced."""
        return max((1.0 - pool.available / pool.size if pool.size else 0.0) for pool in self._pools)

    def take_freed(self) -> int:
        """Pages that lost their last owner since the last call."""
        freed = sum(pool.freed for pool in self._pools)
        for pool in self._pools:
            pool.freed = 0
        return freed

    def need(self, pages: int) -> list[int]:
        """Pages by group to reserve for `pages` more table entries; a window holds few of them at a time."""
        step = self._limits.max_tiles
        return [min(pages, cap + step) for cap in self._caps]

    def need_to_start(self, seq: Seq, start: Start) -> list[int]:
        """Pages by group, from those available now, that a WAITING sequence takes until its prompt is computed and, if
        it was preempted before, until it has come some way further: the way doubles with each preemption, so that a
        sequence does not come and go."""
        missing = pages_for(seq.known) - start.tokens // PAGE_TOKENS
        further = min(1 << seq.preemptions, pages_for(seq.end) - pages_for(seq.known)) if seq.preemptions else 0
        taken = ([*shared, *start.copied[g : g + 1]] for g, shared in enumerate(start.shared))
        return [
            need + sum(1 for page in pages if not pool.references(page))
            for need, pages, pool in zip(self.need(missing + further), taken, self._pools, strict=True)
        ]

    def watermark(self) -> list[int]:
        return [int(pool.size * self._limits.watermark) for pool in self._pools]

    def exclusive(self, seq: Seq, wanted: Sequence[Sequence[int]]) -> list[int]:
        """Pages by group that nobody else holds and that are not `wanted` (by group) either."""
        return [
            sum(1 for _, page in filter(None, table.refs) if pool.references(page) == 1 and page not in keep)
            for table, pool, keep in zip(seq.tables, self._pools, wanted, strict=True)
        ]

    def too_large(self, prompt: int, max_new: int) -> str | None:
        """Why a sequence could not run even alone, or None."""
        limits = self._limits
        end = min(prompt + max_new, limits.max_model_len)
        # The last token's KV is never read. A verification row reaches q - 1 positions further, and the length from
        # which it starts is known to within the q - 1 drafts of each step in flight.
        positions = min(max(prompt, end - 1 + (limits.q - 1) * (limits.lag + 1)), limits.max_model_len)
        for g, (pool, cap) in enumerate(zip(self._pools, self._caps, strict=True)):
            need = min(pages_for(positions), cap)
            if need > pool.size:
                return (
                    f"prompt ({prompt} tokens) and max_tokens ({max_new}) need {need} KV pages of {PAGE_TOKENS} tokens "
                    f"in group {g}, which has {pool.size}; shorten them or give the KV cache more memory"
                )
        return None

    # Granting

    def grow(self, seq: Seq, end: int, grants: list[Grant]) -> None:
        """New pages for table entries [seq.table_end, end) in every group. Requires `room() >= end - table_end`."""
        for index in range(seq.table_end, end):
            for g, pool in enumerate(self._pools):
                page = pool.take()
                seq.tables[g].refs.append((ONE_CLASS, page))
                grants.append(Grant(seq.slot, g, index, ONE_CLASS, page))
        seq.table_end = end

    def begin(self, seq: Seq, start: Start, grants: list[Grant], copies: list[Copy]) -> None:
        """A sequence that just got its slot takes over `start`; needs a page of every group for `start.copied`."""
        entries = start.tokens // PAGE_TOKENS
        for g, (pool, table) in enumerate(zip(self._pools, seq.tables, strict=True)):
            table.first = start.first[g]
            table.refs = [None] * table.first
            for index, page in enumerate(start.shared[g], table.first):
                pool.hold(page)
                table.refs.append((ONE_CLASS, page))
                grants.append(Grant(seq.slot, g, index, ONE_CLASS, page))
        seq.table_end = entries
        seq.published = entries
        if start.copied:
            # Until the plan is complete the source must not become another page's target: copies of one plan have no
            # order among themselves.
            for g, source in enumerate(start.copied):
                self._pools[g].hold(source)
                self._held.append((g, source))
            self.grow(seq, entries + 1, grants)
            for g, source in enumerate(start.copied):
                ref = seq.tables[g].refs[entries]
                assert ref is not None
                copies.append(Copy(g, ONE_CLASS, source, ref[1]))
        seq.computed = start.tokens
        self._next_release(seq)

    def end_plan(self) -> None:
        """Lets go of what was held for the plan's copies."""
        for g, page in self._held:
            self._pools[g].drop(page)
        self._held.clear()

    # Freeing

    def release_behind(self, seq: Seq, length: int) -> None:
        """Frees pages that no query at or after position `length - 1` reads. Programs run in order, so steps in flight
        have read them before anything that is planned from now on is written there."""
        for g, window in enumerate(self.windows):
            if window is None:
                continue
            table = seq.tables[g]
            while table.first < seq.table_end and length >= (table.first + 1) * PAGE_TOKENS + window:
                ref = table.refs[table.first]
                if ref is not None:
                    self._pools[g].drop(ref[1])
                    table.refs[table.first] = None
                table.first += 1
        self._next_release(seq)

    def drop(self, seq: Seq) -> None:
        """Gives back all pages, the deepest first: a chain is evicted from its end."""
        for pool, table in zip(self._pools, seq.tables, strict=True):
            for ref in reversed(table.refs):
                if ref is not None:
                    pool.drop(ref[1])
            table.refs = []
            table.first = 0
        seq.table_end = 0
        seq.published = 0
        seq.release_at = NEVER

    def trim(self, seq: Seq, end: int) -> None:
        """Gives back the pages of table entries from `end` on, which no window has passed."""
        for pool, table in zip(self._pools, seq.tables, strict=True):
            for ref in reversed(table.refs[end:]):
                if ref is not None:
                    pool.drop(ref[1])
            del table.refs[end:]
        seq.table_end = min(seq.table_end, end)

    def reset_cache(self) -> None:
        for pool in self._pools:
            pool.reset()

    def _next_release(self, seq: Seq) -> None:
        if self._windowed:
            seq.release_at = min(
                (table.first + 1) * PAGE_TOKENS + window
                for table, window in zip(seq.tables, self.windows, strict=True)
                if window is not None
            )

    # Sharing

    def publish(self, seq: Seq) -> None:
        """Names pages whose content is computed, or will be by a step already planned.

        Publishing when the step is planned is safe, because programs run in order on the device and every plan is
        executed: a later plan's reads come after this one's writes.
        """
        end = seq.chain_pages
        if end <= seq.published or not self._limits.enable_prefix_caching:
            return
        for pool, table in zip(self._pools, seq.tables, strict=True):
            for index in range(max(seq.published, table.first), end):
                ref = table.refs[index]
                if ref is not None:
                    pool.publish(ref[1], seq.hashes[index])
        seq.published = end

    def prefix(self, seq: Seq) -> Start:
        """The longest cached prefix of a WAITING sequence. Its last token is always computed, so a hit ends before it.

        A group with a window needs only the pages that the first computed token reads.
        """
        nothing = Start(0, (0,) * len(self._pools), ((),) * len(self._pools))
        if seq.whole_prompt or not self._limits.enable_prefix_caching:
            return nothing
        limit = min(len(seq.hashes), (seq.known - 1) // PAGE_TOKENS)
        for pool, window in zip(self._pools, self.windows, strict=True):
            if window is None:
                limit = next((i for i in range(limit) if pool.find(seq.hashes[i]) is None), limit)
        length = limit
        while length:
            shorter = length
            for pool, window in zip(self._pools, self.windows, strict=True):
                if window is not None:
                    first = _first_read(length * PAGE_TOKENS, window)
                    hole = next((i for i in range(length - 1, first - 1, -1) if pool.find(seq.hashes[i]) is None), None)
                    if hole is not None:
                        shorter = min(shorter, hole)
            if shorter == length:
                break
            length = shorter
        if not length:
            return nothing
        first_pages = tuple(0 if w is None else _first_read(length * PAGE_TOKENS, w) for w in self.windows)
        shared = tuple(
            tuple(_found(pool.find(seq.hashes[i])) for i in range(first, length))
            for pool, first in zip(self._pools, first_pages, strict=True)
        )
        return Start(length * PAGE_TOKENS, first_pages, shared)

    def fork(self, donor: Sequence[Table], tokens: int) -> Start | None:
        """The first `tokens` of another sequence, from its tables; None if it has moved its window past them. What it
        wrote behind them does no harm: whoever takes them writes its own there first."""
        entries = tokens // PAGE_TOKENS
        first_pages = tuple(0 if window is None else _first_read(tokens, window) for window in self.windows)
        if any(table.first > first for table, first in zip(donor, first_pages, strict=True)):
            return None
        shared = tuple(
            tuple(_page(ref) for ref in table.refs[first:entries])
            for table, first in zip(donor, first_pages, strict=True)
        )
        copied = tuple(_page(table.refs[entries]) for table in donor) if tokens % PAGE_TOKENS else ()
        return Start(tokens, first_pages, shared, copied)

    # Integrity

    def check(self, seqs: Iterable[Seq]) -> None:
        """Every page is free, cached without references, or held by exactly the references counted.

        Raises:
            IntegrityError: what does not add up.
        """
        expected: list[dict[int, int]] = [{} for _ in self._pools]
        for seq in seqs:
            for g, table in enumerate(seq.tables):
                if len(table.refs) != seq.table_end:
                    raise IntegrityError(f"{seq}: table of group {g} has {len(table.refs)} of {seq.table_end} entries")
                for index, ref in enumerate(table.refs):
                    if (ref is None) != (index < table.first):
                        raise IntegrityError(f"{seq}: entry {index} of group {g} is {ref}, held from {table.first} on")
                    if ref is not None:
                        expected[g][ref[1]] = expected[g].get(ref[1], 0) + 1
        if self._held:
            raise IntegrityError(f"pages held for copies outside a plan: {self._held}")
        for g, pool in enumerate(self._pools):
            pool.check(f"KV group {g}", expected[g])


def _first_read(position: int, window: int) -> int:
    """First page that a query at `position` or later reads."""
    return max(0, position - window + 1) // PAGE_TOKENS


def _found(page: int | None) -> int:
    if page is None:
        raise IntegrityError("a page of a prefix hit vanished from the index")
    return page


def _page(ref: tuple[int, int] | None) -> int:
    if ref is None:
        raise IntegrityError("a page to be shared was already freed")
    return ref[1]
