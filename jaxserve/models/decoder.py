"""The decoder that all families share: embedding, a list of layers, final norm. A family supplies the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.attention import Attend
from jaxserve.models.layers.embedding import Embedding
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rope import rotation
from jaxserve.models.layers.rows import Rows
from jaxserve.quant import LinearContext

Layer = Callable[..., tuple[Any, jax.Array]]
"""layer(x [T, hidden], rows, index, kv, attend, ctx) -> (kv, x)"""


class Decoder(nnx.Module):
    """Leaves: embedding.*, layers.{i}.*, norm.weight."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, layer: Callable[[DecoderConfig, jnp.dtype], Layer]):
        self.config = config
        self.embedding = Embedding(config, dtype)
        self.layers = nnx.List([layer(config, dtype) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden, config.rms_eps, dtype, config.norm_offset)

    def run_layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        read: jax.Array | None,
        kv: Any,
        attend: Attend,
        ctx: LinearContext,
        schedule: Sequence[int],
    ) -> tuple[Any, jax.Array]:
        """x [T, hidden] through the layers that `schedule` names, in its order -> (kv, x).

        `read`: see Model.forward.
        """
        c = self.config
        turns = {rope: rotation(rope, c.head_dim, positions) for rope in {c.layer_rope(i) for i in schedule}}
        live = positions >= 0
        for step, i in enumerate(schedule):
            last = step == len(schedule) - 1
            rows = Rows(turns[c.layer_rope(i)], live, live if read is None or not last else read & live)
            kv, x = self.layers[i](x, rows, i, kv, attend, ctx)
        return kv, x
