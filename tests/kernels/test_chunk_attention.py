"""Attention of chunks among themselves: the definition against float64, and what cuDNN is given and gives back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels.chunk_attention import chunk_attention, unfit
from pallas_kernels.merge import NO_KEY, Attended, normalize

PAGE = 32
CASES = {
    "two chunks, padding, a tile of none": ((0, 0, 2, -1, 4, -1), (32, 20, 7, 32, 32, 0)),
    "one chunk": ((0, 0, 0), (32, 32, 32)),
    "one tile": ((0,), (11,)),
    "nothing": ((-1, -1), (0, 0)),
}
HEADS = {"groups of 4": (8, 2), "no groups": (2, 2)}


def inputs(counts: tuple[int, ...], heads: int, kv_heads: int, dtype: Any) -> tuple[jax.Array, ...]:
    draw = np.random.default_rng(0)
    shapes = ((len(counts), PAGE, each, 16) for each in (heads, kv_heads, kv_heads))
    return tuple(jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes)


def expected(
    q: jax.Array, k: jax.Array, v: jax.Array, first: tuple[int, ...], counts: tuple[int, ...]
) -> dict[tuple[int, int, int], tuple[np.ndarray, float]]:
    """Output and log of the sums in float64 by tile, token and head, where there are any."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    found = {}
    for tile, begin in enumerate(first):
        for token in range(counts[tile] if begin >= 0 else 0):
            keys = [(t, i) for t in range(begin, tile + 1) for i in range(counts[t]) if (t, i) <= (tile, token)]
            for head in range(q.shape[2]):
                kv = head * k.shape[2] // q.shape[2]
                s = np.array([k[t, i, kv] @ q[tile, token, head] * 0.25 for t, i in keys])
                w = np.exp(s)
                o = w @ np.array([v[t, i, kv] for t, i in keys]) / w.sum()
                found[tile, token, head] = o, float(np.log(w.sum()))
    return found


def check(part: Attended, exact: dict[tuple[int, int, int], tuple[np.ndarray, float]], tolerance: float) -> None:
    o, log_sums, m, sums = (
        np.asarray(x) for x in (normalize(part), part.m + jnp.log(jnp.maximum(part.l, 1e-30)), part.m, part.l)
    )
    for at in np.ndindex(m.shape):
        if at in exact:
            np.testing.assert_allclose(o[at], exact[at][0], atol=tolerance)
            assert log_sums[at] == pytest.approx(exact[at][1], abs=tolerance)
        else:
            assert (m[at], sums[at], np.abs(o[at]).max()) == (np.float32(NO_KEY), 0, 0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_close_to_float64(case: str, heads: str) -> None:
    first, counts = CASES[case]
    q, k, v = inputs(counts, *HEADS[heads], jnp.float32)
    part = chunk_attention(q, k, v, jnp.array(first), jnp.array(counts), scale=0.25, backend="reference")
    check(part, expected(q, k, v, first, counts), 2e-6)


def cudnn_itself(q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, return_residual, q_offsets=None, kv_offsets=None):
    """What cuDNN does, by its documentation: sequence i has so many tokens from so many numbers on. Outputs in q's
    dtype; the log of the sums [sequences, heads, tokens] by token of the sequence. Elsewhere it writes nothing."""
    assert return_residual and mask_type == fused.MaskType.PADDING_CAUSAL
    _, tokens, heads, dim = q.shape
    if q_offsets is None:
        starts = kv_starts = np.zeros(1, np.int64)
    else:
        fixed = fused._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
        q_seqlen, kv_seqlen, starts, kv_starts = (np.asarray(x).reshape(-1) for x in fixed)
    assert np.array_equal(q_seqlen, kv_seqlen)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    flat_k, flat_v = k.reshape(-1), v.reshape(-1)
    o, stats = np.full(q.shape, np.nan), np.full((len(q_seqlen), heads, tokens), np.nan, np.float32)
    for number, length in enumerate(q_seqlen):
        for token in range(length):
            at = starts[number] // (heads * dim) + token
            for head in range(heads):
                kv = head * k.shape[2] // heads
                reach = [kv_starts[number] + (i * k.shape[2] + kv) * dim for i in range(token + 1)]
                keys, values = (np.array([x[begin : begin + dim] for begin in reach]) for x in (flat_k, flat_v))
                w = np.exp(scale * keys @ q[0, at, head])
                o[0, at, head], stats[number, head, token] = w @ values / w.sum(), np.log(w.sum())
    return jnp.asarray(o, jnp.bfloat16), jnp.asarray(stats)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_told_where_chunks_are(case: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: cuDNN's part of the contract is played in numpy, that of jax, which counts in other units from
    version to version, is jax's own."""
    monkeypatch.setattr(fused, "dot_product_attention", cudnn_itself)
    first, counts = CASES[case]
    q, k, v = inputs(counts, *HEADS[heads], jnp.bfloat16)
    part = chunk_attention(q, k, v, jnp.array(first), jnp.array(counts), scale=0.25, backend="cudnn")
    check(part, expected(q, k, v, first, counts), 1e-2)


def test_what_does_not_fit() -> None:
    assert unfit(jnp.bfloat16, 64, 32, 8, 128) is None
    assert "16-bit numbers" in unfit(jnp.float32, 64, 32, 8, 128)
    assert "up to 256 channels" in unfit(jnp.bfloat16, 64, 8, 8, 512)
    assert "offsets of 3 KV heads" in unfit(jnp.bfloat16, 32, 9 * 3, 3, 64)
    q, k, _ = inputs((PAGE,), 4, 2, jnp.float32)
    with pytest.raises(ValueError, match="keys"):
        chunk_attention(q, k, q, jnp.zeros(1, int), jnp.ones(1, int), scale=1.0, backend="reference")
    with pytest.raises(ValueError, match=r"must be \[1\]"):
        chunk_attention(q, k, k, jnp.zeros(2, int), jnp.ones(1, int), scale=1.0, backend="reference")
