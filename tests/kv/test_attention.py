"""attend_layer against dense attention in float64: any mix of chunks, tiles and decode rows gives the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kv import ABSENT, KVState, allocate, attend_layer, build_meta, formats, kv_shapes
from jaxserve.kv.pages import grant
from jaxserve.types import PAGE_TOKENS, KVGroup
from pallas_kernels.chunk_attention.api import _OPS as chunk_ops
from pallas_kernels.paged_decode.api import _OPS as decode_ops
from pallas_kernels.paged_prefill.api import _OPS as prefill_ops
from tests.kernels.cases import QUICKLY

HEADS, KV_HEADS, DIM, LAYERS, SLOTS, PAGES = 4, 2, 64, 2, 5, 24
LENGTH = 300


class Spec(NamedTuple):
    scale: float = DIM**-0.5
    window: int | None = None
    softcap: float | None = None


PLAIN = Spec()
Step = Callable[..., tuple[KVState, jax.Array]]


class Work(NamedTuple):
    slot: int
    start: int
    count: int


def new_state(dtype: str = "f32", **options) -> KVState:
    """Slots 1 and 3 have pages for LENGTH tokens each, in scattered order."""
    group = KVGroup(layers=tuple(range(LAYERS)), kv_heads=KV_HEADS, head_dim=DIM)
    kv = allocate(kv_shapes([group], [formats.get(dtype, **options)], [(PAGES,)], SLOTS, LENGTH))
    need = -(-LENGTH // PAGE_TOKENS)
    ids = np.random.default_rng(0).permutation(PAGES)[: 2 * need].astype(np.int32)
    slots = np.repeat(np.array([1, 3], np.int32), need)
    indices = np.tile(np.arange(need, dtype=np.int32), 2)
    return grant(kv, 0, jnp.zeros(2 * need, jnp.int32), slots, indices, ids)


@functools.cache
def sequence(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [LENGTH, heads, dim], numbers that bfloat16 holds, k and v [LENGTH, kv_heads, dim]."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((LENGTH, h, DIM)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
    return q.astype(jnp.bfloat16).astype(np.float32), k, v


@functools.cache
def dense(seed: int, window: int | None = None) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in sequence(seed))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    s = np.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
    i = np.arange(LENGTH)
    seen = i[None] <= i[:, None]
    if window:
        seen &= i[None] > i[:, None] - window
    w = np.where(seen, np.exp(s - s.max(-1, keepdims=True)), 0)
    return np.einsum("hqk,khd->qhd", w / w.sum(-1, keepdims=True), v)


def _step(kv: KVState, q, k, v, rows, tiles, *, spec: Spec):
    meta = build_meta(kv.tables, *rows, *tiles)
    return attend_layer(kv, 0, 1, q, k, v, meta, spec)


step = jax.jit(_step, static_argnames="spec", donate_argnums=0)
quick_step = jax.jit(_step, static_argnames="spec", donate_argnums=0, compiler_options=QUICKLY)
"""Where values are compared, not bits."""


def run(kv: KVState, rows: Sequence[Work], tiles: Sequence[Work], width: int, spec: Spec = PLAIN, step: Step = step):
    """One step in a bucket of 3 rows of `width` tokens and at least 2 tiles; padding is NaN. Slot s holds sequence s.

    Returns the state and {(slot, position): output}.
    """
    flat: list[list[np.ndarray]] = [[], [], []]
    ints = []
    for works, bucket, tokens in ((rows, 3, width), (tiles, max(2, len(tiles)), PAGE_TOKENS)):
        if not works:
            ints.append((np.zeros(0, np.int32),) * 3)
            continue
        padded = [*works, *[Work(SLOTS, 7, 0)] * (bucket - len(works))]
        ints.append(tuple(np.array(column, np.int32) for column in zip(*padded, strict=True)))
        for work in padded:
            for out, x in zip(flat, sequence(work.slot), strict=True):
                block = np.full((tokens, *x.shape[1:]), np.nan, np.float32)
                block[: work.count] = x[work.start : work.start + work.count]
                out.append(block)
    kv, out = step(kv, *(np.concatenate(x) for x in flat), *ints, spec=spec)
    o = np.asarray(out)
    got, at = {}, 0
    for works, bucket, tokens in ((rows, 3, width), (tiles, max(2, len(tiles)), PAGE_TOKENS)):
        for i, work in enumerate(works):
            for t in range(work.count):
                got[work.slot, work.start + t] = o[at + i * tokens + t]
        at += bucket * tokens if works else 0
    assert np.all(np.isfinite(o))
    return kv, got


def generate(kv: KVState, spec: Spec = PLAIN, step: Step = step) -> dict[tuple[int, int], np.ndarray]:
    """Slot 1 by chunks and decode rows of 1 and 2 tokens, slot 3 beside it by other chunks."""
    got = {}
    for rows, tiles in [
        ((), (Work(1, 0, 64), Work(3, 0, 40))),
        ((), (Work(1, 64, 64), Work(3, 40, 24))),
        ((Work(1, 128, 2),), (Work(3, 64, 64), Work(3, 128, 64))),
        ((Work(1, 130, 1),), (Work(3, 192, 64), Work(3, 256, 30))),
        *(((Work(1, p, 1),), ()) for p in range(131, 192)),
        ((Work(3, 286, 2), Work(1, 192, 1)), ()),
        ((Work(1, 193, 2), Work(3, 288, 1)), ()),
    ]:
        kv, new = run(kv, rows, tiles, 2, spec, step)
        got |= new
    return got


@pytest.mark.parametrize(
    ("dtype", "window", "tolerance"),
    [("f32", None, 2e-6), ("f32", 70, 2e-6), ("bf16", None, 2e-2), ("int8", None, 3e-2), ("fp8_e4m3", 70, 1.5e-1)],
)
def test_equals_dense_attention(dtype: str, window: int | None, tolerance: float) -> None:
    equals_dense_attention(new_state(dtype), window, tolerance)


@pytest.mark.parametrize("window", [None, 70])
def test_chunks_on_cudnn_and_the_pages_before_them_merge(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Backend cudnn, which no CPU has, with the definitions of the ops that it consists of; windows are not its own."""
    monkeypatch.setitem(chunk_ops, "cudnn", chunk_ops["reference"])
    for ops in (prefill_ops, decode_ops):
        monkeypatch.setitem(ops, "cudnn", ops["reference"])
    quick_step.clear_cache()
    equals_dense_attention(new_state("bf16", backend="cudnn"), window, 2e-2)
    steps = [
        (Work(1, 0, 64), Work(1, 64, 64), Work(3, 0, 64), Work(3, 64, 6)),
        (Work(1, 128, 64), Work(1, 192, 64), Work(1, 256, 30), Work(3, 70, 58), Work(3, 128, 64), Work(3, 192, 5)),
    ]
    found = {}
    for backend in ("cudnn", "reference"):
        kv, found[backend] = new_state("bf16", backend=backend), {}
        for tiles in steps:
            kv, new = run(kv, (), tiles, 1, Spec(window=window), quick_step)
            found[backend] |= new
    assert len(found["cudnn"]) == 286 + 197
    for at, o in found["cudnn"].items():
        np.testing.assert_allclose(o, found["reference"][at], atol=5e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 3e-2), ("fp8_e4m3", 1.5e-1)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_rotated_keys_meet_rotated_queries(dtype: str, tolerance: float, backend: str | None) -> None:
    equals_dense_attention(new_state(dtype, key_rotation="hadamard", backend=backend), None, tolerance)


