"""A device that executes plans on symbolic tokens and complains about everything a real one would silently get wrong.

The KV of position p is represented by a number that depends on all tokens up to p. Reading checks that the pages of the
block table hold exactly the numbers of the sequence's own tokens; entries and pages that are no longer granted keep
their old content, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.scheduler import Limits
from jaxserve.types import PAGE_TOKENS, PageClasses, Plan, SeqId, Work

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
    tables: list[dict[int, int]]
    granted: list[set[int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.chain) - 1


class Device:
    """Pools, slots and block tables."""

    def __init__(self, limits: Limits, groups: Sequence[PageClasses]) -> None:
        self.limits = limits
        self.windows = [group.window for group in groups]
        self.pools = [[[None] * PAGE_TOKENS for _ in range(group.classes[0].pages)] for group in groups]
        self.slots: dict[int, Slot] = {}
        self._written: dict[tuple[int, int], int] = {}

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
        self._copy(plan)
        self._admit(plan, upload)
        self._written = {}
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
        return samples

    def _check_size(self, plan: Plan) -> None:
        limits = self.limits
        assert len(plan.decode) <= limits.max_decode_rows
        assert len(plan.prefill) <= limits.max_tiles
        cost = len(plan.decode) * limits.q + len(plan.prefill) * PAGE_TOKENS
        assert cost <= limits.max_num_batched_tokens, f"step {plan.step} costs {cost} tokens"
        rows = [work.seq for work in (*plan.decode, *plan.prefill) if work.samples]
        assert len(rows) == len(set(rows)), f"step {plan.step} samples a sequence twice"
        assert not {work.seq for work in plan.decode} & {work.seq for work in plan.prefill}

    def _copy(self, plan: Plan) -> None:
        copies = plan.pages.copies
        targets = {(copy.group, copy.dst) for copy in copies}
        assert len(targets) == len(copies), "two copies into one page"
        assert not targets & {(copy.group, copy.src) for copy in copies}, "copies of one plan depend on their order"
        for copy in copies:
            self.pools[copy.group][copy.dst] = list(self.pools[copy.group][copy.src])

    def _admit(self, plan: Plan, upload: Callable[[SeqId], tuple[Chain, int]]) -> None:
        for admit in plan.admits:
            chain, choice = upload(admit.seq)
            assert 0 <= admit.slot < self.limits.max_num_seqs
            assert 0 <= admit.cached < len(chain) - 1, "the last token is always computed"
            old = self.slots.get(admit.slot)
            tables = old.tables if old else [{} for _ in self.pools]
            self.slots[admit.slot] = Slot(admit.seq, choice, list(chain), tables, [set() for _ in self.pools])
        for grant in plan.pages.grants:
            assert 0 <= grant.page < len(self.pools[grant.group]) and grant.cls == 0
            assert 0 <= grant.index < -(-self.limits.max_model_len // PAGE_TOKENS)
            slot = self.slots[grant.slot]
            assert grant.index not in slot.granted[grant.group], f"{grant} was granted before"
            slot.tables[grant.group][grant.index] = grant.page
            slot.granted[grant.group].add(grant.index)

    def _tile(self, work: Work) -> None:
        slot = self.slots[work.slot]
        assert slot.seq == work.seq
        end = work.start + work.count
        assert work.count >= 1 and work.start // PAGE_TOKENS == (end - 1) // PAGE_TOKENS, f"{work} straddles pages"
        assert work.samples or end % PAGE_TOKENS == 0, f"{work} ends inside a page"
        for position in range(work.start, end):
            self._write(work.slot, position, slot.chain[position + 1])
        self._read(work.slot, work.start, end)

    def _row(self, work: Work, accepted: int) -> list[int]:
        slot = self.slots[work.slot]
        assert slot.seq == work.seq and work.samples and work.count == self.limits.q
        last = slot.length - 1
        assert last <= work.start, f"{work} starts below the slot's last token {last}"
        assert work.start <= last + (self.limits.q - 1) * self.limits.lag, f"{work} is far above {last}"
        tokens = []
        for offset in range(self.limits.q):
            self._write(work.slot, last + offset, slot.chain[last + offset + 1] if offset <= accepted else object())
            if offset <= accepted:
                self._read(work.slot, last + offset, last + offset + 1)
                tokens.append(next_token(slot.chain, slot.choice))
                extend(slot.chain, tokens[-1])
        return tokens

    def _write(self, number: int, position: int, content: object) -> None:
        slot = self.slots[number]
        if position >= self.limits.max_model_len:
            return
        index = position // PAGE_TOKENS
        for g, pool in enumerate(self.pools):
            assert index in slot.granted[g], f"slot {number} writes position {position} of group {g} into a stale page"
            page = slot.tables[g][index]
            owner = self._written.setdefault((g, page), number)
            assert owner == number, f"slots {owner} and {number} write page {page} of group {g}"
            pool[page][position % PAGE_TOKENS] = content

    def _read(self, number: int, start: int, end: int) -> None:
        """Queries [start, end) read all positions up to their own, or those in the window."""
        slot = self.slots[number]
        end = min(end, self.limits.max_model_len)
        for g, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            first = 0 if window is None else max(0, start - window + 1)
            position = first
            while position < end:
                index = position // PAGE_TOKENS
                stop = min(end, (index + 1) * PAGE_TOKENS)
                assert index in slot.granted[g], f"slot {number} reads position {position} of group {g}: never granted"
                page = pool[slot.tables[g][index]]
                found = page[position % PAGE_TOKENS : (stop - 1) % PAGE_TOKENS + 1]
                assert found == slot.chain[position + 1 : stop + 1], (
                    f"slot {number} (sequence {slot.seq}) reads foreign content in group {g}, page {index}"
                )
                position = stop
