"""From a policy's answers to a plan that is feasible. Knows no policy by name and no device.

Pages are granted for upper bounds of lengths, work is cut to tiles, victims give up their pages only if that lets the
wanted sequence run, and if nothing could run at all the first sequence that found no pages gets those of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from jaxserve.scheduler.classes import Span
from jaxserve.scheduler.guard import Guard
from jaxserve.scheduler.kept import Kept, forget, found, keep
from jaxserve.scheduler.pages import Pages, Start
from jaxserve.scheduler.policy import Evict
from jaxserve.scheduler.programs import Pin, Programs
from jaxserve.scheduler.request import Phase, Seq
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.swap import Swap
from jaxserve.scheduler.view import Budget, View
from jaxserve.types import Admit, Copy, Grant, Move, PageUpdates, Plan, Seal, SeqId, Work


class Draft:
    """A plan in the making. Each verb either adds a sequence's share and returns True, or changes nothing."""

    def __init__(
        self,
        policy: Guard,
        view: View,
        roster: Roster,
        pages: Pages,
        programs: Programs,
        swap: Swap,
        in_flight: int,
    ) -> None:
        self.policy = policy
        self.view = view
        self.roster = roster
        self.pages = pages
        self.programs = programs
        self.swap = swap
        self.limits = view.limits
        self._page_tokens = view.limits.page_tokens
        self._q = view.limits.q
        self._seals = pages.seals
        self.step = view.step
        self.left = Budget(view.limits)
        self.idle_device = not in_flight

        self.decode_rows: list[Work] = []
        self.tiles: list[Work] = []
        self.admits: list[Admit] = []
        self.grants: list[Grant] = []
        self.copies: list[Copy] = []
        self.seals: list[Seal] = []
        self.moves: list[Move] = []
        self.admitted: list[Seq] = []
        self.preempted: list[Seq] = []
        self.prefilled: list[Seq] = []
        self.fetching: list[Seq] = []
        self.forkable: list[Seq] = []
        self.starved: Seq | None = None
        """The first resident that was wanted and found no page."""
        self._reserved: list[int] | None = None
        self._how: dict[SeqId, Evict] = {}
        """What the policy said of each victim that it offered."""
        view.admitting = roster.has_slot or policy.displaces

    # Rows

    def decode(self, seq: Seq) -> bool:
        """One row of q tokens, unless the rows in flight already bring the sequence to its end."""
        left, q = self.left, self._q
        length = seq.known + seq.pending_rows
        if length >= seq.end or not left.rows or left.tokens < q:
            return False
        if length >= seq.release_at:
            self.pages.release_behind(seq, length)
        start = seq.known + seq.pending_tokens - 1
        end = start + q
        # Every position that the row can write has an entry; the device drops what lies beyond the table.
        fills = self._seals and end // self._page_tokens > (length - 1) // self._page_tokens
        if fills or end > seq.table_end * self._page_tokens:
            span = self.pages.row(length, end)
            if not self._grow(seq, span):
                return False
            if fills:
                self.pages.seal(seq, length, span, self.seals)
        self.decode_rows.append(Work(seq.id, seq.slot, start, q, True))
        seq.pending_rows += 1
        seq.pending_tokens += q
        seq.step = self.step
        left.rows -= 1
        left.tokens -= q
        return True

    # Tiles

    def prefill(self, seq: Seq, tokens: int) -> bool:
        """Tiles of a resident's prompt for up to `tokens`, as many as budget and pages allow."""
        end = self._chunk_end(seq, tokens)
        if end <= seq.computed:
            return False
        if seq.computed + 1 >= seq.release_at:
            self.pages.release_behind(seq, seq.computed + 1)
        if not self._room_for(seq, self.pages.prefilled(end)):
            tile = self._cut(seq, (seq.computed // self._page_tokens + 1) * self._page_tokens)
            if not self._room_for(seq, self.pages.prefilled(tile)):
                self.starved = self.starved or seq
                return False
            end = self._within_room(seq, end)
        self.pages.grow(seq, self.pages.prefilled(end), self.grants)
        self._add_tiles(seq, end)
        return True

    def _within_room(self, seq: Seq, end: int) -> int:
        """Where a chunk up to `end` must end for want of pages."""
        while end > seq.computed and not self.pages.has_room(seq, self.pages.prefilled(end)):
            end = (end - 1) // self._page_tokens * self._page_tokens
        return max(end, seq.computed)

    def _chunk_end(self, seq: Seq, tokens: int) -> int:
        """Where a chunk of at most `tokens`, but no less than a tile, from `seq.computed` on may end in the budget."""
        tiles = min(self.left.tiles, self.left.tokens // self._page_tokens)
        if tokens <= 0 or tiles <= 0:
            return seq.computed
        page = seq.computed // self._page_tokens
        end = max(seq.computed + tokens, (page + 1) * self._page_tokens)
        return self._cut(seq, min(end, (page + tiles) * self._page_tokens))

    def _cut(self, seq: Seq, end: int) -> int:
        """Only the last chunk of a prompt ends inside a page."""
        return seq.target if end >= seq.target else end // self._page_tokens * self._page_tokens

    def _add_tiles(self, seq: Seq, end: int) -> None:
        start = seq.computed
        while start < end:
            stop = min(end, (start // self._page_tokens + 1) * self._page_tokens)
            self.tiles.append(Work(seq.id, seq.slot, start, stop - start, stop == seq.target))
            self.left.tiles -= 1
            self.left.tokens -= self._page_tokens
            start = stop
        seq.computed = end
        seq.step = self.step
        self.prefilled.append(seq)
        if end == seq.target:
            seq.phase = Phase.DECODE
            seq.pending_rows += 1
            seq.pending_tokens += 1
            seq.forkable_from = self.step + 1
            self.forkable.append(seq)

    # Newcomers

    def admit(self, seq: Seq, tokens: int) -> bool:
        """A slot, the pages that the sequence can share, and its first tiles.

        Beside others it is admitted only when its whole prompt fits with what admitted prompts still need. Alone it
        always is, because arrivals that could not run alone are refused.
        """
        if self._try_admit(seq, tokens):
            if not self.roster.has_slot and not self.policy.displaces:
                self.view.admitting = False
            return True
        if not self.policy.skips_misfits:
            self.view.admitting = False
        return False

    def _try_admit(self, seq: Seq, tokens: int) -> bool:
        if tokens <= 0 or not self.left.tiles or self.left.tokens < self._page_tokens:
            return False
        start = self._start(seq)
        if seq.kept is not None and self._fetch(seq, seq.kept, start):
            return True
        if not self._fits(seq, start):
            victims = self._displaced_by(seq, start)
            if victims is None:
                return False
            for victim in victims:
                self.preempt(victim, self._how[victim.id])
            if seq.kept is not None and self._fetch(seq, seq.kept, start):
                return True
        if not self._others():
            if self.programs.num_hard:
                start = self._unpin_for(seq, start)
            if start.copied and not self.pages.has(self.pages.need_to_start(seq, start)):
                start = self._whole_pages(seq)
            if self.swap.holds and not self.pages.has(self.pages.need_to_start(seq, start)):
                return False
        self._seat(seq, start)
        end = self._within_room(seq, self._chunk_end(seq, tokens))
        self.pages.grow(seq, self.pages.prefilled(end), self.grants)
        self._add_tiles(seq, end)
        if self._reserved is not None and seq.phase is Phase.PREFILL:
            self._reserve(seq)
        return True

    def _seat(self, seq: Seq, start: Start) -> None:
        self.roster.take_slot(seq)
        seq.phase = Phase.PREFILL
        seq.target = seq.known
        self.pages.begin(seq, start, self.grants, self.copies)
        self.programs.begun(seq, start)
        if seq.kept is not None:
            self._resettle(seq, seq.kept, start)
        fresh = not seq.preemptions and not seq.whole_prompt and not start.resumed
        if fresh and self.limits.enable_prefix_caching:
            self.pages.queries += seq.prompt
            self.pages.hits += start.tokens
        self.admits.append(Admit(seq.id, seq.slot, start.tokens))
        self.admitted.append(seq)

    def _resettle(self, seq: Seq, kept: Kept, start: Start) -> None:
        """It has its place again. Pages that it did not take over lose the name it gave them; host copies of full pages
        stay valid, whoever computes those again."""
        forget(self.pages, kept, start.tokens // self._page_tokens if self.swap.hosts else 0)
        self.swap.forget(kept, kept.full)
        seq.kept = None

    def _start(self, seq: Seq) -> Start:
        if len(seq.family) > 1 and not seq.generated and not seq.whole_prompt:
            for donor in seq.family:
                if donor.forkable_from <= self.step:
                    start = self.pages.fork(donor.tables, seq.prompt - 1)
                    if start is not None:
                        return start
        prefix = self.pages.prefix(seq)
        held = self.programs.start(seq) if seq.kept is None else self._left_behind(seq, seq.kept, 1)
        return held if held is not None and held.tokens >= prefix.tokens else prefix

    def _left_behind(self, seq: Seq, kept: Kept, unit: int) -> Start | None:
        """What is still there of a preempted sequence's pages, in units of so many tokens."""
        tables = found(self.pages, kept)
        tokens = min(seq.left_tokens, *(len(table.refs) * self._page_tokens for table in tables)) // unit * unit
        return self.pages.fork(tables, tokens) if tokens > 0 else None

    def _whole_pages(self, seq: Seq) -> Start:
        """A start without a copy: that takes a page more than the sequence will hold."""
        held = None if seq.kept is None else self._left_behind(seq, seq.kept, self._page_tokens)
        return held or self.pages.prefix(seq)

    def _fetch(self, seq: Seq, kept: Kept, start: Start) -> bool:
        """Whether the sequence waits for pages from the host instead: it will begin further on than `start`."""
        if not self.swap.hosts or seq.fetched:
            return False
        wanted = self.swap.wanted(kept, seq.left_tokens)
        if wanted is None or not self.swap.pays(wanted, seq.left_tokens - start.tokens, self.view):
            return False
        need = zip(self.swap.room_for(wanted), self._others_need(), self.pages.watermark(), strict=True)
        if not self.pages.has([sum(pages) for pages in need]):
            return False
        seq.fetched = True
        self.moves.extend(self.swap.fetch(seq, wanted))
        self.fetching.append(seq)
        return True

    def _unpin_for(self, seq: Seq, start: Start) -> Start:
        """Pins yield to a sequence that would run alone, in the end that of its own program: it must be able to run.
        Returns what it can begin with then."""
        pins = [pin for pin in self.policy.pins(self.view) if not start.resumed or pin.program != seq.program]
        for pin in cast(list[Pin], pins):
            if self.pages.has(self.pages.need_to_start(seq, start)):
                return start
            self.programs.soften(pin)
        if start.resumed and not self.pages.has(self.pages.need_to_start(seq, start)):
            self.programs.release(seq.program)
            start = self.pages.prefix(seq)
        return start

    def _others(self) -> int:
        """Residents beside a newcomer."""
        return len(self.roster.residents) + len(self.admitted) - len(self.preempted)

    def _fits(self, seq: Seq, start: Start) -> bool:
        """Whether `seq` can be admitted without anybody's leaving."""
        if not self.roster.has_slot:
            return False
        return self._others() <= 0 or self.pages.has(self._wanted(seq, start))

    def _wanted(self, seq: Seq, start: Start) -> list[int]:
        """Pages by pool that must be available for a newcomer beside others."""
        wanted = zip(self.pages.need_to_start(seq, start), self._others_need(), self.pages.watermark(), strict=True)
        return [sum(pages) for pages in wanted]

    def _displaced_by(self, seq: Seq, start: Start) -> list[Seq] | None:
        """Residents whose eviction makes room for a newcomer, if the policy lets it take their place."""
        if not self.policy.displaces:
            return None
        victims: list[Seq] = []
        wanted, room = self._wanted(seq, start), self.pages.available()
        keep = [shared.values() for shared in start.shared]
        for victim in self._victims(seq):
            if victim.family is not seq.family:
                victims.append(victim)
                room = [a + b for a, b in zip(room, self.pages.exclusive(victim, keep), strict=True)]
                alone = len(victims) >= self._others()
                if alone or all(a >= b for a, b in zip(room, wanted, strict=True)):
                    return victims
        return None

    def _others_need(self) -> list[int]:
        """Pages by pool that admitted prompts have yet to be granted."""
        if self._reserved is None:
            self._reserved = [0] * len(self.pages.flat)
            prefill = Phase.PREFILL
            for seq in [*self.roster.residents, *self.admitted]:
                if seq.phase is prefill:
                    self._reserve(seq)
        return self._reserved

    def _reserve(self, seq: Seq, sign: int = 1) -> None:
        assert self._reserved is not None
        for i, need in enumerate(self.pages.need(seq)):
            self._reserved[i] += sign * need

    # Victims

    def preempt(self, seq: Seq, how: Evict = Evict.SWAP) -> None:
        if self._reserved is not None and seq.phase is Phase.PREFILL:
            self._reserve(seq, -1)
        seq.kept = keep(self.pages, seq)
        self.roster.free_slot(seq)
        seq.leave(self.step)
        if how is Evict.SWAP and self.swap.hosts:
            self.moves.extend(self.swap.out(seq, seq.kept, self.view))
        self.preempted.append(seq)

    def _grow(self, seq: Seq, span: Span) -> bool:
        """Tables up to `span`, at the cost of victims if need be."""
        if not self._room_for(seq, span):
            self.starved = self.starved or seq
            return False
        self.pages.grow(seq, span, self.grants)
        return True

    def _room_for(self, seq: Seq, span: Span) -> bool:
        cost = self.pages.cost(seq, span)
        return self.pages.has(cost) or self._make_room(seq, cost)

    def _make_room(self, want: Seq, missing: list[int]) -> bool:
        """Unpins what programs hold or else evicts victims, if that gives `missing` pages of every pool; nobody is
        evicted in vain."""
        if self.programs.num_hard and self._unpin(want, missing):
            return True
        victims: list[Seq] = []
        available, nobody = self.pages.available(), [()] * len(missing)
        for victim in self._victims(want):
            victims.append(victim)
            available = [a + b for a, b in zip(available, self.pages.exclusive(victim, nobody), strict=True)]
            if all(a >= b for a, b in zip(available, missing, strict=True)):
                break
        else:
            return False
        for victim in victims:
            self.preempt(victim, self._how[victim.id])
        self.view.admitting = False  # pages just taken from a resident are not for newcomers
        return True

    def _unpin(self, want: Seq, missing: list[int]) -> bool:
        for pin in cast(list[Pin], list(self.policy.pins(self.view))):
            if self.policy.may_unpin(want, pin, self.view):
                self.programs.soften(pin)
                if self.pages.has(missing):
                    return True
        return False

    def _victims(self, want: Seq) -> Iterator[Seq]:
        for view in self.policy.victims(self.view):
            victim = self.roster.seqs[view.id]
            if victim is want or victim.step == self.step or not victim.resident:
                continue
            how = self.policy.may_preempt(want, victim, self.view)
            if how is not None:
                self._how[victim.id] = how
                yield victim

    # The end

    def break_deadlock(self) -> None:
        """If pages are all that is missing and no step in flight will free any, the first sequence that wanted them
        takes them from the others, whatever the policy says."""
        want = self.starved
        if want is None or self.tiles or self.decode_rows or not self.idle_device or not want.resident:
            return
        for pin in cast(list[Pin], list(self.policy.pins(self.view))):
            self.programs.soften(pin)
            if self._runs(want):
                return
        for victim in list(reversed(self.roster.residents)):
            if victim is not want and victim.resident:
                self.preempt(victim)
                if self._runs(want):
                    break

    def _runs(self, want: Seq) -> bool:
        return self.decode(want) if want.phase is Phase.DECODE else self.prefill(want, self._page_tokens)

    def _fetch_ahead(self) -> None:
        planned = {work.seq for work in self.decode_rows + self.tiles}
        for view in self.policy.residency(self.view, planned):
            seq = self.roster.seqs[view.id]
            if seq.ready and seq.kept is not None and not self._fetch(seq, seq.kept, self._start(seq)):
                return

    def finish(self) -> Plan:
        self.pages.end_plan()
        for seq in self.prefilled:
            self.pages.publish(seq)
        self.roster.commit(self.admitted, self.preempted, self.forkable)
        if self.swap.hosts and self.policy.wants_pages:
            self._fetch_ahead()
        for seq in self.fetching:
            self.roster.withdraw(seq)
        self.view.admitting = True
        return Plan(
            step=self.step,
            decode=tuple(self.decode_rows),
            prefill=tuple(self.tiles),
            admits=tuple(self.admits),
            preempted=tuple(seq.id for seq in self.preempted),
            moves=tuple(self.moves),
            pages=PageUpdates(
                grants=tuple(self.grants),
                copies=tuple(self.copies),
                seals=tuple(self.seals),
                freed=self.pages.take_freed(),
            ),
        )


def build_plan(
    policy: Guard, view: View, roster: Roster, pages: Pages, programs: Programs, swap: Swap, in_flight: int
) -> Plan:
    """The next step. Sequences, queues and pages are changed to what they are once it has been launched.

    `in_flight`: steps launched whose StepDone has not come.
    """
    draft = Draft(policy, view, roster, pages, programs, swap, in_flight)
    left, step, all_decode, row = draft.left, view.step, policy.all_decode, draft.decode
    waiting, prefill, decode = Phase.WAITING, Phase.PREFILL, Phase.DECODE
    for seq in cast(Iterator[Seq], policy.rank(view)):
        phase = seq.phase
        if seq.step == step or (phase is waiting and not (view.admitting and seq.ready)):
            continue
        if phase is decode and all_decode:  # hundreds in a step: nobody is asked
            row(seq)
        else:
            tokens = policy.tokens(seq, left, view)
            if phase is waiting:
                draft.admit(seq, tokens)
            elif tokens > 0:
                if phase is decode:
                    row(seq)
                elif phase is prefill:
                    draft.prefill(seq, tokens)
        if not left.tokens or not (left.rows or left.tiles):
            break
    draft.break_deadlock()
    return draft.finish()
