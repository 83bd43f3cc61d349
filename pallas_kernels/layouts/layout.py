"""How the bytes of a page become keys and values. Knows nothing of sequences, tables or masks.

A layout is all that the page walks need to know of a KV format: the two products of attention. For the reference walk
`fetch` reads some pages of one layer, and `scores` and `mix` are the products on what was fetched; a layout that
dequantizes does so in `fetch`, a few pages at a time, one that computes on codes does so in the products. For the
Triton walk `KernelLayout.in_kernel` gives the same products on one page of one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


class PageShape(NamedTuple):
    """Sizes of a pool's pages. `head_dim`: channels of a key, and of the queries that meet it; `value_dim`: of a value,
    and of what attention returns."""

    pages: int
    kv_heads: int
    page_tokens: int
    head_dim: int
    value_dim: int


class Layout(Protocol):
    """`ids` int32 [rows]; `q` float32 [rows, kv_heads, m, head_dim] with `m` query vectors that share a KV
    head; `p` float32 [rows, kv_heads, m, page_tokens]. Products depend, query vector by query vector, on that one
    alone."""

    def page_shape(self, pool: Any) -> PageShape: ...

    def prepare(self, q: jax.Array) -> Any:
        """What `scores` needs of q, made once per walk: a pytree of arrays that begin with q's [rows, kv_heads, m]."""
        ...

    def fetch(self, pool: Any, layer: int | jax.Array, ids: jax.Array) -> Any:
        """What `scores` and `mix` need of the pages `ids` of `layer`. Ids are in range."""
        ...

    def scores(self, q: Any, page: Any) -> jax.Array:
        """q K^T of a prepared q, float32 [rows, kv_heads, m, page_tokens]."""
        ...

    def mix(self, p: jax.Array, page: Any) -> jax.Array:
        """p V, float32 [rows, kv_heads, m, value_dim]; zeros where p is zero."""
        ...


@runtime_checkable
class KernelLayout(Layout, Protocol):
    """A layout that kernels can read too."""

    def arrays(self, pool: Any) -> tuple[jax.Array, ...]:
        """The arrays of `pool` that a kernel takes."""
        ...

    def dot_dtype(self, pool: Any, q: jax.Array) -> jnp.dtype:
        """Dtype in which a kernel takes `q`."""
        ...

    def parts(self, pool: Any) -> tuple[int, int]:
        """How many arrays side by side q and o are in a kernel, where an array cannot be cut: channels in order, each
        array a power of two wide."""
        ...

    def in_kernel(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool) -> KernelPages:
        """The pages of one layer and KV head inside a kernel. `refs`: of `arrays`, whole."""
        ...


class KernelPages(Protocol):
    """The products on one page and KV head, in a kernel. `q`: `parts` arrays [m, head_dim / parts] in `dot_dtype`."""

    def prepare(self, q: tuple[jax.Array, ...]) -> Any:
        """What `scores` needs of q, made once per walk."""
        ...

    def scores(self, q: Any, page: jax.Array) -> jax.Array:
        """q K^T of a prepared q, float32 [m, page_tokens]."""
        ...

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        """p V of float32 [m, page_tokens]: `parts` arrays float32 [m, value_dim / parts]."""
        ...


class TokenLayout(Layout, Protocol):
    """A layout whose tokens are written in final form, one by one."""

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        """A pool as `jax.ShapeDtypeStruct`s; the axes of each begin with pages and layers."""
        ...

    def heads_axis(self) -> Any:
        """Like `pool`: the axis that holds kv_heads."""
        ...

    def put_tokens(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> Any:
        """Token i of k, v [n, kv_heads, head_dim] goes to `places[i]` of page `pages[i]`; out of range drops it."""
        ...

    def put_pages(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> Any:
        """k, v [n, kv_heads, page_tokens, head_dim] go to pages int32 [n] where `inside` bool [n, page_tokens]; the
        other tokens stay as they are; a page out of range drops all of it."""
        ...


class FloatLayout(TokenLayout, Protocol):
    """A token layout that gives back the floats that were put into it, bit for bit."""

    def get_pages(self, pool: Any, layer: int | jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k, v [n, kv_heads, page_tokens, head_dim] of `dtype`, as they were put into pages int32 [n]; of a page out of
        range any values."""
        ...

    def pool_of(self, k: jax.Array, v: jax.Array) -> Any:
        """A pool of one layer whose pages are k, v [n, kv_heads, page_tokens, head_dim] of `dtype`."""
        ...


class SealedLayout(Layout, Protocol):
    """A layout whose pages are made whole, from the 16-bit keys and values of a full page, and never change.

    Its pool is a dict of arrays [pages, layers, *shape]; `kv_heads` is the first axis of each shape, so that one axis
    number shards all of them.
    """

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """What one layer of one page holds, by name. `value_dim` None: values have as many channels as keys. Raises
        ValueError where the algebra does not allow the sizes."""
        ...

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        """k [n, kv_heads, page_tokens, head_dim], v [n, kv_heads, page_tokens, value_dim] in the 16-bit page type ->
        arrays [n, *shape] as `shapes` says.

        Every bit of a page depends on its own keys and values alone.
        """
        ...