def equals_dense_attention(kv: KVState, window: int | None, tolerance: float) -> None:
    got = generate(kv, Spec(window=window), quick_step)
    assert len(got) == 195 + 289
    for (slot, position), o in got.items():
        np.testing.assert_allclose(o, dense(slot, window)[position], atol=tolerance)


@pytest.mark.parametrize("backend", ["invariant", "tiled"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [("f32", {}), ("int8", {}), ("fp8_e4m3", {}), ("fp8_e4m3", {"key_rotation": "hadamard"})],
    ids=["f32", "int8", "fp8", "fp8 rotated"],
)
def test_batch_invariant_bits(dtype: str, options: dict[str, Any], backend: str) -> None:
    """Chunks, decode rows and crowds change no bit."""
    got = generate(new_state(dtype, backend=backend, **options))
    kv, whole = new_state(dtype, backend=backend, **options), {}
    for start in range(0, 256, 128):
        kv, new = run(kv, (), (Work(3, start, 64), Work(3, start + 64, 64)), 1)
        whole |= new
    for key, o in whole.items():
        assert np.array_equal(o, got[key])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_writes_touch_their_positions_only(dtype: str) -> None:
    kv = new_state(dtype)
    layout = kv.formats[0].layout
    rng = np.random.default_rng(5)

    def noise(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.integers(0, 1 << 14, x.nbytes // 2, np.uint16).view(x.dtype).reshape(x.shape))

    pool = jax.tree.map(noise, kv.pools[0])

    def read(pool: Any) -> np.ndarray:
        """[pages, layers, 2, kv_heads, page_tokens, head_dim]"""
        layers = [layout.get_pages(pool, layer, jnp.arange(PAGES)) for layer in range(LAYERS)]
        return np.stack([np.stack([k, v], axis=1) for k, v in layers], axis=1)

    before, table = read(pool), np.asarray(kv.tables[0])[0]
    kv, _ = run(replace(kv, pools=(pool,)), (Work(1, 62, 2), Work(3, 5, 1)), (Work(3, 70, 50),), 2)
    written = {(1, 62), (1, 63), (3, 5), *((3, p) for p in range(70, 120))}
    for slot, position in written:
        expected = np.stack([x[position] for x in sequence(slot)[1:]])
        place = (table[slot, position // PAGE_TOKENS], 1, slice(None), slice(None), position % PAGE_TOKENS)
        before[place] = np.asarray(jnp.asarray(expected).astype(kv.formats[0].dtype))
    assert np.array_equal(before, read(kv.pools[0]))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_codes_are_written_to_their_positions_only(dtype: str) -> None:
    kv = new_state(dtype)
    layout = kv.formats[0].layout
    rng = np.random.default_rng(5)
    pool = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 100, x.shape), x.dtype), kv.pools[0])

    def read(pool: Any) -> np.ndarray:
        """[pages, layers, kv_heads, page_tokens, all that is stored of a token and head]"""
        pages = [layout.fetch(pool, layer, jnp.arange(PAGES)) for layer in range(LAYERS)]
        return np.stack([np.concatenate([k.swapaxes(2, 3), v, s.swapaxes(2, 3)], axis=-1) for k, v, s in pages], axis=1)

    before, table = read(pool), np.asarray(kv.tables[0])[0]
    kv, _ = run(replace(kv, pools=(pool,)), (Work(1, 62, 2), Work(3, 5, 1)), (Work(3, 70, 50),), 2)
    after = read(kv.pools[0])
    for slot, position in {(1, 62), (1, 63), (3, 5), *((3, p) for p in range(70, 120))}:
        place = (table[slot, position // PAGE_TOKENS], 1, slice(None), position % PAGE_TOKENS)
        k, v, sides = np.split(after[place], [DIM, 2 * DIM], axis=-1)
        zeros = sides[:, 2:] if sides.shape[1] == 4 else np.zeros_like(sides)
        for x, codes, index in ((sequence(slot)[1][position], k, 0), (sequence(slot)[2][position], v, 1)):
            stored = codes * sides[:, index, None] + zeros[:, index, None]
            np.testing.assert_allclose(stored, x, atol=np.abs(x).max() / (16 if dtype == "fp8_e4m3" else 200))
        before[place] = after[place]
    assert np.array_equal(before, after)


@pytest.mark.parametrize("dtype", ["f32", "int8", "fp8_e4m3"])
def test_a_pool_stays_finite(dtype: str) -> None:
    """What one sequence writes cannot reach another, whatever it is."""
    kv = new_state(dtype)
    q, k, v = (jnp.ones((1, h, DIM)) for h in (HEADS, KV_HEADS, KV_HEADS))
    none = (jnp.zeros(0, jnp.int32),) * 3
    kv, _ = step(
        kv, q, k * jnp.nan, v * jnp.inf, tuple(jnp.array([i], jnp.int32) for i in (1, 0, 1)), none, spec=Spec()
    )
    assert kv.formats[0].finite(jax.tree.map(np.asarray, kv.pools[0]))


def test_a_slot_without_pages_writes_nothing() -> None:
    kv = new_state()
    assert np.all(np.asarray(kv.tables[0])[0, 2] == ABSENT)
    kv, _ = run(kv, (Work(2, 3, 1),), (Work(4, 64, 64),), 1)
    assert not any(np.any(x) for x in jax.tree.leaves(kv.pools[0]))


def test_tokens_that_do_not_fit_are_named() -> None:
    kv = new_state()
    meta = build_meta(kv.tables, *(jnp.zeros(0, jnp.int32),) * 3, *(jnp.zeros(1, jnp.int32),) * 3)
    with pytest.raises(ValueError, match="3 tokens do not fit a step with 64 tile tokens"):
        attend_layer(kv, 0, 0, *(jnp.zeros((3, h, DIM)) for h in (4, 2, 2)), meta, Spec())


def test_layers_under_a_scan() -> None:
    """A traced layer index gives the same pool and outputs as unrolled layers."""
    kv = new_state()
    q, k, v = (x[:64] for x in sequence(1))
    tiles = tuple(jnp.array([i], jnp.int32) for i in (1, 0, 64))

    def layer(kv: KVState, index: int | jax.Array) -> tuple[KVState, jax.Array]:
        meta = build_meta(kv.tables, *(jnp.zeros(0, jnp.int32),) * 3, *tiles)
        return attend_layer(kv, 0, index, q, k + index, v, meta, PLAIN)

    scanned, outs = jax.jit(lambda kv: jax.lax.scan(layer, kv, jnp.arange(LAYERS)))(kv)
    for index in range(LAYERS):
        kv, out = layer(kv, index)
        np.testing.assert_allclose(out, outs[index], atol=2e-6)
    assert all(np.array_equal(x, y) for x, y in zip(kv.pools[0], scanned.pools[0], strict=True))
