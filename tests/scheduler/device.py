"""A device that executes plans on symbolic tokens and complains about everything a real one would silently get wrong.

The KV of position p is represented by a number that depends on all tokens up to p. Reading checks that the pages of the
block table hold exactly the numbers of the sequence's own tokens; entries and pages that are no longer granted keep
their old content, as on a device. In a group with two classes the reading rule says which class is read; a sealed page
holds a mark besides, so that neither form is taken for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.scheduler import Limits
from jaxserve.types import Move, PageClasses, Plan, SeqId, Work

Chain = list[int]


def extend(chain: Chain, token: int) -> None:
    """`chain[p]` stands for the KV of position p - 1; `chain[0]` for the salt."""
    chain.append(hash((chain[-1], token)))


def next_token(chain: Chain, choice: int) -> int:
    """What the model samples after the tokens of `chain`."""
    return hash((chain[-1], choice, 17)) % 997


@dataclass
class Slot:
    """Device state of one sequence. `chain` has one entry more than the slot has tokens."""

    seq: SeqId
    choice: int
    chain: Chain
    tables: dict[tuple[int, int], dict[int, int]]
    """By group and class."""
    granted: dict[tuple[int, int], set[int]]

    @property
    def length(self) -> int:
        return len(self.chain) - 1


class Device:
    """Pools, slots and block tables."""

    def __init__(self, limits: Limits, groups: Sequence[PageClasses]) -> None:
        self.limits = limits
        self.page_tokens = limits.page_tokens
        self.groups = groups
        classes = [(g, c) for g, group in enumerate(groups) for c in range(len(group.classes))]
        self.pools = {
            (g, c): [[None] * self.page_tokens for _ in range(groups[g].classes[c].pages)] for g, c in classes
        }
        self.slots: dict[int, Slot] = {}
        self._written: dict[tuple[int, int, int], int] = {}
        self._host: dict[tuple[int, int, int], list[object]] = {}
        self._staged: dict[int, tuple[Move, list[list[object]]]] = {}
        self._fresh: dict[tuple[int, int, int], list[object]] = {}
        """Pages that a tile of this step completed, by slot, group and index: they exist as activations."""

    def execute(
        self,
        plan: Plan,
        upload: Callable[[SeqId], tuple[Chain, int]],
        accepted: Callable[[SeqId], int],
    ) -> dict[SeqId, list[int]]:
        """Runs a plan; returns the tokens that each sampling row appended.

        `upload` gives the known tokens (as a chain) and the choice of a sequence, `accepted` how many drafts the model
        agrees with in a row of q tokens.
        """
        self._check_size(plan)
        self.move(plan)
        self._copy(plan)
        self._admit(plan, upload)
        self._written, self._fresh = {}, {}
        samples: dict[SeqId, list[int]] = {}
        # Sequences run in an order that suits nobody who counts on another one's writes of the same step.
        for seq in reversed(dict.fromkeys(work.seq for work in plan.prefill)):
            for work in plan.prefill:
                if work.seq == seq:
                    self._tile(work)
        for work in plan.decode:
            samples[work.seq] = self._row(work, accepted(work.seq))
        for work in plan.prefill:
            if work.samples:
                slot = self.slots[work.slot]
                assert work.start + work.count == slot.length, f"{work} samples, but the slot has {slot.length} tokens"
                token = next_token(slot.chain, slot.choice)
                extend(slot.chain, token)
                samples[work.seq] = [token]
        self._seal(plan)
        return samples

    def move(self, plan: Plan) -> None:
        """Starts the moves of a plan: pages are gathered, or read from the host, before anything else happens."""
        for move in plan.moves:
            pool, key = self.pools[move.group, move.cls], (move.group, move.cls)
            assert len(move.pages) == len(move.host) == len(set(move.host)) == len(set(move.pages)) > 0
            if move.kind == "out":
                self._staged[move.id] = move, [list(pool[page]) for page in move.pages]
            else:
                self._staged[move.id] = move, [self._host[*key, place] for place in move.host]

    def finish_move(self, number: int) -> None:
        """The content of a move arrives."""
        move, content = self._staged.pop(number)
        for page, place, one in zip(move.pages, move.host, content, strict=True):
            if move.kind == "out":
                self._host[move.group, move.cls, place] = one
            else:
                self.pools[move.group, move.cls][page] = list(one)

    def _check_size(self, plan: Plan) -> None:
        limits = self.limits
        assert len(plan.decode) <= limits.max_decode_rows
        assert len(plan.prefill) <= limits.max_tiles
        cost = len(plan.decode) * limits.q + len(plan.prefill) * self.page_tokens
        assert cost <= limits.max_num_batched_tokens, f"step {plan.step} costs {cost} tokens"
        rows = [work.seq for work in (*plan.decode, *plan.prefill) if work.samples]
        assert len(rows) == len(set(rows)), f"step {plan.step} samples a sequence twice"
        assert not {work.seq for work in plan.decode} & {work.seq for work in plan.prefill}

    def _copy(self, plan: Plan) -> None:
        copies = plan.pages.copies
        targets = {(copy.group, copy.cls, copy.dst) for copy in copies}
        assert len(targets) == len(copies), "two copies into one page"
        sources = {(copy.group, copy.cls, copy.src) for copy in copies}
        assert not targets & sources, "copies of one plan depend on their order"
        for copy in copies:
            pool = self.pools[copy.group, copy.cls]
            pool[copy.dst] = list(pool[copy.src])

    def _admit(self, plan: Plan, upload: Callable[[SeqId], tuple[Chain, int]]) -> None:
        for admit in plan.admits:
            chain, choice = upload(admit.seq)
            assert 0 <= admit.slot < self.limits.max_num_seqs
            assert 0 <= admit.cached < len(chain) - 1, "the last token is always computed"
            old = self.slots.get(admit.slot)
            tables = old.tables if old else {key: {} for key in self.pools}
            self.slots[admit.slot] = Slot(admit.seq, choice, list(chain), tables, {key: set() for key in self.pools})
        for grant in plan.pages.grants:
            key = (grant.group, grant.cls)
            assert 0 <= grant.page < len(self.pools[key])
            assert 0 <= grant.index < -(-self.limits.max_model_len // self.page_tokens)
            slot = self.slots[grant.slot]
            assert grant.index not in slot.granted[key], f"{grant} was granted before"
            slot.tables[key][grant.index] = grant.page
            slot.granted[key].add(grant.index)

    def _seal(self, plan: Plan) -> None:
        for seal in plan.pages.seals:
            slot, group = self.slots[seal.slot], self.groups[seal.group]
            assert seal.index >= group.sink_pages, f"{seal}: sinks are not sealed"
            assert [slot.tables[seal.group, cls][seal.index] for cls in (0, 1)] == [seal.src, seal.dst]
            assert all(seal.index in slot.granted[seal.group, cls] for cls in (0, 1)), f"{seal}: never granted"
            owner = self._written.setdefault((seal.group, 1, seal.dst), seal.slot)
            assert owner == seal.slot, f"slots {owner} and {seal.slot} write sealed page {seal.dst}"
            if slot.length - 1 >= (seal.index + 1) * self.page_tokens:
                page = self.pools[seal.group, 0][seal.src]
                assert page == self._own(slot, seal.index), f"{seal}: the page is not what the slot computed"
                self.pools[seal.group, 1][seal.dst] = sealed(page)

    def _own(self, slot: Slot, index: int) -> list[object]:
        return slot.chain[index * self.page_tokens + 1 : (index + 1) * self.page_tokens + 1]

    def _tile(self, work: Work) -> None:
        slot = self.slots[work.slot]
        assert slot.seq == work.seq
        end = work.start + work.count
        assert work.count >= 1 and work.start // self.page_tokens == (end - 1) // self.page_tokens, (
            f"{work} straddles pages"
        )
        assert work.samples or end % self.page_tokens == 0, f"{work} ends inside a page"
        for g, group in enumerate(self.groups):
            self._write_tile(work, g, group)
        self._read(work.slot, work.start, end)

    def _write_tile(self, work: Work, g: int, group: PageClasses) -> None:
        """Into a 16-bit page if there is one; a page that is complete with this tile is sealed, unless it is a sink."""
        slot, end = self.slots[work.slot], work.start + work.count
        index = work.start // self.page_tokens
        completed = len(group.classes) == 2 and end % self.page_tokens == 0 and index >= group.sink_pages
        if not completed or index in slot.granted[g, 0]:
            for position in range(work.start, end):
                self._write(work.slot, g, position, slot.chain[position + 1])
        else:
            assert work.start % self.page_tokens == 0, f"{work} joins a page of group {g} that is not there"
        if completed:
            assert index in slot.granted[g, 1], f"{work} completes a page of group {g} without a sealed one"
            page = slot.tables[g, 1][index]
            owner = self._written.setdefault((g, 1, page), work.slot)
            assert owner == work.slot, f"slots {owner} and {work.slot} write sealed page {page} of group {g}"
            self.pools[g, 1][page] = sealed(self._own(slot, index))
            self._fresh[work.slot, g, index] = self._own(slot, index)

    def _row(self, work: Work, accepted: int) -> list[int]:
        slot = self.slots[work.slot]
        assert slot.seq == work.seq and work.samples and work.count == self.limits.q
        last = slot.length - 1
        assert last <= work.start, f"{work} starts below the slot's last token {last}"
        assert work.start <= last + (self.limits.q - 1) * self.limits.lag, f"{work} is far above {last}"
        tokens: list[int] = []
        # Drafts are cut at the end of a page.
        drafts = min(self.limits.q - 1, self.page_tokens - 1 - last % self.page_tokens)
        for offset in range(drafts + 1):
            for g in range(len(self.groups)):
                content = slot.chain[last + offset + 1] if offset <= accepted else object()
                self._write(work.slot, g, last + offset, content)
            if offset <= accepted:
                self._read(work.slot, last + offset, last + offset + 1)
                tokens.append(next_token(slot.chain, slot.choice))
                extend(slot.chain, tokens[-1])
        return tokens

    def _write(self, number: int, g: int, position: int, content: object) -> None:
        slot = self.slots[number]
        if position >= self.limits.max_model_len:
            return
        index = position // self.page_tokens
        assert index in slot.granted[g, 0], f"slot {number} writes position {position} of group {g} into a stale page"
        page = slot.tables[g, 0][index]
        owner = self._written.setdefault((g, 0, page), number)
        assert owner == number, f"slots {owner} and {number} write page {page} of group {g}"
        self.pools[g, 0][page][position % self.page_tokens] = content

    def _read(self, number: int, start: int, end: int) -> None:
        """Queries [start, end), all in one page, read all positions up to their own, or those in the window."""
        slot = self.slots[number]
        if start >= self.limits.max_model_len:
            return
        end = min(end, self.limits.max_model_len)
        for g, group in enumerate(self.groups):
            first = 0 if group.window is None else max(0, start - group.window + 1)
            position = first
            while position < end:
                index = position // self.page_tokens
                stop = min(end, (index + 1) * self.page_tokens)
                found = self._page(number, g, group, index, start // self.page_tokens)
                found = found[position % self.page_tokens : (stop - 1) % self.page_tokens + 1]
                assert found == slot.chain[position + 1 : stop + 1], (
                    f"slot {number} (sequence {slot.seq}) reads foreign content in group {g}, page {index}"
                )
                position = stop

    def _page(self, number: int, g: int, group: PageClasses, index: int, own: int) -> list[object]:
        """What a query in page `own` reads of page `index`."""
        slot, cls = self.slots[number], 0
        if len(group.classes) == 2 and group.sink_pages <= index <= own - group.residual_pages:
            cls = 1
        elif index not in slot.granted[g, 0] and (number, g, index) in self._fresh:
            return self._fresh[number, g, index]
        assert index in slot.granted[g, cls], (
            f"slot {number} reads page {index} of group {g}, class {cls}: never granted"
        )
        page = self.pools[g, cls][slot.tables[g, cls][index]]
        return unsealed(page) if cls else page


def sealed(page: list[object]) -> list[object]:
    return [("sealed", content) for content in page]


def unsealed(page: list[object]) -> list[object]:
    assert all(isinstance(content, tuple) for content in page), "a page is read that was never sealed"
    return [content[1] for content in page]
