"""From a plan to device programs: packs arrays, picks buckets, launches, fetches. Knows no scheduling and no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxserve.engine.layout import blank_head_rows
from jaxserve.engine.moved import Moved
from jaxserve.engine.mover import Mover
from jaxserve.engine.programs import ProgramSet
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.shapes import fit
from jaxserve.engine.step import (
    COPIES,
    FORWARD_ACCESS,
    SEALS,
    STAGED,
    StepFunctions,
    copy_name,
    decode_name,
    forward_name,
    gather_name,
    head_name,
    scatter_name,
    seal_name,
)
from jaxserve.kv.meta import ABSENT
from jaxserve.kv.state import KVState
from jaxserve.sampling.admit import pack_admit, pack_extras
from jaxserve.sampling.bitmask import all_allowed
from jaxserve.sampling.head import HeadVariant, Out
from jaxserve.sampling.logprobs import Logprobs
from jaxserve.sampling.state import Slots
from jaxserve.types import Admit, Grant, Move, Plan, Request, Seal, SeqId, Work


@dataclass
class Launched:
    """A step on its way: what was asked, and the device arrays that will hold its results."""

    plan: Plan
    started: float
    done: jax.Array | None = None
    """Ready when the forward is."""
    tokens: int = 0
    places: int = 0
    """What the step computes, without and with padding."""
    rows: list[SeqId] = field(default_factory=list)
    """The sequence of each head row."""
    out: Out | None = None
    scores: list[tuple[Work, Logprobs]] = field(default_factory=list)


class Runner:
    """Owns the device state of an engine. Only the loop's thread may touch it: a donated handle is dead."""

    def __init__(
        self,
        functions: StepFunctions,
        programs: ProgramSet,
        params: Any,
        kv: KVState,
        slots: Slots,
        mover: Mover | None = None,
    ):
        self._functions = functions
        self._shape = functions.shape
        self._programs = programs
        self._params, self._head_params = params, functions.model.head_params(params)
        self._kv = kv
        self._slots = slots
        self._tables = [np.full(table.shape, ABSENT, np.int32) for table in kv.tables]
        self._no_masks: dict[int, jax.Array] = {}
        self._head_access = {variant: functions.head_access(variant) for variant in HeadVariant}
        self._decode_access = {variant: functions.decode_access(variant) for variant in HeadVariant}
        self._mover = mover

    @property
    def host_copies(self) -> int:
        """Copies between device and host memory so far."""
        return 0 if self._mover is None else self._mover.copies

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()

    def start_moves(self, moves: tuple[Move, ...]) -> None:
        """Gathers pages that go out, before anything of this step writes to them, and asks for those that come in."""
        assert self._mover is not None
        for move in moves:
            if move.kind == "in":
                self._mover.bring_in(move)
                continue
            self._mover.take_out(move, self.stage_pages(move.group, move.cls, move.pages))

    def finish_move(self, moved: Moved) -> None:
        """Puts pages that have come in where they belong. Steps launched from now on read them."""
        name = scatter_name(moved.move.group, moved.move.cls)
        for ids, staged in zip(_chunks(moved.move.pages), moved.staged, strict=False):
            self._kv = self._call(name, self._kv, ids, staged)

    def stage_pages(self, group: int, cls: int, pages: Iterable[int]) -> list[Any]:
        """Starts gathering pages of one pool into staging arrays, STAGED pages each, the last one padded. They hold
        what the pages hold now, whatever is launched after, and any thread may wait for them."""
        name = gather_name(group, cls)
        return [self._call(name, self._kv, ids) for ids in _chunks(tuple(pages))]

    def write_pages(self, group: int, cls: int, pages: Iterable[int], content: Iterable[Any]) -> None:
        """Puts host arrays, of one page each, into pages of a pool. Steps launched from now on read them."""
        name, pages, content = scatter_name(group, cls), tuple(pages), list(content)
        for first, ids in zip(range(0, len(pages), STAGED), _chunks(pages), strict=True):
            part = content[first : first + STAGED]
            padded = [*part, *[part[0]] * (STAGED - len(part))]  # what pads is dropped
            staged = jax.tree.map(lambda *arrays: np.concatenate(arrays), *padded)
            self._kv = self._call(name, self._kv, ids, staged)

    def launch(self, plan: Plan, sequences: Mapping[SeqId, Sequence], now: float) -> Launched:
        """Starts everything that `plan` asks for and returns at once."""
        launched = Launched(plan, now)
        self._copy(plan)
        grants = self._admit(plan, sequences)
        scored = {work.seq for work in plan.prefill if sequences[work.seq].wants_prompt_logprobs}
        launched.tokens = len(plan.decode) * self._shape.q + sum([work.count for work in plan.prefill])
        if plan.prefill or not self._decode(plan, sequences, grants, launched):
            rows, tiles = self._forward_bucket(len(plan.decode), len(plan.prefill))
            launched.done = self._forward(plan, rows, tiles, grants, scored)
            launched.places = rows * self._shape.q + tiles * self._shape.page_tokens
            self._score(plan, scored, rows, launched)
            self._head(plan, sequences, rows, launched)
        if plan.pages.seals:
            self._seal(plan.pages.seals)
        return launched

    def settle(self) -> None:
        """Waits for everything that was launched."""
        jax.block_until_ready(self._slots)

    def check(self, request: Request) -> None:
        """ValueError if the slots cannot hold what `request` asks for."""
        pack_extras(self._functions.slot_layout, request.params, (), request.banned)

    # Parts of a launch, in order

    def _copy(self, plan: Plan) -> None:
        for group in range(len(self._tables)):
            pairs = [(c.src, c.dst) for c in plan.pages.copies if c.group == group]
            for first in range(0, len(pairs), COPIES):
                packed = np.full((2, COPIES), ABSENT, np.int32)
                part = pairs[first : first + COPIES]
                packed[:, : len(part)] = np.array(part, np.int32).T
                self._kv = self._call(copy_name(group), self._kv, packed)

    def _admit(self, plan: Plan, sequences: Mapping[SeqId, Sequence]) -> list[Grant]:
        """Fills the slots of admitted sequences; returns the grants that go with the forward's batch."""
        fresh = {admit.slot for admit in plan.admits}
        for slot in fresh:
            for table in self._tables:
                table[:, slot] = ABSENT
        for g in plan.pages.grants:
            self._tables[g.group][g.cls, g.slot, g.index] = g.page
        for admit in plan.admits:
            self._upload(admit, sequences[admit.seq])
            self._upload_table(admit.slot)
        return [g for g in plan.pages.grants if g.slot not in fresh] if fresh else list(plan.pages.grants)

    def _upload(self, admit: Admit, sequence: Sequence) -> None:
        request, layout = sequence.request, self._functions.slot_layout
        packed = pack_admit(layout, sequence.tokens, sequence.prompt, request.params, sequence.choice, request.banned)
        self._slots = self._call("admit", self._slots, _with_slot(admit.slot, packed))
        extras = pack_extras(layout, request.params, sequence.eos, request.banned)
        if extras is not None:
            self._slots = self._call("extras", self._slots, _with_slot(admit.slot, extras))

    def _upload_table(self, slot: int) -> None:
        rows = [table[:, slot].reshape(-1) for table in self._tables]
        self._kv = self._call("tables", self._kv, _with_slot(slot, np.concatenate(rows)))

    def _decode(self, plan: Plan, sequences: Mapping[SeqId, Sequence], grants: list[Grant], launched: Launched) -> bool:
        """Forward and head in one program. False, and nothing done: there is none that does it."""
        rows = [work.seq for work in plan.decode]
        found = self._decode_bucket(len(rows), max([sequences[seq].variant for seq in rows]))
        if found is None:
            return False
        bucket, variant = found
        batch = self._packed(plan, bucket, 0, grants, set())
        written, read = self._decode_access[variant].split(self._slots)
        name = decode_name(bucket, variant)
        self._kv, written, launched.out = self._call(name, self._params, self._kv, written, read, batch)
        self._slots = self._slots.merged(written)
        launched.rows, launched.places = rows, bucket * self._shape.q
        return True

    def _forward(self, plan: Plan, rows: int, tiles: int, grants: list[Grant], scored: set[SeqId]) -> jax.Array:
        batch = self._packed(plan, rows, tiles, grants, scored)
        written, read = FORWARD_ACCESS.split(self._slots)
        name = forward_name(rows, tiles)
        self._kv, written, done = self._call(name, self._params, self._kv, written, read, batch)
        self._slots = self._slots.merged(written)
        return done

    def _packed(self, plan: Plan, rows: int, tiles: int, grants: list[Grant], scored: set[SeqId]) -> np.ndarray:
        """The plan as a forward[rows, tiles] reads it. More grants than it has room for go ahead of it."""
        layout = self._functions.forward_layout(rows, tiles)
        if len(grants) > layout.grants:
            for slot in {g.slot for g in grants}:
                self._upload_table(slot)
            grants = []
        batch = layout.blank(self._shape.slots)
        row_slots, tile_fields, grant_fields = layout.split(batch)
        if plan.decode:
            row_slots[: len(plan.decode)] = [work.slot for work in plan.decode]
        if plan.prefill:
            fields = [(w.slot, w.start, w.count, w.count if w.seq in scored else w.samples) for w in plan.prefill]
            tile_fields[:, : len(plan.prefill)] = np.array(fields, np.int32).T
        if grants:
            entries = [(g.slot, g.group, g.cls, g.index, g.page) for g in grants]
            grant_fields[:, : len(grants)] = np.array(entries, np.int32).T
        return batch

    def _score(self, plan: Plan, scored: set[SeqId], rows: int, launched: Launched) -> None:
        for index, work in enumerate(plan.prefill):
            if work.seq in scored:
                first = rows * self._shape.q + index * self._shape.page_tokens
                packed = np.array([work.slot, work.start, first], np.int32)
                launched.scores.append((work, self._call("score", self._head_params, self._slots, packed)))

    def _head(self, plan: Plan, sequences: Mapping[SeqId, Sequence], rows: int, launched: Launched) -> None:
        q = self._shape.q
        sampling = [(i, work) for i, work in enumerate(plan.prefill) if work.samples]
        needed = len(plan.decode) + len(sampling)
        if not needed:
            return
        works = [*plan.decode, *(work for _, work in sampling)]
        launched.rows = [work.seq for work in works]
        least = max([sequences[seq].variant for seq in launched.rows])
        bucket, variant = self._head_bucket(needed, least)
        packed = blank_head_rows(bucket, q, self._shape.slots)
        packed[:needed, 0] = [work.slot for work in works]
        decoding = len(plan.decode)
        packed[:decoding, 1:] = np.arange(decoding * q, dtype=np.int32).reshape(decoding, q)
        base, tile = rows * q - 1, self._shape.page_tokens
        packed[decoding:needed, 1:] = np.array([[base + i * tile + w.count] for i, w in sampling]).reshape(-1, 1)
        masks = (self._allow_all(bucket),) if variant is HeadVariant.FULL else ()
        written, read = self._head_access[variant].split(self._slots)
        name = head_name(bucket, variant)
        written, launched.out = self._call(name, self._head_params, written, read, packed, *masks)
        self._slots = self._slots.merged(written)

    def _seal(self, seals: Iterable[Seal]) -> None:
        """After the head, which has set the lengths that say which pages are full."""
        groups = len(self._tables)
        waiting = [[s for s in seals if s.group == group] for group in range(groups)]
        while most := max(len(each) for each in waiting):
            size = fit(SEALS, min(most, SEALS[-1]))
            if self._programs.ready(seal_name(size)) is None:
                size = SEALS[-1]
            packed = np.full((groups, 4, size), ABSENT, np.int32)
            for fields, each in zip(packed, waiting, strict=True):
                if each:
                    part = [(s.slot, s.index, s.src, s.dst) for s in each[:size]]
                    fields[:, : len(part)] = np.array(part, np.int32).T
            waiting = [each[size:] for each in waiting]
            self._kv = self._call(seal_name(size), self._kv, self._slots, packed)

    # Buckets

    def _forward_bucket(self, rows: int, tiles: int) -> tuple[int, int]:
        """The cheapest compiled bucket that holds the step."""
        for bucket in self._shape.holding(rows, tiles):
            if self._programs.ready(forward_name(*bucket)) is not None:
                return bucket
        return self._shape.decode[-1], (self._shape.tiles[-1] if tiles else 0)

    def _decode_bucket(self, rows: int, least: HeadVariant) -> tuple[int, HeadVariant] | None:
        """The cheapest compiled program of forward and head that holds the rows and does what `least` does."""
        for bucket in self._shape.decode:
            if bucket >= rows:
                for variant in list(HeadVariant)[least : HeadVariant.FULL]:
                    if self._programs.ready(decode_name(bucket, variant)) is not None:
                        return bucket, variant
        return None

    def _head_bucket(self, rows: int, least: HeadVariant) -> tuple[int, HeadVariant]:
        """The cheapest compiled head that holds the rows and does at least what `least` does."""
        for variant in list(HeadVariant)[least:]:
            for bucket in self._shape.head_rows:
                if bucket >= rows and self._programs.ready(head_name(bucket, variant)) is not None:
                    return bucket, variant
        raise LookupError(f"no compiled head holds {rows} rows")

    def _call(self, name: str, *args: Any) -> Any:
        program = self._programs.ready(name)
        if program is None:
            raise LookupError(f"{name} is not compiled")
        return program(*args)

    def _allow_all(self, rows: int) -> jax.Array:
        if rows not in self._no_masks:
            words = all_allowed(self._functions.slot_layout.vocab)
            self._no_masks[rows] = jax.device_put(np.tile(words, (rows, 1)))
        return self._no_masks[rows]


def _chunks(pages: tuple[int, ...]) -> list[np.ndarray]:
    """Page ids, STAGED at a time, padded with ABSENT."""
    chunks = []
    for first in range(0, len(pages), STAGED):
        ids = np.full(STAGED, ABSENT, np.int32)
        part = pages[first : first + STAGED]
        ids[: len(part)] = part
        chunks.append(ids)
    return chunks


def _with_slot(slot: int, packed: np.ndarray) -> np.ndarray:
    return np.concatenate([np.array([slot], np.int32), packed])
