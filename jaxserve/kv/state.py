"""The device's KV state: pools and block tables as one pytree. Knows no request and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kv.format import KVFormat
from jaxserve.kv.meta import ABSENT
from jaxserve.types import KVGroup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVState:
    """`pools[g]`: the arrays of group g, as its format lays them out. `tables[g]`: int32 [classes, slots, max_pages],
    the page ids of each slot, ABSENT where there is none. `formats[g]` is static. Donated to every step."""

    pools: tuple[Any, ...]
    tables: tuple[Any, ...]
    formats: tuple[KVFormat, ...] = field(metadata={"static": True})

    def with_pool(self, group: int, pool: Any) -> KVState:
        return replace(self, pools=(*self.pools[:group], pool, *self.pools[group + 1 :]))


def kv_shapes(
    groups: Sequence[KVGroup],
    group_formats: Sequence[KVFormat],
    pages: Sequence[tuple[int, ...]],
    slots: int,
    max_model_len: int,
) -> KVState:
    """A KVState of `jax.ShapeDtypeStruct`. `pages[g]`: pages of each class of group g."""
    pools = tuple(f.payload(g, n) for g, f, n in zip(groups, group_formats, pages, strict=True))
    tables = tuple(
        jax.ShapeDtypeStruct((len(n), slots, -(-max_model_len // g.page_tokens)), jnp.int32)
        for g, n in zip(groups, pages, strict=True)
    )
    return KVState(pools, tables, tuple(group_formats))


def allocate(shapes: KVState, shardings: KVState | None = None) -> KVState:
    """Zeroed pools and empty tables for `shapes`, each array created in place on its devices.

    `shardings`: a KVState of shardings, see `kv_shardings`; None puts everything on the default device.
    """

    def make() -> KVState:
        pools = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.pools)
        tables = tuple(jnp.full(x.shape, ABSENT, x.dtype) for x in shapes.tables)
        return KVState(pools, tables, shapes.formats)

    return jax.jit(make, out_shardings=shardings)()


def kv_shardings(shapes: KVState, groups: Sequence[KVGroup], mesh: jax.sharding.Mesh, axis: str | None) -> KVState:
    """Shardings for `shapes`: the kv_heads axis of every pool array over mesh axis `axis`, the rest replicated."""

    def sharded(array: jax.ShapeDtypeStruct, heads_axis: int) -> jax.sharding.NamedSharding:
        spec: list[str | None] = [None] * array.ndim
        spec[heads_axis] = axis
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    pools = tuple(
        jax.tree.map(sharded, pool, f.heads_axis(g))
        for pool, f, g in zip(shapes.pools, shapes.formats, groups, strict=True)
    )
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return KVState(pools, tuple(whole for _ in shapes.tables), shapes.formats)
