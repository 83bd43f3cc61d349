"""The `(o, m, l)` merge, the joint of all attention here. Knows nothing of pages, formats or devices.

A part of an attention result over some of the keys is `o = sum_j exp(s_j - m) v_j`, `m = max_j s_j`, `l = sum_j
exp(s_j - m)`. Parts over disjoint keys merge into the part over all of them, in any order up to rounding: split-K,
16-bit and sealed pages, shared prefixes, remote pages, chunk and prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_KEY = -1e30
"""The `m` of a part that saw no key, and the score of a key that must not be seen. Finite, so that `m - m` is 0."""


class Attended(NamedTuple):
    """Attention over some keys. `o`: float32 [..., head_dim], not normalized; `m`, `l`: float32 [...]."""

    o: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741  (the literature's name)


def merge(parts: Sequence[Attended]) -> Attended:
    """The part over all keys of `parts`, which must have seen disjoint keys. A part without keys changes no bit."""
    if not parts:
        raise ValueError("merge() needs at least one part.")
    m = functools.reduce(jnp.maximum, (part.m for part in parts))
    scaled = []
    for part in parts:
        weight = jnp.exp(part.m - m)
        scaled.append((part.o * weight[..., None], part.l * weight))
    o, l = functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), scaled)  # noqa: E741
    return Attended(o, m, l)


def normalize(part: Attended) -> jax.Array:
    """Softmax-weighted values, float32 [..., head_dim]; zeros where the part saw no key."""
    return part.o / jnp.where(part.l == 0, 1.0, part.l)[..., None]
