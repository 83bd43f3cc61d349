"""What programs hold between their turns: the pages of the turn that ended last. Knows no tokens, plans or policies.

A pin is hard at first: its pages are referenced like those of a running sequence. It becomes soft when its time is up,
when all hard pins together exceed their share of a pool, or when the plan builder needs its pages: then they lie among
the cached pages under names of their own, whole or not, and are evicted in their turn. So nothing is given up while
there is room, with prefix caching or without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

from jaxserve.scheduler.kept import Kept, forget, found, keep
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pages import Pages, Start
from jaxserve.scheduler.request import Seq


class Pin:
    """Pages of a program's last turn. `seq`, which has finished, owns them while the pin is hard."""

    __slots__ = ("awaited", "expires", "kept", "program", "seq", "since", "tokens", "tool")

    def __init__(self, seq: Seq, now: float, seconds: float) -> None:
        self.program = seq.program
        self.seq = seq
        self.tokens = seq.computed
        """Leading tokens of the turn whose KV is there."""
        self.tool = seq.tool
        self.since = now
        self.expires = now + seconds
        self.awaited = 0
        """Turns of the program that wait to take it over. It does not expire meanwhile."""
        self.kept: Kept | None = None
        """What became of its pages when it turned soft."""

    @property
    def hard(self) -> bool:
        return self.kept is None

    @property
    def pages(self) -> int:
        """Table entries that it holds against others."""
        return self.seq.table_end

    def __repr__(self) -> str:
        return f"Pin({self.program!r}, {self.seq.id}, tokens={self.tokens}, hard={self.hard})"


class Programs:
    """Pins by program: one each, that of the turn which ended last."""

    def __init__(self, pages: Pages, limits: Limits) -> None:
        self.reused = 0
        """Tokens that turns took over instead of computing them."""
        self._pages = pages
        self._limits = limits
        self._hard: dict[str, Pin] = {}
        self._soft: dict[str, Pin] = {}
        self._expiries: list[tuple[float, int, Pin]] = []
        self._held = [0] * len(pages.flat)
        """Table entries of hard pins by pool, pages shared between pins counted for each."""
        self._sweep_at = 16

    # Looking

    def get(self, program: str) -> Pin | None:
        return self._hard.get(program) or self._soft.get(program)

    def hard(self) -> Iterator[Pin]:
        """Hard pins, in order of their turns' ends."""
        return iter(self._hard.values())

    @property
    def num_hard(self) -> int:
        return len(self._hard)

    def owners(self) -> Iterable[Seq]:
        """Who holds pages although it has finished."""
        return (pin.seq for pin in self._hard.values())

    # A turn's way

    def arrive(self, seq: Seq) -> None:
        """A turn has come and waits for what its program holds; that is let go if it has nothing in common with it."""
        if not seq.shared:
            self.release(seq.program)
            return
        seq.pin = self.get(seq.program)
        if seq.pin is not None:
            seq.pin.awaited += 1

    def start(self, seq: Seq) -> Start | None:
        """What a turn that has not run yet can take over."""
        pin = seq.pin
        if pin is None or self.get(seq.program) is not pin:
            return None
        tokens = min(seq.shared, pin.tokens, seq.prompt - 1)
        tables = pin.seq.tables if pin.kept is None else found(self._pages, pin.kept)
        tokens = min(tokens, *(len(table.refs) * self._limits.page_tokens for table in tables))
        start = self._pages.fork(tables, tokens) if tokens > 0 else None
        return start._replace(resumed=True) if start is not None else None

    def begun(self, seq: Seq, start: Start) -> None:
        """A turn has taken `start` over, or what else there was; what its program held has served its time."""
        pin, seq.pin = seq.pin, None
        if start.resumed:
            self.reused += start.tokens
        if pin is not None and self.get(seq.program) is pin:
            self.release(seq.program)

    def gone(self, seq: Seq) -> None:
        """A turn was aborted, perhaps before it began."""
        pin, seq.pin = seq.pin, None
        if pin is not None:
            pin.awaited -= 1
            heappush(self._expiries, (pin.expires, pin.seq.id, pin))

    def ended(self, seq: Seq, now: float, seconds: float) -> None:
        """Takes over the pages of a sequence that has finished. What the program held before is let go."""
        self.release(seq.program)
        self._pages.trim(seq, seq.computed)
        pin = Pin(seq, now, seconds)
        self._hard[seq.program] = pin
        heappush(self._expiries, (pin.expires, seq.id, pin))
        self._hold(pin, 1)
        self._keep_share()
        self._sweep()

    # Letting go

    def expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, _, pin = heappop(self._expiries)
            if not pin.awaited:  # else `gone` puts it back, or it is taken over
                self.soften(pin)

    def soften(self, pin: Pin) -> None:
        """From now on its pages are for whoever needs them."""
        if self._hard.get(pin.program) is not pin:
            return
        self._hold(pin, -1)
        pin.kept = keep(self._pages, pin.seq)
        del self._hard[pin.program]
        self._soft[pin.program] = pin

    def release(self, program: str) -> None:
        """The program holds nothing any more; pages that the prefix index knows stay cached there."""
        hard, soft = self._hard.pop(program, None), self._soft.pop(program, None)
        if hard is not None:
            self._hold(hard, -1)
            self._pages.drop(hard.seq)
        if soft is not None and soft.kept is not None:
            forget(self._pages, soft.kept)

    def reset(self) -> None:
        for program in [*self._hard, *self._soft]:
            self.release(program)

    def _keep_share(self) -> None:
        share = self._limits.pin_share
        while self._hard and any(
            held > share * pool.size for held, pool in zip(self._held, self._pages.flat, strict=True)
        ):
            self.soften(next(iter(self._hard.values())))

    def _hold(self, pin: Pin, sign: int) -> None:
        for i, table in enumerate(pin.seq.tables):
            self._held[i] += sign * sum(page is not None for page in table.refs)

    def _sweep(self) -> None:
        """Forgets soft pins of which nothing is left."""
        if len(self._soft) < self._sweep_at:
            return
        for pin in list(self._soft.values()):
            tables = found(self._pages, pin.kept) if pin.kept is not None else pin.seq.tables
            if any(not any(page is not None for page in table.refs) for table in tables):
                self.release(pin.program)
        self._sweep_at = 16 + 2 * len(self._soft)
