"""The device programs of a step as pure functions: forward, head, admit, tables, copy, score. No state, no plans.

    forward[rows, tiles](params, kv, written, read, batch) -> (kv, written, done)  embed, layers, KV writes; activations
    head[rows, variant](params, written, read, rows, masks) -> (written, out)  logits, masks, sample, log-probs
    decode[rows, variant](params, kv, written, read, batch) -> (kv, written, out)  both, for a step that only decodes
    admit(slots, packed) -> slots                                    a sequence's tokens and parameters into its slot
    tables(kv, packed) -> kv                                         a slot's whole block table
    copy[n](kv, packed) -> kv                                        pages forked before a step
    seal[n](kv, slots, packed) -> kv                                 pages that decode rows have filled
    score(params, slots, packed) -> logprobs                         prompt log-probs of one tile

`kv`, `slots` and `written` are donated by every program that returns them. `written` and `read` are the arrays of the
slots that a program changes and those that it only looks at (`Access`): each array that is handed back costs the
host some 7 us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.engine.layout import ForwardLayout
from jaxserve.engine.programs import Program
from jaxserve.engine.shapes import EngineShape
from jaxserve.kv import pages as kv_pages
from jaxserve.kv.attention import attend_layer
from jaxserve.kv.meta import ABSENT, build_meta
from jaxserve.kv.reading import ReadingRule
from jaxserve.kv.state import KVState
from jaxserve.models.model import Model
from jaxserve.quant.linear import LinearContext
from jaxserve.sampling.admit import admit, admit_extras, pack_admit_size
from jaxserve.sampling.head import HeadVariant, Out, head
from jaxserve.sampling.logprobs import Logprobs, prompt_logprobs
from jaxserve.sampling.state import Ints, SlotLayout, Slots, decode_inputs, mask_words
from jaxserve.speculative.proposer import Proposer
from jaxserve.types import KVGroup

COPIES = 16
"""Pages that one copy program moves; more copies are more launches."""
SEALS = (2, 16)
"""Pages of a group that a seal program makes, by size of the program; more are more launches."""

STAGED = 16
"""Pages of a staging array for moves to and from the host; more are more launches."""

_LEAF: Any = 0
"""Stands for an array where only the structure of a result counts."""


class Access(NamedTuple):
    """The arrays of the slots that a program writes, and those that it reads beside them."""

    writes: tuple[str, ...]
    reads: tuple[str, ...]

    def split(self, slots: Slots) -> tuple[Slots, Slots]:
        return slots.only(self.writes), slots.only(self.reads)


FORWARD_ACCESS = Access(("hidden",), ("tokens", "ints", "drafts"))


@dataclass(frozen=True)
class StepFunctions:
    """Everything that is static about an engine's programs.

    `params`, `kv`, `slots` are trees of jax.ShapeDtypeStruct: what the programs are compiled for. `groups[g]` says
    which layers the pool `kv.pools[g]` holds.
    """

    model: Model
    shape: EngineShape
    slot_layout: SlotLayout
    ctx: LinearContext
    proposer: Proposer | None
    params: Any
    groups: tuple[KVGroup, ...]
    kv: KVState
    slots: Slots

    def forward_layout(self, rows: int, tiles: int) -> ForwardLayout:
        return ForwardLayout.of(self.shape, sum(table.shape[0] for table in self.kv.tables), rows, tiles)

    @property
    def seals(self) -> bool:
        """Whether any group has pages to be sealed."""
        return any(rule is not None for rule in self._rules)

    @property
    def _rules(self) -> tuple[ReadingRule | None, ...]:
        return tuple(format.rule for format in self.kv.formats)

    # The functions

    def forward(self, layout: ForwardLayout, params: Any, kv: KVState, written: Slots, read: Slots, batch: jax.Array):
        slots = read.merged(written)
        row_slots, (tile_slots, tile_starts, tile_counts, tile_reads), grants = layout.split(batch)
        kv = _grant(kv, grants)
        q, page_tokens = self.shape.q, self.shape.page_tokens
        row_tokens, row_positions, row_counts = decode_inputs(slots, row_slots, q)
        offsets = jnp.arange(page_tokens, dtype=jnp.int32)
        tile_positions = tile_starts[:, None] + offsets
        tile_tokens = slots.tokens.at[tile_slots[:, None], tile_positions].get(mode="fill", fill_value=0)
        rows, tiles = (row_slots, row_positions[:, 0], row_counts), (tile_slots, tile_starts, tile_counts)
        meta = build_meta(kv.tables, *rows, *tiles, self._rules, page_tokens)
        groups, last = self._layer_groups(), self.model.config.layers - 1
        # What the last layer makes of most prompt tokens is read by nobody.
        readers = meta.reading(tile_reads > 0)

        def attend(layer: int, kv: KVState, q: jax.Array, k: jax.Array, v: jax.Array):
            group, index = groups[layer]
            spec = self.model.attention_spec(layer)
            return attend_layer(kv, group, index, q, k, v, meta, spec, readers if layer == last else meta)

        tokens = _flat(row_tokens, tile_tokens)
        live, live_tiles = _first(row_counts, q), _first(tile_counts, page_tokens)
        positions = _flat(jnp.where(live, row_positions, -1), jnp.where(live_tiles, tile_positions, -1))
        used = _flat(live, live_tiles & ~_first(tile_counts - tile_reads, page_tokens))
        hidden, kv = self.model.forward(params, tokens, positions, kv, attend, self.ctx, read=used)
        buffer = jax.lax.dynamic_update_slice(slots.hidden, hidden.astype(slots.hidden.dtype), (0, 0))
        # Neither state can be waited for once the next step has taken it over; this scalar can.
        done = buffer[0, 0]
        return kv, replace(written, hidden=buffer), done

    def head(
        self,
        variant: HeadVariant,
        params: Any,
        written: Slots,
        read: Slots,
        rows: jax.Array,
        masks: jax.Array | None = None,
    ):
        slots, logits = read.merged(written), self._logits(params)
        slots, out = head(logits, slots, rows, masks, variant, self.proposer, self.shape.page_tokens)
        return slots.only(self.head_access(variant).writes), out

    def decode(
        self,
        layout: ForwardLayout,
        variant: HeadVariant,
        params: Any,
        kv: KVState,
        written: Slots,
        read: Slots,
        batch: jax.Array,
    ):
        slots = read.merged(written)
        kv, hidden, _ = self.forward(layout, params, kv, *FORWARD_ACCESS.split(slots), batch)
        # A head fused with what is before it would round otherwise than one that reads activations from memory.
        slots = slots.merged(jax.lax.optimization_barrier(hidden))
        (row_slots, *_), q = layout.split(batch), self.shape.q
        rows = jnp.arange(layout.rows * q, dtype=jnp.int32).reshape(layout.rows, q)
        rows = jnp.concatenate([row_slots[:, None], rows], axis=1)
        drawn, out = self.head(variant, params, *self.head_access(variant).split(slots), rows)
        return kv, slots.merged(drawn).only(self.decode_access(variant).writes), out

    def decode_access(self, variant: HeadVariant) -> Access:
        """What a forward and a head of this engine do with the slots."""
        first, second = FORWARD_ACCESS, self.head_access(variant)
        writes = {*first.writes, *second.writes}
        return Access(tuple(sorted(writes)), tuple(sorted({*first.reads, *second.reads} - writes)))

    def head_access(self, variant: HeadVariant) -> Access:
        """What a head of this engine does with the slots."""
        writes, reads = ["tokens", "ints"], ["hidden"]
        (writes if self.proposer else reads).append("drafts")
        if variant is not HeadVariant.GREEDY:
            reads.append("floats")
        if variant is HeadVariant.FULL:
            writes.append("counts")
            reads.append("extras")
        return Access(tuple(writes), tuple(reads))

    def tables(self, kv: KVState, packed: jax.Array) -> KVState:
        """packed: the slot, then its table of every group and class, [classes, max_pages] each."""
        slot, rest = packed[0], packed[1:]
        tables = []
        for table in kv.tables:
            size = table.shape[0] * table.shape[2]
            row = rest[:size].reshape(table.shape[0], table.shape[2])
            tables.append(table.at[:, slot].set(row, mode="drop"))
            rest = rest[size:]
        return replace(kv, tables=tuple(tables))

    def copy(self, group: int, kv: KVState, packed: jax.Array) -> KVState:
        """packed [2, COPIES]: source and target pages of `group`; padding targets are out of range. Only pages that are
        still written are ever copied, and they are of class 0."""
        format, pool = kv.formats[group], kv.pools[group]
        copied = kv_pages.copy_pages(format.part(pool, 0), packed[0], packed[1])
        return kv.with_pool(group, format.with_part(pool, 0, copied))

    def seal(self, kv: KVState, slots: Slots, packed: jax.Array) -> KVState:
        """packed [groups, 4, n]: slot, index of the page, source and target page. A page that is not yet full, by its
        slot's length, is left alone: the host did not know better."""
        for group, format in enumerate(kv.formats):
            if format.rule is not None:
                ids, index, source, target = packed[group]
                length = slots.ints.at[ids, Ints.LENGTH].get(mode="fill", fill_value=0)
                # The KV of the newest token comes with the next step.
                target = jnp.where(length - 1 >= (index + 1) * self.shape.page_tokens, target, ABSENT)
                kv = kv.with_pool(group, format.seal(kv.pools[group], source, target))
        return kv

    def score(self, params: Any, slots: Slots, packed: jax.Array) -> Logprobs:
        """packed: slot, first position and first activation row of a tile."""
        slot, start, row = packed
        return prompt_logprobs(self._logits(params), slots, slot, start, row, self.shape.page_tokens)

    def _logits(self, params: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda hidden: self.model.logits(params, hidden, self.ctx)

    @property
    def _model_identity(self) -> tuple:
        return self.model.config, self.model.dtype, self.ctx

    @property
    def _tile_identity(self) -> tuple:
        return *self._model_identity, self.shape.page_tokens

    def _layer_groups(self) -> dict[int, tuple[int, int]]:
        """Layer -> (KV group, index within it)."""
        return {layer: (g, i) for g, group in enumerate(self.groups) for i, layer in enumerate(group.layers)}

    # The declared programs

    def gather(self, group: int, cls: int, kv: KVState, pages: jax.Array) -> Any:
        """A staging array of `pages` int32 [STAGED] of a pool; padding copies any page."""
        return kv_pages.gather_pages(kv.formats[group].part(kv.pools[group], cls), pages)

    def scatter(self, group: int, cls: int, kv: KVState, pages: jax.Array, staged: Any) -> KVState:
        """Puts a staging array into `pages` int32 [STAGED] of a pool; padding is out of range."""
        format, pool = kv.formats[group], kv.pools[group]
        part = kv_pages.scatter_pages(format.part(pool, cls), pages, staged)
        return kv.with_pool(group, format.with_part(pool, cls, part))

    def move_programs(self) -> list[Program]:
        """Gather and scatter of each pool."""
        programs = []
        for group, format in enumerate(self.kv.formats):
            for cls in range(self.kv.tables[group].shape[0]):
                part = format.part(self.kv.pools[group], cls)
                staged = jax.tree.map(lambda x: jax.ShapeDtypeStruct((STAGED, *x.shape[1:]), x.dtype), part)
                ids = _ints(STAGED)
                gather, scatter = partial(self.gather, group, cls), partial(self.scatter, group, cls)
                programs.append(Program(gather_name(group, cls), gather, (self.kv, ids), (), staged))
                programs.append(Program(scatter_name(group, cls), scatter, (self.kv, ids, staged), (0,), self.kv))
        return programs

    def programs(self) -> list[Program]:
        """Every program of the engine, in the order in which it is best to have them."""
        kv, slots, params = self.kv, self.slots, self.model.head_params(self.params)
        tables = sum(table.shape[0] * table.shape[2] for table in kv.tables)
        programs = [
            Program("admit", _admit, (slots, _ints(1 + pack_admit_size(self.slot_layout))), (0,), slots),
            Program("extras", _extras, (slots, _ints(1 + self.slot_layout.extras)), (0,), slots),
            Program("tables", self.tables, (kv, _ints(1 + tables)), (0,), kv),
            Program("score", self.score, (params, slots, _ints(3)), (), Logprobs(_LEAF), self._tile_identity),
        ]
        for group in range(len(kv.pools)):
            programs.append(Program(copy_name(group), partial(self.copy, group), (kv, _ints(2, COPIES)), (0,), kv))
        if self.seals:
            for n in reversed(SEALS):
                args = (kv, slots, _ints(len(kv.pools), 4, n))
                programs.append(Program(seal_name(n), self.seal, args, (0,), kv))
        *smaller, largest = self.shape.head_rows
        programs += [self._head_program(largest, variant) for variant in HeadVariant]
        programs += [self._forward_program(rows, tiles) for rows, tiles in self.shape.forward_buckets() if tiles]
        # Steps that only decode have programs of their own, but for the full head.
        programs += [self._forward_program(rows, 0) for rows in reversed(self.shape.mixed_decode)]
        programs += [
            self._decode_program(rows, variant)
            for rows in reversed(self.shape.decode)
            for variant in (HeadVariant.GREEDY, HeadVariant.SAMPLE)
        ]
        programs += [self._head_program(rows, HeadVariant.GREEDY) for rows in reversed(smaller)]
        programs += [self._head_program(rows, HeadVariant.SAMPLE) for rows in reversed(smaller)]
        # Costly to compile and seldom needed: one narrow head besides the largest will do.
        few = [rows for rows in self.shape.mixed_decode if rows in smaller]
        programs += [self._head_program(rows, HeadVariant.FULL) for rows in few]
        return programs

    def _forward_program(self, rows: int, tiles: int) -> Program:
        layout = self.forward_layout(rows, tiles)
        written, read = FORWARD_ACCESS.split(self.slots)
        args = (self.params, self.kv, written, read, _ints(layout.size))
        out = (self.kv, written, _LEAF)
        static = (*self._tile_identity, self.shape.q, self.groups)
        return Program(forward_name(rows, tiles), partial(self.forward, layout), args, (1, 2), out, static)

    def _decode_program(self, rows: int, variant: HeadVariant) -> Program:
        layout = self.forward_layout(rows, 0)
        written, read = self.decode_access(variant).split(self.slots)
        args = (self.params, self.kv, written, read, _ints(layout.size))
        out = (self.kv, written, Out(_LEAF, None))
        static = (*self._tile_identity, self.shape.q, self.groups, self.proposer)
        return Program(decode_name(rows, variant), partial(self.decode, layout, variant), args, (1, 2), out, static)

    def _head_program(self, rows: int, variant: HeadVariant) -> Program:
        full = variant is HeadVariant.FULL
        masks = (jax.ShapeDtypeStruct((rows, mask_words(self.slot_layout.vocab)), jnp.uint32),) if full else ()
        written, read = self.head_access(variant).split(self.slots)
        args = (self.model.head_params(self.params), written, read, _ints(rows, 1 + self.shape.q), *masks)
        out = (written, Out(_LEAF, Logprobs(_LEAF) if full else None))
        static = (*self._model_identity, self.proposer and (self.proposer, self.shape.page_tokens))
        return Program(head_name(rows, variant), partial(self.head, variant), args, (1,), out, static)

    def covering(self) -> list[str]:
        """Names of the programs with which every request can be served. The full head stands in for the others."""
        heads = [head_name(self.shape.head_rows[-1], HeadVariant.FULL)]
        forwards = [forward_name(*bucket) for bucket in self.shape.covering_buckets()]
        copies = [copy_name(group) for group in range(len(self.kv.pools))]
        seals = [seal_name(SEALS[-1])] if self.seals else []
        return [*reversed(forwards), *heads, "admit", "extras", "tables", "score", *copies, *seals]


def forward_name(rows: int, tiles: int) -> str:
    return f"forward[{rows},{tiles}]"


def head_name(rows: int, variant: HeadVariant) -> str:
    return f"head[{rows},{variant.name.lower()}]"


def decode_name(rows: int, variant: HeadVariant) -> str:
    return f"decode[{rows},{variant.name.lower()}]"


def copy_name(group: int) -> str:
    return f"copy[{group}]"


def gather_name(group: int, cls: int) -> str:
    return f"gather[{group},{cls}]"


def scatter_name(group: int, cls: int) -> str:
    return f"scatter[{group},{cls}]"


def seal_name(pages: int) -> str:
    return f"seal[{pages}]"


def _first(counts: jax.Array, tokens: int) -> jax.Array:
    """bool [rows, tokens]: the first `counts` of each row."""
    return jnp.arange(tokens) < counts[:, None]


def _flat(rows: jax.Array, tiles: jax.Array) -> jax.Array:
    """What rows and tiles hold by token, as one vector."""
    return jnp.concatenate([rows.reshape(-1), tiles.reshape(-1)])


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _admit(slots: Slots, packed: jax.Array) -> Slots:
    """packed: the slot, then what pack_admit made."""
    return admit(slots, packed[0], packed[1:])


def _extras(slots: Slots, packed: jax.Array) -> Slots:
    """packed: the slot, then what pack_extras made."""
    return admit_extras(slots, packed[0], packed[1:])


def _grant(kv: KVState, grants: jax.Array) -> KVState:
    slots, groups, classes, indices, pages = grants
    for group, table in enumerate(kv.tables):
        # A grant for another group gets a slot that does not exist, so that this group's scatter drops it.
        rows = jnp.where(groups == group, slots, table.shape[1])
        kv = kv_pages.grant(kv, group, classes, rows, indices, pages)
    return kv
