"""Recording the scheduler's input and output, and replaying it. Knows no engine; writes to a file object it is given.

A record is a sequence of frames: length (4 bytes, little-endian, of what follows), kind (1 byte), msgpack. The first
frame is the header, then events and plans in the order in which they happened. A record cut short by a crash is good up
to its last whole frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from jaxserve.scheduler import policies
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.types import Event, PageClasses, Plan

VERSION = 1
HEADER, EVENT, PLAN = b"H", b"E", b"P"


class ReplayError(RuntimeError):
    """A record that cannot be replayed, or whose plans come out differently."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """How the scheduler was made."""

    version: int
    policy: str
    params: dict[str, Any]
    limits: Limits
    groups: tuple[PageClasses, ...]

    def scheduler(self) -> Scheduler:
        return Scheduler(policies.make(self.policy, **self.params), self.limits, self.groups)


class Recorder:
    """Writes frames to `stream`, whose buffering and closing are the caller's."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder()

    def header(self, policy: Policy, limits: Limits, groups: tuple[PageClasses, ...]) -> None:
        self._write(
            HEADER, Header(version=VERSION, policy=policy.name, params=policy.params, limits=limits, groups=groups)
        )

    def event(self, event: Event) -> None:
        self._write(EVENT, event)

    def plan(self, plan: Plan) -> None:
        self._write(PLAN, plan)

    def _write(self, kind: bytes, value: Any) -> None:
        body = self._encoder.encode(value)
        self._stream.write((len(body) + 1).to_bytes(4, "little") + kind + body)


def frames(record: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, msgpack) of each whole frame."""
    at = 0
    while at + 4 <= len(record):
        end = at + 4 + int.from_bytes(record[at : at + 4], "little")
        if end > len(record) or end == at + 4:
            return
        yield record[at + 4 : at + 5], record[at + 5 : end]
        at = end


def replay(
    record: bytes | str | PathLike[str], make_scheduler: Callable[[Header], Scheduler] = Header.scheduler
) -> Iterator[Plan]:
    """Feeds the recorded events to a new scheduler and yields its plans, which are those of the record.

    Raises:
        ReplayError: no header, another version, or a plan whose bytes differ from the recorded ones.
    """
    data = record if isinstance(record, bytes) else Path(record).read_bytes()
    read = frames(data)
    kind, body = next(read, (b"", b""))
    if kind != HEADER:
        raise ReplayError("this is not a record of a scheduler: it does not begin with a header")
    header = msgspec.msgpack.decode(body, type=Header)
    if header.version != VERSION:
        raise ReplayError(f"the record has version {header.version}; this program replays version {VERSION}")
    scheduler = make_scheduler(header)
    events = msgspec.msgpack.Decoder(Event)
    encoder = msgspec.msgpack.Encoder()
    for kind, body in read:
        if kind == EVENT:
            scheduler.on_event(events.decode(body))
        elif kind == PLAN:
            plan = scheduler.plan()
            if encoder.encode(plan) != body:
                recorded = msgspec.msgpack.decode(body, type=Plan)
                raise ReplayError(f"step {plan.step} was planned as {recorded}, the replay plans {plan}")
            yield plan
        else:
            raise ReplayError(f"the record has a frame of unknown kind {kind!r}")
