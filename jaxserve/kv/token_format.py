"""Formats that store a token in its final form when it is written: one page class. Knows no particular format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.kv.format import AttentionSpec, KVFormat, Layer, PageKind, Pool
from jaxserve.kv.meta import Rows
from jaxserve.types import KVGroup
from pallas_kernels.layouts import TokenLayout
from pallas_kernels.merge import Attended
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill


@dataclass(frozen=True)
class TokenFormat(KVFormat):
    """What is left to a format: its `layout`, which encodes, stores and reads."""

    backend: str | None = None
    """Of the attention ops, see `pallas_kernels.backends`; None takes the platform's."""

    @property
    def layout(self) -> TokenLayout:
        """The layout that the backend which reads it wants."""
        raise NotImplementedError

    def storable(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k and v [..., head_dim] as the layout may take them: what it stores must be finite."""
        return k, v

    def asking(self, q: jax.Array) -> jax.Array:
        """q [..., head_dim] as the stored keys are to be asked."""
        return q

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> Any:
        return self.layout.pool(pages[0], len(group.layers), group.kv_heads, group.page_tokens, group.head_dim)

    def kinds(self, group: KVGroup) -> tuple[PageKind, ...]:
        arrays = jax.tree.leaves(self.payload(group, (1,)))
        return (PageKind(self.name, sum(x.size * x.dtype.itemsize for x in arrays)),)

    def pages_held(self, pages: int) -> tuple[int, ...]:
        return (pages,)

    def heads_axis(self, group: KVGroup) -> Any:
        return self.layout.heads_axis()

    def write_rows(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, rows: Rows) -> Pool:
        count, q_tokens, kv_heads, head_dim = k.shape
        k, v = (x.reshape(count * q_tokens, kv_heads, head_dim) for x in self.storable(k, v))
        return self.layout.put_tokens(pool, layer, k, v, *rows.targets(q_tokens))

    def write_tiles(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, tiles: Rows) -> Pool:
        inside, (k, v) = tiles.as_pages(*(x.swapaxes(1, 2) for x in self.storable(k, v)))
        return self.layout.put_pages(pool, layer, k, v, tiles.pages, inside)

    def attend_rows(self, q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
        return self._attend(paged_decode, q, pool, layer, rows, spec)

    def attend_tiles(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, layer: Layer, tiles: Rows, spec: AttentionSpec
    ) -> Attended:
        return self._attend(paged_prefill, q, pool, layer, tiles, spec)

    def _attend(
        self, op: Callable[..., Attended], q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec
    ) -> Attended:
        return op(
            self.asking(q),
            rows.positions,
            pool,
            layer,
            rows.tables[0],
            counts=rows.counts,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            layout=self.layout,
            backend=self.backend,
        )
