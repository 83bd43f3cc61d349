"""Formats with two page classes: tokens go to 16-bit pages, full pages are sealed, once. Knows no particular code.

The reading rule (kv/reading.py) says which pages a query reads in which form. Values are rounded to the 16-bit page
type before they are quantized, whichever way they came, so a sealed page has the same bits however it came about.

A sealed page may hold only the leading channels of each head (`channels`). That is worth something where a model's
heads are written in a basis in which these carry the most (models/basis.py); formats neither know nor need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kv.format import AttentionSpec, KVFormat, Layer, PageKind
from jaxserve.kv.meta import ABSENT, Rows
from jaxserve.kv.reading import ReadingRule, Reads, TileReads
from jaxserve.kv.rotation import check_rotation, turned_keys, turned_queries
from jaxserve.types import KVGroup
from pallas_kernels.layouts import FloatLayout, Layout, SealedLayout, float_layout
from pallas_kernels.merge import Attended, merge
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

Pool = dict[str, Any]
"""`open`: 16-bit pages as `SealedFormat.open` lays them out; `sealed`: the layout's arrays [pages of class 1, layers,
*shape] by name."""

Attend = Callable[..., Attended]
"""attend(q, pool, layer, table, places, layout) of one list of pages for the rows of a step."""

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class SealedFormat(KVFormat):
    """What is left to a format: its `layout`, as a class attribute or property.

    Raises:
        ValueError: options out of range.
    """

    backend: str | None = None
    """Of the attention ops, see `pallas_kernels.backends`; None takes the platform's."""
    sink_pages: int = 1
    """Pages at the front that are never sealed: attention sinks stay exact."""
    residual_pages: int = 1
    """Pages up to the newest token that are read in 16 bits."""
    prefill_exact: bool = False
    """Prefill attends to its own chunk in 16 bits, as the papers do; results then depend on where chunks begin."""
    dtype: str = "bfloat16"
    """Of 16-bit pages. float32 is for tests of exactness."""
    channels: tuple[int, int] | None = None
    """Leading channels of a key and of a value that sealed pages hold; 16-bit pages hold all. None: all, here too."""
    key_rotation: str = "none"
    """How keys are turned before they are sealed, and queries before they read them (kv/rotation.py); values and 16-bit
    pages stay as they are."""

    def __post_init__(self) -> None:
        if self.sink_pages < 0:
            raise ValueError(f"--kv-sink-pages {self.sink_pages} must be at least 0")
        if self.residual_pages not in (1, 2):
            raise ValueError(f"--kv-residual-pages {self.residual_pages} must be 1 or 2")
        if self.dtype not in DTYPES:
            raise ValueError(f"16-bit pages of {self.dtype} do not exist; choose one of {', '.join(DTYPES)}")
        check_rotation(self.key_rotation)

    @property
    def layout(self) -> SealedLayout:
        """How sealed pages are made and read."""
        raise NotImplementedError

    @property
    def usual_rotation(self) -> str:
        """The `key_rotation` that is best as far as has been measured."""
        return "none"

    @property
    def open(self) -> FloatLayout:
        """How 16-bit pages are laid out: as the backend that reads them wants it."""
        return float_layout(jnp.dtype(self.dtype), self.backend)

    @property
    def rule(self) -> ReadingRule:
        return ReadingRule(self.sink_pages, self.residual_pages, self.prefill_exact)

    # Shapes

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> Pool:
        layers = len(group.layers)
        shapes = self._sealed_shapes(group)
        return {
            "open": self.open.pool(pages[0], layers, group.kv_heads, group.page_tokens, group.head_dim),
            "sealed": {
                name: jax.ShapeDtypeStruct((pages[1], layers, *one.shape), one.dtype) for name, one in shapes.items()
            },
        }

    def kinds(self, group: KVGroup) -> tuple[PageKind, ...]:
        one = self.payload(group, (1, 1))
        return PageKind(self.dtype, _bytes(one["open"])), PageKind(self.name, _bytes(one["sealed"]))

    def part(self, pool: Pool, cls: int) -> Any:
        return pool[_PARTS[cls]]

    def with_part(self, pool: Pool, cls: int, part: Any) -> Pool:
        return pool | {_PARTS[cls]: part}

    def heads_axis(self, group: KVGroup) -> Any:
        return {"open": self.open.heads_axis(), "sealed": dict.fromkeys(self._sealed_shapes(group), 2)}

    def _sealed_shapes(self, group: KVGroup) -> dict[str, jax.ShapeDtypeStruct]:
        keys = self.channels[0] if self.channels else group.head_dim
        check_rotation(self.key_rotation, keys)
        if self.channels is None:
            return self.layout.shapes(group.kv_heads, group.page_tokens, group.head_dim)
        if max(self.channels) > group.head_dim:
            raise ValueError(
                f"sealed pages cannot hold {max(self.channels)} of the {group.head_dim} channels of a head"
            )
        return self.layout.shapes(group.kv_heads, group.page_tokens, *self.channels)

    def pages_held(self, pages: int) -> tuple[int, ...]:
        # All pages but the newest are full, and a page is sealed as soon as it is full.
        return min(pages, self.sink_pages + self.residual_pages), max(pages - 1 - self.sink_pages, 0)

    # Writing

    def write_rows(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, rows: Rows) -> Pool:
        count, q_tokens, kv_heads, head_dim = k.shape
        k, v = (self._rounded(x).reshape(count * q_tokens, kv_heads, head_dim) for x in (k, v))
        return pool | {"open": self.open.put_tokens(pool["open"], layer, k, v, *rows.targets(q_tokens))}

    def write_tiles(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, tiles: Rows) -> Pool:
        """Tiles go to 16-bit pages where the table has one; a tile that completes a page makes a sealed page too."""
        inside, (k, v) = tiles.as_pages(*self._as_pages(k, v))
        # A tile that begins inside a page joins what the page holds.
        before = self.open.get_pages(pool["open"], layer, tiles.pages)
        full = [jnp.where(inside[:, None, :, None], x, old) for x, old in zip((k, v), before, strict=True)]
        return {
            "open": self.open.put_pages(pool["open"], layer, k, v, tiles.pages, inside),
            "sealed": self._store(pool["sealed"], layer, _tile_reads(tiles).seals, *full),
        }

    def seal(self, pool: Pool, src: jax.Array, dst: jax.Array) -> Pool:
        def one_layer(layer: jax.Array, sealed: Any) -> Any:
            return self._store(sealed, layer, dst, *self.open.get_pages(pool["open"], layer, src))

        layers = jax.tree.leaves(pool["open"])[0].shape[1]
        return pool | {"sealed": lax.fori_loop(0, layers, one_layer, pool["sealed"])}

    def _store(self, sealed: Any, layer: Layer, ids: Any, k: jax.Array, v: jax.Array) -> Any:
        """Sealed pages `ids` int32 [n] become what k, v [n, kv_heads, page_tokens, head_dim] encode to."""
        if self.channels is not None:
            k, v = (x[..., :held] for x, held in zip((k, v), self.channels, strict=True))
        codes = self.layout.encode(turned_keys(k, self.key_rotation), v)
        return {
            name: array.at[ids, layer].set(codes[name], mode="drop", unique_indices=True)
            for name, array in sealed.items()
        }

    def _as_pages(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[n, tokens, kv_heads, head_dim] each -> [n, kv_heads, tokens, head_dim] of the 16-bit type."""
        return self._rounded(k).swapaxes(1, 2), self._rounded(v).swapaxes(1, 2)

    def _rounded(self, x: jax.Array) -> jax.Array:
        # The pool's invariant is finite values: another row's masked read of this page computes 0 * value.
        return jnp.nan_to_num(x.astype(self.dtype), nan=0.0)

    # Reading

    def attend_rows(self, q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
        reads = _reads(rows)
        attend = self._attention(paged_decode, rows, spec)
        return merge(
            [
                self._attend_sealed(attend, q, pool["sealed"], layer, reads.sealed),
                attend(q, pool["open"], layer, reads.open, reads.places, self.open),
            ]
        )

    def attend_tiles(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, layer: Layer, tiles: Rows, spec: AttentionSpec
    ) -> Attended:
        reads = _tile_reads(tiles)
        near, table = self._near(pool["open"], layer, *self._as_pages(k, v), reads)
        attend = self._attention(paged_prefill, tiles, spec)
        return merge(
            [
                self._attend_sealed(attend, q, pool["sealed"], layer, reads.sealed),
                attend(q, near, 0, table, reads.places, self.open),
            ]
        )

    def _attend_sealed(self, attend: Attend, q: jax.Array, pool: Any, layer: Layer, table: jax.Array) -> Attended:
        head_dim = q.shape[-1]
        keys, values = self.channels or (head_dim, head_dim)
        q = turned_queries(q[..., :keys], self.key_rotation)
        part = attend(q, pool, layer, table, None, self.layout)
        if values == head_dim:
            return part
        missing = [(0, 0)] * (q.ndim - 1) + [(0, head_dim - values)]
        return part._replace(o=jnp.pad(part.o, missing))

    def _near(self, pool: Any, layer: Layer, k: jax.Array, v: jax.Array, reads: TileReads) -> tuple[Any, jax.Array]:
        """A pool of one layer with everything that tiles read in 16 bits, and their tables into it.

        Pages of this step that are sealed at once exist as activations only, k, v [tiles, kv_heads, page_tokens,
        head_dim]; they begin at their page's first token, because a page that was begun before is in the pool. One walk
        over one pool gives the bits that a decode row gets, for which all of these pages lie in `pool`.
        """
        count, entries = reads.open.shape
        taken = jax.tree.map(lambda x: x.at[reads.open.reshape(-1), layer].get(mode="clip")[:, None], pool)
        in_pool = jnp.arange(count * entries).reshape(count, entries)
        in_pool = jnp.where(reads.open == ABSENT, ABSENT, in_pool)
        in_pool = jnp.pad(in_pool, ((0, 0), (0, reads.places.shape[1] - entries)), constant_values=ABSENT)
        tiles = jnp.where(reads.tiles == ABSENT, ABSENT, reads.tiles + count * entries)
        near = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), taken, self.open.pool_of(k, v))
        return near, jnp.minimum(in_pool, tiles)

    def _attention(self, op: Callable[..., Attended], rows: Rows, spec: AttentionSpec) -> Attend:
        def attend(
            q: jax.Array, pool: Any, layer: Layer, table: jax.Array, places: jax.Array | None, layout: Layout
        ) -> Attended:
            return op(
                q,
                rows.positions,
                pool,
                layer,
                table,
                counts=rows.counts,
                places=places,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                layout=layout,
                backend=self.backend,
            )

        return attend


_PARTS = ("open", "sealed")


def _bytes(arrays: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _reads(rows: Rows) -> Reads:
    if rows.reads is None:
        raise ValueError("a format with two page classes needs its reading rule in build_meta(rules=...).")
    return rows.reads


def _tile_reads(tiles: Rows) -> TileReads:
    reads = _reads(tiles)
    if not isinstance(reads, TileReads):
        raise ValueError("attention of tiles was given the page lists of decode rows.")
    return reads
