"""Causal attention over whole sequences, without a KV cache: for training, evaluation and as a reference for parity."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.config import AttentionSpec
from jaxserve.models.layers.attention import Attend
from jaxserve.models.model import Model

QUERY_CHUNK = 256


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, chunk: int = QUERY_CHUNK
) -> jax.Array:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] of one sequence -> [T, heads, head_dim].

    Queries are taken `chunk` at a time against the keys that their windows reach, so scores take chunk * T floats and
    about half of the causal square is never computed. Scores and sums are float32.
    """
    length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(length, kv_heads, heads // kv_heads, head_dim)
    out = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first = 0 if spec.window is None else max(0, start + 1 - spec.window)
        out.append(_attend_rows(q[start:end], k[first:end], v[first:end], start - first, spec))
    return jnp.concatenate(out).reshape(length, heads, head_dim)


def _attend_rows(q: jax.Array, k: jax.Array, v: jax.Array, offset: int, spec: AttentionSpec) -> jax.Array:
    """q [Q, kv_heads, group, head_dim] at positions offset.. against keys at positions 0.."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = dot("qhgd,khd->hgqk", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    age = jnp.arange(q.shape[0])[:, None] + offset - jnp.arange(k.shape[0])
    visible = age >= 0 if spec.window is None else (age >= 0) & (age < spec.window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return dot("hgqk,khd->qhgd", weights.astype(v.dtype), v).astype(q.dtype)


def dense_attend(model: Model, batch: int = 1, chunk: int = QUERY_CHUNK) -> Attend:
    """An `attend` for `Model.forward` over `batch` sequences of equal length, laid end to end: T = batch * length.

    Needs no KV state: pass None. Activations stay two-dimensional, which keeps gradients fast on CPU.
    """

    def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        one = partial(causal_attention, spec=model.attention_spec(layer), chunk=chunk)
        if batch == 1:
            return kv, one(q, k, v)
        rows = (x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v))
        return kv, jax.vmap(one)(*rows).reshape(q.shape)

    return attend
