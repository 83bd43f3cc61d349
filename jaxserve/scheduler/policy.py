"""The policy seam: who computes next, how much, who yields. A policy knows no clock, randomness, device or page ids.

A policy is a state machine over the event stream, so the same object runs in the engine and in the simulator, and a
replay restores it. `build_plan` makes its answers feasible; a policy cannot overdraw anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Set
from enum import Enum
from typing import Any

from jaxserve.scheduler.request import DECODE, PREFILL
from jaxserve.scheduler.view import Budget, PinView, SeqView, View
from jaxserve.types import Event, Plan, SeqId


class Evict(Enum):
    """How a victim gives up its pages. They stay cached until somebody needs the room; what is gone when it comes back,
    RECOMPUTE prefills again. SWAP copies them to host memory first, where there is some and fetching will be faster."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


class Policy:
    """Answers the plan builder's questions. The defaults serve every policy that follows arrival order.

    Constructor arguments are kept as attributes of the same name: the record of a run holds them.
    """

    name: str = ""
    """Set by `policies.register`."""
    displaces: bool = False
    """Whether a waiting sequence may evict residents (through `may_preempt`) to get in. Where False, pages are taken
    from a resident only when they have run out for another resident."""
    skips_misfits: bool = False
    """Whether sequences behind one that does not fit are admitted before it."""

    def on_event(self, event: Event, view: View) -> None:
        """Called after the scheduler has applied `event`: a sequence that finished with it is no longer in the view."""

    def on_plan(self, plan: Plan, view: View) -> None:
        """Called with each plan, once it is complete: who was admitted, who lost its place, who computes."""

    def rank(self, view: View) -> Iterator[SeqView]:
        """Sequences in the order in which they get their share of the step. Lazy; whoever is left out is held back.

        The builder stops when the step is full. `view.admitting` turns False when no further sequence can be admitted;
        `view.waiting()` ends then.
        """
        raise NotImplementedError

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        """Tokens that `seq` should compute in this step; 0 is none.

        Any positive number gives a DECODE sequence one row. For a prefill the builder cuts it to what fits and, unless
        it reaches the end of the prompt, to a page boundary, but not below one tile.
        """
        if seq.phase is DECODE:
            return view.limits.q
        return seq.remaining if seq.resident else seq.known

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        """Whether `victim` may lose its place for `want`. By default later arrivals give up pages that ran out."""
        return Evict.SWAP if want.resident and victim.order > want.order else None

    def victims(self, view: View) -> Iterator[SeqView]:
        """Residents, the one to evict first in front."""
        return view.newest_residents()

    def pin_s(self, seq: SeqView, view: View) -> float:
        """Seconds for which a program holds the pages of its turn `seq`, which has just ended, against others."""
        return view.limits.pin_ttl_s

    def pins(self, view: View) -> Iterator[PinView]:
        """Programs that hold pages against others, the one to lose them first in front. By default the one that has
        been idle longest."""
        return view.pins()

    def may_unpin(self, want: SeqView, pin: PinView, view: View) -> bool:
        """Whether a resident that ran out of pages takes them from `pin` before it takes them from other residents."""
        return True

    def residency(self, view: View, planned: Set[SeqId]) -> Iterable[SeqView]:
        """Waiting sequences whose pages should come back from host memory although it is not their turn yet, the most
        urgent first. `planned`: sequences with work in the step. The builder fetches as long as there is room to spare.
        """
        return ()

    def next_wake(self, view: View) -> float | None:
        """When `rank` may answer differently although no event has come; None: never."""
        return None

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, by name."""
        if type(self).__init__ is object.__init__:
            return {}
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}


class Wrapper(Policy):
    """A policy over another one: it changes some answers of `inner` and passes the others on.

    Written `outer+inner` where policies have names; `params["inner"]` holds the parameters of `inner`.
    """

    default_inner = "sarathi"

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.name = f"{type(self).name}+{inner.name}"
        self.displaces = inner.displaces
        self.skips_misfits = inner.skips_misfits
        if type(self).tokens is Wrapper.tokens:  # asked for each row of each step
            self.tokens = inner.tokens  # type: ignore[method-assign]

    def on_event(self, event: Event, view: View) -> None:
        self.inner.on_event(event, view)

    def on_plan(self, plan: Plan, view: View) -> None:
        self.inner.on_plan(plan, view)

    def rank(self, view: View) -> Iterator[SeqView]:
        return self.inner.rank(view)

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        return self.inner.tokens(seq, left, view)

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        return self.inner.may_preempt(want, victim, view)

    def victims(self, view: View) -> Iterator[SeqView]:
        return self.inner.victims(view)

    def pin_s(self, seq: SeqView, view: View) -> float:
        return self.inner.pin_s(seq, view)

    def pins(self, view: View) -> Iterator[PinView]:
        return self.inner.pins(view)

    def may_unpin(self, want: SeqView, pin: PinView, view: View) -> bool:
        return self.inner.may_unpin(want, pin, view)

    def residency(self, view: View, planned: Set[SeqId]) -> Iterable[SeqView]:
        return self.inner.residency(view, planned)

    def next_wake(self, view: View) -> float | None:
        return self.inner.next_wake(view)

    @property
    def params(self) -> dict[str, Any]:
        return {**super().params, "inner": self.inner.params}


def decodes(view: View) -> list[SeqView]:
    """Residents that generate, in order of arrival."""
    return [seq for seq in view.residents() if seq.phase is DECODE]


def prefills(view: View) -> list[SeqView]:
    """Residents whose prompt is partly computed, in order of arrival."""
    return [seq for seq in view.residents() if seq.phase is PREFILL]
