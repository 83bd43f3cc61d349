"""Inputs of the paged attention ops and their definition in numpy, float64."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

PAGE = 64


@dataclass(frozen=True)
class Case:
    """Rows at `positions` (of the first query; -1 is padding) with `counts` real queries each, over permuted pages."""

    positions: tuple[int, ...]
    counts: tuple[int, ...]
    q_tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"
    spare_pages: int = 3
    layers: int = 2
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Inputs:
    q: jax.Array
    positions: jax.Array
    counts: jax.Array
    pool: jax.Array
    tables: jax.Array

    def take(self, rows: list[int]) -> Inputs:
        index = jnp.array(rows)
        return Inputs(self.q[index], self.positions[index], self.counts[index], self.pool, self.tables[index])


def inputs(case: Case) -> Inputs:
    """Every row has exactly the pages it needs; further table entries are absent, as ids out of range."""
    rng = np.random.default_rng(case.seed)
    rows = len(case.positions)
    needed = [0 if p < 0 else (p + c - 1) // PAGE + 1 for p, c in zip(case.positions, case.counts, strict=True)]
    pages = sum(needed) + case.spare_pages
    ids = rng.permutation(pages)
    tables = np.full((rows, max(needed) + 2), 1 << 30, np.int32)
    for row, count in enumerate(needed):
        tables[row, :count], ids = ids[:count], ids[count:]
    pool = rng.standard_normal((pages, case.layers, 2, case.kv_heads, PAGE, case.head_dim))
    q = rng.standard_normal((rows, case.q_tokens, case.heads, case.head_dim))
    return Inputs(
        jnp.asarray(q, case.dtype),
        jnp.asarray(case.positions, jnp.int32),
        jnp.asarray(case.counts, jnp.int32),
        jnp.asarray(pool, case.dtype),
        jnp.asarray(tables),
    )


def expected(case: Case, given: Inputs, layer: int) -> np.ndarray:
    """Softmax attention, float64 [rows, q_tokens, heads, head_dim]; zeros for what sees nothing."""
    q, pool = np.asarray(given.q, np.float64), np.asarray(given.pool, np.float64)
    tables = np.asarray(given.tables)
    out = np.zeros(q.shape)
    group = case.heads // case.kv_heads
    for row, (start, count) in enumerate(zip(case.positions, case.counts, strict=True)):
        for token in range(count if start >= 0 else 0):
            p = start + token
            keys = np.arange(0 if case.window is None else max(p - case.window + 1, 0), p + 1)
            kv = pool[tables[row, keys // PAGE], layer][np.arange(len(keys)), :, :, keys % PAGE]
            for head in range(case.heads):
                s = kv[:, 0, head // group] @ q[row, token, head] * case.scale
                if case.softcap is not None:
                    s = case.softcap * np.tanh(s / case.softcap)
                w = np.exp(s - s.max())
                out[row, token, head] = w @ kv[:, 1, head // group] / w.sum()
    return out
