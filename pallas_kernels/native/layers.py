"""The halves of a decoder layer on a CPU: the faces of heads.c and feed_forward.c.

Each is one call for what XLA would run as ten operations: threads go from one to the next without sleeping, and rows
that are padding are not computed. A row's bits depend on that row alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import build
from pallas_kernels.native.products import LANES, PANEL, kind

_MAX_HEAD_DIM = 256


def project_heads(
    x: jax.Array,
    live: jax.Array,
    read: jax.Array,
    norm: jax.Array,
    eps: float,
    qkv: jax.Array,
    bias: jax.Array | None,
    qk_norm: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    heads: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """RMS norm, projection, norms of queries and keys, RoPE.

    float32 x [T, hidden], bool live and read [T], norm [hidden]; qkv: panels of
    [hidden, kv_heads * (group + 2) * head_dim], the queries of a KV head before its key and its value; bias of as many
    columns; qk_norm [2, head_dim], of queries and of keys; cos, sin [T, head_dim / 2]; heads: of queries, of keys
    -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]; zeros where not live, queries also where not read.
    None where there is no compiler, or for sizes that are no multiple of the kernel's.
    """
    query_heads, kv_heads = heads
    rows, hidden = x.shape
    head_dim = 2 * cos.shape[-1]
    columns = (query_heads + 2 * kv_heads) * head_dim
    if hidden % LANES or head_dim % PANEL or head_dim > _MAX_HEAD_DIM or qkv.shape[0] * PANEL != columns:
        return None
    target = build.target("project_heads", "heads.c", kind(qkv))
    if target is None:
        return None
    shapes = (rows, query_heads, head_dim), *[(rows, kv_heads, head_dim)] * 2, (rows, hidden)
    nothing = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    bias, qk_norm = (nothing if each is None else each for each in (bias, qk_norm))
    q, k, v, _ = call(x, live, read, norm, qkv, bias, qk_norm, cos, sin, eps=np.float64(eps))
    return q, k, v


def feed_forward(
    x: jax.Array,
    read: jax.Array,
    heads: jax.Array,
    out: jax.Array,
    norm: jax.Array,
    eps: float,
    gate_up: jax.Array,
    down: jax.Array,
    block: int,
) -> jax.Array | None:
    """x + heads out = y; y + down(silu(gate) * up of the RMS norm of y).

    float32 x [T, hidden], bool read [T], heads [T, inner]; panels of out [inner, hidden], of gate_up
    [hidden, 2 * size] in blocks of `block` gate columns and as many up columns, of down [size, hidden]; norm [hidden]
    -> [T, hidden], zeros where not read. None where there is no compiler, or for sizes that are no multiple of the
    kernel's.
    """
    rows, hidden = x.shape
    size = down.shape[1]
    if hidden % PANEL or block % PANEL or len({out.dtype, gate_up.dtype, down.dtype}) > 1:
        return None
    target = build.target("feed_forward", "feed_forward.c", kind(out))
    if target is None:
        return None
    shapes = (rows, hidden), (rows, hidden), (rows, size)
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    y, *_ = call(x, read, heads, out, norm, gate_up, down, block=np.int64(block), eps=np.float64(eps))
    return y
