"""Pages of sequences: granting, sharing, freeing behind windows, finding prefixes. Knows no policy and no plan order.

All groups of a sequence advance together. What is done for a pool is done for every pool in one order, group by group
and class by class: tables, rules (classes.py) and lists of page counts follow it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxserve.scheduler.classes import NEVER, Open, Span, Whole, first_read, pages_for, rules_of
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pool import IntegrityError, Pool
from jaxserve.scheduler.request import Phase, Seq, Table
from jaxserve.types import Copy, Grant, PageClasses, Seal


class Start(NamedTuple):
    """Computed content that a sequence can begin with instead of prefilling it.

    `first`: by pool, the first table entry that anybody reads. `shared`: by pool, pages by table entry, all of
    them whole. `copied`: by pool, if there are any, pages of another sequence that hold the rest of `tokens`.
    """

    tokens: int
    first: tuple[int, ...]
    shared: tuple[Mapping[int, int], ...]
    copied: tuple[int, ...] = ()
    resumed: bool = False
    """It is what the sequence's program held."""


class Pages:
    """The pools of all groups and who holds what in them."""

    def __init__(self, groups: Sequence[PageClasses], limits: Limits) -> None:
        if not groups:
            raise ValueError("a model without KV groups has no pages to schedule")
        self.rules = tuple(rule for g, group in enumerate(groups) for rule in rules_of(g, group, limits))
        self.pools = tuple(tuple(Pool(c) for c in group.classes) for group in groups)
        self.flat = tuple(pool for classes in self.pools for pool in classes)
        self.seals = any(isinstance(rule, Open) for rule in self.rules)
        """Whether any group has two classes."""
        self.queries = 0
        """Tokens looked up in the prefix index, counted when the sequence is first admitted."""
        self.hits = 0
        self._limits = limits
        self._page_tokens = limits.page_tokens
        self._releases = self.seals or any(rule.window is not None for rule in self.rules)
        self._held: list[tuple[int, int]] = []

    # Room

    def available(self) -> list[int]:
        """Pages by pool that can be granted."""
        return [pool.available for pool in self.flat]

    def cost(self, seq: Seq, span: Span) -> list[int]:
        """Pages by pool that `grow` would grant."""
        return [rule.cost(len(table.refs), span) for rule, table in zip(self.rules, seq.tables, strict=True)]

    def has_room(self, seq: Seq, span: Span) -> bool:
        """Whether `grow` can grant all of them."""
        return self.has(self.cost(seq, span))

    def has(self, pages: Sequence[int]) -> bool:
        """Whether so many pages of every pool can be granted."""
        return all(pool.available >= count for pool, count in zip(self.flat, pages, strict=True))

    def prefilled(self, tokens: int) -> Span:
        """What a sequence needs of which exactly `tokens` are computed."""
        return Span.prefilled(tokens, self._page_tokens)

    def whole(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return tokens // self._page_tokens

    def row(self, length: int, end: int) -> Span:
        """What a row needs of a sequence of at least `length` tokens; it writes positions below `end`, at or above
        which the next row begins at the latest."""
        end = min(end, self._limits.max_model_len)
        return Span(pages_for(end, self._page_tokens), (length - 1) // self._page_tokens, end // self._page_tokens)

    def usage(self) -> float:
        """Share of the fullest pool that is referenced."""
        return max((1.0 - pool.available / pool.size if pool.size else 0.0) for pool in self.flat)

    def take_freed(self) -> int:
        """Pages that lost their last owner since the last call."""
        freed = sum(pool.freed for pool in self.flat)
        for pool in self.flat:
            pool.freed = 0
        return freed

    def need(self, seq: Seq) -> list[int]:
        """Pages by pool that a sequence in PREFILL has yet to be granted until its prompt is computed."""
        return self._need(seq.table_end, self.prefilled(seq.target))

    def _need(self, have: int, span: Span) -> list[int]:
        return [rule.need(have, span, self._limits.max_tiles) for rule in self.rules]

    def need_to_start(self, seq: Seq, start: Start) -> list[int]:
        """Pages by pool, from those available now, that a WAITING sequence takes until its prompt is computed and, if
        it was preempted before, until it has come some way further: the way doubles with each preemption, so that a
        sequence does not come and go."""
        prompt = self.prefilled(seq.known)
        further = (
            min(1 << seq.preemptions, pages_for(seq.end, self._page_tokens) - prompt.entries) if seq.preemptions else 0
        )
        need = self._need(
            start.tokens // self._page_tokens, Span(prompt.entries + further, prompt.reads, prompt.full + further)
        )
        taken = ([*shared.values(), *start.copied[i : i + 1]] for i, shared in enumerate(start.shared))
        return [
            count + sum(1 for page in pages if not pool.references(page))
            for count, pages, pool in zip(need, taken, self.flat, strict=True)
        ]

    def watermark(self) -> list[int]:
        return [int(pool.size * self._limits.watermark) for pool in self.flat]

    def exclusive(self, seq: Seq, wanted: Sequence[Collection[int]]) -> list[int]:
        """Pages by pool that nobody else holds and that are not `wanted` (by pool) either."""
        return [
            sum(1 for page in table.refs if page is not None and pool.references(page) == 1 and page not in keep)
            for table, pool, keep in zip(seq.tables, self.flat, wanted, strict=True)
        ]

    def too_large(self, prompt: int, max_new: int) -> str | None:
        """Why a sequence could not run even alone, or None."""
        limits = self._limits
        end = min(prompt + max_new, limits.max_model_len)
        # The last token's KV is never read. A verification row reaches q - 1 positions further, and the length from
        # which it starts is known to within the q - 1 drafts of each step in flight.
        positions = min(max(prompt, end - 1 + (limits.q - 1) * (limits.lag + 1)), limits.max_model_len)
        span = self.prefilled(positions)
        for rule, pool in zip(self.rules, self.flat, strict=True):
            need = rule.least(span)
            if need > pool.size:
                return (
                    f"prompt ({prompt} tokens) and max_tokens ({max_new}) need {need} KV pages of {self._page_tokens} "
                    f"tokens ({pool.label}) in group {rule.group}, which has {pool.size}; shorten them or give the KV "
                    "cache more memory"
                )
        return None

    # Granting

    def grow(self, seq: Seq, span: Span, grants: list[Grant]) -> None:
        """New pages for the tables of a sequence up to `span`. Requires `has_room`."""
        ends = [rule.end(span) for rule in self.rules]
        for index in range(min(len(table.refs) for table in seq.tables), max(ends)):
            for end, rule, pool, table in zip(ends, self.rules, self.flat, seq.tables, strict=True):
                if len(table.refs) == index < end:
                    page = pool.take() if rule.takes(index, span) else None
                    table.refs.append(page)
                    if page is not None:
                        grants.append(Grant(seq.slot, rule.group, index, rule.cls, page))
        seq.table_end = max(seq.table_end, span.entries)

    def seal(self, seq: Seq, length: int, span: Span, seals: list[Seal]) -> None:
        """Sealing after the step of pages that its row may fill. A page that is not certainly full yet comes up again
        with the next row; the device looks whether it is, and sealing it twice changes nothing."""
        for i, rule in enumerate(self.rules):
            if isinstance(rule, Open):
                for index in range(max((length - 1) // self._page_tokens, rule.sinks), span.full):
                    source, target = seq.tables[i].refs[index], seq.tables[i + 1].refs[index]
                    if source is None or target is None:
                        raise IntegrityError(f"{seq}: page {index} of group {rule.group} is to be sealed, but not held")
                    seals.append(Seal(rule.group, seq.slot, index, source, target))

    def begin(self, seq: Seq, start: Start, grants: list[Grant], copies: list[Copy]) -> None:
        """A sequence that just got its slot takes over `start`; needs a page of every pool for `start.copied`."""
        entries = start.tokens // self._page_tokens
        for i, (rule, pool, table) in enumerate(zip(self.rules, self.flat, seq.tables, strict=True)):
            table.first = start.first[i]
            table.tail = rule.sinks if isinstance(rule, Open) else 0
            table.refs = [None] * entries
            for index, page in start.shared[i].items():
                pool.hold(page)
                table.refs[index] = page
                grants.append(Grant(seq.slot, rule.group, index, rule.cls, page))
        seq.table_end = entries
        seq.published = entries
        if start.copied:
            # Until the plan is complete the source must not become another page's target: copies of one plan have no
            # order among themselves.
            for i, source in enumerate(start.copied):
                self.flat[i].hold(source)
                self._held.append((i, source))
            self.grow(seq, self.prefilled(start.tokens), grants)
            for i, source in enumerate(start.copied):
                target = seq.tables[i].refs[entries]
                assert target is not None
                copies.append(Copy(self.rules[i].group, self.rules[i].cls, source, target))
        seq.computed = start.tokens
        self._next_release(seq)

    def end_plan(self) -> None:
        """Lets go of what was held for the plan's copies."""
        for i, page in self._held:
            self.flat[i].drop(page)
        self._held.clear()

    # Freeing

    def release_behind(self, seq: Seq, length: int) -> None:
        """Frees pages that no query at or after position `length - 1` reads. Programs run in order, so steps in flight
        have read them, and sealed them, before anything that is planned from now on is written there."""
        for rule, pool, table in zip(self.rules, self.flat, seq.tables, strict=True):
            if rule.window is not None:
                while table.first < len(table.refs) and length >= (table.first + 1) * self._page_tokens + rule.window:
                    self._release(pool, table, table.first)
                    table.first += 1
            if isinstance(rule, Open):
                end = min((length - 1) // self._page_tokens - rule.residual + 1, len(table.refs))
                for index in range(table.tail, end):
                    self._release(pool, table, index)
                table.tail = max(table.tail, end)
        self._next_release(seq)

    @staticmethod
    def _release(pool: Pool, table: Table, index: int) -> None:
        page = table.refs[index]
        if page is not None:
            pool.drop(page)
            table.refs[index] = None

    def drop(self, seq: Seq) -> None:
        """Gives back all pages, the deepest first: a chain is evicted from its end."""
        for pool, table in zip(self.flat, seq.tables, strict=True):
            for page in reversed(table.refs):
                if page is not None:
                    pool.drop(page)
            table.refs = []
            table.first = table.tail = 0
        seq.table_end = 0
        seq.published = 0
        seq.release_at = NEVER

    def trim(self, seq: Seq, tokens: int) -> None:
        """Gives back the pages that `fork` has no use for, of a sequence whose first `tokens` are computed. No window
        has passed them."""
        end = tokens // self._page_tokens if self.seals else pages_for(tokens, self._page_tokens)
        for pool, table in zip(self.flat, seq.tables, strict=True):
            for page in reversed(table.refs[end:]):
                if page is not None:
                    pool.drop(page)
            del table.refs[end:]
        seq.table_end = min(seq.table_end, end)

    def reset_cache(self) -> None:
        for pool in self.flat:
            pool.reset()

    def _next_release(self, seq: Seq) -> None:
        if self._releases:
            seq.release_at = NEVER
            for rule, table in zip(self.rules, seq.tables, strict=True):
                if rule.window is not None:
                    seq.release_at = min(seq.release_at, (table.first + 1) * self._page_tokens + rule.window)
                if isinstance(rule, Open):
                    seq.release_at = min(seq.release_at, (table.tail + rule.residual) * self._page_tokens + 1)

    # Sharing

    def publish(self, seq: Seq) -> None:
        """Names pages whose content is computed, or will be by a step already planned.

        Publishing when the step is planned is safe, because programs run in order on the device and every plan is
        executed: a later plan's reads come after this one's writes.
        """
        end = min(seq.computed // self._page_tokens, len(seq.hashes))  # content that is computed and has a name
        if end <= seq.published or not self._limits.enable_prefix_caching:
            return
        for rule, pool, table in zip(self.rules, self.flat, seq.tables, strict=True):
            for index in range(max(seq.published, table.first), end):
                page = table.refs[index]
                if page is not None and rule.shares(index):
                    pool.publish(page, seq.hashes[index])
        seq.published = end

    def prefix(self, seq: Seq) -> Start:
        """The longest cached prefix of a WAITING sequence. Its last token is always computed, so a hit ends before it.

        A group needs only the pages that later tokens read: those in the window, and in each form in which they are
        read behind a prefix of that length.
        """
        if seq.whole_prompt or not self._limits.enable_prefix_caching:
            return self.cached((), 0)
        return self.cached(seq.hashes, min(len(seq.hashes), (seq.known - 1) // self._page_tokens))

    def cached(self, hashes: Sequence[bytes], limit: int) -> Start:
        """The longest prefix of at most `limit` pages, named `hashes`, behind which a sequence could go on."""
        nothing = Start(0, (0,) * len(self.flat), ({},) * len(self.flat))
        moving = []
        for rule, pool in zip(self.rules, self.flat, strict=True):
            # Pages that every longer prefix needs, too: the first one that is missing bounds it.
            if rule.window is not None:
                moving.append((rule, pool))
                continue
            if isinstance(rule, Open):
                moving += [(rule, pool)] if rule.residual > 1 else []
                needed: Iterable[int] = range(min(rule.sinks, limit))
            else:
                needed = (index for index in range(limit) if rule.takes(index, _UNENDING))
            limit = next((i for i in needed if pool.find(hashes[i]) is None), limit)
        length = limit
        while length:
            shorter = length
            for rule, pool in moving:
                needed = reversed(self._indices(rule, length))
                shorter = min(shorter, next((i for i in needed if pool.find(hashes[i]) is None), length))
            if shorter == length:
                break
            length = shorter
        if not length:
            return nothing
        first = tuple(first_read(length * self._page_tokens, rule.window, self._page_tokens) for rule in self.rules)
        shared = tuple(
            {index: _found(pool.find(hashes[index])) for index in self._indices(rule, length)}
            for rule, pool in zip(self.rules, self.flat, strict=True)
        )
        return Start(length * self._page_tokens, first, shared)

    def land(self, hashes: Sequence[bytes], places: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]] | None:
        """Cached pages for content that comes from elsewhere: (number in `places`, page) for each (group, class, index)
        that is not cached already. None, and nothing changes, if a pool lacks room for its own."""
        number = {(rule.group, rule.cls): i for i, rule in enumerate(self.rules)}
        found: list[tuple[Pool, int]] = []
        missing: list[tuple[int, Pool, bytes]] = []
        for item, (group, cls, index) in enumerate(places):
            pool, name = self.flat[number[group, cls]], hashes[index]
            page = pool.find(name)
            if page is None:
                missing.append((item, pool, name))
            else:  # room is not made at the cost of the same prefix
                pool.hold(page)
                found.append((pool, page))
        fits = all(sum(1 for _, p, _ in missing if p is pool) <= pool.available for pool in self.flat)
        landed = []
        for item, pool, name in missing if fits else ():
            page = pool.take()
            pool.publish(page, name)
            found.append((pool, page))
            landed.append((item, page))
        for pool, page in reversed(found):
            pool.drop(page)
        return landed if fits else None

    def _indices(self, rule: Whole, entries: int) -> list[int]:
        """Table entries below `entries` that tokens from there on read in the rule's class."""
        span = Span(entries, entries, entries)
        first = first_read(entries * self._page_tokens, rule.window, self._page_tokens)
        return [index for index in range(first, entries) if rule.takes(index, span)]

    def fork(self, donor: Sequence[Table], tokens: int) -> Start | None:
        """The first `tokens` of another sequence, from its tables; None if it has given back what is read behind them.
        What it wrote behind them does no harm: whoever takes them writes its own there first.

        With sealed pages only whole pages are taken over: to compute the rest of one again is one tile, as it is to
        compute its last token.
        """
        if self.seals:
            tokens -= tokens % self._page_tokens
            if not tokens:
                return None
        entries = tokens // self._page_tokens
        first = tuple(first_read(tokens, rule.window, self._page_tokens) for rule in self.rules)
        if any(table.first > least for table, least in zip(donor, first, strict=True)):
            return None
        span = Span(entries, entries, entries)
        shared: list[Mapping[int, int]] = []
        for rule, least, table in zip(self.rules, first, donor, strict=True):
            indices = [index for index in range(least, entries) if rule.takes(index, span)]
            pages = {index: page for index in indices if (page := table.refs[index]) is not None}
            if len(pages) < len(indices):
                return None
            shared.append(pages)
        copied = tuple(_page(table.refs[entries]) for table in donor) if tokens % self._page_tokens else ()
        return Start(tokens, first, tuple(shared), copied)

    # Integrity

    def check(self, seqs: Iterable[Seq], held: Iterable[tuple[int, int]] = ()) -> None:
        """Every page is free, cached without references, or held by exactly the references counted, from sequences and
        `held` (pool, page).

        Raises:
            IntegrityError: what does not add up.
        """
        expected: list[dict[int, int]] = [{} for _ in self.flat]
        for seq in seqs:
            for i, (rule, table) in enumerate(zip(self.rules, seq.tables, strict=True)):
                self._check_table(seq, rule, table)
                for page in table.refs:
                    if page is not None:
                        expected[i][page] = expected[i].get(page, 0) + 1
        for i, page in held:
            expected[i][page] = expected[i].get(page, 0) + 1
        if self._held:
            raise IntegrityError(f"pages held for copies outside a plan: {self._held}")
        for rule, pool, pages in zip(self.rules, self.flat, expected, strict=True):
            pool.check(f"KV group {rule.group}, {pool.label}", pages)

    def _check_table(self, seq: Seq, rule: Whole, table: Table) -> None:
        known = (
            seq.computed if seq.phase is Phase.PREFILL else min(seq.length_min - 1, seq.table_end * self._page_tokens)
        )
        span = Span(seq.table_end, known // self._page_tokens, known // self._page_tokens)
        where = f"{seq}: table of group {rule.group}, class {rule.cls},"
        if not rule.end(span) <= len(table.refs) <= seq.table_end:
            raise IntegrityError(f"{where} has {len(table.refs)} entries; {span}")
        for index, page in enumerate(table.refs):
            # What a query at the least known position reads is there; what nobody reads any more may still be there.
            needed = index >= table.first and rule.takes(index, span)
            idle = index < table.first or (isinstance(rule, Open) and rule.sinks <= index < table.tail)
            if (needed and page is None) or (page is not None and (idle or not rule.takes(index, _UNENDING))):
                raise IntegrityError(
                    f"{where} has page {page} at {index}, first {table.first}, tail {table.tail}; {span}"
                )


_UNENDING = Span(NEVER, 0, NEVER)
"""Of no sequence: what a rule may hold at all."""


def _found(page: int | None) -> int:
    if page is None:
        raise IntegrityError("a page of a prefix hit vanished from the index")
    return page


def _page(page: int | None) -> int:
    if page is None:
        raise IntegrityError("a page to be shared was already freed")
    return page
