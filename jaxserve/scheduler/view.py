"""What a policy may see: live and read-only, nothing is copied. Knows no page ids and no device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pages import Pages
from jaxserve.scheduler.programs import Programs
from jaxserve.scheduler.request import Phase
from jaxserve.scheduler.roster import Roster
from jaxserve.types import PageClasses, SeqId


class SeqView(Protocol):
    """One unfinished sequence. Lengths are counts of tokens; see request.py for their algebra."""

    @property
    def id(self) -> SeqId: ...
    @property
    def order(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def prompt(self) -> int: ...
    @property
    def max_new(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def program(self) -> str: ...
    @property
    def last_turn(self) -> bool: ...
    @property
    def tool(self) -> str: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def output(self) -> int | None: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def resident(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def known(self) -> int: ...
    @property
    def generated(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def preemptions(self) -> int: ...


class PinView(Protocol):
    """What a program holds between two turns."""

    @property
    def program(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def tool(self) -> str: ...
    @property
    def since(self) -> float: ...
    @property
    def expires(self) -> float: ...
    @property
    def awaited(self) -> int: ...
    @property
    def hard(self) -> bool: ...


class Budget:
    """What is left of the step being planned. `tokens` are what the step costs: a page a tile, q a row."""

    __slots__ = ("rows", "tiles", "tokens")

    def __init__(self, limits: Limits) -> None:
        self.rows = limits.max_decode_rows
        self.tiles = limits.max_tiles
        self.tokens = limits.max_num_batched_tokens


class View:
    """The scheduler's state now. A policy keeps what else it needs in indexes of its own."""

    __slots__ = ("_pages", "_programs", "_roster", "admitting", "cost", "groups", "limits", "now", "step")

    def __init__(
        self, roster: Roster, pages: Pages, programs: Programs, limits: Limits, groups: tuple[PageClasses, ...]
    ) -> None:
        self._roster = roster
        self._pages = pages
        self._programs = programs
        self.limits = limits
        self.groups = groups
        self.now = 0.0
        """Time of the latest event, in seconds."""
        self.step = 0
        """The step that is being planned, or the next one."""
        self.cost: Mapping[str, float] = {}
        """Parameters of the cost model, as CostUpdate events brought them."""
        self.admitting = True
        """Whether the plan being made can still admit a sequence."""

    def get(self, seq: SeqId) -> SeqView | None:
        """None once it has finished."""
        return self._roster.seqs.get(seq)

    def residents(self) -> Iterator[SeqView]:
        """Sequences with a slot and pages, in order of arrival."""
        return iter(self._roster.residents)

    def newest_residents(self) -> Iterator[SeqView]:
        return reversed(self._roster.residents)

    def waiting(self) -> Iterator[SeqView]:
        """Sequences that could start, in order of arrival, as long as the plan admits any."""
        for seq in self._roster.waiting():
            if not self.admitting:
                return
            yield seq

    def pin(self, program: str) -> PinView | None:
        """What a program holds, against others or as long as there is room."""
        return self._programs.get(program)

    def pins(self) -> Iterator[PinView]:
        """What programs hold against others, in order of their turns' ends."""
        return self._programs.hard()

    def refuse_newcomers(self) -> None:
        """For a policy that has found that nobody else should be admitted by the plan being made."""
        self.admitting = False

    @property
    def has_slot(self) -> bool:
        """Whether a sequence could be admitted without displacing another."""
        return self._roster.has_slot

    @property
    def num_residents(self) -> int:
        return len(self._roster.residents)

    @property
    def num_waiting(self) -> int:
        return self._roster.num_waiting

    def free(self, group: int, cls: int = 0) -> int:
        """Pages of a class that could be granted: free ones and cached ones nobody holds."""
        return self._pages.pools[group][cls].available
