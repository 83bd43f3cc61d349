"""Which replica gets a request. Knows how loaded replicas are and what they were sent, nothing of their insides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from jaxserve.sim.replica import Call, Replica

FIRST_PAGES = 4
"""Pages that name the family of a prompt: enough to tell system prompts apart, few enough to be shared."""


class Dispatch(Protocol):
    def choose(self, call: Call, replicas: Sequence[Replica]) -> int:
        """Index of the replica that `call` goes to."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, call: Call, replicas: Sequence[Replica]) -> int:
        self._next = (self._next + 1) % len(replicas)
        return self._next


class LeastLoaded:
    """The replica with the fewest unfinished requests."""

    def choose(self, call: Call, replicas: Sequence[Replica]) -> int:
        return min(range(len(replicas)), key=lambda i: replicas[i].load)


class PrefixAffinity:
    """Where the session's last turn or prompts that begin alike went before, so that their KV is found, unless that
    replica has `slack` times the requests of the least loaded one, and some."""

    def __init__(self, slack: float = 1.5, some: int = 4) -> None:
        self._slack, self._some = slack, some
        self._least = LeastLoaded()
        self._homes: dict[tuple[bytes, ...] | int, int] = {}

    def choose(self, call: Call, replicas: Sequence[Replica]) -> int:
        least = self._least.choose(call, replicas)
        session, family = call.served.job, call.names(0, min(FIRST_PAGES, call.hashed))
        if not family:
            return least
        home = self._homes.get(session, self._homes.get(family, least))
        if replicas[home].load > self._slack * replicas[least].load + self._some:
            home = least
        self._homes[family] = self._homes[session] = home
        if call.served.last_turn:
            del self._homes[session]
        return home


DISPATCHES: dict[str, Callable[[], Dispatch]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-affinity": PrefixAffinity,
}


def make_dispatch(name: str) -> Dispatch:
    """
    Raises:
        ValueError: there is no such policy.
    """
    if name not in DISPATCHES:
        raise ValueError(f"there is no dispatch policy {name!r} (use {', '.join(DISPATCHES)})")
    return DISPATCHES[name]()
