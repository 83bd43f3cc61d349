"""HACK (homomorphic KV compression): attention on integer codes, without dequantizing a page.

q and p are quantized to 8 bits, the products run on integers, and sums of codes stored when the page was sealed put
back what the offsets of both sides contribute (summation elimination). With y = sy cy + center for q or p and
x = sx cx + mid for K or V, a product over one partition of channels or tokens is exact on the codes:

    sum x y = sx (sy sum(cx cy) + center sum(cx)) + mid sum(y)

cx are signed codes, the stored ones less half the levels: rounding y costs its error times cx, which signs halve.

Only rounding q and p to 8 bits loses anything, and it is done vector by vector. Integer sums stay below 2^24, so the
reference may form them in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layouts.packed import PackedLayout
from pallas_kernels.layouts.packed_kernel import HackFoldedPages, HackPartitionedPages, PackedRefs, parts
from pallas_kernels.layouts.packing import from_bits, half, quantize8


@dataclass(frozen=True)
class _Hack(PackedLayout):
    """Adds the sums of signed codes: `k_sum` [head_dim / group, page_tokens] over the channels of a partition, `v_sum`
    [value_dim] over the tokens of the page; int8 where they fit, else int16."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*super().names, "k_sum", "v_sum")

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = super().shapes(kv_heads, page_tokens, head_dim, value_dim)
        k_sum = (kv_heads, head_dim // self.group, page_tokens)
        shapes["k_sum"] = jax.ShapeDtypeStruct(k_sum, self._sum_dtype(self.group))
        shapes["v_sum"] = jax.ShapeDtypeStruct((kv_heads, value_dim or head_dim), self._sum_dtype(page_tokens))
        return shapes

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        page = super().encode(k, v)
        k_codes, v_codes = self._signed(page)
        k_sum = jnp.sum(k_codes.reshape(*k.shape[:-1], -1, self.group), axis=-1).swapaxes(-1, -2)
        v_sum = jnp.sum(v_codes, axis=-2)
        page["k_sum"] = k_sum.astype(self._sum_dtype(self.group))
        page["v_sum"] = v_sum.astype(self._sum_dtype(v.shape[-2]))
        return page

    def fetch(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> Fetched:
        page = self.gather(pool, layer, ids)
        k_scale, k_min, v_scale, v_min = (from_bits(page[name]) for name in ("k_scale", "k_min", "v_scale", "v_min"))
        k_sum, v_sum = (page[name].astype(jnp.float32) for name in ("k_sum", "v_sum"))
        k_mid, v_mid = k_min + half(self.bits) * k_scale, v_min + half(self.bits) * v_scale
        k, v = self._signed(page)
        return Fetched(k, v, k_scale, k_mid, k_sum, v_scale, v_mid, v_sum)

    def parts(self, pool: dict[str, jax.Array]) -> tuple[int, int]:
        return parts(self, pool)

    def _partitions(self, head_dim: int) -> list[tuple[int, slice]]:
        """Number and channels of each partition."""
        return [(start // self.group, slice(start, start + self.group)) for start in range(0, head_dim, self.group)]

    def _signed(self, page: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Signed codes of K and V, float32 [n, kv_heads, page_tokens, head_dim and value_dim]."""
        k, v = self.codes(page)
        return k - half(self.bits), v - half(self.bits)

    def _sum_dtype(self, terms: int) -> jnp.dtype:
        """For sums of `terms` signed codes, which lie in [-terms * half, terms * half)."""
        return jnp.dtype(jnp.int8 if terms * half(self.bits) <= 128 else jnp.int16)


class Fetched(NamedTuple):
    """Pages as float32 [n, kv_heads, ...]: codes [page_tokens, head_dim or value_dim], and what belongs to them."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    k_mid: jax.Array
    k_sum: jax.Array
    v_scale: jax.Array
    v_mid: jax.Array
    v_sum: jax.Array


@dataclass(frozen=True)
class HackFolded(_Hack):
    """Form F, KIVI's axes: keys per channel, values per token. Their scales vary along the inner product, so they are
    folded into q and p before these are quantized: q once per page and partition, p once per page and partition.

    Bytes per page and KV head at 64 tokens, head_dim 128, 2 bits: 5,376 (16.4 % of bfloat16).
    """

    def prepare(self, q: jax.Array) -> jax.Array:
        return q

    def scores(self, q: jax.Array, page: Fetched) -> jax.Array:
        s = jnp.einsum("rhmd,rhd->rhm", q, page.k_mid, precision="highest")[..., None]
        for partition, channels in self._partitions(q.shape[-1]):
            folded = q[..., channels] * page.k_scale[:, :, None, channels]
            (codes,), scale, center = quantize8(folded)
            s += scale * _dot(codes, page.k[..., channels]) + center * page.k_sum[:, :, None, partition]
        return s

    def mix(self, p: jax.Array, page: Fetched) -> jax.Array:
        mixed = []
        for partition, channels in self._partitions(page.v.shape[-1]):
            (codes,), scale, center = quantize8(p * page.v_scale[:, :, None, partition])
            o = scale * _dot(codes, page.v[..., channels].swapaxes(-1, -2))
            o += center * page.v_sum[:, :, None, channels]
            mixed.append(
                o + jnp.einsum("rhms,rhs->rhm", p, page.v_mid[:, :, partition], precision="highest")[..., None]
            )
        return jnp.concatenate(mixed, axis=-1)

    def in_kernel(
        self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool
    ) -> HackFoldedPages:
        return HackFoldedPages(PackedRefs.of(self, refs, layer, head, interpret))


class PreparedQ(NamedTuple):
    """q in 8 bits, one scale for each partition: codes int8 [rows, kv_heads, m, head_dim], the rest float32
    [rows, kv_heads, m, head_dim / group]."""

    codes: jax.Array
    scale: jax.Array
    center: jax.Array
    total: jax.Array


@dataclass(frozen=True)
class HackPartitioned(_Hack):
    """Form P: keys per token, values per channel, so that every scale is constant along the inner product. q is
    quantized once per walk and p once per page, but keys with outlier channels lose more than in form F.

    Bytes as in form F.
    """

    k_axis = "token"
    v_axis = "channel"

    def prepare(self, q: jax.Array) -> PreparedQ:
        made = [quantize8(q[..., channels]) for _, channels in self._partitions(q.shape[-1])]
        total = [jnp.sum(q[..., channels], axis=-1, keepdims=True) for _, channels in self._partitions(q.shape[-1])]
        return PreparedQ(
            jnp.concatenate([codes for (codes,), _, _ in made], axis=-1),
            jnp.concatenate([scale for _, scale, _ in made], axis=-1),
            jnp.concatenate([center for _, _, center in made], axis=-1),
            jnp.concatenate(total, axis=-1),
        )

    def scores(self, q: PreparedQ, page: Fetched) -> jax.Array:
        s = jnp.zeros((), jnp.float32)
        for partition, channels in self._partitions(page.k.shape[-1]):
            own = slice(partition, partition + 1)
            k_scale, k_mid, k_sum = (meta[:, :, own] for meta in (page.k_scale, page.k_mid, page.k_sum))
            product = q.scale[..., own] * _dot(q.codes[..., channels], page.k[..., channels])
            s += k_scale * (product + q.center[..., own] * k_sum) + k_mid * q.total[..., own]
        return s

    def mix(self, p: jax.Array, page: Fetched) -> jax.Array:
        (codes,), scale, center = quantize8(p)
        product = scale * _dot(codes, page.v.swapaxes(-1, -2)) + center * page.v_sum[:, :, None]
        return page.v_scale[:, :, None] * product + page.v_mid[:, :, None] * jnp.sum(p, axis=-1, keepdims=True)

    def in_kernel(
        self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool
    ) -> HackPartitionedPages:
        return HackPartitionedPages(PackedRefs.of(self, refs, layer, head, interpret))


def hack(bits: int, form: Literal["F", "P"] = "F", group: int = 64) -> HackFolded | HackPartitioned:
    """The homomorphic layout of `form`. ValueError for a form that there is not."""
    if form not in ("F", "P"):
        raise ValueError(f"HACK has the forms F and P, not {form!r}.")
    return HackFolded(bits, group) if form == "F" else HackPartitioned(bits, group)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T of integers, int8 and float32, exact: [.., m, n], [.., s, n] -> [.., m, s]."""
    return jnp.einsum("rhmn,rhsn->rhms", a.astype(jnp.float32), b, precision="highest")
