"""Sealed layouts and formats for tests: one that loses nothing, one that rounds. Small, and nobody serves with them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.kv import SealedFormat, formats
from pallas_kernels.layouts import Dense, PageShape


class _AsFloats(Dense):
    """The products of attention on pages that `fetch` turns into floats."""

    def arrays(self, pool):
        raise NotImplementedError("tests attend by the reference walk")


@dataclass(frozen=True)
class Plain(_AsFloats):
    """Sealed pages hold keys and values as they are."""

    dtype: str = "float32"

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        dims = {"k": head_dim, "v": value_dim or head_dim}
        return {n: jax.ShapeDtypeStruct((kv_heads, page_tokens, dim), jnp.dtype(self.dtype)) for n, dim in dims.items()}

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        return {"k": k, "v": v}

    def page_shape(self, pool):
        pages, _, kv_heads, page_tokens, head_dim = pool["k"].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, pool["v"].shape[-1])

    def fetch(self, pool, layer, ids):
        return tuple(pool[name].at[ids, layer].get(mode="promise_in_bounds") for name in ("k", "v"))


@dataclass(frozen=True)
class Rounded(_AsFloats):
    """Codes of `levels` steps per channel over the page, for keys and values alike."""

    levels: int = 15

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        if value_dim not in (None, head_dim):
            raise ValueError("keys and values of this layout have the same channels")
        codes = jax.ShapeDtypeStruct((kv_heads, page_tokens, head_dim), jnp.uint8)
        edge = jax.ShapeDtypeStruct((kv_heads, 2, head_dim), jnp.float32)
        return {"k": codes, "v": codes, "k_edge": edge, "v_edge": edge}

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        (k, k_edge), (v, v_edge) = self._codes(k), self._codes(v)
        return {"k": k, "v": v, "k_edge": k_edge, "v_edge": v_edge}

    def _codes(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        low, high = jnp.min(x, axis=2, keepdims=True), jnp.max(x, axis=2, keepdims=True)
        step = jnp.where(high > low, (high - low) / self.levels, 1.0)
        return jnp.floor((x - low) / step + 0.5).astype(jnp.uint8), jnp.concatenate([step, low], axis=2)

    def page_shape(self, pool):
        pages, _, kv_heads, page_tokens, head_dim = pool["k"].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, pool["v"].shape[-1])

    def fetch(self, pool, layer, ids):
        def floats(name: str) -> jax.Array:
            codes, edge = (pool[n].at[ids, layer].get(mode="promise_in_bounds") for n in (name, name + "_edge"))
            return codes.astype(jnp.float32) * edge[:, :, :1] + edge[:, :, 1:]

        return floats("k"), floats("v")


@formats.register("test-plain")
@dataclass(frozen=True)
class PlainFormat(SealedFormat):
    """Two classes that hold the same: equal to dense float32 in every result."""

    dtype: str = "float32"

    @property
    def layout(self) -> Plain:
        return Plain(self.dtype)


@formats.register("test-rounded")
@dataclass(frozen=True)
class RoundedFormat(SealedFormat):
    """Four bits a value once a page is sealed."""

    @property
    def layout(self) -> Rounded:
        return Rounded()


@formats.register("test-rounded-f32")
@dataclass(frozen=True)
class RoundedFloatsFormat(RoundedFormat):
    """The same beside pages of float32: what is read unsealed is exact."""

    dtype: str = "float32"
