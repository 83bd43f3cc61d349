"""One sequence as the scheduler sees it: its state and the algebra of its lengths. Knows nothing of pools and policies.

Lengths are counts of tokens. What the host knows lags behind what the device did, so a running sequence has bounds:

    computed <= known <= length_min <= length_max

`known` is the prompt and every generated token that a StepDone reported. Each row in flight appends between one token
and its width (a row that appends none belongs to a sequence that has finished), which gives the two bounds. `computed`
counts leading tokens whose KV is, or with the steps already planned will be, in the sequence's pages.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from jaxserve.types import Arrive, SeqId

if TYPE_CHECKING:
    from jaxserve.scheduler.kept import Kept
    from jaxserve.scheduler.programs import Pin

NO_SLOT = -1
NEVER = 1 << 62


class Phase(Enum):
    """PREFILL and DECODE sequences are resident: they hold a slot and pages. The others hold neither."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


WAITING, PREFILL, DECODE, FINISHED = Phase
"""To look a member up in its class takes a tenth of a microsecond, and a step asks for hundreds."""


class Table:
    """A sequence's pages of one pool, in order of positions; None where it holds none.

    `first`: entries below were freed behind the window. `tail`: of 16-bit pages beside sealed ones, entries between the
    sinks and here were freed because they are read sealed.
    """

    __slots__ = ("first", "refs", "tail")

    def __init__(self) -> None:
        self.first = 0
        self.tail = 0
        self.refs: list[int | None] = []


class Seq:
    """State of one sequence. Written by `Roster`, `Pages` and the plan builder; policies read it as `SeqView`."""

    __slots__ = (
        "arrival",
        "computed",
        "deadline",
        "end",
        "family",
        "fetched",
        "fetching",
        "forkable_from",
        "hashes",
        "id",
        "kept",
        "known",
        "last_turn",
        "left",
        "max_new",
        "order",
        "output",
        "parked",
        "pending_rows",
        "pending_tokens",
        "phase",
        "pin",
        "preemptions",
        "priority",
        "program",
        "prompt",
        "published",
        "release_at",
        "shared",
        "slot",
        "step",
        "table_end",
        "tables",
        "target",
        "tenant",
        "tool",
        "was_decoding",
        "whole_prompt",
    )

    def __init__(self, arrive: Arrive, order: int, pools: int, max_model_len: int) -> None:
        self.id: SeqId = arrive.seq
        self.order = order
        """Rank of arrival; unique."""
        self.arrival = arrive.now
        self.prompt = arrive.prompt
        self.max_new = arrive.max_new
        self.end = min(arrive.prompt + arrive.max_new, max_model_len)
        """Length at which it has finished at the latest."""
        self.priority = arrive.priority
        self.tenant = arrive.tenant
        self.whole_prompt = arrive.whole_prompt
        self.program = arrive.program
        self.last_turn = arrive.last_turn
        self.tool = arrive.tool
        self.deadline = arrive.deadline
        self.output = arrive.output
        self.shared = 0 if arrive.whole_prompt else arrive.shared
        """Leading tokens in common with the sequence of `pin`."""
        self.pin: Pin | None = None
        """What its program held when it arrived."""
        self.hashes = list(arrive.hashes)
        """Chain hashes: entry j belongs to the tokens up to the end of page j."""
        self.family: list[Seq] = [self]
        """Unfinished choices of one request, shared by all of them."""
        self.parked = False
        """Waits for the family to have the prompt computed."""

        self.phase = WAITING
        self.slot = NO_SLOT
        self.known = arrive.prompt
        self.target = arrive.prompt
        """Tokens to prefill before the first sample of this residence: prompt and what was generated before it."""
        self.computed = 0
        self.pending_rows = 0
        self.pending_tokens = 0
        self.preemptions = 0
        self.step = -1
        """Last step that planned or preempted it."""
        self.forkable_from = NEVER
        """First step before which the whole prompt is computed, in this residence."""

        self.kept: Kept | None = None
        """What it left behind when it lost its place."""
        self.fetching = 0
        """Moves under way that bring its pages back."""
        self.fetched = False
        """Whether that has been tried since it lost its place."""
        self.was_decoding = False
        self.left = 0
        """Tokens computed when it lost its place."""

        self.tables = tuple(Table() for _ in range(pools))
        self.table_end = 0
        """Pages that hold tokens: positions below the end of page table_end - 1 were granted. Tables of sealed pages
        may be shorter, the others are as long."""
        self.release_at = NEVER
        """`length_min` from which a page can be freed."""
        self.published = 0
        """Leading pages offered to the prefix index."""

    @property
    def generated(self) -> int:
        return self.known - self.prompt

    @property
    def remaining(self) -> int:
        """Tokens left to prefill."""
        return self.target - self.computed

    @property
    def resident(self) -> bool:
        return self.phase is PREFILL or self.phase is DECODE

    @property
    def ready(self) -> bool:
        """Waits, and nothing but room is missing: no row in flight, no prompt of its family or page outstanding."""
        return self.phase is WAITING and not (self.parked or self.pending_rows or self.fetching)

    @property
    def length_min(self) -> int:
        return self.known + self.pending_rows

    @property
    def length_max(self) -> int:
        return self.known + self.pending_tokens

    @property
    def left_tokens(self) -> int:
        """Leading tokens whose KV is in what it left behind, with that of rows which were in flight then."""
        return self.known - 1 if self.was_decoding else self.left

    def leave(self, step: int) -> None:
        """Back to WAITING without pages (the caller freed them); rows in flight still count when they report."""
        self.was_decoding = self.phase is DECODE
        self.fetched = False
        self.left = self.computed
        self.phase = WAITING
        self.slot = NO_SLOT
        self.computed = 0
        self.forkable_from = NEVER
        self.preemptions += 1
        self.step = step

    def __repr__(self) -> str:
        return f"Seq({self.id}, {self.phase.value}, slot={self.slot}, computed={self.computed}, known={self.known})"
