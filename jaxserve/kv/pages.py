"""Programs that touch whole pages or table entries: grants, copies, staging. Bodies to be jitted with `kv` donated.

Every index array may be padded with ABSENT: scatters drop what is out of range.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxserve.kv.state import KVState


def grant(
    kv: KVState, group: int, classes: jax.Array, slots: jax.Array, indices: jax.Array, pages: jax.Array
) -> KVState:
    """Table entries [classes[i], slots[i], indices[i]] of `group` become pages[i]; all int32 [n], entries distinct.

    An entry whose slot is out of range is dropped.
    """
    table = kv.tables[group].at[classes, slots, indices].set(pages, mode="drop", unique_indices=True)
    tables = (*kv.tables[:group], table, *kv.tables[group + 1 :])
    return KVState(kv.pools, tables, kv.formats)


def gather_pages(pool: Any, pages: jax.Array) -> Any:
    """Staging copy of `pages` int32 [n] of a pool: the same pytree with n pages. An id out of range copies any page."""
    return jax.tree.map(lambda x: x.at[pages].get(mode="clip"), pool)


def scatter_pages(pool: Any, pages: jax.Array, staged: Any) -> Any:
    """Puts `staged`, as `gather_pages` returns it, into `pages`, distinct ids; ids out of range are dropped."""
    return jax.tree.map(lambda x, y: x.at[pages].set(y, mode="drop", unique_indices=True), pool, staged)


def copy_pages(pool: Any, src: jax.Array, dst: jax.Array) -> Any:
    """Page src[i] is copied to page dst[i]; int32 [n], dst distinct. A pair whose dst is out of range does nothing."""
    return scatter_pages(pool, dst, gather_pages(pool, src))
